//! `jepa-host ls`: the runs in a directory, a line each.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use clap::Args;
use serde::Serialize;

use super::exit::Usage;
use super::output::{Format, NOTHING, print, print_columns};
use crate::nearest::nearest;
use crate::report::format::{ago, count, value_of};
use crate::report::{SavedRun, Status, find_runs};
use crate::track::lower_is_better;

/// The figures that are shown, with their columns' names.
const COLUMNS: [(&str, &str); 3] =
    [("linear", "eval/linear_top1_final"), ("kNN", "eval/knn_top1"), ("loss", "train/loss")];

/// List the runs in a directory: how each stands, how far it is, and how good
#[derive(Debug, Args)]
pub(super) struct LsArgs {
    /// The directory of runs
    #[arg(value_name = "DIR", default_value = "runs")]
    directory: PathBuf,
    /// Best first by this metric: linear, knn, loss, or a name in metrics.jsonl; by default, the newest comes first
    #[arg(long, value_name = "METRIC")]
    sort: Option<String>,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// A run, for programs.
#[derive(Debug, Serialize)]
struct Line {
    run: String,
    path: PathBuf,
    status: Status,
    resumable: bool,
    step: u64,
    total_steps: Option<u64>,
    epoch: f64,
    epochs: Option<u64>,
    /// Seconds since 1970 of the last sign of life.
    updated: Option<f64>,
    method: Option<String>,
    backbone: Option<String>,
    /// What it ended with.
    error: Option<String>,
    /// What could not be read.
    damage: Vec<String>,
    last: BTreeMap<String, f64>,
    best: BTreeMap<String, Best>,
}

/// A metric's best value, and when it was reached.
#[derive(Debug, Serialize)]
struct Best {
    value: f64,
    step: u64,
}

impl LsArgs {
    pub fn run(self) -> anyhow::Result<()> {
        let runs = match find_runs(&self.directory) {
            Ok(runs) => runs,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Usage(format!(
                    "there is no directory {}: training makes it (run.dir), or name another one",
                    self.directory.display()
                ))
                .into());
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", self.directory.display()));
            }
        };
        let mut lines: Vec<Line> =
            runs.iter().map(|path| Line::of(&self.directory, &SavedRun::read(path))).collect();
        lines.sort_by(|a, b| b.updated.unwrap_or(0.0).total_cmp(&a.updated.unwrap_or(0.0)));
        if let Some(wanted) = &self.sort
            && !lines.is_empty()
        {
            let metric = metric_named(wanted, &lines)?;
            let worst = if lower_is_better(&metric) { f64::INFINITY } else { f64::NEG_INFINITY };
            let sign = if lower_is_better(&metric) { 1.0 } else { -1.0 };
            let value = |line: &Line| line.best.get(&metric).map_or(worst, |best| best.value);
            lines.sort_by(|a, b| (sign * value(a)).total_cmp(&(sign * value(b))));
        }
        print(self.format, &lines, |lines, out| match lines.as_slice() {
            [] => writeln!(
                out,
                "There are no runs in {}. A run lies in <run.dir>/<run.name>/version_<n>; \
                 `jepa-host --plugin … --config …` makes one.",
                self.directory.display()
            ),
            lines => print_table(lines, out),
        })
    }
}

impl Line {
    fn of(root: &Path, run: &SavedRun) -> Self {
        let metrics = run.metrics();
        let last = |metric: &&str| Some(((*metric).to_owned(), run.last(metric)?));
        let best = |metric: &&str| {
            let (step, value) = run.best(metric)?;
            Some(((*metric).to_owned(), Best { value, step }))
        };
        let below = run.path.strip_prefix(root).ok().filter(|path| path.components().count() > 1);
        Line {
            run: below.map_or_else(|| run.name.clone(), |path| path.display().to_string()),
            path: run.path.clone(),
            status: run.status,
            resumable: run.is_resumable(),
            step: run.step(),
            total_steps: run.total_steps,
            epoch: run.epoch(),
            epochs: run.epochs(),
            updated: run.updated,
            method: run.setting("method.name").map(str::to_owned),
            backbone: run.setting("backbone.name").map(str::to_owned),
            error: run.error.clone(),
            damage: run.damage.clone(),
            last: metrics.iter().filter_map(last).collect(),
            best: metrics.iter().filter_map(best).collect(),
        }
    }

    fn cells(&self, now: f64) -> Vec<String> {
        let of = |done: String, all: Option<String>| match all {
            Some(all) => format!("{done}/{all}"),
            None => done,
        };
        let status = match self.resumable {
            true => format!("{}, resumable", self.status.text()),
            false => self.status.text().to_owned(),
        };
        let epoch = format!("{:.1}", self.epoch);
        let mut cells = vec![
            self.run.clone(),
            status,
            of(count(self.step as i64), self.total_steps.map(|total| count(total as i64))),
            of(epoch.trim_end_matches(".0").to_owned(), self.epochs.map(|epochs| epochs.to_string())),
            self.updated.map_or(NOTHING.to_owned(), |time| ago(now - time)),
        ];
        for (_, metric) in COLUMNS {
            let last = self.last.get(metric).map(|value| value_of(metric, *value));
            let best = self.best.get(metric).map(|best| value_of(metric, best.value));
            cells.push(match (last, best) {
                (Some(last), Some(best)) if last != best => format!("{last} (best {best})"),
                (Some(last), _) => last,
                (None, _) => NOTHING.to_owned(),
            });
        }
        cells
    }
}

/// The full name of the metric that `wanted` means.
fn metric_named(wanted: &str, lines: &[Line]) -> Result<String, Usage> {
    let short = COLUMNS.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted));
    let wanted = short.map_or(wanted, |(_, metric)| metric);
    let known: BTreeSet<&str> = lines.iter().flat_map(|line| line.last.keys().map(String::as_str)).collect();
    if known.contains(wanted) || short.is_some() {
        return Ok(wanted.to_owned());
    }
    let close = nearest(wanted, known.iter().copied().chain(COLUMNS.map(|(name, _)| name)));
    let close = close.map_or(String::new(), |close| format!(" (did you mean {close}?)"));
    Err(Usage(format!(
        "no run has a metric {wanted}{close}: --sort takes linear, knn, loss, or a name in metrics.jsonl"
    )))
}

fn print_table(lines: &[Line], out: &mut dyn Write) -> io::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let head = ["run", "status", "step", "epoch", "updated"].into_iter().chain(COLUMNS.map(|(name, _)| name));
    let rows =
        lines.iter().map(|line| (line.cells(now), line.error.iter().chain(&line.damage).cloned().collect()));
    print_columns(head.map(str::to_owned).collect(), &rows.collect::<Vec<_>>(), out)
}
