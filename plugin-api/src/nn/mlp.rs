//! Multi-layer perceptrons: the heads of joint-embedding methods.

use tch::Tensor;

use super::{BatchNorm, Linear};
use crate::Params;

/// Linear layers with batch norm and ReLU between them.
///
/// ```
/// use jepa_plugin_api::nn::Mlp;
/// use jepa_plugin_api::{Params, tch};
/// let projector = Mlp::new(&Params::new(tch::Device::Cpu), &[64, 128, 32], false);
/// let features = tch::Tensor::randn([4, 64], (tch::Kind::Float, tch::Device::Cpu));
/// assert_eq!(projector.forward(&features, true).size(), [4, 32]);
/// ```
#[derive(Debug)]
pub struct Mlp {
    layers: Vec<(Linear, Option<BatchNorm>)>,
}

impl Mlp {
    /// Registers layer i as `{i}.linear` and `{i}.norm`. `sizes` are those of the input, of each hidden layer and of
    /// the output. A hidden layer has batch norm and ReLU and so no bias; the last layer is linear with a bias, or, with
    /// `last_norm`, has batch norm in its place.
    ///
    /// # Panics
    /// When there are fewer than two sizes.
    pub fn new(params: &Params, sizes: &[i64], last_norm: bool) -> Self {
        assert!(sizes.len() >= 2, "a layer has an input and an output");
        let last = sizes.len() - 2;
        let layer = |(i, pair): (usize, &[i64])| {
            let params = params.sub(i.to_string());
            let norm = i < last || last_norm;
            let linear = Linear::new(&params.sub("linear"), pair[0], pair[1], !norm);
            (linear, norm.then(|| BatchNorm::new(&params.sub("norm"), pair[1])))
        };
        Mlp { layers: sizes.windows(2).enumerate().map(layer).collect() }
    }

    /// `(B, in)` to `(B, out)`. With `train`, batch norms take the batch's statistics and update the running ones.
    pub fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        let mut x = x.shallow_clone();
        for (i, (linear, norm)) in self.layers.iter().enumerate() {
            x = linear.forward(&x);
            if let Some(norm) = norm {
                x = norm.forward(&x, train);
            }
            if i + 1 < self.layers.len() {
                x = x.relu();
            }
        }
        x
    }
}
