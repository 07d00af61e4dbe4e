//! A subject in training: the steps of [`train::run`](crate::train::run), without all that a run has around them.

use jepa_plugin_api::abi::BackboneHandle;
use jepa_plugin_api::params::Kind as EntryKind;
use jepa_plugin_api::tch::{self, Device, Kind, Tensor, no_grad};
use jepa_plugin_api::{Batch, Interpolation, Rng, ViewSpec};

use super::images::Images;
use super::{Built, Subject};
use crate::checkpoint::NamedTensors;
use crate::device::autocast_bf16;
use crate::train::{Model, Optimizer, StepSettings};

/// Key of the numbers that libtorch's generator starts from in each step.
const STEP: u64 = 0x7374_6570_0000_0000;

/// A built subject with an optimizer, and images to train on.
pub struct Trainee {
    body: Body,
    optimizer: Optimizer,
    trained: usize,
    images: Images,
    batch_size: usize,
    epochs: u64,
}

enum Body {
    Method(Box<Model>),
    Backbone(BackboneHandle),
}

/// What a step told.
pub struct Told {
    /// The loss.
    pub loss: f64,
    /// The gradients' norm.
    pub norm: f64,
    /// Parameters that got no gradient.
    pub without_gradient: Vec<String>,
    /// Tensors that crossed the boundary: views, labels, loss, metrics.
    pub crossings: usize,
}

impl Trainee {
    /// Builds `subject` with weights of `seed`.
    pub fn new(subject: &dyn Subject, seed: u64) -> anyhow::Result<Trainee> {
        let config = subject.config();
        let (body, trained, views) = match subject.build(seed)? {
            Built::Method(method) => {
                let views = method.views().to_vec();
                let model = Model::adopt(method, "it")?;
                let trained =
                    model.trained().iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect();
                (Body::Method(Box::new(model)), trained, views)
            }
            Built::Backbone(backbone) => {
                let parameters =
                    backbone.entries()?.into_iter().filter(|entry| entry.kind == EntryKind::Parameter);
                let trained: NamedTensors = parameters.map(|entry| (entry.name, entry.tensor)).collect();
                let view = ViewSpec::new("image").resize_center_crop(1.0, Interpolation::Bilinear);
                (Body::Backbone(backbone), trained, vec![view.normalize_imagenet()])
            }
            Built::Probe(_) => anyhow::bail!("a probe is not trained"),
        };
        Ok(Trainee {
            body,
            optimizer: Optimizer::new(&config.optimizer, &trained),
            trained: trained.len(),
            images: Images::new(&views, config.data.size)?,
            batch_size: config.optimizer.batch_size,
            epochs: config.trainer.epochs,
        })
    }

    /// Takes step `step`, with its own images and random numbers whatever came before it.
    pub fn step(&mut self, step: u64, bf16: bool) -> anyhow::Result<Told> {
        let batch = self.images.batch(step, self.batch_size, true);
        let views = batch.views.len();
        tch::manual_seed(Rng::keyed(0, step, 0, STEP).bits() as i64);
        let (loss, metrics) = match &mut self.body {
            Body::Method(model) => {
                model.update_ema(0, self.epochs)?;
                let output = autocast_bf16(bf16, Device::Cpu, || model.method.step(batch))??;
                (output.loss, output.metrics.len())
            }
            Body::Backbone(backbone) => {
                (autocast_bf16(bf16, Device::Cpu, || backbone_loss(backbone, &batch))??, 0)
            }
        };
        loss.f_to_kind(Kind::Float)?.f_backward()?;
        let gradients = self.optimizer.gradients()?;
        let told = Told {
            loss: loss.f_double_value(&[])?,
            norm: gradients.norm().f_double_value(&[])?,
            without_gradient: self.optimizer.without_gradient(&gradients).map(str::to_owned).collect(),
            crossings: views + 2 + metrics,
        };
        self.optimizer.step(&gradients, StepSettings { lr: 1e-3, weight_decay: 0.01, max_norm: None })?;
        Ok(told)
    }

    /// Gives the subject a batch that may not fit, in a forward pass without a graph. What it says to it.
    pub fn offer(&mut self, batch: Batch) -> anyhow::Result<()> {
        no_grad(|| match &mut self.body {
            Body::Method(model) => Ok(model.method.step(batch).map(drop)?),
            Body::Backbone(backbone) => backbone_loss(backbone, &batch).map(drop),
        })
    }

    /// Features `(B, D)` of images `(B, 3, S, S)`: a backbone's map is pooled.
    pub fn features(&mut self, images: &Tensor) -> anyhow::Result<Tensor> {
        no_grad(|| match &mut self.body {
            Body::Method(model) => Ok(model.method.encode(images)?),
            Body::Backbone(backbone) => {
                let map = backbone.forward(images, None, false)?;
                Ok(map.f_mean_dim([2i64, 3].as_slice(), false, Kind::Float)?)
            }
        })
    }

    /// The dense map `(B, C, S / r, S / r)` in evaluation, and r: of a backbone that has a sparse mode.
    pub fn map(&self, images: &Tensor) -> anyhow::Result<Option<(Tensor, i64)>> {
        match &self.body {
            Body::Backbone(backbone) if backbone.info().sparse => {
                Ok(Some((no_grad(|| backbone.forward(images, None, false))?, backbone.info().downsample)))
            }
            _ => Ok(None),
        }
    }

    /// The map in evaluation of the cells that `mask` shows.
    pub fn sparse_map(&self, images: &Tensor, mask: &Tensor) -> anyhow::Result<Tensor> {
        match &self.body {
            Body::Backbone(backbone) => no_grad(|| backbone.forward(images, Some(mask), false)),
            Body::Method(_) => anyhow::bail!("a method has no map"),
        }
    }

    /// Every tensor that a checkpoint would hold: the subject's, and the optimizer's.
    pub fn tensors(&self) -> anyhow::Result<[NamedTensors; 2]> {
        let own = match &self.body {
            Body::Method(model) => model.tensors(),
            Body::Backbone(backbone) => backbone.entries()?.into_iter().map(|e| (e.name, e.tensor)).collect(),
        };
        Ok([own, self.optimizer.tensors()])
    }

    /// The number of parameters that are trained, counted as tensors.
    pub fn trained(&self) -> usize {
        self.trained
    }

    /// The images it trains on.
    pub fn images(&self) -> &Images {
        &self.images
    }
}

/// A scalar of the map that every channel and every cell takes part in; the sparse mode takes part where there is one.
fn backbone_loss(backbone: &BackboneHandle, batch: &Batch) -> anyhow::Result<Tensor> {
    let images = batch.views.first().ok_or_else(|| anyhow::anyhow!("no view"))?;
    let map = backbone.forward(images, None, batch.train)?;
    let loss = map.f_to_kind(Kind::Float)?.f_square()?.f_mean(Kind::Float)?;
    if !backbone.info().sparse {
        return Ok(loss);
    }
    let sparse = backbone.forward(images, Some(&half_mask(&map)), batch.train)?;
    Ok(loss.f_add(&sparse.f_to_kind(Kind::Float)?.f_square()?.f_mean(Kind::Float)?)?)
}

/// A mask bool `(B, 1, h, w)` for `map`, that shows every other cell.
pub fn half_mask(map: &Tensor) -> Tensor {
    let (batch, _, height, width) = map.size4().unwrap_or((1, 0, 1, 1));
    let cells = Tensor::arange(height * width, (Kind::Int64, map.device())).reshape([1, 1, height, width]);
    let column = cells.remainder(width) + cells.floor_divide_scalar(width);
    column.remainder(2).eq(0).expand([batch, 1, height, width], false).contiguous()
}
