//! `jepa-host data …`: make, look at, check and time data sets. The work is done in [`crate::data`].

mod bench;

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};

use crate::cli::exit::Usage;
use crate::cli::output::{Format, print};
use crate::data::{
    self, DataError, Dataset, Layout, PackOptions, PackProgress, PackReport, Provenance, Smaller, Split,
    Summary, VerifyReport,
};
use crate::plugin::PluginSources;
use crate::train::{Signals, TrainError};

/// Make, look at, check, and time data sets.
#[derive(Debug, Subcommand)]
pub(super) enum DataCommand {
    /// Pack images into one HDF5 file that loads in parallel.
    ///
    /// SOURCE is a directory with one folder of JPEG or PNG files per class (labels follow the sorted names), a
    /// directory of images without labels, an HDF5 file in the `images/<i>`, `labels/<i>` layout, a packed file, or
    /// IDX files as MNIST has them (gzipped or not, stored as PNG). Every image is decoded once before anything is
    /// written, and an existing file is replaced only with --force and only when all went well. A pack that was ended
    /// half-way leaves OUT.packing, from which the same command goes on.
    ///
    /// Training sees 8-bit RGB: of 16 bits the upper 8, transparency is dropped, and the orientation that a camera notes
    /// in EXIF is not applied, as in torchvision's ImageFolder. Beside each image lie its checksum and, from folders, its
    /// file's name.
    Pack(PackArgs),
    /// Show what is in a data set: images, classes, sizes, formats, fingerprint, where it comes from.
    ///
    /// The fingerprint is that of all labels and lengths and of some of the bytes: it tells data sets apart, and a run goes on
    /// with the one that it began with. That no byte has changed is for `data verify` to say.
    Inspect(InspectArgs),
    /// Read every image and list those that are damaged: cut off, without a header, or not what was packed, by its checksum; with
    /// --deep, also those that do not decode. Exits with 4 if there are any.
    Verify(VerifyArgs),
    /// Time how fast a method's views of a file are made, and say whether a step would wait for them.
    Bench(bench::BenchArgs),
}

/// Options of `data pack`.
#[derive(Debug, Args)]
pub(super) struct PackArgs {
    /// Class folders, an HDF5 file, an IDX file, or a directory of IDX files
    source: PathBuf,
    /// The file to write
    out: PathBuf,
    /// Which IDX files of a directory
    #[arg(long, value_enum)]
    split: Option<SplitArg>,
    /// Take only N images, evenly from all classes, the same ones every time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Names of classes 0, 1, …, separated by commas, where the source has none
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    class_names: Option<Vec<String>>,
    /// Give classes the labels that they have in the data set FILE: for held-out images, that of the training images
    #[arg(long, value_name = "FILE", conflicts_with = "class_names")]
    classes_of: Option<PathBuf>,
    /// Make images smaller whose shorter side is longer than N pixels, and store those as JPEG: faster to read and
    /// decode. Takes twice the space of the result while it works
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    shorter_side: Option<u32>,
    /// Quality of these JPEGs
    #[arg(long, value_name = "1-100", default_value_t = 90, requires = "shorter_side", value_parser = clap::value_parser!(u8).range(1..=100))]
    quality: u8,
    /// Leave unreadable images out instead of refusing the source; an error of the disk ends it all the same
    #[arg(long)]
    skip_bad: bool,
    /// Overwrite OUT if it exists
    #[arg(long)]
    force: bool,
    /// Threads that check images; 0 for one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// How to print the result
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SplitArg {
    /// train-images-idx3-ubyte
    Train,
    /// t10k-images-idx3-ubyte
    Test,
}

/// Options of `data inspect`.
#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// The data set
    file: PathBuf,
    /// How to print the result
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Options of `data verify`.
#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// The data set
    file: PathBuf,
    /// Decode every image too, which finds damage that no checksum shows: of images without one, or from before they were packed
    #[arg(long)]
    deep: bool,
    /// Threads that do it; 0 for one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// How to print the result
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl DataCommand {
    /// Runs the command and prints its result.
    ///
    /// # Errors
    /// A [`DataError`] (exit code 4), or that standard output cannot be written.
    pub fn run(self, sources: &PluginSources) -> anyhow::Result<()> {
        match self {
            DataCommand::Bench(args) => args.run(sources),
            DataCommand::Pack(args) => args.run(),
            DataCommand::Inspect(args) => args.run(),
            DataCommand::Verify(args) => args.run(),
        }
    }
}

impl PackArgs {
    fn run(self) -> anyhow::Result<()> {
        let signals =
            Signals::install("ending; a second signal ends at once").context("cannot take over signals")?;
        let classes = self.classes_of.as_deref().map(classes_of).transpose()?;
        let options = PackOptions {
            split: self.split.map(|split| match split {
                SplitArg::Train => Split::Train,
                SplitArg::Test => Split::Test,
            }),
            limit: self.limit.map(|limit| limit as usize),
            class_names: self.class_names,
            label_by: classes,
            skip_bad: self.skip_bad,
            smaller: self.shorter_side.map(|shorter_side| Smaller { shorter_side, quality: self.quality }),
            force: self.force,
            threads: self.threads,
        };
        let bar = Bar::new();
        let packed = data::pack(&self.source, &self.out, &options, &|progress| {
            match progress {
                PackProgress::Checked(done, of) => bar.show("check", done, of),
                PackProgress::Written(done, of) => bar.show("write", done, of),
            }
            if signals.pending().is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        drop(bar);
        match (packed, signals.pending()) {
            (Err(DataError::Interrupted), Some(signal)) => Err(TrainError::Stopped { signal }.into()),
            (packed, _) => print(self.format, &packed?, print_pack),
        }
    }
}

/// The names of the classes of a data set.
fn classes_of(path: &Path) -> anyhow::Result<Vec<String>> {
    match Dataset::open(path)?.class_names() {
        Some(names) => Ok(names.to_vec()),
        None => Err(Usage(format!("--classes-of: {} names no classes", path.display())).into()),
    }
}

impl InspectArgs {
    fn run(self) -> anyhow::Result<()> {
        print(self.format, &data::inspect(&Dataset::open(&self.file)?)?, print_summary)
    }
}

impl VerifyArgs {
    fn run(self) -> anyhow::Result<()> {
        let dataset = Dataset::open(&self.file)?;
        let bar = Bar::new();
        let what = if self.deep { "decode" } else { "read" };
        let report = data::verify(&dataset, self.deep, self.threads, &|done, of| bar.show(what, done, of));
        drop(bar);
        print(self.format, &report, print_verify)?;
        let VerifyReport { path, images, deep, bad, .. } = report;
        if bad.is_empty() {
            Ok(())
        } else {
            Err(DataError::BadImages { path, bad: bad.len(), images, deep }.into())
        }
    }
}

/// A progress bar on a terminal, and nothing elsewhere.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Bar {
        let bar = ProgressBar::new(0);
        if let Ok(style) =
            ProgressStyle::with_template("{msg:6} {bar:30} {human_pos}/{human_len} {per_sec:.0} {eta}")
        {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Bar(bar)
    }

    fn show(&self, stage: &'static str, done: usize, of: usize) {
        // A thousand steps are plenty to look at; more would cost time.
        if done.is_multiple_of(of / 1000 + 1) || done == of {
            self.0.set_message(stage);
            self.0.set_length(of as u64);
            self.0.set_position(done as u64);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// `1 image`, `2 images`, `60,000 images`; `class` and its like get `es`.
fn count(number: u64, noun: &str) -> String {
    let ending = match number {
        1 => "",
        _ if noun.ends_with('s') => "es",
        _ => "s",
    };
    format!("{} {noun}{ending}", HumanCount(number))
}

fn print_pack(report: &PackReport, out: &mut dyn Write) -> io::Result<()> {
    for bad in &report.skipped {
        writeln!(out, "left out {}: {}", bad.name, bad.reason)?;
    }
    if report.ignored_files > 0 {
        let named = report.ignored_by_extension.iter().map(|(extension, count)| match extension.as_str() {
            "" => format!("{count} without an extension"),
            extension => format!("{count} {extension}"),
        });
        let (files, named) =
            (count(report.ignored_files as u64, "file"), named.collect::<Vec<_>>().join(", "));
        writeln!(out, "ignored {files} that are no JPEG or PNG by their names: {named}")?;
    }
    if report.made_smaller > 0 {
        writeln!(out, "made {} smaller", count(report.made_smaller as u64, "image"))?;
    }
    let classes = match report.classes {
        0 => "no labels".to_owned(),
        classes => count(classes as u64, "class"),
    };
    writeln!(
        out,
        "{}: {}, {classes}, {}",
        report.path.display(),
        count(report.images as u64, "image"),
        HumanBytes(report.image_bytes)
    )
}

fn print_summary(summary: &Summary, out: &mut dyn Write) -> io::Result<()> {
    let range =
        |(low, high): (u32, u32)| if low == high { low.to_string() } else { format!("{low}–{high}") };
    let sample = &summary.sample;
    let layout = match summary.layout {
        Layout::Reference => "images/<i>, labels/<i>",
        Layout::Packed => "packed",
    };
    let formats: Vec<_> = sample.formats.iter().map(|(format, count)| format!("{count} {format}")).collect();
    writeln!(out, "file         {}", summary.path.display())?;
    writeln!(out, "layout       {layout}")?;
    if let Some(provenance) = &summary.provenance {
        let Provenance { source, source_kind, tool, format_version, source_sha256, .. } = provenance;
        match source.as_str() {
            // Version 1 kept it in a way that is not read.
            "" => writeln!(out, "packed       by an early version, format {format_version}")?,
            source => {
                writeln!(out, "packed from  {source} ({source_kind}) by {tool}, format {format_version}")?
            }
        }
        if !source_sha256.is_empty() {
            writeln!(out, "source       SHA-256 {source_sha256}")?;
        }
        if let (Some(side), Some(quality)) = (provenance.shorter_side, provenance.jpeg_quality) {
            writeln!(out, "made smaller to a shorter side of {side} pixels, as JPEG of quality {quality}")?;
        }
    }
    let mean = summary.image_bytes / summary.images as u64;
    let (total, mean) = (HumanBytes(summary.image_bytes), HumanBytes(mean));
    writeln!(out, "images       {}, {total}, {mean} each", HumanCount(summary.images as u64))?;
    let (width, height) = (range(sample.width), range(sample.height));
    match formats.join(", ") {
        none if none.is_empty() => writeln!(out, "sample       no image can be read")?,
        formats => writeln!(out, "sample       {formats}: {width} × {height} pixels")?,
    }
    if sample.unreadable > 0 {
        let hint = "run `jepa-host data verify`";
        writeln!(out, "             unreadable: {} of {}; {hint}", sample.unreadable, sample.images)?;
    }
    writeln!(out, "fingerprint  {}", summary.fingerprint)?;
    match &summary.classes {
        None => writeln!(out, "classes      no labels"),
        Some(classes) => {
            writeln!(out, "classes      {}", classes.len())?;
            if summary.unlabelled > 0 {
                writeln!(out, "             {} without a label", count(summary.unlabelled as u64, "image"))?;
            }
            classes.iter().try_for_each(|class| {
                let name = class.name.as_deref().unwrap_or_default();
                writeln!(
                    out,
                    "{:>12}  {:>9}  {name}",
                    class.label,
                    HumanCount(class.images as u64).to_string()
                )
            })
        }
    }
}

fn print_verify(report: &VerifyReport, out: &mut dyn Write) -> io::Result<()> {
    for bad in &report.bad {
        writeln!(out, "{}: {}", bad.name, bad.reason)?;
    }
    if report.bad.is_empty() {
        let images = count(report.images as u64, "image");
        let sound = match (report.deep, report.checksums) {
            (true, true) => "all of them decode, and each is what was packed, by its checksum",
            (true, false) => {
                "all of them decode; there are no checksums that would show other damage: packing the original again makes them"
            }
            (false, true) => "each of them is what was packed, by its checksum; --deep decodes them as well",
            (false, false) => {
                "all have a header that can be read, and none is cut off; --deep decodes them as well"
            }
        };
        writeln!(out, "{}: {images}, {sound}", report.path.display())?;
    }
    Ok(())
}
