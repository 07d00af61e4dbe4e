//! Where a run's figures go: the console for people, `metrics.jsonl` for everything else.

pub mod console;
mod examples;
mod follow;
mod histogram;
mod jsonl;
mod record;
pub mod tensorboard;
pub mod wandb;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use console::Console;
pub use console::StepReport;
use examples::write_examples;
use follow::Follower;
pub use follow::{Replayed, Tracker, replay};
pub use histogram::Histogram;
use jepa_plugin_api::ViewSpec;
use jepa_plugin_api::tch::Tensor;
use jsonl::Jsonl;
pub use jsonl::METRICS_FILE;
pub use record::{Record, lower_is_better};

/// All trackers of a run.
pub struct Trackers {
    /// None where another process records.
    jsonl: Option<Jsonl>,
    console: Console,
    followers: Vec<Follower>,
    run: PathBuf,
}

impl Trackers {
    /// Trackers that append to `metrics.jsonl` in `directory`, which `others` follow.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(directory: &Path, others: Vec<Box<dyn Tracker>>) -> anyhow::Result<Self> {
        let metrics = directory.join(METRICS_FILE);
        let jsonl = Jsonl::open(&metrics)?;
        let followers = others.into_iter().map(|tracker| Follower::start(metrics.clone(), tracker));
        Ok(Trackers {
            jsonl: Some(jsonl),
            console: Console::new(),
            followers: followers.collect::<anyhow::Result<_>>()?,
            run: directory.to_owned(),
        })
    }

    /// None: another process records the same run.
    pub fn none() -> Self {
        Trackers { jsonl: None, console: Console::silent(), followers: Vec::new(), run: PathBuf::new() }
    }

    /// Shows that training goes from step `from` to step `to`.
    pub fn start(&mut self, from: u64, to: u64) {
        self.console.start(from, to);
    }

    /// Moves the progress bar.
    pub fn step(&mut self, report: &StepReport) {
        self.console.step(report);
    }

    /// Says what the run is doing when it is not training.
    pub fn note(&mut self, what: &str) {
        self.console.note(what);
    }

    /// Records figures at a step; `epoch` counts with its fraction. A disk that does not take them is reported, and
    /// [`sync`](Trackers::sync) fails until it does.
    pub fn log(&mut self, step: u64, epoch: f64, figures: &BTreeMap<String, f64>) {
        self.console.log(step, epoch, figures);
        self.append(Record { figures: figures.clone(), ..Record::at(step, epoch) });
    }

    /// Records the first images of each tensor in `columns`, f32 `(B, 3, S, S)` as `views` normalise, by its name. When
    /// they cannot be written, on a full disk for one, that is said, and the record has no images.
    pub fn log_examples(&mut self, step: u64, epoch: f64, views: &[ViewSpec], columns: &[(String, Tensor)]) {
        if self.jsonl.is_none() {
            return;
        }
        let images = write_examples(&self.run, step, views, columns).unwrap_or_else(|error| {
            tracing::warn!("no example images of step {step}: {error:#}");
            BTreeMap::new()
        });
        self.append(Record { images, ..Record::at(step, epoch) });
    }

    /// Records how the numbers of some tensors are distributed.
    pub fn log_histograms(&mut self, step: u64, epoch: f64, histograms: BTreeMap<String, Histogram>) {
        self.append(Record { histograms, ..Record::at(step, epoch) });
    }

    fn append(&mut self, record: Record) {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).ok().map(|time| time.as_secs_f64());
        if let Some(jsonl) = &mut self.jsonl {
            jsonl.append(&Record { time, ..record });
        }
        self.followers.iter().for_each(Follower::news);
    }

    /// Brings `metrics.jsonl` to the disk and returns how many lines it has.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn sync(&mut self) -> anyhow::Result<u64> {
        self.jsonl.as_mut().map_or(Ok(0), Jsonl::sync)
    }

    /// Takes the progress bar away.
    pub fn finish(&mut self) {
        self.console.finish();
    }

    /// The run has ended with `exit_code`: whoever follows gets `patience` to take what is missing. What fails is said,
    /// and is no failure of the run.
    pub fn close(self, exit_code: i32, patience: Duration) {
        let deadline = Instant::now() + patience;
        for follower in self.followers {
            let name = follower.name();
            match follower.finish(exit_code, deadline) {
                Ok(advice) => advice.iter().for_each(|advice| tracing::info!("{name}: {advice}")),
                Err(error) => {
                    let run = self.run.display();
                    tracing::warn!(
                        "{name}: {error:#}; what is missing is in {run}/{METRICS_FILE}: jepa-host track replay {run} --to {}",
                        name.to_lowercase().replace('&', "and")
                    );
                }
            }
        }
    }
}
