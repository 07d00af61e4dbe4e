//! What a run's directory tells about it: while the run goes on or after it, whole or damaged. Nothing here writes.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::Value;

use super::settings::{self, Setting};
use crate::checkpoint::{self, CheckpointError, RunDir, find_run};
use crate::sweep::{End, Trial, trial_of};
use crate::track::{METRICS_FILE, Record, lower_is_better};

/// How a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// A process holds it.
    Running,
    /// It came to its last step.
    Done,
    /// Somebody stopped it, or it was killed.
    Interrupted,
    /// Its sweep stopped it: other trials were better when they had come as far.
    Stopped,
    /// NaN, or features that have become the same.
    Diverged,
    /// An error ended it.
    Failed,
    /// Nothing in it can be read.
    Damaged,
}

impl Status {
    /// In a word.
    pub fn text(self) -> &'static str {
        match self {
            Status::Running => "running",
            Status::Done => "done",
            Status::Interrupted => "interrupted",
            Status::Stopped => "stopped early",
            Status::Diverged => "diverged",
            Status::Failed => "failed",
            Status::Damaged => "damaged",
        }
    }
}

/// One version of a run, as far as its files can be read.
#[derive(Clone, Debug)]
pub struct SavedRun {
    /// Its directory.
    pub path: PathBuf,
    /// `<run.name>/version_<n>`.
    pub name: String,
    /// How it stands.
    pub status: Status,
    /// Why it ended early, in the words that it ended with.
    pub error: Option<String>,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// Every line of `metrics.jsonl` that is a record.
    pub records: Vec<Record>,
    /// What could not be read, a sentence each.
    pub damage: Vec<String>,
    /// Every setting, in the order of `config.toml`.
    pub settings: Vec<Setting>,
    /// `provenance.json`: one entry for each time that the run was started or resumed.
    pub sessions: Vec<Value>,
    /// The trial of a sweep that it is.
    pub trial: Option<Trial>,
    /// Optimizer steps that it is meant to take.
    pub total_steps: Option<u64>,
    /// Seconds since 1970 of the last sign of life.
    pub updated: Option<f64>,
}

impl SavedRun {
    /// Reads the run that `path` means: a version's directory, or that of a run, of which the newest version is taken.
    ///
    /// # Errors
    /// When there is no run. A damaged one is read as far as it goes.
    pub fn find(path: &Path) -> Result<Self, CheckpointError> {
        Ok(SavedRun::read(&find_run(path)?))
    }

    /// Reads the version in `path`.
    pub fn read(path: &Path) -> Self {
        let mut damage = Vec::new();
        let held = RunDir::is_held(path);
        let records = read_records(path, held, &mut damage);
        let settings = read(path, "config.toml", &mut damage)
            .and_then(|text| {
                settings::parse(&text)
                    .map_err(|why| damage.push(format!("config.toml cannot be used: {why}")))
                    .ok()
            })
            .unwrap_or_default();
        let sessions = read(path, "provenance.json", &mut damage)
            .and_then(|text| {
                serde_json::from_str::<Vec<Value>>(&text)
                    .map_err(|why| damage.push(format!("provenance.json cannot be used: {why}")))
                    .ok()
            })
            .unwrap_or_default();
        let checkpoint = checkpoint::latest(path).unwrap_or_else(|error| {
            damage.push(error.to_string());
            None
        });
        let trial = trial_of(path).unwrap_or_else(|error| {
            damage.push(error.to_string());
            None
        });
        let mut run = SavedRun {
            name: name_of(path),
            path: path.to_owned(),
            status: Status::Damaged,
            error: None,
            checkpoint,
            records,
            damage,
            settings,
            sessions,
            trial,
            total_steps: None,
            updated: None,
        };
        run.total_steps = run.count_steps();
        run.updated = run.last_sign();
        (run.status, run.error) = run.judge(held);
        run
    }

    /// The value of a setting as `config.toml` has it; none where it is not set.
    pub fn setting(&self, key: &str) -> Option<&str> {
        let setting = self.settings.iter().find(|setting| setting.key == key)?;
        (setting.value != "none").then_some(setting.value.as_str())
    }

    /// Optimizer steps done, as far as they are recorded.
    pub fn step(&self) -> u64 {
        self.records.last().map_or(0, |record| record.step)
    }

    /// Epochs done, with the fraction of the current one.
    pub fn epoch(&self) -> f64 {
        self.records.last().map_or(0.0, |record| record.epoch)
    }

    /// Epochs that it is meant to have.
    pub fn epochs(&self) -> Option<u64> {
        self.setting("trainer.epochs")?.parse().ok()
    }

    /// Whether `--resume` has something to go on with, and to go on to.
    pub fn is_resumable(&self) -> bool {
        self.checkpoint.is_some() && !matches!(self.status, Status::Running | Status::Done)
    }

    /// The names of all metrics.
    pub fn metrics(&self) -> BTreeSet<&str> {
        self.records.iter().flat_map(|record| record.figures.keys().map(String::as_str)).collect()
    }

    /// Each record that has `metric`, with its value.
    pub fn series<'r>(&'r self, metric: &str) -> impl DoubleEndedIterator<Item = (&'r Record, f64)> {
        self.records.iter().filter_map(move |record| Some((record, *record.figures.get(metric)?)))
    }

    /// The last value of `metric`.
    pub fn last(&self, metric: &str) -> Option<f64> {
        self.series(metric).next_back().map(|(_, value)| value)
    }

    /// The best value of `metric` that training has come to, and the step that it belongs to; the earliest of equal ones.
    pub fn best(&self, metric: &str) -> Option<(u64, f64)> {
        let sign = if lower_is_better(metric) { -1.0 } else { 1.0 };
        let all =
            self.series(metric).map(|(record, value)| (record.step, value)).filter(|(step, _)| *step > 0);
        all.reduce(|best, next| if sign * next.1 > sign * best.1 { next } else { best })
    }

    /// The first and the last record that have images, which may be the same.
    pub fn examples(&self) -> Option<(&Record, &Record)> {
        let mut records = self.records.iter().filter(|record| !record.images.is_empty());
        let first = records.next()?;
        Some((first, records.next_back().unwrap_or(first)))
    }

    /// Steps in all: of the newest checkpoint, which knows the steps of an epoch; else by what the records say.
    fn count_steps(&self) -> Option<u64> {
        let saved = self.checkpoint.as_deref().and_then(|path| checkpoint::load_state(path).ok());
        let per_epoch = match saved {
            Some(state) => state.steps_per_epoch as f64,
            None => self.records.iter().rev().find(|r| r.epoch > 0.0).map(|r| r.step as f64 / r.epoch)?,
        };
        let total = (per_epoch * self.epochs()? as f64).round() as u64;
        let most = self.setting("trainer.max_steps").and_then(|most| most.parse().ok());
        Some(most.map_or(total, |most: u64| most.min(total)))
    }

    fn last_sign(&self) -> Option<f64> {
        let recorded = self.records.iter().rev().find_map(|record| record.time);
        recorded.or_else(|| {
            let metadata = fs::metadata(self.path.join(METRICS_FILE)).or_else(|_| fs::metadata(&self.path));
            let modified: SystemTime = metadata.ok()?.modified().ok()?;
            Some(modified.duration_since(UNIX_EPOCH).ok()?.as_secs_f64())
        })
    }

    fn judge(&self, held: bool) -> (Status, Option<String>) {
        if held {
            return (Status::Running, None);
        }
        if self.records.is_empty() && self.settings.is_empty() {
            return (Status::Damaged, None);
        }
        let stopped = self.trial.as_ref().and_then(|trial| trial.end.as_ref());
        let stopped = stopped.filter(|end| matches!(end, End::Stopped { .. })).and_then(End::why);
        let end = self.sessions.last().and_then(|session| session.get("end"));
        let error = end.and_then(|end| end.get("error")?.as_str()).map(str::to_owned);
        let status = match end.and_then(|end| end.get("exit_code")?.as_u64()) {
            Some(0) => Status::Done,
            Some(5) => Status::Diverged,
            Some(130 | 138 | 143) if stopped.is_some() => return (Status::Stopped, stopped),
            Some(130 | 138 | 143) => Status::Interrupted,
            Some(_) => Status::Failed,
            // Killed; or of a version that did not note the end.
            None if self.total_steps.is_some_and(|total| self.step() >= total) => Status::Done,
            // A trial that does not end in time is killed.
            None if stopped.is_some() => return (Status::Stopped, stopped),
            None => Status::Interrupted,
        };
        (status, error)
    }
}

fn name_of(path: &Path) -> String {
    let full = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let names: Vec<_> = full.iter().rev().take(2).map(|name| name.to_string_lossy()).collect();
    names.into_iter().rev().collect::<Vec<_>>().join("/")
}

/// A text file of the run. One that is not there is none, and no damage.
fn read(run: &Path, name: &str, damage: &mut Vec<String>) -> Option<String> {
    match fs::read(run.join(name)) {
        Ok(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => {
            damage.push(format!("{name} cannot be read: {error}"));
            None
        }
    }
}

fn read_records(run: &Path, held: bool, damage: &mut Vec<String>) -> Vec<Record> {
    let Some(text) = read(run, METRICS_FILE, damage) else { return Vec::new() };
    let mut records = Vec::new();
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let whole = line.ends_with('\n');
        match serde_json::from_str(line) {
            Ok(record) if whole => records.push(record),
            // It is being written.
            _ if !whole && held => {}
            Ok(record) => records.push(record),
            Err(error) => {
                let what = if whole { "is no record" } else { "is cut off" };
                damage.push(format!("{METRICS_FILE}, line {}, {what} and left out: {error}", number + 1));
            }
        }
    }
    records
}
