//! The predictor: a few dense convolutions over context features and mask tokens.

use jepa_plugin_api::nn::{Conv2d, ConvOptions, Norm};
use jepa_plugin_api::{NormKind, Params, Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// The keys under `method.predictor.`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PredictorOptions {
    /// Number of layers.
    pub depth: i64,
    /// Side of the kernels in cells, odd.
    pub kernel: i64,
    /// Depthwise-separable convolutions: a depthwise k×k, then a 1×1 one. Otherwise plain k×k ones.
    pub dw_sep_conv: bool,
}

impl Default for PredictorOptions {
    fn default() -> Self {
        PredictorOptions { depth: 3, kernel: 3, dw_sep_conv: true }
    }
}

/// Layers of convolution, norm and ReLU that keep the shape `(B, C, f, f)`.
pub struct Predictor {
    layers: Vec<Layer>,
}

struct Layer {
    /// `dw` and `pw`, or `conv`.
    convs: Vec<Conv2d>,
    norm: Norm,
}

impl Predictor {
    /// Registers layer i under `{i}.`: `dw`, `pw` or `conv`, and `norm`.
    pub fn new(options: &PredictorOptions, params: &Params, channels: i64, norm: NormKind) -> Result<Self> {
        let &PredictorOptions { depth, kernel, dw_sep_conv } = options;
        ensure!((1..=100).contains(&depth), "method.predictor.depth is {depth}, but must lie in 1..=100");
        ensure!(
            (1..=99).contains(&kernel) && kernel % 2 == 1,
            "method.predictor.kernel is {kernel}, but must be odd and lie in 1..=99"
        );
        let layer = |i: i64| {
            let params = params.sub(i.to_string());
            let conv = |name: &str, kernel: i64, groups: i64| {
                let options = ConvOptions { padding: kernel / 2, groups, ..ConvOptions::default() };
                Conv2d::new(&params.sub(name), channels, channels, kernel, options)
            };
            let convs = if dw_sep_conv {
                vec![conv("dw", kernel, channels), conv("pw", 1, 1)]
            } else {
                vec![conv("conv", kernel, 1)]
            };
            Layer { convs, norm: Norm::new(norm, &params.sub("norm"), channels) }
        };
        Ok(Predictor { layers: (0..depth).map(layer).collect() })
    }

    /// `(B, C, f, f)` to the same.
    pub fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        self.layers.iter().fold(x.shallow_clone(), |x, layer| {
            let x = layer.convs.iter().fold(x, |x, conv| conv.forward(&x));
            layer.norm.forward_relu(&x, train)
        })
    }
}
