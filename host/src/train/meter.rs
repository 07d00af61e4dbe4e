//! Averages between two log lines. They are part of a checkpoint, so that a resumed run logs what an undisturbed one
//! would have.

use std::collections::BTreeMap;

/// Sums and counts by metric name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Meters(pub BTreeMap<String, (f64, u64)>);

impl Meters {
    /// Adds one value of metric `name`.
    pub fn add(&mut self, name: &str, value: f64) {
        let (sum, count) = self.0.entry(name.to_owned()).or_default();
        *sum += value;
        *count += 1;
    }

    /// The mean so far.
    pub fn mean(&self, name: &str) -> Option<f64> {
        self.0.get(name).map(|(sum, count)| sum / *count as f64)
    }

    /// All means, and starts anew.
    pub fn take(&mut self) -> BTreeMap<String, f64> {
        let sums = std::mem::take(&mut self.0);
        sums.into_iter().map(|(name, (sum, count))| (name, sum / count as f64)).collect()
    }
}
