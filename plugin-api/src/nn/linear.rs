//! Fully connected layer.

use tch::Tensor;

use super::Init;
use crate::Params;

/// y = x Wᵀ + b.
///
/// ```
/// use jepa_plugin_api::nn::Linear;
/// use jepa_plugin_api::{Params, tch};
/// let classifier = Linear::new(&Params::new(tch::Device::Cpu), 64, 10, true);
/// let features = tch::Tensor::zeros([4, 64], (tch::Kind::Float, tch::Device::Cpu));
/// assert_eq!(classifier.forward(&features).size(), [4, 10]);
/// ```
#[derive(Debug)]
pub struct Linear {
    /// `(out, in)`.
    pub weight: Tensor,
    /// `(out)`.
    pub bias: Option<Tensor>,
}

impl Linear {
    /// Registers `weight` and, if asked, `bias`.
    pub fn new(params: &Params, features_in: i64, features_out: i64, bias: bool) -> Self {
        Self::with_init(params, features_in, features_out, bias, Init::Uniform)
    }

    /// The same with other initial values.
    pub fn with_init(params: &Params, features_in: i64, features_out: i64, bias: bool, init: Init) -> Self {
        let weight = init.weight(&[features_out, features_in], params.device());
        let weight = params.parameter("weight", weight);
        let initial_bias = || init.bias(features_out, features_in, params.device());
        let bias = bias.then(|| params.parameter("bias", initial_bias()));
        Linear { weight, bias }
    }

    /// `(…, in)` to `(…, out)`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }
}
