//! Supervised learning: a linear classifier on the backbone, and cross-entropy. The yardstick of the other methods.

use jepa_plugin_api::nn::Linear;
use jepa_plugin_api::{
    Augmentation, BackboneHandle, Batch, Host, Method, Result, Step, ViewSpec, bail, ensure,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

jepa_plugin_api::export_plugin! { methods: [Supervised] }

/// Classification with the labels of the training set.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SupervisedOptions {
    /// How images are augmented.
    pub augment: Augmentation,
}

impl Default for SupervisedOptions {
    fn default() -> Self {
        SupervisedOptions { augment: Augmentation::CROP_AND_FLIP }
    }
}

/// The method: backbone and classifier.
pub struct Supervised {
    options: SupervisedOptions,
    backbone: BackboneHandle,
    classifier: Linear,
    classes: i64,
}

impl Method for Supervised {
    const NAME: &'static str = "supervised";
    const ENCODER: &'static str = "backbone";
    const NEEDS_LABELS: bool = true;
    const CAPTURABLE: bool = true;

    type Options = SupervisedOptions;

    fn new(options: SupervisedOptions, host: &mut Host) -> Result<Self> {
        options.augment.check("method.augment")?;
        let classes = host.facts().classes;
        ensure!(classes > 1, "all images of data.train have the same label: there is nothing to tell apart");
        let backbone = host.backbone("backbone")?;
        let channels = backbone.info().channels;
        let classifier = Linear::new(&host.params().sub("classifier"), channels, classes, true);
        Ok(Supervised { options, backbone, classifier, classes })
    }

    fn views(&self) -> Vec<ViewSpec> {
        vec![self.options.augment.view("image")]
    }

    fn step(&mut self, batch: &Batch) -> Result<Step> {
        let [images] = batch.views.as_slice() else {
            bail!("supervised learning declares one view, but the batch has {}", batch.views.len());
        };
        let features = self.backbone.pooled(images, batch.train)?;
        let logits = self.classifier.forward(&features).to_kind(Kind::Float);
        let loss = logits.cross_entropy_for_logits(&batch.labels);
        let right = |k: i64| {
            let (_, best) = logits.topk(k.min(self.classes), 1, true, false);
            best.eq_tensor(&batch.labels.unsqueeze(1))
                .any_dim(1, false)
                .to_kind(Kind::Float)
                .mean(Kind::Float)
        };
        Ok(Step::new(loss).metric("top1", &right(1)).metric("top5", &right(5)))
    }

    fn encode(&mut self, images: &Tensor) -> Result<Tensor> {
        tch::no_grad(|| self.backbone.pooled(images, false))
    }
}
