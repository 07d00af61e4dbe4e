//! Runs a method in a unit test, in the test's own process: no plugin file, no host, no data set. [`Method`] shows how.

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::host::HostParts;
use crate::nn::{Conv2d, ConvOptions};
use crate::params::Entry;
use crate::{
    Backbone, BackboneHandle, BackboneInfo, Batch, Context, EmaPair, Host, Method, NoOptions, NormKind,
    Params, Result, RunFacts, parse_device,
};

/// A method built in this process, with all that it registered and declared.
///
/// ```
/// use jepa_plugin_api::testing::{self, LinkedMethod, SmallBackbone};
/// use jepa_plugin_api::{Host, Method, NoOptions, Result};
/// # use jepa_plugin_api::{BackboneHandle, Batch, Step, ViewSpec, bail, tch::Tensor};
/// # struct Plain(BackboneHandle);
/// # impl Method for Plain {
/// #   const NAME: &'static str = "plain";
/// #   const ENCODER: &'static str = "encoder";
/// #   type Options = NoOptions;
/// #   fn new(_: NoOptions, host: &mut Host) -> Result<Self> { Ok(Plain(host.backbone("encoder")?)) }
/// #   fn views(&self) -> Vec<ViewSpec> { vec![] }
/// #   fn step(&mut self, _: &Batch) -> Result<Step> { bail!("it learns nothing here") }
/// #   fn encode(&mut self, images: &Tensor) -> Result<Tensor> { self.0.pooled(images, false) }
/// # }
///
/// let built: LinkedMethod<Plain> = testing::method(serde_json::json!({}), testing::facts(), SmallBackbone::new)?;
/// let names: Vec<&str> = built.entries.iter().map(|entry| entry.name.as_str()).collect();
/// assert_eq!(names, ["encoder.conv.weight", "encoder.conv.bias"]);
/// # Ok::<(), jepa_plugin_api::Error>(())
/// ```
pub struct LinkedMethod<M> {
    /// The method itself.
    pub method: M,
    /// Its tensors, backbones' included.
    pub entries: Vec<Entry>,
    /// The EMA pairs it declared. Nobody applies them here.
    pub ema: Vec<EmaPair>,
}

impl<M> LinkedMethod<M> {
    /// The tensor called `name`: sharing storage and gradient with the method's own.
    ///
    /// # Errors
    /// When there is none.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        tensor(&self.entries, name)
    }
}

/// The tensor called `name` among `entries`.
///
/// # Errors
/// When there is none.
///
/// ```
/// use jepa_plugin_api::{Params, nn::Linear, tch::Device, testing};
/// let params = Params::new(Device::Cpu);
/// Linear::new(&params, 8, 2, false);
/// assert_eq!(testing::tensor(&params.entries(), "weight")?.size(), [2, 8]);
/// # Ok::<(), jepa_plugin_api::Error>(())
/// ```
pub fn tensor<'a>(entries: &'a [Entry], name: &str) -> Result<&'a Tensor> {
    let entry = entries.iter().find(|entry| entry.name == name);
    Ok(&entry.with_context(|| format!("no tensor is named `{name}`"))?.tensor)
}

/// Copies `value` into the tensor called `name`.
///
/// # Errors
/// When there is none, or its shape differs.
///
/// ```
/// use jepa_plugin_api::{Params, nn::Linear, tch, testing};
/// let params = Params::new(tch::Device::Cpu);
/// let linear = Linear::new(&params, 2, 1, false);
/// testing::set_tensor(&params.entries(), "weight", &tch::Tensor::from_slice(&[1f32, 2.0]).view([1, 2]))?;
/// assert_eq!(f64::try_from(linear.forward(&tch::Tensor::from_slice(&[1f32, 1.0])))?, 3.0);
/// # Ok::<(), jepa_plugin_api::Error>(())
/// ```
pub fn set_tensor(entries: &[Entry], name: &str, value: &Tensor) -> Result<()> {
    let tensor = tensor(entries, name)?;
    let (theirs, ours) = (value.size(), tensor.size());
    anyhow::ensure!(theirs == ours, "`{name}` has shape {ours:?}, but the value has {theirs:?}");
    tch::no_grad(|| tensor.shallow_clone().copy_(value));
    Ok(())
}

/// Builds method `M` with `options`, as they stand under `method.`; `backbone` builds each backbone it asks for.
///
/// # Errors
/// When the options do not fit, and whatever the method and its backbones say.
pub fn method<M: Method, B: Backbone>(
    options: Value,
    facts: RunFacts,
    mut backbone: impl FnMut(&Params) -> Result<B>,
) -> Result<LinkedMethod<M>> {
    let device = parse_device(&facts.device)?;
    let mut build = || {
        let params = Params::new(device);
        BackboneHandle::linked(backbone(&params)?, &params)
    };
    let mut host = Host::new(facts, &mut build)?;
    let method = M::new(serde_json::from_value(options)?, &mut host)?;
    let HostParts { params, ema, .. } = host.into_parts();
    Ok(LinkedMethod { method, entries: params.entries(), ema })
}

/// A backbone for tests: one convolution whose windows are its cells, so that 32 px give an 8 × 8 map of 8 channels,
/// dense or sparse.
///
/// ```
/// use jepa_plugin_api::testing::SmallBackbone;
/// use jepa_plugin_api::{Backbone as _, Params, tch};
/// let net = SmallBackbone::new(&Params::new(tch::Device::Cpu))?;
/// let images = tch::Tensor::zeros([2, 3, 32, 32], (tch::Kind::Float, tch::Device::Cpu));
/// assert_eq!(net.forward(&images, None, true)?.size(), [2, 8, 8, 8]);
/// # Ok::<(), jepa_plugin_api::Error>(())
/// ```
pub struct SmallBackbone(Conv2d);

impl SmallBackbone {
    /// C, the channels of its map.
    pub const CHANNELS: i64 = 8;
    /// r, the side of a cell in pixels.
    pub const DOWNSAMPLE: i64 = 4;

    /// Registers `conv.weight` `(8, 3, 4, 4)` and `conv.bias` `(8)`.
    ///
    /// # Errors
    /// None: this fits where [`method`] takes a function that builds a backbone.
    pub fn new(params: &Params) -> Result<Self> {
        let options = ConvOptions { stride: Self::DOWNSAMPLE, ..ConvOptions::default() };
        Ok(SmallBackbone(Conv2d::new(&params.sub("conv"), 3, Self::CHANNELS, Self::DOWNSAMPLE, options)))
    }
}

impl Backbone for SmallBackbone {
    const NAMES: &'static [&'static str] = &["small"];

    type Options = NoOptions;

    fn new(_name: &str, _options: NoOptions, params: &Params) -> Result<Self> {
        SmallBackbone::new(params)
    }

    fn info(&self) -> BackboneInfo {
        BackboneInfo::new(Self::CHANNELS, Self::DOWNSAMPLE, NormKind::Batch).with_sparse_mode()
    }

    /// A cell's output sees its own pixels alone, so hidden ones have only to be cleared.
    fn forward(&self, images: &Tensor, mask: Option<&Tensor>, _train: bool) -> Result<Tensor> {
        let map = self.0.forward(images).relu();
        Ok(match mask {
            Some(mask) => &map * mask.to_kind(map.kind()),
            None => map,
        })
    }
}

/// Facts of a small run on the CPU: 32 px, batches of 4, ten epochs of 100 steps, ten classes, seed 0.
///
/// ```
/// use jepa_plugin_api::{RunFacts, testing};
/// let facts = RunFacts { image_size: 96, ..testing::facts() };
/// assert_eq!((facts.image_size, facts.batch_size), (96, 4));
/// ```
pub fn facts() -> RunFacts {
    RunFacts {
        device: "cpu".to_owned(),
        image_size: 32,
        batch_size: 4,
        epochs: 10,
        steps_per_epoch: 100,
        classes: 10,
        unlabelled: 0,
        seed: 0,
    }
}

/// The first training batch of such a run, of `views` f32 `(B, 3, S, S)`: samples 0, 1, …, of unknown classes.
///
/// ```
/// use jepa_plugin_api::{testing, tch};
/// let view = tch::Tensor::zeros([4, 3, 32, 32], (tch::Kind::Float, tch::Device::Cpu));
/// assert!(testing::batch(vec![view]).train);
/// ```
pub fn batch(views: Vec<Tensor>) -> Batch {
    let images = views.first().map_or(0, |view| view.size()[0]);
    Batch {
        views,
        labels: Tensor::full([images], -1, (Kind::Int64, Device::Cpu)),
        samples: (0..images as u64).collect(),
        seed: 0,
        epoch: 0,
        step: 0,
        train: true,
    }
}
