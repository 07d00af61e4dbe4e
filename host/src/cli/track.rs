//! `jepa-host track`: a run's records, sent to trackers once more, or as CSV.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;

use super::exit::Usage;
use super::output::{Format, print, print_text};
use super::trackers::wandb;
use crate::checkpoint::{RunDir, find_run};
use crate::config::{Layers, WandbMode};
use crate::track::tensorboard::TensorBoard;
use crate::track::wandb::{Wandb, WandbRun};
use crate::track::{METRICS_FILE, Record, Replayed, Tracker, replay};

#[derive(Debug, Subcommand)]
pub(super) enum TrackCommand {
    Replay(ReplayArgs),
    Csv(CsvArgs),
}

const REPLAY_HELP: &str = "\
W&B gets what it lacks: the records that were lost, or all of them, under the run's own id. TensorBoard's file is written
anew.
  jepa-host track replay runs/demo --to tensorboard
  jepa-host track replay runs/demo/version_0 --to wandb track.wandb.mode=offline
  wandb sync runs/demo/version_0/wandb/offline-run-*";

/// Send the records of a run to a tracker, from its metrics.jsonl
#[derive(Debug, Args)]
#[command(after_help = REPLAY_HELP)]
pub(super) struct ReplayArgs {
    /// A run directory (its newest version is taken), or a version
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// The tracker
    #[arg(long, value_enum)]
    to: To,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Settings that differ from the run's, such as track.wandb.project=cells
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum To {
    /// Weights & Biases: online, unless track.wandb.mode or WANDB_MODE is offline
    Wandb,
    /// TensorBoard's event files in the run's directory
    Tensorboard,
}

/// Print the records of a run as CSV: a row a record, a column a metric
#[derive(Debug, Args)]
pub(super) struct CsvArgs {
    /// A run directory (its newest version is taken), or a version
    #[arg(value_name = "RUN")]
    run: PathBuf,
}

impl TrackCommand {
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            TrackCommand::Replay(args) => args.run(),
            TrackCommand::Csv(args) => args.run(),
        }
    }
}

impl ReplayArgs {
    fn run(self) -> anyhow::Result<()> {
        let path = find_run(&self.run)?;
        let metrics = path.join(METRICS_FILE);
        // Nothing should be left of a tracker that gets nothing.
        if std::fs::metadata(&metrics).map_or(0, |file| file.len()) == 0 {
            return Err(Usage(format!("{} has no records: there is nothing to send", path.display())).into());
        }
        // While a run trains it feeds its trackers itself.
        let run = RunDir::open(&path)?;
        let tracker: Box<dyn Tracker> = match self.to {
            To::Tensorboard => Box::new(TensorBoard::new(run.path())),
            To::Wandb => Box::new(Wandb::new(self.wandb(&run)?)),
        };
        let replayed = replay(&metrics, tracker, 0)?;
        let mut report = json!(replayed);
        report["run"] = json!(path);
        print(self.format, &report, |_, out| {
            let Replayed { records, known, place, advice } = &replayed;
            let had = if *known > 0 { format!(", which had {known} already") } else { String::new() };
            writeln!(out, "{records} records of {} sent to {place}{had}", path.display())?;
            advice.iter().try_for_each(|advice| writeln!(out, "{advice}"))
        })
    }

    fn wandb(&self, run: &RunDir) -> anyhow::Result<WandbRun> {
        let file = Some(run.path().join("config.toml"));
        let layers = Layers { file, overrides: self.overrides.clone(), ..Layers::default() };
        let config = layers.with_process_environment().load()?.config;
        let offline = |mode: &str| std::env::var("WANDB_MODE").is_ok_and(|value| value == mode);
        let wanted = match config.track.wandb.mode {
            Some(WandbMode::Offline) => WandbMode::Offline,
            None if offline("offline") => WandbMode::Offline,
            _ => WandbMode::Online,
        };
        let name = run.path().parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
        let name = format!("{name}/{}", run.version());
        let found = wandb(&config, run.path(), &name, Some(wanted))?;
        Ok(WandbRun { live: false, ..found.context("W&B is off")? })
    }
}

impl CsvArgs {
    fn run(self) -> anyhow::Result<()> {
        let path = find_run(&self.run)?.join(METRICS_FILE);
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        // The last line of a run that was killed may be cut.
        let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let parse = |(index, line): (usize, &str)| {
            serde_json::from_str::<Record>(line)
                .with_context(|| format!("{}:{} is no record", path.display(), index + 1))
        };
        let records: Vec<Record> = whole.enumerate().map(parse).collect::<anyhow::Result<_>>()?;
        let names: BTreeSet<&String> = records.iter().flat_map(|record| record.figures.keys()).collect();
        print_text(|out| {
            write!(out, "step,epoch,time")?;
            names.iter().try_for_each(|name| write!(out, ",{name}"))?;
            writeln!(out)?;
            for record in records.iter().filter(|record| !record.figures.is_empty()) {
                write!(out, "{},{},", record.step, record.epoch)?;
                write!(out, "{}", record.time.map(|time| time.to_string()).unwrap_or_default())?;
                for name in &names {
                    let value = record.figures.get(*name).map(|value| value.to_string());
                    write!(out, ",{}", value.unwrap_or_default())?;
                }
                writeln!(out)?;
            }
            Ok(())
        })
    }
}
