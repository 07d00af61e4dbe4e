//! A plugin as people could write one with API 1.0: a method with options, two views, an EMA pair, a parameter, a
//! buffer, metrics, log lines and random numbers of its own; and a backbone.

use jepa_plugin_api::nn::{BatchNorm, Conv2d, ConvOptions, Mlp, negative_cosine, spread};
use jepa_plugin_api::tch::{self, Kind, Tensor};
use jepa_plugin_api::{
    Augmentation, Backbone, BackboneHandle, BackboneInfo, Batch, EmaSchedule, Host, Method, NormKind, Params, Result,
    Step, ViewSpec, ensure, tracing,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

jepa_plugin_api::export_plugin! { methods: [Elder], backbones: [ElderNet] }

/// Options of 1.0.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ElderOptions {
    /// Units of the predictor.
    #[schemars(range(min = 1))]
    hidden: i64,
    /// How the target follows.
    ema: EmaSchedule,
    /// Panics at this step.
    panic_at: Option<u64>,
}

impl Default for ElderOptions {
    fn default() -> Self {
        ElderOptions { hidden: 16, ema: EmaSchedule::default(), panic_at: None }
    }
}

struct Elder {
    options: ElderOptions,
    online: BackboneHandle,
    target: BackboneHandle,
    predictor: Mlp,
    scale: Tensor,
    steps: Tensor,
}

impl Method for Elder {
    const NAME: &'static str = "elder";
    const ENCODER: &'static str = "online";

    type Options = ElderOptions;

    fn new(options: ElderOptions, host: &mut Host) -> Result<Self> {
        ensure!(host.facts().image_size >= 8, "data.size is too small");
        let (online, target) = (host.backbone("online")?, host.backbone("target")?);
        host.ema("online", "target", options.ema);
        let channels = online.info().channels;
        let predictor = Mlp::new(&host.params().sub("predictor"), &[channels, options.hidden, channels], false);
        let on = (Kind::Float, host.device());
        let scale = host.params().parameter("scale", Tensor::ones([1], on));
        let steps = host.params().buffer("steps", Tensor::zeros([1], on));
        tracing::info!("a method of API 1.0 is built");
        Ok(Elder { options, online, target, predictor, scale, steps })
    }

    fn views(&self) -> Vec<ViewSpec> {
        vec![Augmentation::SIMCLR.view("first"), Augmentation::SIMCLR.view("second")]
    }

    fn step(&mut self, batch: &Batch) -> Result<Step> {
        if Some(batch.step) == self.options.panic_at {
            panic!("as asked");
        }
        if batch.train {
            tch::no_grad(|| self.steps.shallow_clone().g_add_scalar_(1.0));
        }
        let features = self.online.pooled(&batch.views[0], batch.train)?;
        let predicted = self.predictor.forward(&features, batch.train).to_kind(Kind::Float) * &self.scale;
        let wanted = tch::no_grad(|| self.target.pooled(&batch.views[1], batch.train))?;
        let noise = batch.rng(1).uniform(0.0, 1e-3);
        let loss = negative_cosine(&predicted, &(wanted.to_kind(Kind::Float) + noise));
        Ok(Step::new(loss).metric("spread", &spread(&features)))
    }

    fn encode(&mut self, images: &Tensor) -> Result<Tensor> {
        tch::no_grad(|| self.online.pooled(images, false))
    }
}

/// Options of 1.0.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ElderNetOptions {
    /// Channels.
    width: i64,
}

impl Default for ElderNetOptions {
    fn default() -> Self {
        ElderNetOptions { width: 8 }
    }
}

struct ElderNet {
    conv: Conv2d,
    norm: BatchNorm,
    width: i64,
}

impl Backbone for ElderNet {
    const NAMES: &'static [&'static str] = &["elder_net"];

    type Options = ElderNetOptions;

    fn new(_name: &str, options: ElderNetOptions, params: &Params) -> Result<Self> {
        let window = ConvOptions { stride: 4, ..ConvOptions::default() };
        let conv = Conv2d::new(&params.sub("conv"), 3, options.width, 4, window);
        Ok(ElderNet { conv, norm: BatchNorm::new(&params.sub("norm"), options.width), width: options.width })
    }

    fn info(&self) -> BackboneInfo {
        BackboneInfo { channels: self.width, downsample: 4, norm: NormKind::Batch, sparse: false }
    }

    fn forward(&self, images: &Tensor, mask: Option<&Tensor>, train: bool) -> Result<Tensor> {
        ensure!(mask.is_none(), "elder_net has no sparse mode");
        Ok(self.norm.forward(&self.conv.forward(images), train).relu())
    }
}
