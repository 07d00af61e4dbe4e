//! What the host tells a method while it is built, and what the method asks of it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::abi::BackboneHandle;
use crate::{BackboneInfo, Params, Result};

/// The facts of a run that a method may depend on.
///
/// ```
/// use jepa_plugin_api::testing;
/// let facts = testing::facts();
/// let total_steps = facts.epochs * facts.steps_per_epoch;
/// assert_eq!((facts.device.as_str(), total_steps), ("cpu", 1000));
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunFacts {
    /// `cpu` or `cuda:<n>`.
    pub device: String,
    /// Side S of a view, in pixels.
    pub image_size: i64,
    /// Images in a batch of one forward pass, of all [`ranks`](crate::ranks) together: with gradient accumulation, several of
    /// these make a step.
    pub batch_size: i64,
    /// Epochs of the whole run.
    pub epochs: u64,
    /// Optimizer steps in an epoch, at least 1.
    pub steps_per_epoch: u64,
    /// Classes of the training set; 0 without labels.
    pub classes: i64,
    /// Training images without a label.
    #[serde(default)]
    pub unlabelled: u64,
    /// The run's seed.
    pub seed: u64,
}

/// How the momentum of an EMA pair moves: a half cosine from `from` to `to` over the epochs, constant within one.
///
/// It can be an option of a method as it is; by default it goes from 0.996 to 1.
///
/// ```
/// use jepa_plugin_api::EmaSchedule;
/// let schedule: EmaSchedule = serde_json::from_str(r#"{ "from": 0.99 }"#)?;
/// assert_eq!((schedule.from, schedule.to), (0.99, 1.0));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EmaSchedule {
    /// Momentum in the first epoch, in [0, 1].
    #[schemars(range(min = 0.0, max = 1.0))]
    pub from: f64,
    /// Momentum in the last epoch, all of it, in [0, 1]. At 1 targets do not move any more; a run of a single epoch
    /// is its own last one.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub to: f64,
}

impl Default for EmaSchedule {
    fn default() -> Self {
        EmaSchedule { from: 0.996, to: 1.0 }
    }
}

/// Two subtrees of parameters of which one follows the other.
///
/// ```
/// use jepa_plugin_api::{EmaPair, EmaSchedule};
/// let pair = EmaPair { online: "encoder".into(), target: "teacher".into(), schedule: EmaSchedule::default() };
/// assert_eq!(pair.schedule.to, 1.0);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EmaPair {
    /// Name of the subtree that is trained.
    pub online: String,
    /// Name of the subtree that follows: equal at the start, then target ← m · target + (1 − m) · online before each
    /// forward pass. Its parameters get no gradients; its buffers are its own.
    pub target: String,
    /// The momentum m.
    pub schedule: EmaSchedule,
}

/// What a method has registered and declared.
pub(crate) struct HostParts {
    pub params: Params,
    pub ema: Vec<EmaPair>,
    /// The names of its backbones.
    pub backbones: Vec<String>,
}

/// The host, as a method sees it while it is built.
///
/// ```
/// use jepa_plugin_api::nn::Linear;
/// use jepa_plugin_api::testing::{self, SmallBackbone};
/// use jepa_plugin_api::{BackboneHandle, EmaSchedule, Host, Method, NoOptions, Result};
/// # use jepa_plugin_api::{Batch, Step, ViewSpec, bail, tch::Tensor};
///
/// /// A method with a teacher.
/// struct Taught(BackboneHandle, BackboneHandle, Linear);
///
/// impl Method for Taught {
/// #   const NAME: &'static str = "taught";
/// #   const ENCODER: &'static str = "student";
/// #   type Options = NoOptions;
///     fn new(_: NoOptions, host: &mut Host) -> Result<Self> {
///         let (student, teacher) = (host.backbone("student")?, host.backbone("teacher")?);
///         host.ema("student", "teacher", EmaSchedule::default());
///         let classes = host.facts().classes.max(1);
///         let head = Linear::new(&host.params().sub("head"), student.info().channels, classes, true);
///         Ok(Taught(student, teacher, head))
///     }
///     // …
/// #   fn views(&self) -> Vec<ViewSpec> { vec![] }
/// #   fn step(&mut self, _: &Batch) -> Result<Step> { bail!("it learns nothing here") }
/// #   fn encode(&mut self, _: &Tensor) -> Result<Tensor> { bail!("it learns nothing here") }
/// }
///
/// let built = testing::method::<Taught, _>(serde_json::json!({}), testing::facts(), SmallBackbone::new)?;
/// assert_eq!((built.ema[0].online.as_str(), built.ema[0].target.as_str()), ("student", "teacher"));
/// assert_eq!(built.tensor("head.weight")?.size(), [10, 8]);
/// # Ok::<(), jepa_plugin_api::Error>(())
/// ```
pub struct Host<'a> {
    facts: RunFacts,
    device: Device,
    params: Params,
    ema: Vec<EmaPair>,
    backbones: Vec<String>,
    build_backbone: &'a mut dyn FnMut() -> Result<BackboneHandle>,
}

impl<'a> Host<'a> {
    pub(crate) fn new(
        facts: RunFacts,
        build_backbone: &'a mut dyn FnMut() -> Result<BackboneHandle>,
    ) -> Result<Self> {
        let device = parse_device(&facts.device)?;
        Ok(Host {
            facts,
            device,
            params: Params::new(device),
            ema: Vec::new(),
            backbones: Vec::new(),
            build_backbone,
        })
    }

    /// The facts of the run.
    pub fn facts(&self) -> &RunFacts {
        &self.facts
    }

    /// The device that all tensors live on.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Where the method registers its own parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Builds the backbone that `backbone.name` chooses; its parameters appear under `name`. Each call builds one.
    ///
    /// # Errors
    /// When no loaded plugin has that backbone, or it refuses its options.
    pub fn backbone(&mut self, name: &str) -> Result<BackboneHandle> {
        let backbone = (self.build_backbone)()?;
        self.params.sub(name).adopt(backbone.entries()?);
        self.backbones.push(name.to_owned());
        Ok(backbone)
    }

    /// Declares that the parameters under `target` follow those under `online`.
    pub fn ema(&mut self, online: &str, target: &str, schedule: EmaSchedule) {
        self.ema.push(EmaPair { online: online.to_owned(), target: target.to_owned(), schedule });
    }

    pub(crate) fn into_parts(self) -> HostParts {
        HostParts { params: self.params, ema: self.ema, backbones: self.backbones }
    }
}

/// Reads `cpu`, `cuda` or `cuda:<n>`.
///
/// # Errors
/// When it is none of these.
///
/// ```
/// use jepa_plugin_api::{parse_device, tch::Device};
/// assert_eq!(parse_device("cuda:1")?, Device::Cuda(1));
/// assert!(parse_device("gpu").is_err());
/// # Ok::<(), jepa_plugin_api::Error>(())
/// ```
pub fn parse_device(text: &str) -> Result<Device> {
    match text.split_once(':').unwrap_or((text, "0")) {
        ("cpu", _) => Ok(Device::Cpu),
        ("cuda", n) => Ok(Device::Cuda(n.parse()?)),
        _ => anyhow::bail!("`{text}` is no device: use cpu, cuda or cuda:<n>"),
    }
}

/// A backbone as a method holds it, wherever it was built.
impl BackboneHandle {
    /// Features pooled over space `(B, C)` from `images` f32 `(B, 3, S, S)`.
    ///
    /// # Errors
    /// Whatever [`forward`](BackboneHandle::forward) gives.
    pub fn pooled(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let map = self.forward(images, None, train)?;
        Ok(map.mean_dim([2i64, 3].as_slice(), false, tch::Kind::Float))
    }

    /// Cells a side, f = S / r, for images of side `size`.
    ///
    /// # Errors
    /// When `size` is not a multiple of r.
    pub fn cells(&self, size: i64) -> Result<i64> {
        let BackboneInfo { downsample, .. } = self.info();
        anyhow::ensure!(
            size % downsample == 0 && size > 0,
            "images of {size} px do not divide into cells of {downsample} px: set data.size to a multiple of {downsample}"
        );
        Ok(size / downsample)
    }
}
