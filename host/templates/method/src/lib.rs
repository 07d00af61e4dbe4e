//! {{Type}}: say here what it does and where it is published.

use jepa_plugin_api::nn::{Mlp, nt_xent, spread};
use jepa_plugin_api::tch::{self, Kind, Tensor};
use jepa_plugin_api::{Augmentation, BackboneHandle, Batch, Host, Method, Result, Step, ViewSpec, bail};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

jepa_plugin_api::export_plugin! { methods: [{{Type}}] }

/// The keys under `method.`. These comments and the defaults are what `jepa-host plugin info {{name}}` prints.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct {{Type}}Options {
    /// How both views are augmented.
    pub augment: Augmentation,
    /// Units of the head's hidden layer.
    #[schemars(range(min = 1))]
    pub hidden: i64,
    /// Units of the head's output.
    #[schemars(range(min = 1))]
    pub output: i64,
}

impl Default for {{Type}}Options {
    fn default() -> Self {
        {{Type}}Options { augment: Augmentation::SIMCLR, hidden: 256, output: 64 }
    }
}

/// What a run keeps: the backbone that learns, and a head on top of it.
pub struct {{Type}} {
    options: {{Type}}Options,
    backbone: BackboneHandle,
    head: Mlp,
}

impl Method for {{Type}} {
    const NAME: &'static str = "{{name}}";
    const ENCODER: &'static str = "backbone";

    type Options = {{Type}}Options;

    /// Backbones come from the host, so that users choose them; register tensors under `host.params()`, and ask for an
    /// average that follows with `host.ema(…)`.
    fn new(options: {{Type}}Options, host: &mut Host) -> Result<Self> {
        options.augment.check("method.augment")?;
        let backbone = host.backbone("backbone")?;
        let sizes = [backbone.info().channels, options.hidden, options.output];
        let head = Mlp::new(&host.params().sub("head"), &sizes, false);
        Ok({{Type}} { options, backbone, head })
    }

    /// What `step` gets of each image: here two random views.
    fn views(&self) -> Vec<ViewSpec> {
        vec![self.options.augment.view("first"), self.options.augment.view("second")]
    }

    /// The loss, which the host differentiates. This one begins as SimCLR's: make it yours.
    fn step(&mut self, batch: &Batch) -> Result<Step> {
        let [first, second] = batch.views.as_slice() else { bail!("{{name}} takes two views") };
        let embed = |images: &Tensor| -> Result<Tensor> {
            let features = self.backbone.pooled(images, batch.train)?;
            Ok(self.head.forward(&features, batch.train).to_kind(Kind::Float))
        };
        let (a, b) = (embed(first)?, embed(second)?);
        let (loss, accuracy) = nt_xent(&a, &b, 0.2);
        Ok(Step::new(loss).metric("contrastive_accuracy", &accuracy).metric("spread", &spread(&a)))
    }

    /// Features `(B, C)` of plain images, for probes and for `jepa-host embed`.
    fn encode(&mut self, images: &Tensor) -> Result<Tensor> {
        tch::no_grad(|| self.backbone.pooled(images, false))
    }
}
