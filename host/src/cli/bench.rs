//! `jepa-host bench`: where the time of a training step goes, for these settings on this machine.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde::Serialize;

use super::output::{Format, print, print_columns};
use super::session::Session;
use super::train::{Prepared, Purpose, begin_trace, join_ranks, prepare};
use crate::checkpoint::RunDir;
use crate::config::Layers;
use crate::data::Work;
use crate::device::peak_resident_bytes;
use crate::dist::Comm;
use crate::plugin::PluginSources;
use crate::trace::Trace;
use crate::track::Trackers;
use crate::train::{Measured, Part, Ranks, Resources, Signals, Unwaited, measure, or_part};

/// Measure training on this machine
#[derive(Debug, Subcommand)]
pub(super) enum BenchCommand {
    Step(StepArgs),
}

/// Time the parts of a training step
///
/// Trains some steps with the settings of a run, and keeps nothing of it. Shown are medians over the steps, and as shares of the
/// median step, so they need not add up. On a GPU each part is waited for, which a run does not do.
#[derive(Debug, Args)]
#[command(after_help = "\
Parts of a step:
  wait       until the data threads have a batch
  copy       of the batch to the device
  forward    the method's step: backbones, heads and the loss
  backward   from the loss to gradients
  exchange   of gradients between ranks, beyond the backward pass; next to nothing for one
  optimizer  norm and clipping of gradients, and the update
  ema        target networks and what batch norms remember
  sync       until the figures of the step are read
  log        progress, log lines and example images

Examples:
  jepa-host bench step --plugin cnn_jepa --config configs/demo.toml
  jepa-host bench step --plugin byol --config configs/byol_imagenet.toml --trace step.json
  jepa-host bench step --plugin simclr --config configs/demo.toml --same-batch trainer.threads=1")]
pub(super) struct StepArgs {
    /// Plugin to load: a path, a file name (libcnn_jepa.so) or a bare name (cnn_jepa); may be repeated
    #[arg(long, value_name = "PLUGIN", help_heading = "Plugins")]
    plugin: Vec<PathBuf>,
    /// Configuration in TOML
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Steps that are measured
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Steps before them, which fill the pipeline and the caches
    #[arg(long, value_name = "N", default_value_t = 5)]
    warmup: u32,
    /// Take the first batch again and again: the step alone, with no data pipeline beside it
    #[arg(long)]
    same_batch: bool,
    /// Write what each thread does when, for ui.perfetto.dev or chrome://tracing; a file that is there is replaced
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Settings of training, such as optimizer.batch_size=64
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

impl BenchCommand {
    pub fn run(self, sources: &PluginSources) -> anyhow::Result<()> {
        match self {
            BenchCommand::Step(args) => args.run(sources),
        }
    }
}

impl StepArgs {
    fn run(self, sources: &PluginSources) -> anyhow::Result<()> {
        let layers =
            Layers { file: self.config.clone(), overrides: self.overrides.clone(), ..Layers::default() };
        let session = Session::open(&self.plugin, layers, sources)?;
        let comm = join_ranks(&session)?;
        let signals = Signals::install("ending after this step").context("cannot take over signals")?;
        let first = comm.as_ref().is_none_or(|comm| comm.rank() == 0);
        let begin = || {
            let trace = self.trace.as_deref().filter(|_| first).map(begin_trace).transpose()?;
            anyhow::Ok((prepare(&session, Purpose::Measuring, comm.as_ref(), trace.clone())?, trace))
        };
        let (prepared, trace) = or_part(comm.as_ref(), begin())?;
        let counts = (self.warmup, self.steps);
        let timed = time_steps(session, prepared, comm, trace.clone(), signals, counts, self.same_batch);
        if let Some(Err(error)) = trace.map(|trace| trace.finish()) {
            tracing::warn!("--trace: the file is not complete: {error}");
        }
        let report = timed?;
        if first { print(self.format, &report, Report::text) } else { Ok(()) }
    }
}

/// Takes some steps, and then others that are measured, as [`measure`] does.
pub(super) fn time_steps(
    session: Session,
    prepared: Prepared,
    comm: Option<Comm>,
    trace: Option<Trace>,
    signals: Signals,
    (warmup, steps): (u32, u32),
    same_batch: bool,
) -> anyhow::Result<Report> {
    let Prepared { device, model, optimizer, train, state, .. } = prepared;
    let config = session.settings.config;
    let of = Setup {
        method: session.method,
        backbone: session.backbone,
        size: config.data.size,
        images: config.optimizer.batch_size * config.trainer.accumulate,
        precision: serde_json::to_value(config.trainer.precision)?.as_str().unwrap_or_default().to_owned(),
        device: state.device.clone(),
        threads: state.threads,
        ranks: state.ranks,
        warmup,
        same_batch,
    };
    // The loop wants a place for its records.
    let begin = || {
        let folder = tempfile::tempdir().context("no folder can be made for temporary files")?;
        let directory = RunDir::create(folder.path(), "bench")?;
        let trackers = match &comm {
            Some(comm) if comm.rank() > 0 => Trackers::none(),
            _ => Trackers::open(directory.path(), Vec::new())?,
        };
        anyhow::Ok((folder, directory, trackers))
    };
    let (_folder, directory, mut trackers) = or_part(comm.as_ref(), begin())?;
    let ranks = match comm {
        Some(comm) => Ranks::new(comm, &model, config.ranks.bucket_mib << 20)?,
        None => Ranks::alone(),
    };
    let resources = Resources {
        device,
        model,
        optimizer,
        train,
        validation: None,
        evaluation: None,
        directory,
        signals,
        ranks,
        steps_per_epoch: state.steps_per_epoch,
        state,
        trace,
        config,
    };
    let measured = measure(resources, &mut trackers, (warmup as usize, steps as usize), same_batch)?;
    Ok(Report::new(of, &measured))
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Setup {
    method: String,
    backbone: String,
    size: usize,
    images: usize,
    precision: String,
    device: String,
    threads: usize,
    ranks: usize,
    warmup: u32,
    same_batch: bool,
}

/// Seconds of a step: median, and quartiles.
#[derive(Debug, Serialize)]
struct Row {
    part: &'static str,
    median_s: f64,
    quartiles_s: [f64; 2],
}

#[derive(Debug, Serialize)]
struct Beside {
    part: &'static str,
    /// Of all threads together.
    seconds_per_step: f64,
}

#[derive(Debug, Serialize)]
struct TrafficOfStep {
    times: f64,
    bytes: f64,
    parts_of_gradients: f64,
    bytes_of_gradients: f64,
}

/// The parts of a step.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    setup: Setup,
    steps: usize,
    parts: Vec<Row>,
    step: Row,
    pub images_per_s: f64,
    loader: Vec<Beside>,
    /// What each rank hands over to the others.
    traffic: Option<TrafficOfStep>,
    peak_resident_bytes: Option<u64>,
    /// On a GPU.
    unwaited: Option<UnwaitedStep>,
    peak_gpu_bytes: Option<u64>,
}

/// A step that nobody waits for, as in a run.
#[derive(Debug, Serialize)]
struct UnwaitedStep {
    step_s: f64,
    images_per_s: f64,
    /// What the host needs to queue each part of it.
    queue_s: Vec<Queued>,
}

#[derive(Debug, Serialize)]
struct Queued {
    part: &'static str,
    median_s: f64,
}

impl Report {
    fn new(setup: Setup, measured: &Measured) -> Self {
        let row = |part: &'static str, mut seconds: Vec<f64>| {
            seconds.sort_by(f64::total_cmp);
            let at = |share: f64| {
                let place = (seconds.len() - 1) as f64 * share;
                let (low, high) = (seconds[place.floor() as usize], seconds[place.ceil() as usize]);
                low + (high - low) * place.fract()
            };
            Row { part, median_s: at(0.5), quartiles_s: [at(0.25), at(0.75)] }
        };
        let parts = Part::ALL
            .map(|part| row(part.name(), measured.steps.iter().map(|step| step[part as usize]).collect()));
        let step = row("step", measured.steps.iter().map(|step| step.iter().sum()).collect());
        let beside = Work::ALL.into_iter().zip(measured.beside);
        Report {
            steps: measured.steps.len(),
            parts: parts.into(),
            images_per_s: measured.images as f64 / step.median_s,
            step,
            loader: beside
                .map(|(work, seconds)| Beside { part: work.name(), seconds_per_step: seconds })
                .collect(),
            traffic: measured.traffic.map(|traffic| {
                let of_step = |count: u64| count as f64 / measured.steps.len().max(1) as f64;
                TrafficOfStep {
                    times: of_step(traffic.times),
                    bytes: of_step(traffic.bytes),
                    parts_of_gradients: of_step(traffic.parts_of_gradients),
                    bytes_of_gradients: of_step(traffic.bytes_of_gradients),
                }
            }),
            peak_resident_bytes: peak_resident_bytes(),
            unwaited: measured.unwaited.map(|Unwaited { step_s, queue_s }| UnwaitedStep {
                step_s,
                images_per_s: measured.images as f64 / step_s,
                queue_s: Part::ALL
                    .into_iter()
                    .zip(queue_s)
                    .map(|(part, median_s)| Queued { part: part.name(), median_s })
                    .collect(),
            }),
            peak_gpu_bytes: measured.peak_gpu_bytes,
            setup,
        }
    }

    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let Setup { method, backbone, size, images, precision, device, threads, ranks, warmup, same_batch } =
            &self.setup;
        let data = if *same_batch { "one batch again and again" } else { "from the pipeline" };
        writeln!(
            out,
            "{method} with {backbone}, {size} px, {images} images a step ({data}), {precision}, {device}, \
             {}{threads} threads: {} steps after {warmup}\n",
            if *ranks == 1 { String::new() } else { format!("{ranks} ranks × ") },
            self.steps
        )?;
        let ms = |seconds: f64| format!("{:.2}", seconds * 1e3);
        let cells = |row: &Row| {
            let [low, high] = row.quartiles_s.map(ms);
            let share = format!("{:.1} %", 100.0 * row.median_s / self.step.median_s);
            (vec![row.part.to_owned(), ms(row.median_s), format!("{low} to {high}"), share], Vec::new())
        };
        let rows: Vec<_> = self.parts.iter().chain([&self.step]).map(cells).collect();
        let head = ["part", "ms", "quartiles", "share"].map(str::to_owned).to_vec();
        print_columns(head, &rows, out)?;
        writeln!(out, "\n{:.1} images/s", self.images_per_s)?;
        if !same_batch {
            let parts: Vec<String> = self
                .loader
                .iter()
                .map(|part| format!("{} {}", part.part, ms(part.seconds_per_step)))
                .collect();
            writeln!(out, "beside the step, on the data threads, ms of all together: {}", parts.join(", "))?;
            let wait = self.parts[Part::Wait as usize].median_s / self.step.median_s;
            let verdict = match wait {
                wait if wait > 0.05 => "the data pipeline is the bottleneck: see data.threads, data pack",
                _ => "the step is the bottleneck, not the data",
            };
            writeln!(out, "{verdict}")?;
            if device.starts_with("cpu") {
                writeln!(
                    out,
                    "data threads take the step's cores, which makes its parts longer: `data bench` and --same-batch show by how much"
                )?;
            }
        }
        if let Some(traffic) = &self.traffic {
            let TrafficOfStep { times, bytes, parts_of_gradients, bytes_of_gradients } = traffic;
            writeln!(
                out,
                "{ranks} ranks: each hands over {:.2} MB of gradients in {parts_of_gradients:.0} parts, and {:.2} MB for sums and rows \
                 that are waited for {times:.0} times a step",
                bytes_of_gradients / 1e6,
                bytes / 1e6
            )?;
        }
        if let Some(UnwaitedStep { step_s, images_per_s, queue_s }) = &self.unwaited {
            let parts = queue_s.iter().filter(|part| part.part != Part::Wait.name());
            let all: f64 = parts.clone().map(|part| part.median_s).sum();
            let parts: Vec<String> =
                parts.map(|part| format!("{} {}", part.part, ms(part.median_s))).collect();
            writeln!(
                out,
                "without waiting for parts, as in a run: {} ms, {images_per_s:.1} images/s\nto queue a step takes the host {} ms: {}",
                ms(*step_s),
                ms(all),
                parts.join(", ")
            )?;
        }
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        if let Some(bytes) = self.peak_gpu_bytes {
            writeln!(out, "peak memory of tensors on the GPU {:.2} GiB", gib(bytes))?;
        }
        match self.peak_resident_bytes {
            Some(bytes) => writeln!(out, "peak memory {:.2} GiB", gib(bytes)),
            None => Ok(()),
        }
    }
}
