//! The trials of a sweep, best first.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::definition::Definition;
use super::directory::{End, Trial, read_sweep};
use super::error::SweepError;
use super::search::Parameters;
use super::series::{Point, Series, best, is_held};
use crate::checkpoint::find_run;

/// The trials of a sweep, best first, as their files have them.
#[derive(Clone, Debug, Serialize)]
pub struct Leaderboard {
    /// What the sweep is called.
    pub sweep: String,
    /// What they are compared by.
    pub metric: Option<String>,
    /// The parameters that trials differ in.
    #[serde(skip)]
    pub varied: Vec<String>,
    /// The trials. Those without a value come last.
    pub trials: Vec<Row>,
}

/// A trial in a [`Leaderboard`].
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What it is called.
    pub trial: String,
    /// How it stands.
    pub standing: Standing,
    /// The best value of the metric, and the step that it belongs to.
    pub best: Option<Point>,
    /// The last value of the metric, and the step that it belongs to.
    pub last: Option<Point>,
    /// What it tries.
    pub parameters: Parameters,
    /// Its folder.
    pub path: PathBuf,
    /// Why it ended early.
    pub why: Option<String>,
}

/// How a trial stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// A process trains it.
    Running,
    /// It came to its last step.
    Done,
    /// Others were better when they had come as far.
    Stopped,
    /// NaN, or features that have become the same.
    Diverged,
    /// An error ended it.
    Failed,
    /// It is gone on with when the sweep is run again.
    Interrupted,
    /// It has not come to be a run.
    NotStarted,
}

impl Standing {
    /// In a word.
    pub fn text(self) -> &'static str {
        match self {
            Standing::Running => "running",
            Standing::Done => "done",
            Standing::Stopped => "stopped early",
            Standing::Diverged => "diverged",
            Standing::Failed => "failed",
            Standing::Interrupted => "interrupted",
            Standing::NotStarted => "not started",
        }
    }
}

impl Leaderboard {
    /// The trials in `directory`.
    ///
    /// # Errors
    /// [`SweepError::NoSweep`]; and when they cannot be read.
    pub fn read(directory: &Path, definition: &Definition) -> Result<Self, SweepError> {
        let (_, trials) =
            read_sweep(directory)?.ok_or_else(|| SweepError::NoSweep { path: directory.to_owned() })?;
        let (metric, goal) = (definition.metric.as_ref(), definition.goal());
        let row = |trial: &Trial| {
            let path = directory.join(trial.name());
            let mut series = Series::default();
            if let Some(metric) = metric {
                series.read_on(&path, &metric.name);
            }
            Row {
                trial: trial.name(),
                standing: standing(trial, &path),
                best: best(series.points(), goal),
                last: series.points().last().copied(),
                parameters: trial.parameters.clone(),
                path,
                why: trial.end.as_ref().and_then(End::why),
            }
        };
        let mut trials: Vec<Row> = trials.iter().map(row).collect();
        let cost = |row: &Row| row.best.map_or(f64::INFINITY, |best| goal.cost(best.value));
        trials.sort_by(|a, b| cost(a).total_cmp(&cost(b)));
        Ok(Leaderboard {
            sweep: definition.name.clone(),
            metric: metric.map(|metric| metric.name.clone()),
            varied: definition.varied().map(str::to_owned).collect(),
            trials,
        })
    }
}

fn standing(trial: &Trial, folder: &Path) -> Standing {
    match &trial.end {
        Some(End::Done) => Standing::Done,
        Some(End::Stopped { .. }) => Standing::Stopped,
        Some(End::Diverged { .. }) => Standing::Diverged,
        Some(End::Failed { .. }) => Standing::Failed,
        None if is_held(folder) => Standing::Running,
        None if find_run(folder).is_ok() => Standing::Interrupted,
        None => Standing::NotStarted,
    }
}
