//! `jepa-host sweep`: the YAML of a W&B sweep, run on this machine.

use std::env;
use std::io::{self, Write};
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::Context as _;
use clap::Args;

use super::exit::Usage;
use super::output::{Format, NOTHING, print, print_columns, print_text};
use crate::config::Device;
use crate::device::choose;
use crate::report::format::{in_figures, value_of};
use crate::sweep::{
    Definition, Leaderboard, Point, Resources, Row, Scheduler, Search, Standing, SweepDir, Trial, rehearse,
};
use crate::track::console;
use crate::train::Signals;

const ON_SIGNAL: &str = "ending all trials, with a checkpoint each; run the same command again to go on. A second signal ends them at once";

/// So many commands of an endless search are shown.
const SAMPLE: u64 = 10;

const EXAMPLES: &str = "\
Examples:
  jepa-host sweep examples/sweep.yaml --dry-run --count 5
  jepa-host sweep examples/sweep.yaml --parallel 2
  jepa-host sweep examples/sweep.yaml --leaderboard
  jepa-host sweep sweep.yaml --parallel 4 --gpus 0,1,2,3

The file is one of `wandb sweep`: method grid or random, parameters, metric, early_terminate, run_cap, command. No
account is needed. A trial is a run in DIR/trial-0001, and so on; running the same command again goes on where the
sweep stopped. Relative paths, those in FILE too, begin in the folder that the sweep is started in. A script as program
must `exec` jepa-host with all of its arguments: before the first trial it is asked with --print-config whether it takes
them, and SIGTERM tells it to end.

Trials that run at a time share the cores: each one computes (trainer.threads) and loads images (data.threads) with its
share, unless FILE, its configuration or the environment (OMP_NUM_THREADS, JEPA_DATA__THREADS) says otherwise.";

/// Try settings: run the YAML of a W&B sweep on this machine, without W&B
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct SweepArgs {
    /// The definition of the sweep
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Where its trials lie [default: runs/<name of the sweep>]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Begin at most so many trials now; run_cap of FILE is how many there may be in all
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// Run so many trials at a time, which share the cores [default: 1, or one for each of --gpus]
    #[arg(long, value_name = "N")]
    parallel: Option<NonZeroUsize>,
    /// Deal trials to these CUDA devices
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    gpus: Vec<String>,
    /// What random draws depend on
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Give trials that have failed another chance
    #[arg(long)]
    retry: bool,
    /// Print the commands of the trials, and run none
    #[arg(long, conflicts_with = "leaderboard")]
    dry_run: bool,
    /// Print how the trials stand, and run none
    #[arg(long)]
    leaderboard: bool,
    /// How to print the leaderboard
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl SweepArgs {
    pub fn run(self) -> anyhow::Result<()> {
        let definition = Definition::read(&self.file)?;
        let directory = self.directory(&definition)?;
        self.check_gpus()?;
        if self.leaderboard {
            return self.print(&Leaderboard::read(&directory, &definition)?);
        }
        for doubt in definition.doubts() {
            tracing::warn!("{}: {doubt}", self.file.display());
        }
        let search = Search::new(&definition, self.seed).map_err(Usage)?;
        let total = [search.len(), definition.run_cap.map(NonZeroU64::get)].into_iter().flatten().min();
        if self.dry_run {
            return self.print_commands(&definition, &search, total, &directory);
        }
        if total.or(self.count).is_none() {
            return Err(Usage(format!(
                "{}: a random search does not end by itself: add run_cap to it, or --count N here",
                self.file.display()
            ))
            .into());
        }
        if !self.gpus.is_empty() {
            choose(Device::Cuda(None), 0).context("--gpus")?;
        }
        let signals = Signals::install(ON_SIGNAL).context("cannot take over signals")?;
        let held = SweepDir::open(&directory, &definition, &self.file)?;
        tracing::info!("sweep {} in {}", definition.name, directory.display());
        let bar = console::counter(total);
        let resources = self.resources();
        let mut scheduler =
            Scheduler::new(definition.clone(), search, held, resources, self.count, bar.clone())?;
        if self.retry {
            scheduler.retry()?;
        }
        let ended = scheduler.run(&signals);
        bar.finish_and_clear();
        let board = Leaderboard::read(&directory, &definition);
        let printed = match &board {
            Ok(board) if board.trials.is_empty() && ended.is_err() => Ok(()),
            Ok(board) => self.print(board),
            Err(error) => Err(anyhow::anyhow!("{error}")),
        };
        if let (Err(error), true) = (&printed, ended.is_err()) {
            tracing::warn!("no leaderboard: {error:#}");
        }
        ended?;
        printed?;
        let board = board?;
        let failed = board.trials.iter().filter(|row| row.standing == Standing::Failed).count();
        anyhow::ensure!(
            failed == 0,
            "{failed} of {} trials have failed: --retry runs them again",
            board.trials.len()
        );
        Ok(())
    }

    fn directory(&self, definition: &Definition) -> Result<PathBuf, Usage> {
        let Some(directory) = &self.dir else {
            return match definition.name.contains(['/', '\\']) || definition.name.starts_with('.') {
                true => Err(Usage(format!("name: {} is no name for a folder: add --dir", definition.name))),
                false => Ok(PathBuf::from("runs").join(&definition.name)),
            };
        };
        match directory.to_str() {
            Some(_) => Ok(directory.clone()),
            None => Err(Usage(format!("--dir {} is not UTF-8, which settings are", directory.display()))),
        }
    }

    /// Whether `--gpus` names devices as CUDA does.
    fn check_gpus(&self) -> Result<(), Usage> {
        let is_device = |gpu: &&String| {
            gpu.parse::<u32>().is_ok() || ["GPU-", "MIG-"].iter().any(|prefix| gpu.starts_with(prefix))
        };
        match self.gpus.iter().find(|gpu| !is_device(gpu)) {
            Some(gpu) => Err(Usage(format!(
                "--gpus: {gpu:?} is no CUDA device: give numbers such as 0,1, or names such as GPU-…"
            ))),
            None => Ok(()),
        }
    }

    fn resources(&self) -> Resources {
        let parallel = self.parallel.map_or(self.gpus.len().max(1), NonZeroUsize::get);
        let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let set = env::var("OMP_NUM_THREADS").ok().and_then(|threads| threads.parse().ok());
        let share = (cores / parallel).max(1);
        Resources {
            parallel,
            gpus: self.gpus.clone(),
            threads: set.unwrap_or(share),
            loaders: (parallel > 1).then_some(share),
        }
    }

    fn print_commands(
        &self,
        definition: &Definition,
        search: &Search,
        total: Option<u64>,
        directory: &Path,
    ) -> anyhow::Result<()> {
        let count = [total, self.count].into_iter().flatten().min().unwrap_or(SAMPLE);
        let threads = self.resources().threads;
        let trial =
            |number| Some(Trial::new(number + 1, search.trial(number)?, definition, directory, threads));
        print_text(|out| {
            for trial in (0..count).map_while(trial) {
                writeln!(out, "{}", trial.command.join(" "))?;
            }
            match total {
                Some(total) if total <= count => Ok(()),
                Some(total) => writeln!(out, "and {} more", total - count),
                None => writeln!(out, "and so on without an end"),
            }
        })?;
        if let Some(first) = trial(0) {
            rehearse(&first)?;
        }
        Ok(())
    }

    fn print(&self, board: &Leaderboard) -> anyhow::Result<()> {
        print(self.format, board, |board, out| print_table(board, out))
    }
}

fn print_table(board: &Leaderboard, out: &mut dyn Write) -> io::Result<()> {
    let mut head = vec!["trial".to_owned(), "status".to_owned()];
    if let Some(metric) = &board.metric {
        head.extend([metric.clone(), "at step".to_owned(), "last".to_owned()]);
    }
    head.extend(board.varied.iter().cloned());
    let rows = board.trials.iter().map(|row| {
        let lines = row.why.iter().cloned().collect();
        (cells(row, board.metric.as_deref(), &board.varied), lines)
    });
    print_columns(head, &rows.collect::<Vec<_>>(), out)
}

fn cells(row: &Row, metric: Option<&str>, names: &[String]) -> Vec<String> {
    let mut cells = vec![row.trial.clone(), row.standing.text().to_owned()];
    if let Some(metric) = metric {
        let value =
            |value: Option<Point>| value.map_or(NOTHING.to_owned(), |value| value_of(metric, value.value));
        cells.push(value(row.best));
        cells.push(row.best.map_or(NOTHING.to_owned(), |best| best.step.to_string()));
        cells.push(value(row.last));
    }
    let parameter = |name: &String| row.parameters.get(name).map_or(NOTHING.to_owned(), in_figures);
    cells.extend(names.iter().map(parameter));
    cells
}
