//! SimCLR (Chen et al., arXiv 2002.05709): two views of an image attract, views of different images repel.

use jepa_plugin_api::nn::{Mlp, nt_xent, spread};
use jepa_plugin_api::{
    Augmentation, BackboneHandle, Batch, Host, Method, Result, Step, ViewSpec, bail, ensure,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

jepa_plugin_api::export_plugin! { methods: [SimClr] }

/// Contrast of two views of each image against all others of the batch. The defaults are the published settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SimClrOptions {
    /// How both views are augmented.
    pub augment: Augmentation,
    /// Units of the projector's hidden layer.
    #[schemars(range(min = 1))]
    pub hidden: i64,
    /// Units of the projector's output.
    #[schemars(range(min = 1))]
    pub output: i64,
    /// Temperature of the softmax over similarities.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub temperature: f64,
}

impl Default for SimClrOptions {
    fn default() -> Self {
        SimClrOptions { augment: Augmentation::SIMCLR, hidden: 2048, output: 128, temperature: 0.1 }
    }
}

/// The method: backbone and projector.
pub struct SimClr {
    options: SimClrOptions,
    backbone: BackboneHandle,
    projector: Mlp,
}

impl Method for SimClr {
    const NAME: &'static str = "simclr";
    const ENCODER: &'static str = "backbone";
    const CAPTURABLE: bool = true;

    type Options = SimClrOptions;

    fn new(options: SimClrOptions, host: &mut Host) -> Result<Self> {
        options.augment.check("method.augment")?;
        let batch_size = host.facts().batch_size;
        ensure!(
            batch_size > 1,
            "SimCLR has no negatives in a batch of {batch_size}: raise optimizer.batch_size"
        );
        let backbone = host.backbone("backbone")?;
        let sizes = [backbone.info().channels, options.hidden, options.output];
        let projector = Mlp::new(&host.params().sub("projector"), &sizes, true);
        Ok(SimClr { options, backbone, projector })
    }

    fn views(&self) -> Vec<ViewSpec> {
        ["first", "second"].map(|name| self.options.augment.view(name)).to_vec()
    }

    fn step(&mut self, batch: &Batch) -> Result<Step> {
        let [first, second] = batch.views.as_slice() else {
            bail!("SimCLR declares two views, but the batch has {}", batch.views.len());
        };
        let project = |images: &Tensor| -> Result<Tensor> {
            let features = self.backbone.pooled(images, batch.train)?;
            Ok(self.projector.forward(&features, batch.train).to_kind(Kind::Float))
        };
        let (a, b) = (project(first)?, project(second)?);
        let (loss, accuracy) = nt_xent(&a, &b, self.options.temperature);
        Ok(Step::new(loss).metric("contrastive_accuracy", &accuracy).metric("spread", &spread(&a)))
    }

    fn encode(&mut self, images: &Tensor) -> Result<Tensor> {
        tch::no_grad(|| self.backbone.pooled(images, false))
    }
}
