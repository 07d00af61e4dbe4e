//! {{Type}}: say here what it does and where it is published.

use jepa_plugin_api::nn::{BatchNorm, Conv2d, ConvOptions};
use jepa_plugin_api::tch::Tensor;
use jepa_plugin_api::{Backbone, BackboneInfo, NormKind, Params, Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

jepa_plugin_api::export_plugin! { backbones: [{{Type}}] }

/// The keys under `backbone.`. These comments and the defaults are what `jepa-host plugin info {{name}}` prints.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct {{Type}}Options {
    /// Channels of the first layer; each further one has twice as many, and half the side.
    #[schemars(range(min = 1))]
    pub width: i64,
    /// Number of layers.
    #[schemars(range(min = 1, max = 8))]
    pub layers: u32,
}

impl Default for {{Type}}Options {
    fn default() -> Self {
        {{Type}}Options { width: 16, layers: 3 }
    }
}

/// Convolutions of stride 2, each with batch norm and ReLU.
pub struct {{Type}} {
    layers: Vec<(Conv2d, BatchNorm)>,
    info: BackboneInfo,
}

impl Backbone for {{Type}} {
    const NAMES: &'static [&'static str] = &["{{name}}"];

    type Options = {{Type}}Options;

    /// Registers every tensor under `params`: those names are the ones in checkpoints and in `jepa-host export`.
    fn new(_name: &str, options: {{Type}}Options, params: &Params) -> Result<Self> {
        let mut channels = 3;
        let mut layers = Vec::new();
        for number in 0..options.layers {
            let params = params.sub(format!("layers.{number}"));
            let wider = options.width << number;
            let conv = ConvOptions { stride: 2, padding: 1, bias: false, ..ConvOptions::default() };
            let conv = Conv2d::new(&params.sub("conv"), channels, wider, 3, conv);
            layers.push((conv, BatchNorm::new(&params.sub("norm"), wider)));
            channels = wider;
        }
        let info = BackboneInfo::new(channels, 1 << options.layers, NormKind::Batch);
        Ok({{Type}} { layers, info })
    }

    /// What methods ask: here C channels, cells of r pixels, and no sparse mode (which CNN-JEPA needs).
    fn info(&self) -> BackboneInfo {
        self.info.clone()
    }

    /// The map of features `(B, C, S / r, S / r)` of `images` `(B, 3, S, S)`.
    fn forward(&self, images: &Tensor, mask: Option<&Tensor>, train: bool) -> Result<Tensor> {
        ensure!(mask.is_none(), "{{name}} has no sparse mode");
        let layer = |x: Tensor, (conv, norm): &(Conv2d, BatchNorm)| norm.forward(&conv.forward(&x), train).relu();
        Ok(self.layers.iter().fold(images.shallow_clone(), layer))
    }
}
