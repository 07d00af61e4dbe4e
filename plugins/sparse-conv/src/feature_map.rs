//! The operations of a network, dense or over visible positions.
//!
//! Between convolutions a sparse map is its visible positions alone, `(N, C)`: norms, ReLU, sums and 1×1 convolutions
//! cost what is visible. Wider convolutions and pooling go through a dense map with zeros at hidden positions.

use std::rc::Rc;

use jepa_plugin_api::nn::{BatchNorm, Conv2d, LayerNorm2d, Norm};
use jepa_plugin_api::{Result, bail, ensure};
use tch::Tensor;

use crate::Visible;
use crate::visible::Size;

/// The features `(B, C, H, W)` of a batch, all of them or those at visible cells.
#[derive(Debug)]
pub struct FeatureMap {
    values: Values,
    /// None for a dense map, which has no rows.
    visible: Option<Rc<Visible>>,
}

#[derive(Debug)]
enum Values {
    /// `(B, C, H, W)`, zero at hidden positions.
    Map(Tensor),
    /// `(N, C)` at visible positions of a map of this size.
    Rows(Tensor, Size),
}

impl FeatureMap {
    /// The features `map` `(B, C, H, W)`: all of them without a mask; with one, bool `(B, 1, f, f)` and true where
    /// visible, what is visible of them. The rest then counts as zero, whatever is there.
    ///
    /// # Errors
    /// When the mask does not fit, or shows nothing.
    pub fn new(map: &Tensor, mask: Option<&Tensor>) -> Result<Self> {
        match mask {
            None => Ok(Self::dense(map)),
            Some(mask) => Self::sparse(map, &Rc::new(Visible::new(mask)?)),
        }
    }

    /// The pixels of `images` `(B, 3, S, S)` at the entrance of a network with downsample ratio r; the mask, if any, is
    /// bool `(B, 1, S / r, S / r)`. Without one, S is any number of pixels that the network takes.
    ///
    /// # Errors
    /// When masked images do not divide into cells of r pixels, and those of [`new`](Self::new).
    pub fn images(images: &Tensor, mask: Option<&Tensor>, downsample: i64) -> Result<Self> {
        let (shape, r) = (images.size(), downsample);
        let &[batch, 3, height, width] = shape.as_slice() else {
            bail!("a backbone takes images (B, 3, S, S), not {shape:?}");
        };
        if let Some(mask) = mask {
            ensure!(
                height > 0 && width > 0 && height % r == 0 && width % r == 0,
                "images of {height} × {width} px do not divide into this backbone's cells of {r} px: set data.size to \
                 a multiple of {r}, or change backbone.stem or backbone.depths"
            );
            let (wanted, given) = ([batch, 1, height / r, width / r], mask.size());
            ensure!(
                given == wanted,
                "the mask of visible cells has shape {given:?}, but must have {wanted:?}"
            );
        }
        Self::new(images, mask)
    }

    /// All of `map` `(B, C, H, W)`.
    pub fn dense(map: &Tensor) -> Self {
        FeatureMap { values: Values::Map(channels_last(map)), visible: None }
    }

    /// What is visible of `map` `(B, C, H, W)`.
    ///
    /// # Errors
    /// When H × W does not divide into the mask's cells, or the batches differ.
    pub fn sparse(map: &Tensor, visible: &Rc<Visible>) -> Result<Self> {
        visible.check_shape(&map.size())?;
        let level = visible.at(size_of(map));
        // Not a product: what is hidden may be infinite or no number.
        let nothing = Tensor::zeros([1], (map.kind(), map.device()));
        let map = channels_last(map).where_self(&level.mask, &nothing);
        Ok(FeatureMap { values: Values::Map(map), visible: Some(Rc::clone(visible)) })
    }

    /// The map `(B, C, H, W)`, exactly zero at hidden positions.
    pub fn into_map(self) -> Tensor {
        self.map()
    }

    /// Convolution. In sparse mode a kernel sees zeros at hidden positions, and its output is kept at visible ones.
    ///
    /// # Panics
    /// When the new H and W do not divide into the mask's cells.
    pub fn conv(&self, conv: &Conv2d) -> Self {
        let pointwise = conv.kernel() == 1 && conv.padding == 0 && conv.groups == 1;
        let Some(visible) = self.visible.as_ref().filter(|_| pointwise) else {
            return self.gathered(&conv.forward(&self.map()));
        };
        let (mut rows, mut size) = self.rows(visible);
        if conv.stride > 1 {
            rows = rows.index_select(0, &visible.every(conv.stride, size));
            size = ((size.0 - 1) / conv.stride + 1, (size.1 - 1) / conv.stride + 1);
        }
        self.with(Values::Rows(rows.linear(&conv.weight.flatten(1, -1), conv.bias.as_ref()), size))
    }

    /// Max-pool. In sparse mode a window sees zeros at hidden positions, and its output is kept at visible ones.
    ///
    /// # Panics
    /// When the new H and W do not divide into the mask's cells.
    pub fn max_pool(&self, kernel: i64, stride: i64, padding: i64) -> Self {
        self.gathered(&self.map().max_pool2d([kernel; 2], [stride; 2], [padding; 2], [1, 1], false))
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
    /// When there is a single position to take the variance of.
    pub fn batch_norm(&self, norm: &BatchNorm, train: bool) -> Result<Self> {
        let Some(visible) = &self.visible else {
            let map = self.map();
            ensure!(
                !train || map.numel() as i64 > map.size()[1],
                "batch norm cannot train on a single position: raise optimizer.batch_size or data.size"
            );
            return Ok(self.with(Values::Map(norm.forward(&map, train))));
        };
        let (rows, size) = self.rows(visible);
        ensure!(
            !train || rows.size()[0] > 1,
            "batch norm cannot train on a single visible position: raise optimizer.batch_size or show more cells"
        );
        Ok(self.with(Values::Rows(norm.forward(&rows, train), size)))
    }

    /// Layer norm over the channels of each position.
    pub fn layer_norm(&self, norm: &LayerNorm2d) -> Self {
        self.each_position(|x| norm.last_dimension(x))
    }

    /// What `operation` makes of the channels of each position: it takes `(…, C)` to `(…, C')`, and mixes no positions.
    pub fn each_position(&self, operation: impl FnOnce(&Tensor) -> Tensor) -> Self {
        let Some(visible) = &self.visible else {
            let last = operation(&self.map().permute([0, 2, 3, 1]));
            return self.with(Values::Map(last.permute([0, 3, 1, 2])));
        };
        let (rows, size) = self.rows(visible);
        self.with(Values::Rows(operation(&rows), size))
    }

    /// Stochastic depth (Huang et al., arXiv 1603.09382) for the branch of a residual block: with probability `rate`,
    /// in [0, 1), an image's features are zero, else they are divided by 1 − `rate`. One draw for each image, from
    /// torch's global generator.
    pub fn drop_path(&self, rate: f64) -> Self {
        let keep = 1.0 - rate;
        let factors = |batch: i64, x: &Tensor| {
            Tensor::empty([batch], (x.kind(), x.device())).bernoulli_float_(keep) / keep
        };
        self.with(match (&self.values, &self.visible) {
            (Values::Rows(rows, size), Some(visible)) => {
                let level = visible.at(*size);
                let of_rows = factors(level.batch, rows).index_select(0, &level.images());
                Values::Rows(rows * of_rows.unsqueeze(-1), *size)
            }
            (Values::Map(map) | Values::Rows(map, _), _) => {
                Values::Map(map * factors(map.size()[0], map).view([-1, 1, 1, 1]))
            }
        })
    }

    /// max(x, 0).
    pub fn relu(&self) -> Self {
        self.with(match &self.values {
            Values::Map(map) => Values::Map(map.relu()),
            Values::Rows(rows, size) => Values::Rows(rows.relu(), *size),
        })
    }

    /// The sum of two maps of the same shape and the same visible cells.
    pub fn add(&self, other: &Self) -> Self {
        self.with(match (&self.values, &other.values) {
            (Values::Rows(a, size), Values::Rows(b, _)) => Values::Rows(a + b, *size),
            _ => Values::Map(self.map() + other.map()),
        })
    }

    fn map(&self) -> Tensor {
        match (&self.values, &self.visible) {
            (Values::Rows(rows, size), Some(visible)) => visible.at(*size).scatter(rows),
            (Values::Map(values) | Values::Rows(values, _), _) => values.shallow_clone(),
        }
    }

    fn rows(&self, visible: &Visible) -> (Tensor, Size) {
        match &self.values {
            Values::Rows(rows, size) => (rows.shallow_clone(), *size),
            Values::Map(map) => (visible.at(size_of(map)).gather(map), size_of(map)),
        }
    }

    /// The result `map` of an operation, as far as it is visible.
    fn gathered(&self, map: &Tensor) -> Self {
        self.with(match &self.visible {
            None => Values::Map(map.shallow_clone()),
            Some(visible) => Values::Rows(visible.at(size_of(map)).gather(map), size_of(map)),
        })
    }

    fn with(&self, values: Values) -> Self {
        FeatureMap { values, visible: self.visible.clone() }
    }
}

fn size_of(map: &Tensor) -> Size {
    let shape = map.size();
    (shape[2], shape[3])
}

/// The same numbers, ordered in memory as (B, H, W, C): convolutions and norms are faster so, and positions are rows.
fn channels_last(map: &Tensor) -> Tensor {
    map.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
}
