//! `jepa-host data bench`: how fast a method's views of a file are made here, and whether a step would wait for them.

use std::io::{self, Write};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use jepa_plugin_api::tch::Device;
use serde::Serialize;
use serde_json::json;

use crate::cli::bench::time_steps;
use crate::cli::exit::Usage;
use crate::cli::output::{Format, print, print_columns};
use crate::cli::session::Session;
use crate::cli::train::{Purpose, prepare};
use crate::config::{Base, Layers};
use crate::data::{Dataset, Decode, Loader, Work};
use crate::plugin::PluginSources;
use crate::train::{Signals, TrainError};

/// What `data bench` takes.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  jepa-host data bench photos.h5 --method simclr
  jepa-host data bench photos.h5 --plugin cnn_jepa --config configs/cnn_jepa_imagenet100.toml
  jepa-host data bench photos.h5 --plugin byol --steps 0 data.threads=4 data.size=160")]
pub(in crate::cli) struct BenchArgs {
    /// HDF5 file with images
    file: PathBuf,
    /// Plugin to load: a path, a file name (libsimclr.so) or a bare name (simclr); may be repeated
    #[arg(long, visible_alias = "method", value_name = "PLUGIN", help_heading = "Plugins")]
    plugin: Vec<PathBuf>,
    /// Configuration in TOML
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Seconds for each number of threads: 1, and data.threads
    #[arg(long, value_name = "S", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Training steps that are timed to compare with, behind the first; 0: none
    #[arg(long, value_name = "N", default_value_t = 10)]
    steps: u32,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Settings of training, such as optimizer.batch_size=64; the backbone is a resnet50 unless one is named
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

impl BenchArgs {
    pub fn run(self, sources: &PluginSources) -> anyhow::Result<()> {
        let signals = Signals::install("ending").context("cannot take over signals")?;
        if let Some(other) = self.overrides.iter().find(|setting| setting.starts_with("data.train=")) {
            return Err(Usage(format!("FILE is what is timed: leave {other} out")).into());
        }
        if self.file.to_string_lossy().contains('=') && !self.file.exists() {
            let setting = self.file.display();
            return Err(Usage(format!(
                "`{setting}` stands where FILE belongs: jepa-host data bench FILE {setting}"
            ))
            .into());
        }
        // Before anything that may be wrong with the method.
        drop(Dataset::open(&self.file)?);
        // A JSON string is a TOML string as well.
        let file = format!("data.train={}", serde_json::to_string(&self.file.to_string_lossy())?);
        let overrides = self.overrides.into_iter().chain([file]).collect();
        let usual = json!({ "backbone": { "name": "resnet50" } });
        let base = Base {
            layer: "default of data bench".to_owned(),
            settings: usual.as_object().cloned().unwrap_or_default(),
        };
        let layers = Layers { base: Some(base), file: self.config, overrides, ..Layers::default() };
        let session = Session::open(&self.plugin, layers, sources)?;
        let config = session.config().clone();
        let prepared = prepare(&session, Purpose::Measuring, None, None)?;

        let mut rows = Vec::new();
        let mut counts = vec![1, prepared.train.threads()];
        counts.dedup();
        for threads in counts {
            let loader = prepared.train.clone().with_threads(threads);
            rows.push(Row::measure(&loader, Duration::from_secs(self.seconds.into()), &signals)?);
        }
        let views = prepared.model.method.views().len();
        let (method, images) = (session.method.clone(), prepared.train.dataset().len());
        let cores_are_shared = prepared.device == Device::Cpu;
        let step_images_per_s = match self.steps {
            0 => None,
            steps => {
                tracing::info!("timing {steps} steps of {} images", config.optimizer.batch_size);
                // Steps that are to be replayed are captured in the first few.
                let warmup = if config.trainer.cuda_graphs { 5 } else { 1 };
                Some(time_steps(session, prepared, None, None, signals, (warmup, steps), true)?.images_per_s)
            }
        };
        let report = Report {
            file: self.file,
            images,
            method,
            views,
            size: config.data.size,
            decode: config.data.decode,
            verdict: step_images_per_s.zip(rows.last()).map(|(step, row)| {
                let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
                verdict(row.images_per_s, step, cores_are_shared, cores.saturating_sub(row.threads))
            }),
            threads: rows,
            step_images_per_s,
        };
        print(self.format, &report, Report::text)
    }
}

/// What a number of threads makes.
#[derive(Debug, Serialize)]
struct Row {
    threads: usize,
    images_per_s: f64,
    /// Milliseconds of one thread for one image, as in [`Work::ALL`].
    read_ms: f64,
    decode_ms: f64,
    augment_ms: f64,
}

impl Row {
    /// Makes batches for so long, behind the first, which are left out.
    fn measure(loader: &Loader, time: Duration, signals: &Signals) -> anyhow::Result<Self> {
        let mut batches = (0..).flat_map(|epoch| loader.batches(epoch, 0));
        let mut next = || match signals.pending() {
            Some(signal) => Err(anyhow::Error::from(TrainError::Stopped { signal })),
            None => Ok(batches.next().context("the pipeline makes no batch")??.len()),
        };
        // Until every batch that is in the making has memory of its own.
        for _ in 0..loader.prefetch() + 2 {
            next()?;
        }
        let (begin, before, mut images) = (Instant::now(), loader.clock().seconds(), 0);
        while begin.elapsed() < time {
            images += next()?;
        }
        let (seconds, after) = (begin.elapsed().as_secs_f64(), loader.clock().seconds());
        let ms = |work: Work| (after[work as usize] - before[work as usize]) * 1e3 / images as f64;
        Ok(Row {
            threads: loader.threads(),
            images_per_s: images as f64 / seconds,
            read_ms: ms(Work::Read),
            decode_ms: ms(Work::Decode),
            augment_ms: ms(Work::Augment),
        })
    }
}

#[derive(Debug, Serialize)]
struct Report {
    file: PathBuf,
    images: usize,
    method: String,
    views: usize,
    size: usize,
    decode: Decode,
    threads: Vec<Row>,
    /// Of training steps that have their batch.
    step_images_per_s: Option<f64>,
    verdict: Option<String>,
}

/// What training would wait for, when `data` and `step` are the images/s of each without the other.
fn verdict(data: f64, step: f64, cores_are_shared: bool, idle_cores: usize) -> String {
    let advice = match idle_cores {
        0 => "pack the images smaller (data pack --shorter-side)",
        _ => "give it more data.threads, or pack the images smaller (data pack --shorter-side)",
    };
    if cores_are_shared {
        // Each takes the time of the cores that the other has not.
        let (share, both) = (step / (step + data), step * data / (step + data));
        let bottleneck = match share {
            ..0.5 => "the step is the bottleneck".to_owned(),
            _ => format!("the data pipeline is the bottleneck: {advice}"),
        };
        let percent = 100.0 * share;
        return format!(
            "data and step share the cores: {percent:.0} % of the time for data, some {both:.1} images/s; {bottleneck}"
        );
    }
    match data / step {
        ratio @ 1.25.. => format!("the step is the bottleneck: its data could come {ratio:.1} times as fast"),
        1.0.. => format!("the step is the bottleneck, but not by much: {advice}"),
        _ => format!("the data pipeline is the bottleneck: {advice}"),
    }
}

impl Report {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let Report { file, images, method, views, size, .. } = self;
        let views = if *views == 1 { "1 view".to_owned() } else { format!("{views} views") };
        writeln!(out, "{}: {images} images; {method}: {views} of {size} px\n", file.display())?;
        let head = ["threads", "images/s", "a thread", "read an image", "decode it", "augment it"]
            .map(str::to_owned)
            .to_vec();
        let cells = |row: &Row| {
            let each = row.images_per_s / row.threads as f64;
            let rates = [row.images_per_s, each].map(|rate| format!("{rate:.0}"));
            let parts = [row.read_ms, row.decode_ms, row.augment_ms].map(|ms| format!("{ms:.3} ms"));
            let cells = std::iter::once(row.threads.to_string()).chain(rates).chain(parts).collect();
            (cells, Vec::new())
        };
        print_columns(head, &self.threads.iter().map(cells).collect::<Vec<_>>(), out)?;
        match (self.step_images_per_s, &self.verdict) {
            (Some(step), Some(verdict)) => writeln!(out, "\na step takes {step:.1} images/s\n{verdict}"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_names_what_training_waits_for() {
        let shared = verdict(100.0, 25.0, true, 0);
        assert!(shared.contains("20 % of the time") && shared.contains("some 20.0 images/s"), "{shared}");
        assert!(shared.contains("the step is the bottleneck"), "{shared}");
        let pipeline = verdict(10.0, 90.0, true, 0);
        assert!(pipeline.contains("90 %") && pipeline.contains("the data pipeline is"), "{pipeline}");
        assert!(!pipeline.contains("threads"), "every core has one: {pipeline}");

        assert!(verdict(500.0, 250.0, false, 4).contains("could come 2.0 times as fast"));
        assert!(verdict(260.0, 250.0, false, 4).contains("not by much"));
        assert!(verdict(200.0, 250.0, false, 4).contains("more data.threads"));
    }
}
