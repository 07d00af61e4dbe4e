//! A record of `metrics.jsonl`: what was measured at a step.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Histogram;

/// Whether less of `metric` is better.
pub fn lower_is_better(metric: &str) -> bool {
    metric.ends_with("loss")
}

/// One line of `metrics.jsonl`. A file may have lines without a time, which older versions have written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Optimizer steps done.
    pub step: u64,
    /// Epochs done, with the fraction of the current one.
    pub epoch: f64,
    /// When it was measured, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<f64>,
    /// Images by name, each a PNG file relative to the run's directory.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub images: BTreeMap<String, PathBuf>,
    /// Distributions by name, such as `weights/backbone.conv1.weight`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub histograms: BTreeMap<String, Histogram>,
    /// Values by metric name, such as `train/loss`.
    #[serde(flatten)]
    pub figures: BTreeMap<String, f64>,
}

impl Record {
    /// A record of nothing, at a step.
    pub fn at(step: u64, epoch: f64) -> Self {
        Record {
            step,
            epoch,
            time: None,
            images: BTreeMap::new(),
            histograms: BTreeMap::new(),
            figures: BTreeMap::new(),
        }
    }
}
