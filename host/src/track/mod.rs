//! Where a run's figures go: the console for people, `metrics.jsonl` for everything else.

pub mod console;
mod jsonl;

use std::collections::BTreeMap;
use std::path::Path;

use console::Console;
pub use console::StepReport;
use jsonl::Jsonl;
pub use jsonl::METRICS_FILE;

/// All trackers of a run.
pub struct Trackers {
    jsonl: Jsonl,
    console: Console,
}

impl Trackers {
    /// Trackers that append to `metrics.jsonl` in `directory`.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(directory: &Path) -> anyhow::Result<Self> {
        Ok(Trackers { jsonl: Jsonl::open(&directory.join(METRICS_FILE))?, console: Console::new() })
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
        self.jsonl.append(step, epoch, figures);
    }

    /// Brings `metrics.jsonl` to the disk and returns how many lines it has.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn sync(&mut self) -> anyhow::Result<u64> {
        self.jsonl.sync()
    }

    /// Takes the progress bar away.
    pub fn finish(&mut self) {
        self.console.finish();
    }
}
