//! Early termination: which runs are not worth going on with.
//!
//! Hyperband as W&B has it (Li et al. 2018 describe the algorithm): at certain numbers of iterations, the bands, a run
//! must be among the best 1/eta of all runs that came so far. An iteration is one value of the metric.

use serde::Deserialize;

/// W&B's `early_terminate`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "Entry")]
pub struct Hyperband {
    /// The iterations at which runs are compared, ascending.
    bands: Vec<usize>,
    /// One run of so many goes on.
    eta: f64,
    /// Whether the value at the band counts, and not the best one so far.
    strict: bool,
}

/// Why a run should end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// The iteration at which it was compared.
    pub band: usize,
    /// Its value.
    pub value: f64,
    /// The value that it should have had.
    pub threshold: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    r#type: Type,
    max_iter: Option<u32>,
    min_iter: Option<u32>,
    s: Option<u32>,
    #[serde(default = "three")]
    eta: f64,
    /// W&B's schema has it on.
    #[serde(default = "yes")]
    strict: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Type {
    Hyperband,
}

fn three() -> f64 {
    3.0
}

fn yes() -> bool {
    true
}

/// There are no more bands than this.
const BANDS: i32 = 100;
/// Bands beyond this many iterations are never reached.
const FARTHEST: f64 = 1e9;

impl TryFrom<Entry> for Hyperband {
    type Error = String;

    fn try_from(entry: Entry) -> Result<Self, String> {
        let Entry { r#type: Type::Hyperband, max_iter, min_iter, s, eta, strict } = entry;
        if eta.is_nan() || eta <= 1.0 {
            return Err("early_terminate.eta must be greater than 1".to_owned());
        }
        let bands: Vec<usize> = match (max_iter, min_iter, s) {
            (Some(last), _, Some(s)) => {
                let down = (1..=s.min(BANDS as u32))
                    .map(|i| f64::from(last) / eta.powi(i as i32))
                    .take_while(|band| *band >= 1.0);
                let mut bands: Vec<usize> = down.map(|band| band as usize).collect();
                bands.reverse();
                bands
            }
            (None, Some(first), _) => {
                let up =
                    (0..BANDS).map(|i| f64::from(first) * eta.powi(i)).take_while(|band| *band < FARTHEST);
                up.map(|band| band as usize).filter(|band| *band > 0).collect()
            }
            _ => return Err("early_terminate needs min_iter, or max_iter and s".to_owned()),
        };
        if bands.is_empty() {
            return Err(
                "early_terminate has no iteration to compare at: raise min_iter or max_iter, or lower eta"
                    .to_owned(),
            );
        }
        Ok(Hyperband { bands, eta, strict })
    }
}

impl Hyperband {
    /// For each run, given as all its values of the metric, of which less is better: why it should end, or `None`.
    pub fn judge(&self, runs: &[Vec<f64>]) -> Vec<Option<Verdict>> {
        let thresholds: Vec<f64> = self.bands.iter().map(|band| self.threshold(*band, runs)).collect();
        let verdict = |run: &Vec<f64>| {
            let reached = self.bands.iter().zip(&thresholds).rev().find(|(band, _)| **band <= run.len());
            let (&band, &threshold) = reached?;
            let best = || run.iter().copied().fold(f64::INFINITY, f64::min);
            let value = if self.strict { run[band - 1] } else { best() };
            (value > threshold).then_some(Verdict { band, value, threshold })
        };
        runs.iter().map(verdict).collect()
    }

    /// The worst value at iteration `band` of the best 1/eta of the runs that came so far.
    fn threshold(&self, band: usize, runs: &[Vec<f64>]) -> f64 {
        let mut values: Vec<f64> = runs.iter().filter_map(|run| run.get(band - 1).copied()).collect();
        values.sort_by(f64::total_cmp);
        let place = (values.len() as f64 / self.eta) as usize;
        values.get(place).copied().unwrap_or(f64::INFINITY)
    }
}
