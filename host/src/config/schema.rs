//! Every setting that the host knows: its type, its unit, its default and its range.
//!
//! The JSON Schema derived from these types is what layers are checked against, so a range stands here only.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::ConfigError;
use crate::data::{Augment, Decode, OnError};
use crate::eval::FIGURES;
use crate::nearest::nearest;

/// A whole configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Keys every random number of the run. Default 42.
    pub seed: u64,
    /// Where results go.
    pub run: Run,
    /// Which method trains, and its own options.
    pub method: Method,
    /// Which backbone is trained, and its own options.
    pub backbone: Backbone,
    /// The images and how they are read.
    pub data: Data,
    /// How parameters are updated.
    pub optimizer: Optimizer,
    /// How long and on what the loop runs.
    pub trainer: Trainer,
    /// How processes train together, where a launcher has started several.
    pub ranks: Ranks,
    /// When the state is saved and what is kept.
    pub checkpoint: Checkpoint,
    /// How representations are judged while training.
    pub eval: Eval,
    /// What the backbone begins with.
    pub init: Init,
    /// Where figures go besides the console and `metrics.jsonl`.
    pub track: Track,
}

/// Where results go: `<dir>/<name>/version_<n>`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Run {
    /// Name of the run: one directory name. Default: the method's name.
    pub name: Option<String>,
    /// Directory of all runs. Default `runs`.
    pub dir: PathBuf,
}

/// Which method trains. Every other key of the section is the method's own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Method {
    /// Name of the method. May be left out when the loaded plugins have just one.
    pub name: Option<String>,
    /// The method's own options, checked against the schema that its plugin publishes.
    #[serde(flatten)]
    pub options: Map<String, Value>,
}

/// Which backbone is trained. Every other key of the section is the backbone's own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Backbone {
    /// Name of the backbone, such as `resnet50`.
    pub name: Option<String>,
    /// The backbone's own options, checked against the schema that its plugin publishes.
    #[serde(flatten)]
    pub options: Map<String, Value>,
}

/// The images and how they are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// HDF5 file with the training images, relative to the current directory.
    pub train: Option<PathBuf>,
    /// HDF5 file with the held-out images, relative to the current directory. The method's loss on it is logged after
    /// every epoch, and probes are judged on it. Default: none, so neither.
    pub val: Option<PathBuf>,
    /// Side of the square images that the network sees, in pixels. Default 224.
    #[schemars(range(min = 1))]
    pub size: usize,
    /// Train on images most of which are smaller than `size`, and have to be enlarged. Default false: they are refused.
    pub upscale: bool,
    /// Threads that decode and augment; 0: one per core. Results do not depend on it. Default 0.
    #[schemars(range(max = 1024))]
    pub threads: usize,
    /// What to do about an image that cannot be decoded. Default `fail`.
    pub on_error: OnError,
    /// Whether large JPEGs are made smaller as they are decoded (`fast`) or not (`exact`). Default `fast`.
    pub decode: Decode,
    /// Where views are cropped and resized and get flips, colours and blurs: in the loader's threads (`cpu`), or on the run's
    /// device (`gpu`), with the same arithmetic. For machines with few cores for each GPU. Default `cpu`.
    pub augment: Augment,
}

/// How parameters are updated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Optimizer {
    /// Update rule. Default `adamw`.
    pub algorithm: Algorithm,
    /// Peak learning rate, reached at the end of the warm-up; before `lr_scale`. Default 0.001.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub lr: f64,
    /// What `lr` is multiplied by: with `linear` by the images in a step (`batch_size` × `trainer.accumulate`) / 256,
    /// with `sqrt` by the root of that. Default `none`.
    pub lr_scale: LrScale,
    /// Weight decay. AdamW's is decoupled: each step multiplies parameters by 1 − lr × weight_decay; LARS and SGD add
    /// weight_decay × parameter to the gradient. Default 0.01.
    #[schemars(range(min = 0.0))]
    pub weight_decay: f64,
    /// Weight decay of the run's last step, reached by a half cosine over all steps. Default: it stays as it is.
    #[schemars(range(min = 0.0))]
    pub weight_decay_end: Option<f64>,
    /// Share of the last update in the next one, for LARS and SGD. Default 0.9.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    pub momentum: f64,
    /// Nesterov's momentum, for LARS and SGD. Default false.
    pub nesterov: bool,
    /// LARS: size of an update relative to its tensor, at learning rate 1. Default 0.001.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub trust_coefficient: f64,
    /// AdamW: decay rates of the averages of gradients and of squared gradients. Default [0.9, 0.999].
    #[schemars(extend("items" = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}))]
    pub betas: [f64; 2],
    /// Added to the denominator of an update, for AdamW and LARS. Default 1e-8.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub eps: f64,
    /// Images in one forward pass, of all ranks together. Default 128.
    #[schemars(range(min = 1))]
    pub batch_size: usize,
    /// Length of the linear warm-up from 0, in epochs; may be a fraction. Default 10.
    #[schemars(range(min = 0.0))]
    pub warmup_epochs: f64,
    /// The half cosine after the warm-up ends at this share of the peak learning rate. Default 0.001.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub final_lr_ratio: f64,
    /// Whether parameters of norm layers and biases (all of one dimension, and all called `bias`) stay without weight
    /// decay, and without LARS's scaling. Default false.
    pub exclude_norm_and_bias: bool,
}

/// The update rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101).
    AdamW,
    /// Layer-wise adaptive rate scaling over SGD (You et al., arXiv 1708.03888).
    Lars,
    /// Stochastic gradient descent with momentum.
    Sgd,
}

/// How the learning rate depends on the number of images in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LrScale {
    /// Not at all.
    None,
    /// In proportion (Goyal et al., arXiv 1706.02677).
    Linear,
    /// As the square root.
    Sqrt,
}

/// How long and on what the loop runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Trainer {
    /// Passes over the training images. Default 100.
    #[schemars(range(min = 1))]
    pub epochs: u64,
    /// Stop after so many optimizer steps, where that comes before the last epoch. Default: no such limit.
    #[schemars(range(min = 1))]
    pub max_steps: Option<u64>,
    /// Arithmetic of the forward pass; parameters are fp32 in any case. Default `fp32`.
    pub precision: Precision,
    /// Where to compute: `auto` (CUDA where there is one, else the CPU), `cpu`, `cuda` or `cuda:N`. Default `auto`.
    pub device: Device,
    /// Threads that libtorch computes with; 0: one per core. Resuming to the bit needs the same number. Default 0.
    pub threads: usize,
    /// Batches whose gradients are averaged into one optimizer step. Default 1.
    #[schemars(range(min = 1))]
    pub accumulate: usize,
    /// Gradients are scaled down to this L2 norm over all parameters. Default: no clipping.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub clip: Option<f64>,
    /// On a GPU, capture the forward and backward pass of a step as a CUDA graph and queue it whole from then on: small networks
    /// and small batches, which are bound by the host's queueing, gain. For methods that say that their every step is the
    /// same to a GPU, in one process, without `accumulate`. The graph keeps the memory of a step for itself; a replayed
    /// step has all of its time in `time/forward`. Default false.
    pub cuda_graphs: bool,
    /// Optimizer steps between two records of training metrics. Default 10.
    #[schemars(range(min = 1))]
    pub log_every_steps: u64,
}

/// Arithmetic of the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floating point throughout.
    Fp32,
    /// bfloat16 autocast: matrix products and convolutions in bf16, the rest in fp32.
    Bf16,
}

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum Device {
    /// CUDA where there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA device: this one, or the one that the launcher assigns (else the first).
    Cuda(Option<usize>),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Device::Auto),
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda(None)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|index| index.parse().ok())
                .map(|index| Device::Cuda(Some(index)))
                .ok_or_else(|| {
                    format!("\"{text}\" is not one of \"auto\", \"cpu\", \"cuda\", \"cuda:0\", \"cuda:1\", …")
                }),
        }
    }
}

impl TryFrom<String> for Device {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Device> for String {
    fn from(device: Device) -> String {
        match device {
            Device::Auto => "auto".to_owned(),
            Device::Cpu => "cpu".to_owned(),
            Device::Cuda(None) => "cuda".to_owned(),
            Device::Cuda(Some(index)) => format!("cuda:{index}"),
        }
    }
}

/// How processes train together, where `torchrun` or `srun` has started several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Ranks {
    /// Seconds that a rank waits for the others: one that takes longer for a step, or does not answer, ends the run.
    /// Default 600.
    #[schemars(range(min = 1))]
    pub timeout_s: u64,
    /// MiB of gradients that travel together. Smaller parts are on their way earlier, and are more. Resuming to the bit needs the
    /// same number. Default 25.
    #[schemars(range(min = 1))]
    pub bucket_mib: u64,
}

impl Default for Ranks {
    fn default() -> Self {
        Ranks { timeout_s: 600, bucket_mib: 25 }
    }
}

/// When the state is saved and what is kept. The last state of a run is saved in any case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Checkpoint {
    /// Save every so many optimizer steps. Default: not by steps.
    #[schemars(range(min = 1))]
    pub every_steps: Option<u64>,
    /// Save every so many epochs; 0: not by epochs. Default 1.
    pub every_epochs: u64,
    /// How many of the newest checkpoints are kept. Default 2.
    #[schemars(range(min = 1))]
    pub keep: usize,
    /// Save and keep the state that is best by this metric too: `val/loss` (lowest) or a figure of the evaluation,
    /// `eval/…` (highest, or lowest where it ends in `loss`); `none` keeps no such checkpoint. Default `eval/linear_top1_final`.
    pub best: Option<String>,
}

/// What the backbone begins with. A resumed run has its own weights and does not look here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Init {
    /// Weights for the backbone: a run, a checkpoint, or a safetensors file with timm's names. Default: random.
    pub from: Option<PathBuf>,
}

/// What to do when features collapse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Collapse {
    /// Nothing.
    Off,
    /// Say so.
    Warn,
    /// Stop the run, with exit code 5.
    Stop,
}

/// How representations are judged while training, on `data.val`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Eval {
    /// Evaluate every so many epochs, and after the last one; 0: never. Default 5.
    pub every_epochs: u64,
    /// Evaluate before the first step too. Default true.
    pub at_start: bool,
    /// Images in one forward pass. Default 256.
    #[schemars(range(min = 1))]
    pub batch_size: usize,
    /// Side of the centre crop as a share of the resized image: 0.875 is resize 256, crop 224. Default 0.875.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0))]
    pub crop_ratio: f64,
    /// How many training images the probes learn from, drawn at random by the seed. Default: all.
    #[schemars(range(min = 1))]
    pub train_limit: Option<usize>,
    /// What to do when features collapse: when `eval/spread`, or the method's own `spread` on `data.val`, falls below
    /// `collapse_below`. Default `warn`.
    pub collapse: Collapse,
    /// The least spread of healthy features: 1 when they fill their space, 0 when all are the same. Default 0.01.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub collapse_below: f64,
    /// The linear probe.
    pub linear: LinearProbe,
    /// The nearest-neighbour vote.
    pub knn: Knn,
    /// Whether views of one image are told from others.
    pub contrastive: Contrastive,
    /// Probes of plugins, by their names. Those of the plugins that --plugin names run in any case.
    pub probes: BTreeMap<String, PluginProbe>,
}

/// A probe of a plugin. Every other key of the section is the probe's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct PluginProbe {
    /// Whether it runs. Default true.
    pub enabled: bool,
    /// The probe's own options, checked against the schema that its plugin publishes.
    #[serde(flatten)]
    pub options: Map<String, Value>,
}

/// A linear classifier on frozen features, trained with Adam.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LinearProbe {
    /// Whether it runs. Default true.
    pub enabled: bool,
    /// Passes over the features. Default 90.
    #[schemars(range(min = 1))]
    pub epochs: u64,
    /// Learning rate. Default 0.001.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub lr: f64,
    /// Features in one step. Default 256.
    #[schemars(range(min = 1))]
    pub batch_size: usize,
}

/// Contrastive accuracy: for how many of two SimCLR views of held-out images the other view of the same image is the
/// nearest by cosine similarity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Contrastive {
    /// Whether it is measured. Default false.
    pub enabled: bool,
    /// Among the views of how many images. Default 256.
    #[schemars(range(min = 2))]
    pub images: usize,
}

impl Default for Contrastive {
    fn default() -> Self {
        Contrastive { enabled: false, images: 256 }
    }
}

/// A vote of the nearest training features by cosine similarity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Knn {
    /// Whether it runs. Default true.
    pub enabled: bool,
    /// Neighbours that vote. Default 200.
    #[schemars(range(min = 1))]
    pub k: usize,
    /// A neighbour's weight is exp(similarity / temperature). Default 0.1.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub temperature: f64,
}

/// Where figures go besides the console and `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Track {
    /// Keep images of what the method sees, of the first epoch and of those that are evaluated. Default true.
    pub examples: bool,
    /// Keep histograms of weights and gradients, of the last step and of those before an evaluation. Default false.
    pub histograms: bool,
    /// Weights & Biases.
    pub wandb: Wandb,
    /// Write TensorBoard's event files into the run's directory. Default false.
    pub tensorboard: bool,
}

impl Default for Track {
    fn default() -> Self {
        Track { examples: true, histograms: false, wandb: Wandb::default(), tensorboard: false }
    }
}

/// Weights & Biases. What is not set here is taken from W&B's own environment variables, such as `WANDB_PROJECT`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Wandb {
    /// `online` uploads while training, `offline` writes files for `wandb sync`. Default: `WANDB_MODE`, else `online`
    /// under `wandb agent`, else `disabled`.
    pub mode: Option<WandbMode>,
    /// Project. Default: `jepa-host`.
    pub project: Option<String>,
    /// User or team. Default: that of the API key.
    pub entity: Option<String>,
    /// Runs that belong together.
    pub group: Option<String>,
    /// Kind of run within a group, such as `pretrain`.
    pub job_type: Option<String>,
    /// Name that people see. Default: `<run.name>/version_<n>`.
    pub name: Option<String>,
    /// Identifies the run within its project, for ever. Default: drawn at random, and kept in the run's directory.
    pub id: Option<String>,
    /// Text for people.
    pub notes: Option<String>,
    /// Words to find the run by.
    pub tags: Vec<String>,
    /// What to do about a run of this id on the server: go on with it if it is there (`allow`, the default), only if it
    /// is there (`must`), or only if it is not (`never`). A run that is resumed here is gone on with in any case.
    pub resume: Option<WandbResume>,
    /// Upload the newest and the best checkpoint as artifacts when the run ends. Default false.
    pub checkpoints: bool,
    /// Log the backbone of the last checkpoint as an artifact, as `jepa-host export` writes it. Default false.
    pub export: bool,
}

/// Where W&B's records go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WandbMode {
    /// Nowhere.
    Disabled,
    /// To files in the run's directory.
    Offline,
    /// To files, and to the server.
    Online,
}

/// What to do about a W&B run that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WandbResume {
    /// Go on with it, if it is there.
    Allow,
    /// It has to be there.
    Must,
    /// It must not be there.
    Never,
}

/// Sections with keys of plugins.
const FREE_SECTIONS: [&str; 3] = ["method", "backbone", "eval.probes"];

impl Default for Config {
    fn default() -> Self {
        Config {
            seed: 42,
            run: Run::default(),
            method: Method::default(),
            backbone: Backbone::default(),
            data: Data::default(),
            optimizer: Optimizer::default(),
            trainer: Trainer::default(),
            ranks: Ranks::default(),
            checkpoint: Checkpoint::default(),
            eval: Eval::default(),
            init: Init::default(),
            track: Track::default(),
        }
    }
}

impl Default for Run {
    fn default() -> Self {
        Run { name: None, dir: "runs".into() }
    }
}

impl Default for Data {
    fn default() -> Self {
        Data {
            train: None,
            val: None,
            size: 224,
            upscale: false,
            threads: 0,
            on_error: OnError::Fail,
            decode: Decode::Fast,
            augment: Augment::Cpu,
        }
    }
}

impl Default for Optimizer {
    fn default() -> Self {
        Optimizer {
            algorithm: Algorithm::AdamW,
            lr: 1e-3,
            lr_scale: LrScale::None,
            weight_decay: 0.01,
            weight_decay_end: None,
            momentum: 0.9,
            nesterov: false,
            trust_coefficient: 1e-3,
            betas: [0.9, 0.999],
            eps: 1e-8,
            batch_size: 128,
            warmup_epochs: 10.0,
            final_lr_ratio: 1e-3,
            exclude_norm_and_bias: false,
        }
    }
}

impl Default for Trainer {
    fn default() -> Self {
        Trainer {
            epochs: 100,
            max_steps: None,
            precision: Precision::Fp32,
            device: Device::Auto,
            threads: 0,
            accumulate: 1,
            clip: None,
            cuda_graphs: false,
            log_every_steps: 10,
        }
    }
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint {
            every_steps: None,
            every_epochs: 1,
            keep: 2,
            best: Some("eval/linear_top1_final".to_owned()),
        }
    }
}

impl Default for Eval {
    fn default() -> Self {
        Eval {
            every_epochs: 5,
            at_start: true,
            batch_size: 256,
            crop_ratio: 0.875,
            train_limit: None,
            collapse: Collapse::Warn,
            collapse_below: 0.01,
            linear: LinearProbe::default(),
            knn: Knn::default(),
            contrastive: Contrastive::default(),
            probes: BTreeMap::new(),
        }
    }
}

impl Default for PluginProbe {
    fn default() -> Self {
        PluginProbe { enabled: true, options: Map::new() }
    }
}

impl Default for LinearProbe {
    fn default() -> Self {
        LinearProbe { enabled: true, epochs: 90, lr: 1e-3, batch_size: 256 }
    }
}

impl Default for Knn {
    fn default() -> Self {
        Knn { enabled: true, k: 200, temperature: 0.1 }
    }
}

impl Config {
    /// The JSON Schema of the host's own settings.
    pub fn schema() -> Value {
        schemars::schema_for!(Config).to_value()
    }

    /// Takes out of `settings`, which another version of this program has saved, what this one does not know. Returns
    /// those keys. Options of plugins are not looked at.
    pub fn drop_unknown(settings: &mut Map<String, Value>) -> Vec<String> {
        fn drop(settings: &mut Map<String, Value>, known: &Value, prefix: &str, unknown: &mut Vec<String>) {
            settings.retain(|name, value| {
                let key = format!("{prefix}{name}");
                let Some(known) = known.get(name) else {
                    unknown.push(key);
                    return false;
                };
                if let (Value::Object(inner), true) = (value, !FREE_SECTIONS.contains(&&*key)) {
                    drop(inner, known, &format!("{key}."), unknown);
                }
                true
            });
        }
        let mut unknown = Vec::new();
        if let Ok(known) = serde_json::to_value(Config::default()) {
            drop(settings, &known, "", &mut unknown);
        }
        unknown
    }

    /// The training file, or the error that says how to name one.
    pub fn train_file(&self) -> Result<&PathBuf, ConfigError> {
        self.data.train.as_ref().filter(|path| !path.as_os_str().is_empty()).ok_or_else(|| {
            ConfigError::Missing { key: "data.train".to_owned(), example: "train.h5".to_owned() }
        })
    }

    /// The backbone's name, or the error that says how to give one.
    pub fn backbone_name(&self) -> Result<&str, ConfigError> {
        self.backbone.name.as_deref().ok_or_else(|| ConfigError::Missing {
            key: "backbone.name".to_owned(),
            example: "resnet50".to_owned(),
        })
    }

    /// The run's name: as configured, else that of the method.
    pub fn run_name<'a>(&'a self, method: &'a str) -> &'a str {
        self.run.name.as_deref().unwrap_or(method)
    }

    /// The peak learning rate, scaled as `optimizer.lr_scale` says.
    pub fn peak_lr(&self) -> f64 {
        let images = (self.optimizer.batch_size * self.trainer.accumulate) as f64;
        let share = images / 256.0;
        self.optimizer.lr
            * match self.optimizer.lr_scale {
                LrScale::None => 1.0,
                LrScale::Linear => share,
                LrScale::Sqrt => share.sqrt(),
            }
    }

    /// What a schema cannot say: (key, message) of each setting that is wrong in itself or beside another one.
    pub(super) fn faults(&self) -> Vec<(&'static str, String)> {
        let mut faults = Vec::new();
        if let Some(name) = &self.run.name
            && (name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']))
        {
            faults.push((
                "run.name",
                format!("{name:?} is no directory name: leave out slashes and a leading dot, or set run.dir"),
            ));
        }
        if self.optimizer.nesterov && self.optimizer.momentum == 0.0 {
            faults
                .push(("optimizer.nesterov", "needs a momentum: set optimizer.momentum above 0".to_owned()));
        }
        let decays = [
            ("optimizer.weight_decay", Some(self.optimizer.weight_decay)),
            ("optimizer.weight_decay_end", self.optimizer.weight_decay_end),
        ];
        for (key, _) in decays.into_iter().filter(|(_, decay)| *decay == Some(0.0)) {
            if self.optimizer.algorithm == Algorithm::Lars {
                let message = "LARS scales only what decays, so that with 0 it is SGD: set a small value such as \
                               1e-6, or optimizer.algorithm = \"sgd\"";
                faults.push((key, message.to_owned()));
            }
        }
        if self.eval.collapse == Collapse::Stop && (self.eval.every_epochs == 0 || self.data.val.is_none()) {
            let message = "nothing would be watched: \"stop\" needs data.val, and eval.every_epochs above 0";
            faults.push(("eval.collapse", message.to_owned()));
        }
        // What a plugin's probe gives is known when it has run.
        let of_a_plugin = |metric: &str| metric.strip_prefix("eval/").is_some_and(|rest| rest.contains('/'));
        let metrics = || FIGURES.into_iter().chain(["val/loss"]);
        if let Some(best) = &self.checkpoint.best
            && !metrics().any(|metric| metric == best)
            && !of_a_plugin(best)
        {
            let close = nearest(best, metrics()).map(|close| format!("; did you mean {close}?"));
            let all: Vec<&str> = metrics().collect();
            let message = format!("is no metric of a run ({}){}", all.join(", "), close.unwrap_or_default());
            faults.push(("checkpoint.best", message));
        }
        faults
    }
}

impl Optimizer {
    /// Keys that `algorithm` does not use and that are not at their default.
    pub fn without_effect(&self) -> Vec<&'static str> {
        use Algorithm::{AdamW, Lars, Sgd};
        let default = Optimizer::default();
        let keys: [(_, _, &[Algorithm]); 5] = [
            ("optimizer.betas", self.betas != default.betas, &[AdamW]),
            ("optimizer.eps", self.eps != default.eps, &[AdamW, Lars]),
            ("optimizer.momentum", self.momentum != default.momentum, &[Lars, Sgd]),
            ("optimizer.nesterov", self.nesterov != default.nesterov, &[Lars, Sgd]),
            ("optimizer.trust_coefficient", self.trust_coefficient != default.trust_coefficient, &[Lars]),
        ];
        let idle = keys.into_iter().filter(|(_, set, users)| *set && !users.contains(&self.algorithm));
        idle.map(|(key, ..)| key).collect()
    }
}
