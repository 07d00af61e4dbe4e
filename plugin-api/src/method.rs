//! The trait of a pretraining method, and what it gets and gives at each step.

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Host, Result, Rng, ViewSpec};

/// The options of a method, backbone or probe that has none.
///
/// ```
/// use jepa_plugin_api::NoOptions;
/// assert!(serde_json::from_str::<NoOptions>("{ }").is_ok());
/// assert!(serde_json::from_str::<NoOptions>(r#"{ "depth": 1 }"#).is_err());
/// ```
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NoOptions {}

/// A self-supervised (or supervised) method: which views it wants, and what loss they give.
///
/// The host owns everything else: device, precision, data, random numbers, optimizer, schedules, EMA updates,
/// checkpoints, evaluation and logging.
///
/// ```
/// use jepa_plugin_api::nn::l2_normalize;
/// use jepa_plugin_api::tch::{self, Kind, Tensor};
/// use jepa_plugin_api::testing::{self, SmallBackbone};
/// use jepa_plugin_api::{Augmentation, BackboneHandle, Batch, Host, Method, NoOptions, Result, Step, ViewSpec};
///
/// /// Draws two views of an image together. It collapses, of course.
/// struct Attract(BackboneHandle);
///
/// impl Method for Attract {
///     const NAME: &'static str = "attract";
///     const ENCODER: &'static str = "encoder";
///     type Options = NoOptions;
///
///     fn new(_: NoOptions, host: &mut Host) -> Result<Self> {
///         Ok(Attract(host.backbone("encoder")?))
///     }
///
///     fn views(&self) -> Vec<ViewSpec> {
///         ["first", "second"].map(|name| Augmentation::SIMCLR.view(name)).to_vec()
///     }
///
///     fn step(&mut self, batch: &Batch) -> Result<Step> {
///         let [a, b] = [0, 1].map(|i| self.0.pooled(&batch.views[i], batch.train));
///         let apart = l2_normalize(&a?, 1) - l2_normalize(&b?, 1);
///         Ok(Step::new(apart.square().sum(Kind::Float) / batch.len() as f64))
///     }
///
///     fn encode(&mut self, images: &Tensor) -> Result<Tensor> {
///         tch::no_grad(|| self.0.pooled(images, false))
///     }
/// }
///
/// let options = serde_json::json!({});
/// let mut built = testing::method::<Attract, _>(options, testing::facts(), SmallBackbone::new)?;
/// let view = || Tensor::rand([4, 3, 32, 32], (Kind::Float, tch::Device::Cpu));
/// let step = built.method.step(&testing::batch(vec![view(), view()]))?;
/// step.loss.backward();
/// assert!(built.tensor("encoder.conv.weight")?.grad().defined());
/// assert!(built.method.examples(&testing::batch(vec![view(), view()]))?.is_empty(), "the views are shown");
/// # Ok::<(), jepa_plugin_api::Error>(())
/// ```
pub trait Method: Send + Sized + 'static {
    /// The name in `method.name`, in `snake_case`.
    const NAME: &'static str;

    /// Name of the backbone, as given to [`Host::backbone`], that holds the learned representation: the one that
    /// [`encode`](Method::encode) uses. `jepa-host export` writes it, and `init.from` takes it up in another run.
    const ENCODER: &'static str;

    /// Whether [`step`](Method::step) learns from [`Batch::labels`]. The host then begins no run unless every image of
    /// `data.train` and of `data.val` has one, below [`RunFacts::classes`](crate::RunFacts). Since API 1.1; hosts of
    /// 1.0 check nothing.
    const NEEDS_LABELS: bool = false;

    /// Whether [`step`](Method::step) queues the same operations on a GPU for every training batch of one size, so that the
    /// host may capture them once as a CUDA graph and replay them (`trainer.cuda_graphs`). It computes loss and metrics on the
    /// device, of [`Batch::views`], [`Batch::labels`], parameters and registered buffers, which it changes in place; it may draw there
    /// by libtorch's generator. It looks at no number of a tensor, which would wait for the GPU, draws nothing on the CPU,
    /// keeps no tensor from step to step but registered ones, and uses nothing else of the batch that changes. Masks whose
    /// visible cells are counted do not keep to that. Any backbone is tried: the host compares the loss and gradients
    /// of a replayed step with those of a computed one before it goes on. Since API 1.1; hosts of 1.0 capture nothing.
    const CAPTURABLE: bool = false;

    /// The keys under `method.`: a struct with a serde default for every field. Its schema, its defaults and its doc
    /// comments are what `jepa-host plugin info` prints, and what the host validates a configuration against.
    type Options: DeserializeOwned + Serialize + JsonSchema;

    /// Builds the method: asks the host for backbones, registers parameters, declares EMA pairs. An error says which
    /// option (or which setting of the host) does not fit: the host reports it as a wrong configuration.
    fn new(options: Self::Options, host: &mut Host) -> Result<Self>;

    /// The views of each image that [`step`](Method::step) wants, in order.
    fn views(&self) -> Vec<ViewSpec>;

    /// The loss of one batch: a scalar of any floating-point type, which the host differentiates, except in validation
    /// ([`Batch::train`] is false), where no graph is kept. Runs under the run's autocast: with
    /// `trainer.precision = "bf16"` convolutions and matrix products give bf16.
    fn step(&mut self, batch: &Batch) -> Result<Step>;

    /// Features of images for evaluation, without augmentation and without gradients.
    ///
    /// `images` is f32 `(B, 3, S, S)` on the run's device; the result is `(B, D)` of any floating-point type on the
    /// same device, pooled over space. Before a run begins, the host tries it with one blank image.
    fn encode(&mut self, images: &Tensor) -> Result<Tensor>;

    /// What a person should see of `batch`, by name: tensors `(B, 3, S, S)` with pixels as the views have them. The host
    /// asks now and then, and hands the first of them to trackers and reports. The default, nothing, stands for the
    /// views by their names. Since 1.1.
    fn examples(&mut self, batch: &Batch) -> Result<Vec<(String, Tensor)>> {
        let _ = batch;
        Ok(Vec::new())
    }
}

/// One batch of views, and where in the run it stands. Where several [`ranks`](crate::ranks) train together, it is this one's
/// share.
///
/// ```
/// use jepa_plugin_api::{testing, tch};
/// let view = tch::Tensor::zeros([4, 3, 32, 32], (tch::Kind::Float, tch::Device::Cpu));
/// let batch = testing::batch(vec![view]);
/// assert_eq!((batch.len(), batch.samples.as_slice()), (4, [0, 1, 2, 3].as_slice()));
///
/// // A mask for each image, the same whenever this step is taken again.
/// const MASKS: u64 = 0x6d61_736b;
/// let hidden = |i| batch.sample_rng(i, MASKS).below(64);
/// assert_eq!(hidden(2), hidden(2));
/// ```
#[derive(Debug)]
pub struct Batch {
    /// One tensor f32 `(B, 3, S, S)` for each declared view.
    pub views: Vec<Tensor>,
    /// Class of each image, i64 `(B)`; −1 where the data set has no labels.
    pub labels: Tensor,
    /// Number of each image in the data set.
    pub samples: Vec<u64>,
    /// The run's seed.
    pub seed: u64,
    /// Epochs finished before this one.
    pub epoch: u64,
    /// Optimizer steps taken before this one.
    pub step: u64,
    /// False during validation: use running statistics, change no state.
    pub train: bool,
}

impl Batch {
    /// Number of images B.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// True for a batch without images.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Random numbers for a decision about the whole batch: the same at every replay of this step, and the same for
    /// all batches that are accumulated into it. Give each use in your plugin a `purpose` of its own.
    pub fn rng(&self, purpose: u64) -> Rng {
        Rng::keyed(self.seed, self.step, u64::MAX, purpose)
    }

    /// Random numbers for a decision about image `i` of the batch, keyed by the image's number in the data set and
    /// not by its place in the batch, so that they do not depend on how a batch is split over devices.
    ///
    /// # Panics
    /// When `i` is not below [`len`](Batch::len).
    pub fn sample_rng(&self, i: usize, purpose: u64) -> Rng {
        Rng::keyed(self.seed, self.step, self.samples[i], purpose)
    }
}

/// What a step gives back: the loss to differentiate, and figures to log.
///
/// ```
/// use jepa_plugin_api::{Step, tch::Tensor};
/// let loss = Tensor::from(1.5f32);
/// let step = Step::new(loss.shallow_clone()).metric("distance", &loss.sqrt());
/// assert_eq!(step.metrics[0].0, "distance");
/// ```
#[derive(Debug)]
pub struct Step {
    /// Scalar with a graph.
    pub loss: Tensor,
    /// Scalars that the host averages between log lines, as `train/<method>/<name>`.
    pub metrics: Vec<(String, Tensor)>,
}

impl Step {
    /// A step with this loss and no metrics.
    pub fn new(loss: Tensor) -> Self {
        Step { loss, metrics: Vec::new() }
    }

    /// Adds a figure to log: a scalar tensor, which the host reads after the step. One called `spread` tells collapse, see `eval.collapse`: about 1 where what
    /// the loss compares fills its space, 0 where it is the same for all images; [`nn::spread`](crate::nn::spread), say.
    pub fn metric(mut self, name: &str, value: &Tensor) -> Self {
        self.metrics.push((name.to_owned(), value.detach().to_kind(Kind::Float)));
        self
    }
}
