//! What a person at a terminal sees: one progress bar, and log lines that do not tear it. Without a terminal, a plain
//! line for each record.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IsTerminal as _, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::writer::OptionalWriter;

/// One step, for the bar.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Steps done.
    pub step: u64,
    /// Epochs done.
    pub epoch: u64,
    /// Epochs in all.
    pub epochs: u64,
    /// Mean loss since the last log line.
    pub loss: f64,
    /// Training images per second.
    pub images_per_s: f64,
    /// Share of time spent waiting for data, 0 to 1.
    pub data_wait: f64,
}

/// The bars of this process; log lines go around them.
fn bars() -> &'static MultiProgress {
    static BARS: OnceLock<MultiProgress> = OnceLock::new();
    BARS.get_or_init(MultiProgress::new)
}

/// A bar that counts up to `total` or without an end, around which log lines go; hidden without a terminal.
pub fn counter(total: Option<u64>) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match total {
        Some(total) => (ProgressBar::new(total), "{bar:24} {pos}/{len} {msg}"),
        None => (ProgressBar::no_length(), "{pos} {msg}"),
    };
    bars().add(bar.with_style(ProgressStyle::with_template(template).expect("a valid template")))
}

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verbosity {
    /// Warnings and errors.
    Quiet,
    /// And what happens.
    Normal,
    /// And why.
    Verbose,
}

/// Sends `tracing` events to the standard error, around progress bars. `RUST_LOG` wins over `verbosity`.
pub fn init_logging(verbosity: Verbosity) {
    let default = match verbosity {
        Verbosity::Quiet => "warn",
        // What happens, the first tells.
        Verbosity::Normal if RANK.load(Ordering::Relaxed) > 0 => "warn",
        Verbosity::Normal => "info",
        Verbosity::Verbose => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let color = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    // A second call, as in a test, leaves the first in place.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(verbosity == Verbosity::Verbose)
        .without_time()
        .with_ansi(color)
        .with_writer(AroundBars)
        .try_init();
}

/// The file's name in a run directory.
pub const CONSOLE_FILE: &str = "console.log";

/// Keeps log lines in `console.log` of `directory` too, from now on.
///
/// # Errors
/// When the file cannot be opened.
pub fn keep_log(directory: &Path) -> anyhow::Result<()> {
    let path = directory.join(CONSOLE_FILE);
    let file = File::options().create(true).append(true).open(&path);
    *log_file() = Some(file.with_context(|| format!("cannot open {}", path.display()))?);
    Ok(())
}

fn log_file() -> MutexGuard<'static, Option<File>> {
    static FILE: Mutex<Option<File>> = Mutex::new(None);
    FILE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The text without the codes that color it: from an escape to the next letter.
fn without_colors(bytes: &[u8]) -> Vec<u8> {
    let mut in_code = false;
    let visible = |byte: &u8| {
        let hidden = in_code || *byte == 0x1b;
        in_code = hidden && !byte.is_ascii_alphabetic();
        !hidden
    };
    bytes.iter().copied().filter(visible).collect()
}

struct AroundBars;

impl<'a> MakeWriter<'a> for AroundBars {
    type Writer = OptionalWriter<AroundBars>;
    fn make_writer(&'a self) -> Self::Writer {
        OptionalWriter::some(AroundBars)
    }
    fn make_writer_for(&'a self, about: &tracing::Metadata<'_>) -> Self::Writer {
        let heard = *about.level() == tracing::Level::ERROR || !MUTED.load(Ordering::Relaxed);
        if heard { OptionalWriter::some(AroundBars) } else { OptionalWriter::none() }
    }
}

/// The number of this process among the ranks of a run: the first needs none.
static RANK: AtomicU32 = AtomicU32::new(0);
/// Whether warnings of this process are those of the first, too.
static MUTED: AtomicBool = AtomicBool::new(false);

/// This process is one of several: it names itself, and says nothing but errors as long as it does what the first does.
pub fn speak_as(rank: u32) {
    RANK.store(rank, Ordering::Relaxed);
    MUTED.store(rank > 0, Ordering::Relaxed);
}

/// From here on this process does what others do not, and what it says matters.
pub fn speak_up() {
    MUTED.store(false, Ordering::Relaxed);
}

/// What lines begin with: the number of a rank that is not the first.
pub fn speaker() -> String {
    match RANK.load(Ordering::Relaxed) {
        0 => String::new(),
        rank => format!("rank {rank}: "),
    }
}

impl Write for AroundBars {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(file) = &mut *log_file() {
            // A full disk must not end the run, and there is nowhere to say so.
            let _ = file.write_all(&without_colors(bytes));
        }
        let line = [speaker().as_bytes(), bytes].concat();
        bars().suspend(|| io::stderr().write_all(&line))?;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Without a terminal, a sign of life comes at least so often.
const SILENCE: Duration = Duration::from_secs(30);

pub(super) struct Console {
    /// Shows nothing.
    silent: bool,
    terminal: bool,
    bar: Option<ProgressBar>,
    /// The last step.
    end: u64,
    last_line: Instant,
}

impl Console {
    pub fn new() -> Self {
        let terminal = io::stderr().is_terminal();
        Console { silent: false, terminal, bar: None, end: 0, last_line: Instant::now() }
    }

    pub fn silent() -> Self {
        Console { silent: true, terminal: false, ..Console::new() }
    }

    pub fn start(&mut self, from: u64, to: u64) {
        self.end = to;
        if self.silent {
            return;
        }
        if !self.terminal {
            tracing::info!("steps {from} to {to}");
            return;
        }
        let style =
            ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}  {eta} left").expect("a valid template");
        let bar = bars().add(ProgressBar::new(to).with_style(style));
        bar.set_position(from);
        bar.reset_eta();
        self.bar = Some(bar);
    }

    pub fn step(&mut self, report: &StepReport) {
        let Some(bar) = &self.bar else {
            if self.last_line.elapsed() > SILENCE && !self.silent {
                self.last_line = Instant::now();
                let (step, end) = (report.step, self.end);
                tracing::info!(
                    "step {step}/{end}  loss {:.4}  {:.1} images/s",
                    report.loss,
                    report.images_per_s
                );
            }
            return;
        };
        bar.set_position(report.step);
        bar.set_message(format!(
            "epoch {}/{}  loss {:.4}  {:.0} images/s  data wait {:.0}%",
            report.epoch + 1,
            report.epochs,
            report.loss,
            report.images_per_s,
            100.0 * report.data_wait
        ));
    }

    pub fn note(&mut self, what: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(what.to_owned()),
            None => tracing::debug!("{what}"),
        }
    }

    /// Training figures are on the bar already; others, and all of them without a terminal, get a line.
    pub fn log(&mut self, step: u64, epoch: f64, figures: &BTreeMap<String, f64>) {
        let of_any = |name: &str, kinds: &[&str]| kinds.iter().any(|kind| name.starts_with(kind));
        let training = figures.keys().all(|name| of_any(name, &["train/", "time/"]));
        if self.silent || training && self.bar.is_some() {
            return;
        }
        let shown =
            |name: &&String| MAIN.contains(&name.as_str()) || !of_any(name, &["train/", "time/", "eval/"]);
        let text: Vec<String> = figures
            .iter()
            .filter(|(name, _)| shown(name))
            .map(|(name, value)| format!("{} {}", short(name), number(*value)))
            .collect();
        self.last_line = Instant::now();
        tracing::info!("step {step}/{}  epoch {epoch:.2}  {}", self.end, text.join("  "));
    }

    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// The figures of training and evaluation that fit on a line.
const MAIN: [&str; 8] = [
    "train/loss",
    "train/lr",
    "train/images_per_s",
    "train/data_wait",
    "eval/linear_top1",
    "eval/knn_top1",
    "eval/rankme",
    "eval/spread",
];

fn short(name: &str) -> &str {
    name.strip_prefix("train/").or_else(|| name.strip_prefix("eval/")).unwrap_or(name)
}

fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        small if small < 1e-3 => format!("{value:.2e}"),
        large if large >= 1000.0 => format!("{value:.0}"),
        _ => format!("{value:.4}"),
    }
}
