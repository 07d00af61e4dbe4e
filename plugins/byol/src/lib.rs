//! BYOL, bootstrap your own latent (Grill et al., arXiv 2006.07733): each view predicts what a slowly following copy of
//! the network makes of the other.

use jepa_plugin_api::nn::{Mlp, negative_cosine, spread};
use jepa_plugin_api::{
    Augmentation, BackboneHandle, Batch, EmaSchedule, Host, Method, Result, Step, ViewSpec, bail, ensure,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

jepa_plugin_api::export_plugin! { methods: [Byol] }

/// Prediction between two views, with a target network that follows. The defaults are the published settings for
/// ImageNet-100; for ImageNet-1k `hidden` is 4096.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ByolOptions {
    /// How the first view is augmented.
    pub augment_1: Augmentation,
    /// How the second view is augmented.
    pub augment_2: Augmentation,
    /// Units of the hidden layers of projector and predictor.
    #[schemars(range(min = 1))]
    pub hidden: i64,
    /// Units of the outputs of projector and predictor.
    #[schemars(range(min = 1))]
    pub output: i64,
    /// How the target network follows.
    pub ema: EmaSchedule,
}

impl Default for ByolOptions {
    fn default() -> Self {
        ByolOptions {
            augment_1: Augmentation::BYOL_1,
            augment_2: Augmentation::BYOL_2,
            hidden: 1024,
            output: 256,
            ema: EmaSchedule::default(),
        }
    }
}

/// The method: online network with a predictor, and the target network that follows.
pub struct Byol {
    options: ByolOptions,
    backbone: BackboneHandle,
    projector: Mlp,
    predictor: Mlp,
    target_backbone: BackboneHandle,
    target_projector: Mlp,
}

impl Method for Byol {
    const NAME: &'static str = "byol";
    const ENCODER: &'static str = "backbone";
    const CAPTURABLE: bool = true;

    type Options = ByolOptions;

    fn new(options: ByolOptions, host: &mut Host) -> Result<Self> {
        options.augment_1.check("method.augment_1")?;
        options.augment_2.check("method.augment_2")?;
        let batch_size = host.facts().batch_size;
        ensure!(
            batch_size > 1,
            "batch norm needs more than one image: raise optimizer.batch_size above {batch_size}"
        );
        let backbone = host.backbone("backbone")?;
        let target_backbone = host.backbone("target_backbone")?;
        let (hidden, output) = (options.hidden, options.output);
        let head =
            |name: &str, input: i64| Mlp::new(&host.params().sub(name), &[input, hidden, output], false);
        let channels = backbone.info().channels;
        let (projector, predictor) = (head("projector", channels), head("predictor", output));
        let target_projector = head("target_projector", channels);
        host.ema("backbone", "target_backbone", options.ema);
        host.ema("projector", "target_projector", options.ema);
        Ok(Byol { options, backbone, projector, predictor, target_backbone, target_projector })
    }

    fn views(&self) -> Vec<ViewSpec> {
        vec![self.options.augment_1.view("first"), self.options.augment_2.view("second")]
    }

    fn step(&mut self, batch: &Batch) -> Result<Step> {
        let [first, second] = batch.views.as_slice() else {
            bail!("BYOL declares two views, but the batch has {}", batch.views.len());
        };
        let train = batch.train;
        let online = |images: &Tensor| -> Result<(Tensor, Tensor)> {
            let features = self.backbone.pooled(images, train)?;
            let prediction = self.predictor.forward(&self.projector.forward(&features, train), train);
            Ok((features, prediction.to_kind(Kind::Float)))
        };
        // In training mode too: its batch norms have statistics of their own.
        let target = |images: &Tensor| -> Result<Tensor> {
            let features = self.target_backbone.pooled(images, train)?;
            Ok(self.target_projector.forward(&features, train).to_kind(Kind::Float))
        };
        let ((features, p1), (_, p2)) = (online(first)?, online(second)?);
        let (z1, z2) = tch::no_grad(|| -> Result<_> { Ok((target(first)?, target(second)?)) })?;
        let loss = (negative_cosine(&p1, &z2) + negative_cosine(&p2, &z1)) * 0.5;
        Ok(Step::new(loss).metric("feature_spread", &spread(&features)).metric("spread", &spread(&z1)))
    }

    fn encode(&mut self, images: &Tensor) -> Result<Tensor> {
        tch::no_grad(|| self.backbone.pooled(images, false))
    }
}
