//! VICReg (Bardes et al., arXiv 2105.04906): two views agree, every dimension varies, and no two dimensions say the same.

use jepa_plugin_api::nn::{Mlp, covariance_loss, deviation, variance_loss};
use jepa_plugin_api::{
    Augmentation, BackboneHandle, Batch, Host, Method, Result, Step, ViewSpec, bail, ensure,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Reduction, Tensor};

jepa_plugin_api::export_plugin! { methods: [VicReg] }

/// Invariance, variance and covariance of two views. The defaults are the published settings; for small images two
/// layers of 2048 units are enough.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct VicRegOptions {
    /// How both views are augmented.
    pub augment: Augmentation,
    /// Units of each layer of the projector, its hidden ones and its output.
    #[schemars(range(min = 1))]
    pub units: i64,
    /// Layers of the projector.
    #[schemars(range(min = 1, max = 10))]
    pub layers: usize,
    /// Weight of the invariance term λ: mean squared difference of the two views.
    #[schemars(range(min = 0.0))]
    pub invariance: f64,
    /// Weight of the variance term μ: a hinge on the standard deviation of each dimension.
    #[schemars(range(min = 0.0))]
    pub variance: f64,
    /// Weight of the covariance term ν: squared covariances of different dimensions.
    #[schemars(range(min = 0.0))]
    pub covariance: f64,
}

impl Default for VicRegOptions {
    fn default() -> Self {
        VicRegOptions {
            augment: Augmentation::VICREG,
            units: 8192,
            layers: 3,
            invariance: 25.0,
            variance: 25.0,
            covariance: 1.0,
        }
    }
}

/// The method: backbone and projector.
pub struct VicReg {
    options: VicRegOptions,
    backbone: BackboneHandle,
    projector: Mlp,
}

impl Method for VicReg {
    const NAME: &'static str = "vicreg";
    const ENCODER: &'static str = "backbone";
    const CAPTURABLE: bool = true;

    type Options = VicRegOptions;

    fn new(options: VicRegOptions, host: &mut Host) -> Result<Self> {
        options.augment.check("method.augment")?;
        let batch_size = host.facts().batch_size;
        ensure!(batch_size > 1, "one image has no variance: raise optimizer.batch_size above {batch_size}");
        let backbone = host.backbone("backbone")?;
        let mut sizes = vec![options.units; options.layers + 1];
        sizes[0] = backbone.info().channels;
        let projector = Mlp::new(&host.params().sub("projector"), &sizes, false);
        Ok(VicReg { options, backbone, projector })
    }

    fn views(&self) -> Vec<ViewSpec> {
        ["first", "second"].map(|name| self.options.augment.view(name)).to_vec()
    }

    fn step(&mut self, batch: &Batch) -> Result<Step> {
        let [first, second] = batch.views.as_slice() else {
            bail!("VICReg declares two views, but the batch has {}", batch.views.len());
        };
        let project = |images: &Tensor| -> Result<Tensor> {
            let features = self.backbone.pooled(images, batch.train)?;
            Ok(self.projector.forward(&features, batch.train).to_kind(Kind::Float))
        };
        let (a, b) = (project(first)?, project(second)?);
        let invariance = a.mse_loss(&b, Reduction::Mean);
        let variance = (variance_loss(&a) + variance_loss(&b)) * 0.5;
        let covariance = covariance_loss(&a) + covariance_loss(&b);
        let VicRegOptions { invariance: lambda, variance: mu, covariance: nu, .. } = self.options;
        let loss = &invariance * lambda + &variance * mu + &covariance * nu;
        Ok(Step::new(loss)
            .metric("invariance", &invariance)
            .metric("variance", &variance)
            .metric("covariance", &covariance)
            .metric("spread", &deviation(&a)))
    }

    fn encode(&mut self, images: &Tensor) -> Result<Tensor> {
        tch::no_grad(|| self.backbone.pooled(images, false))
    }
}
