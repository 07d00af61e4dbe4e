//! The projection head that may stand behind both encoders.

use jepa_plugin_api::nn::{Conv2d, ConvOptions, Norm};
use jepa_plugin_api::{NormKind, Params, Result};
use sparse_conv::FeatureMap;
use tch::Tensor;

/// 1×1 convolution, norm, ReLU: `(B, C, f, f)` to the same.
pub struct Projection {
    conv: Conv2d,
    norm: Norm,
}

impl Projection {
    /// Registers `conv` and `norm`.
    pub fn new(params: &Params, channels: i64, norm: NormKind) -> Self {
        Projection {
            conv: Conv2d::new(&params.sub("conv"), channels, channels, 1, ConvOptions::default()),
            norm: Norm::new(norm, &params.sub("norm"), channels),
        }
    }

    /// Dense, or with a `mask`, bool `(B, 1, f, f)`, over visible cells only.
    ///
    /// # Errors
    /// When the mask does not fit.
    pub fn forward(&self, x: &Tensor, mask: Option<&Tensor>, train: bool) -> Result<Tensor> {
        let x = FeatureMap::new(x, mask)?;
        Ok(x.conv(&self.conv).norm(&self.norm, train)?.relu().into_map())
    }
}
