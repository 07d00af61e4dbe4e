//! The command line: one file per subcommand, each of them thin.

mod bench;
mod check;
mod data;
mod doctor;
mod embed;
mod eval;
mod exit;
mod export;
mod ls;
mod output;
mod plugin;
mod report;
mod session;
mod settings;
mod sweep;
mod track;
mod trackers;
mod train;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory as _, Parser, Subcommand};
use serde_json::json;

use self::exit::Usage;
use crate::config::Config;
use crate::device::{begin_with_calm_threads, keep_freed_memory};
use crate::dist::Launch;
use crate::plugin::{Admission, Lock, PluginSources};
use crate::track::console::{self, Verbosity, init_logging};

const ABOUT: &str = "Pretrain convolutional networks without labels, with methods and backbones as plugins";

const EXAMPLES: &str = "\
Examples:
  jepa-host --plugin libcnn_jepa.so --config configs/demo.toml
  jepa-host --plugin cnn_jepa --config configs/demo.toml optimizer.lr=0.02 trainer.epochs=20
  jepa-host --plugin cnn_jepa --config configs/demo.toml --resume auto
  jepa-host plugin info cnn_jepa
  jepa-host settings data
  jepa-host ls
  jepa-host report runs/demo
  jepa-host sweep examples/sweep.yaml --parallel 2
  jepa-host bench step --plugin cnn_jepa --config configs/demo.toml
  jepa-host data pack photos/ photos.h5
  torchrun --no-python --nproc-per-node 2 jepa-host --plugin cnn_jepa --config configs/demo.toml

Training needs no subcommand: `jepa-host --plugin …` is `jepa-host train --plugin …`.

Exit codes:
  0  done                    4  data is missing or corrupt
  1  anything else           5  training diverged
  2  usage or configuration  6  a plugin failed while running
  3  a plugin was refused    130, 138, 143  interrupted, after a checkpoint";

/// The parsed command line.
#[derive(Debug, Parser)]
#[command(name = "jepa-host", version, about = ABOUT, after_help = EXAMPLES, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: train::TrainArgs,
    #[command(flatten)]
    common: Common,
}

/// Options of every subcommand.
#[derive(Clone, Debug, clap::Args)]
struct Common {
    /// Look for plugins in this folder first; may be repeated
    #[arg(long, global = true, value_name = "DIR", help_heading = "Plugins")]
    plugin_dir: Vec<PathBuf>,
    /// Load those plugin files only that this one lists, see `plugin lock`
    #[arg(long, global = true, value_name = "FILE", help_heading = "Plugins")]
    plugin_lock: Option<PathBuf>,
    /// Load plugin files too that every user may write, or that belong to others
    #[arg(long, global = true, help_heading = "Plugins")]
    allow_untrusted_plugins: bool,
    /// Say why, not only what: debug messages and their sources
    #[arg(short, long, global = true, conflicts_with = "quiet")]
    verbose: bool,
    /// Say nothing but results, warnings and errors
    #[arg(short, long, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Pretrain (the default: `train` may be left out)
    Train(train::TrainArgs),
    /// List plugins, and what they offer
    #[command(subcommand)]
    Plugin(plugin::PluginCommand),
    /// List the host's settings: defaults, choices, and what they mean
    Settings(settings::SettingsArgs),
    /// Pack, inspect, verify and time image data sets
    #[command(subcommand)]
    Data(data::DataCommand),
    /// Judge a trained model
    #[command(subcommand)]
    Eval(eval::EvalCommand),
    Embed(embed::EmbedArgs),
    Export(export::ExportArgs),
    Ls(ls::LsArgs),
    Report(report::ReportArgs),
    Sweep(sweep::SweepArgs),
    /// Send a run's records to W&B or TensorBoard, or print them as CSV
    #[command(subcommand)]
    Track(track::TrackCommand),
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Show what is installed and what is missing
    Doctor(doctor::DoctorArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| explain(error).exit());
    if let Ok(Some(launch)) = Launch::from_environment() {
        console::speak_as(launch.rank);
    }
    init_logging(match (cli.common.quiet, cli.common.verbose) {
        (true, _) => Verbosity::Quiet,
        (_, true) => Verbosity::Verbose,
        _ => Verbosity::Normal,
    });
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            exit::report(&error);
            let code = exit::code(&error);
            exit::die_of_signal(code);
            ExitCode::from(code)
        }
    }
}

/// Who writes a setting with dashes is told how settings are written; the parser's own advice leads astray.
fn explain(mut error: clap::Error) -> clap::Error {
    let given = match (error.kind(), error.get(ContextKind::InvalidArg)) {
        (ErrorKind::UnknownArgument, Some(ContextValue::String(given))) => {
            given.trim_start_matches('-').to_owned()
        }
        _ => return error,
    };
    let settings = json!(Config::default());
    let sections = settings.as_object().into_iter().flatten();
    let mut keys = sections.flat_map(|(section, keys)| {
        keys.as_object().into_iter().flat_map(|keys| keys.keys()).map(move |key| format!("{section}.{key}"))
    });
    let key = keys.find(|key| *key == given || key.split_once('.').is_some_and(|(_, name)| name == given));
    if let Some(key) = key {
        let advice = format!("a setting is written {key}=…, without dashes");
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![advice.into()]));
    }
    error
}

/// Whether a command computes for so long that its threads should give way to other processes.
fn computes(command: Option<&Command>) -> bool {
    matches!(
        command,
        None | Some(
            Command::Train(_)
                | Command::Eval(_)
                | Command::Embed(_)
                | Command::Bench(_)
                | Command::Data(data::DataCommand::Bench(_))
        )
    )
}

fn run(cli: Cli) -> anyhow::Result<()> {
    if computes(cli.command.as_ref()) {
        if let Err(error) = begin_with_calm_threads() {
            tracing::warn!("compute threads will spin: this program cannot begin anew: {error}");
        }
        keep_freed_memory();
    }
    let Common { plugin_dir, plugin_lock, allow_untrusted_plugins: allow_untrusted, .. } = cli.common;
    let lock = plugin_lock.as_deref().map(Lock::read).transpose()?;
    let sources = PluginSources::new(&plugin_dir, Admission { allow_untrusted, lock });
    match cli.command {
        Some(_) if !cli.train.is_empty() => Err(Usage(
            "options of training stand before a subcommand: write them after `train`, or leave the subcommand out"
                .to_owned(),
        )
        .into()),
        None => cli.train.run(&sources),
        Some(Command::Train(args)) => args.run(&sources),
        Some(Command::Plugin(command)) => command.run(&sources),
        Some(Command::Settings(args)) => args.run(),
        Some(Command::Data(command)) => command.run(&sources),
        Some(Command::Eval(command)) => command.run(&sources),
        Some(Command::Embed(args)) => args.run(&sources),
        Some(Command::Export(args)) => args.run(),
        Some(Command::Ls(args)) => args.run(),
        Some(Command::Report(args)) => args.run(&sources),
        Some(Command::Sweep(args)) => args.run(),
        Some(Command::Track(command)) => command.run(),
        Some(Command::Bench(command)) => command.run(&sources),
        Some(Command::Doctor(args)) => args.run(&sources),
        Some(Command::Completions { shell }) => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "jepa-host", &mut script);
            output::print_text(|out| out.write_all(&script))
        }
    }
}
