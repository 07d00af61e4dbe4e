//! SimSiam (Chen and He, arXiv 2011.10566): two views of an image predict each other, and a stopped gradient keeps them
//! from agreeing on nothing.

use jepa_plugin_api::nn::{Mlp, negative_cosine, spread};
use jepa_plugin_api::tch::{self, Kind, Tensor};
use jepa_plugin_api::{Augmentation, BackboneHandle, Batch, Host, Method, Result, Step, ViewSpec, bail};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

jepa_plugin_api::export_plugin! { methods: [SimSiam] }

/// Two views that predict each other. The defaults are the published settings.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SimSiamOptions {
    /// How both views are augmented.
    pub augment: Augmentation,
    /// Units of the projector's three layers.
    #[schemars(range(min = 1))]
    pub units: i64,
    /// Units of the predictor's hidden layer.
    #[schemars(range(min = 1))]
    pub bottleneck: i64,
}

impl Default for SimSiamOptions {
    fn default() -> Self {
        let jitter = Augmentation { brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1, ..Augmentation::SIMCLR };
        SimSiamOptions { augment: Augmentation { crop_scale: (0.2, 1.0), ..jitter }, units: 2048, bottleneck: 512 }
    }
}

pub struct SimSiam {
    options: SimSiamOptions,
    backbone: BackboneHandle,
    projector: Mlp,
    predictor: Mlp,
}

impl Method for SimSiam {
    const NAME: &'static str = "simsiam";
    const ENCODER: &'static str = "backbone";

    type Options = SimSiamOptions;

    fn new(options: SimSiamOptions, host: &mut Host) -> Result<Self> {
        let backbone = host.backbone("backbone")?;
        let (channels, units) = (backbone.info().channels, options.units);
        let projector = Mlp::new(&host.params().sub("projector"), &[channels, units, units, units], true);
        let predictor = Mlp::new(&host.params().sub("predictor"), &[units, options.bottleneck, units], false);
        Ok(SimSiam { options, backbone, projector, predictor })
    }

    fn views(&self) -> Vec<ViewSpec> {
        ["first", "second"].map(|name| self.options.augment.view(name)).into()
    }

    fn step(&mut self, batch: &Batch) -> Result<Step> {
        let [first, second] = batch.views.as_slice() else { bail!("SimSiam takes two views") };
        let project = |images| -> Result<Tensor> {
            let features = self.backbone.pooled(images, batch.train)?;
            Ok(self.projector.forward(&features, batch.train))
        };
        let (z1, z2) = (project(first)?, project(second)?);
        let predict = |z: &Tensor| self.predictor.forward(z, batch.train).to_kind(Kind::Float);
        let fixed = |z: &Tensor| z.detach().to_kind(Kind::Float);
        let loss = (negative_cosine(&predict(&z1), &fixed(&z2)) + negative_cosine(&predict(&z2), &fixed(&z1))) * 0.5;
        Ok(Step::new(loss).metric("spread", &spread(&z1)))
    }

    fn encode(&mut self, images: &Tensor) -> Result<Tensor> {
        tch::no_grad(|| self.backbone.pooled(images, false))
    }
}
