//! The operations of a network, dense or over visible positions.
//!
//! Sparse mode is computed by masked dense emulation here: values are a dense map, hidden positions hold whatever is
//! cheapest and are zeroed before an operation that would let them be seen.

use std::rc::Rc;

use jepa_plugin_api::nn::{BatchNorm, Conv2d, LayerNorm2d, Norm};
use jepa_plugin_api::{Result, ensure};
use tch::{Kind, Tensor};

use crate::Visible;

/// The features `(B, C, H, W)` of a batch, all of them or those at visible cells.
#[derive(Debug)]
pub struct FeatureMap {
    values: Tensor,
    sparse: Option<Sparse>,
}

#[derive(Debug)]
struct Sparse {
    visible: Rc<Visible>,
    /// Whether `values` is zero at hidden positions.
    hidden_is_zero: bool,
}

impl FeatureMap {
    /// All of `values` `(B, C, H, W)`.
    pub fn dense(values: &Tensor) -> Self {
        FeatureMap { values: values.shallow_clone(), sparse: None }
    }

    /// What is visible of `values` `(B, C, H, W)`: the rest counts as zero, whatever is there.
    ///
    /// # Errors
    /// When H × W does not divide into the mask's cells, or the batches differ.
    pub fn sparse(values: &Tensor, visible: &Rc<Visible>) -> Result<Self> {
        visible.check_size(&values.size())?;
        let sparse = Some(Sparse { visible: Rc::clone(visible), hidden_is_zero: false });
        Ok(FeatureMap { values: values.shallow_clone(), sparse })
    }

    /// Dense without a mask, sparse with one, bool `(B, 1, f, f)` and true where visible.
    ///
    /// # Errors
    /// When the mask does not fit, or shows nothing.
    pub fn new(values: &Tensor, mask: Option<&Tensor>) -> Result<Self> {
        match mask {
            None => Ok(Self::dense(values)),
            Some(mask) => Self::sparse(values, &Rc::new(Visible::new(mask)?)),
        }
    }

    /// The dense map `(B, C, H, W)`, exactly zero at hidden positions.
    pub fn into_dense(self) -> Tensor {
        self.with_zeros()
    }

    /// Convolution. In sparse mode a kernel sees zeros at hidden positions, and its output is kept at visible ones.
    ///
    /// H and W after it must still divide into the mask's cells.
    pub fn conv(&self, conv: &Conv2d) -> Self {
        self.after(conv.forward(&self.with_zeros()), false)
    }

    /// Max-pool. In sparse mode a window sees zeros at hidden positions, and its output is kept at visible ones.
    pub fn max_pool(&self, kernel: i64, stride: i64, padding: i64) -> Self {
        let pooled = self.with_zeros().max_pool2d([kernel; 2], [stride; 2], [padding; 2], [1, 1], false);
        self.after(pooled, false)
    }

    /// Batch norm or layer norm, see [`batch_norm`](Self::batch_norm) and [`layer_norm`](Self::layer_norm).
    ///
    /// # Errors
    /// Those of [`batch_norm`](Self::batch_norm).
    pub fn norm(&self, norm: &Norm, train: bool) -> Result<Self> {
        match norm {
            Norm::Batch(norm) => self.batch_norm(norm, train),
            Norm::Layer(norm) => Ok(self.layer_norm(norm)),
        }
    }

    /// Batch norm over (B, H, W), in sparse mode over the visible positions among them: they alone make the batch's
    /// statistics and the running ones.
    ///
    /// # Errors
    /// When there is a single visible position to take the variance of.
    pub fn batch_norm(&self, norm: &BatchNorm, train: bool) -> Result<Self> {
        let Some(sparse) = self.sparse.as_ref().filter(|_| train) else {
            return Ok(self.after(norm.forward(&self.values, train), false));
        };
        let level = sparse.visible.at(self.values.size()[2], self.values.size()[3]);
        let count = level.count;
        ensure!(
            count > 1,
            "batch norm cannot train on a single visible position: show more cells or use a larger batch"
        );

        // In two passes, so that a large mean does not drown the variance.
        let x = self.values.to_kind(Kind::Float);
        let over = [0i64, 2, 3].as_slice();
        let mean = (&x * &level.mask).sum_dim_intlist(over, true, Kind::Float) / count;
        let centred = x - &mean;
        let var = (centred.square() * &level.mask).sum_dim_intlist(over, true, Kind::Float) / count;
        norm.update_running(&mean.flatten(0, -1), &var.flatten(0, -1), count);

        let channels = [1, -1, 1, 1];
        let scale = norm.weight.view(channels) * (var + BatchNorm::EPS).rsqrt();
        let y = centred * scale + norm.bias.view(channels);
        Ok(self.after(y.to_kind(self.values.kind()), false))
    }

    /// Layer norm over the channels of each position.
    pub fn layer_norm(&self, norm: &LayerNorm2d) -> Self {
        self.after(norm.forward(&self.values), false)
    }

    /// max(x, 0).
    pub fn relu(&self) -> Self {
        self.after(self.values.relu(), self.hidden_is_zero())
    }

    /// The sum of two maps of the same shape and the same visible cells.
    pub fn add(&self, other: &Self) -> Self {
        self.after(&self.values + &other.values, self.hidden_is_zero() && other.hidden_is_zero())
    }

    fn hidden_is_zero(&self) -> bool {
        self.sparse.as_ref().is_some_and(|sparse| sparse.hidden_is_zero)
    }

    fn with_zeros(&self) -> Tensor {
        match &self.sparse {
            Some(Sparse { visible, hidden_is_zero: false }) => {
                let level = visible.at(self.values.size()[2], self.values.size()[3]);
                &self.values * level.mask.to_kind(self.values.kind())
            }
            _ => self.values.shallow_clone(),
        }
    }

    fn after(&self, values: Tensor, hidden_is_zero: bool) -> Self {
        let sparse = |sparse: &Sparse| Sparse { visible: Rc::clone(&sparse.visible), hidden_is_zero };
        FeatureMap { values, sparse: self.sparse.as_ref().map(sparse) }
    }
}
