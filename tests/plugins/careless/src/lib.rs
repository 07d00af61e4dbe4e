//! A method that takes any option, and a backbone whose hidden cells are not hidden.

use jepa_plugin_api::nn::{Conv2d, ConvOptions};
use jepa_plugin_api::tch::{Kind, Tensor};
use jepa_plugin_api::{
    Backbone, BackboneInfo, Batch, Host, Interpolation, Method, NoOptions, NormKind, Params, Result, Step,
    ViewSpec,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

jepa_plugin_api::export_plugin! { methods: [Careless], backbones: [Leaky] }

/// Options that lack `deny_unknown_fields`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct CarelessOptions {}

/// Learns the mean colour of the images.
pub struct Careless(Tensor);

impl Method for Careless {
    const NAME: &'static str = "careless";
    const ENCODER: &'static str = "none";

    type Options = CarelessOptions;

    fn new(_options: CarelessOptions, host: &mut Host) -> Result<Self> {
        let zeros = Tensor::zeros([3], (Kind::Float, host.device()));
        Ok(Careless(host.params().parameter("colour", zeros)))
    }

    fn views(&self) -> Vec<ViewSpec> {
        vec![ViewSpec::new("image").resize_center_crop(1.0, Interpolation::Bilinear).normalize_imagenet()]
    }

    fn step(&mut self, batch: &Batch) -> Result<Step> {
        let mean = batch.views[0].mean_dim([0i64, 2, 3].as_slice(), false, Kind::Float);
        Ok(Step::new((&self.0 - mean).square().mean(Kind::Float)))
    }

    fn encode(&mut self, images: &Tensor) -> Result<Tensor> {
        Ok(images.flatten(1, 3))
    }
}

/// One convolution, which takes a mask and forgets it.
pub struct Leaky(Conv2d);

impl Backbone for Leaky {
    const NAMES: &'static [&'static str] = &["leaky"];

    type Options = NoOptions;

    fn new(_name: &str, _options: NoOptions, params: &Params) -> Result<Self> {
        let options = ConvOptions { stride: 8, ..ConvOptions::default() };
        Ok(Leaky(Conv2d::new(&params.sub("conv"), 3, 8, 8, options)))
    }

    fn info(&self) -> BackboneInfo {
        BackboneInfo::new(8, 8, NormKind::Batch).with_sparse_mode()
    }

    fn forward(&self, images: &Tensor, _mask: Option<&Tensor>, _train: bool) -> Result<Tensor> {
        Ok(self.0.forward(images))
    }
}
