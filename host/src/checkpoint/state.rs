//! What is needed beside the tensors to go on exactly where a run stopped.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::plugin::PluginRecord;

/// The version of the layout that this program writes and reads.
pub const FORMAT: u32 = 1;

/// The content of `state.json`. It holds no times and no host names: equal runs write equal bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The layout: [`FORMAT`].
    pub format: u32,
    /// Optimizer steps done.
    pub step: u64,
    /// The epoch that the next batch belongs to, from 0.
    pub epoch: u64,
    /// Batches of that epoch that are done.
    pub batch_in_epoch: u64,
    /// Whether the EMA targets already hold the update of the next step, which failed after it.
    #[serde(default)]
    pub ema_is_ahead: bool,
    /// The run's seed.
    pub seed: u64,
    /// Name of the method.
    pub method: String,
    /// Name of the backbone.
    pub backbone: String,
    /// Where in the model the backbone lies that is learned for: the names of its tensors begin with this and a point.
    pub encoder: String,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// The first evaluation: of random weights, when `eval.at_start` is on.
    pub first_eval: Option<BTreeMap<String, f64>>,
    /// The last evaluation so far.
    pub last_eval: Option<BTreeMap<String, f64>>,
    /// The steps that were done at the last validation and evaluation; older checkpoints do not tell.
    #[serde(default)]
    pub judged: Option<u64>,
    /// Sum and count of each figure since the last log line.
    pub meters: BTreeMap<String, (f64, u64)>,
    /// Lines of `metrics.jsonl` at this point: what follows is to be done again.
    pub metrics_lines: u64,
    /// The resolved configuration.
    pub config: Value,
    /// Classes of the training set; 0 without labels.
    pub classes: u64,
    /// Optimizer steps in an epoch.
    pub steps_per_epoch: u64,
    /// Tells one set of training images from another: [`Dataset::fingerprint`](crate::data::Dataset::fingerprint).
    pub data_fingerprint: String,
    /// The plugins in use.
    pub plugins: Vec<PluginRecord>,
    /// Version of jepa-host.
    pub host: String,
    /// Version of libtorch.
    pub libtorch: String,
    /// What computes: `cuda`, or `cpu` with the vector instructions that libtorch uses there.
    pub device: String,
    /// Threads that libtorch computes with.
    pub threads: usize,
    /// Processes that train together.
    #[serde(default = "one")]
    pub ranks: usize,
}

fn one() -> usize {
    1
}

/// The best evaluation of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Name of the metric, such as `eval/linear_top1_final`.
    pub metric: String,
    /// Its value.
    pub value: f64,
    /// Optimizer steps done when it was measured.
    pub step: u64,
}

impl Best {
    /// Whether `value` of the same metric is better: lower where the name ends in `loss`, else higher.
    pub fn is_beaten_by(&self, value: f64) -> bool {
        if self.metric.ends_with("loss") { value < self.value } else { value > self.value }
    }
}
