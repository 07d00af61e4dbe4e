//! TensorBoard's event files: records of length, checksum, message, checksum, in one file `events.out.tfevents.…` of the
//! run's directory.
//!
//! The file holds nothing that `metrics.jsonl` does not: a session begins a new one with the first record, which takes
//! a moment, and so no step is there twice and none is missing, wherever the session before it was stopped.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use prost::Message as _;

use super::{Record, Tracker};

/// What the names of event files begin with.
const PREFIX: &str = "events.out.tfevents.";

/// Writes event files into a run's directory.
pub struct TensorBoard {
    directory: PathBuf,
    file: Option<BufWriter<File>>,
}

impl TensorBoard {
    /// A tracker for the run in `directory`.
    pub fn new(directory: &Path) -> Self {
        TensorBoard { directory: directory.to_owned(), file: None }
    }

    fn write(&mut self, event: &proto::Event) -> anyhow::Result<()> {
        let file = self.file.as_mut().context("no event file is open")?;
        let message = event.encode_to_vec();
        let length = (message.len() as u64).to_le_bytes();
        for part in [&length[..], &message] {
            file.write_all(part)?;
            file.write_all(&masked_checksum(part).to_le_bytes())?;
        }
        Ok(())
    }
}

impl Tracker for TensorBoard {
    fn name(&self) -> &'static str {
        "TensorBoard"
    }

    fn open(&mut self) -> anyhow::Result<u64> {
        let failed = || format!("cannot write event files in {}", self.directory.display());
        for entry in fs::read_dir(&self.directory).with_context(failed)? {
            let path = entry.with_context(failed)?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX)) {
                fs::remove_file(&path).with_context(failed)?;
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let name = format!("{PREFIX}{}.{}.{}", now.as_secs(), host.trim(), std::process::id());
        self.file = Some(BufWriter::new(File::create(self.directory.join(name)).with_context(failed)?));
        let wall_time = now.as_secs_f64();
        let version = proto::What::FileVersion("brain.Event:2".to_owned());
        self.write(&proto::Event { wall_time, step: 0, what: Some(version) })?;
        // Tells a reader that has seen an earlier file to forget it.
        let start = proto::What::SessionLog(proto::SessionLog { status: proto::SESSION_START });
        self.write(&proto::Event { wall_time, step: 0, what: Some(start) })?;
        Ok(0)
    }

    fn log(&mut self, _index: u64, record: &Record) -> anyhow::Result<()> {
        let scalar = |(name, &value): (&String, &f64)| proto::Value {
            tag: name.clone(),
            kind: Some(proto::Kind::Simple(value as f32)),
        };
        let mut value: Vec<proto::Value> = record.figures.iter().map(scalar).collect();
        value.push(scalar((&"epoch".to_owned(), &record.epoch)));
        for (name, file) in &record.images {
            value.push(proto::Value { tag: name.clone(), kind: Some(image(&self.directory.join(file))?) });
        }
        for (name, histogram) in &record.histograms {
            let kind = Some(proto::Kind::Histogram(proto::Histogram::from(histogram)));
            value.push(proto::Value { tag: name.clone(), kind });
        }
        self.write(&proto::Event {
            wall_time: record.time.unwrap_or_default(),
            step: record.step as i64,
            what: Some(proto::What::Summary(proto::Summary { value })),
        })
    }

    fn rest(&mut self) -> anyhow::Result<()> {
        self.file.as_mut().context("no event file is open")?.flush().context("cannot write the event file")
    }

    fn place(&self) -> String {
        format!("TensorBoard's file in {}", self.directory.display())
    }

    fn close(&mut self, _exit_code: i32) -> anyhow::Result<()> {
        self.rest()
    }
}

fn image(path: &Path) -> anyhow::Result<proto::Kind> {
    let failed = || format!("cannot read {}", path.display());
    let bytes = fs::read(path).with_context(failed)?;
    let (width, height) = image::image_dimensions(path).with_context(failed)?;
    Ok(proto::Kind::Image(proto::Image {
        height: height as i32,
        width: width as i32,
        colorspace: 3,
        encoded_image_string: bytes,
    }))
}

/// A CRC-32C, rotated and shifted, so that the checksum of data with checksums in it is no constant.
fn masked_checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The messages of an event file, with their field numbers.
mod proto {
    use prost::{Message, Oneof};

    #[derive(Clone, PartialEq, Message)]
    pub struct Event {
        /// Seconds since 1970.
        #[prost(double, tag = "1")]
        pub wall_time: f64,
        #[prost(int64, tag = "2")]
        pub step: i64,
        #[prost(oneof = "What", tags = "3, 5, 7")]
        pub what: Option<What>,
    }

    #[derive(Clone, PartialEq, Oneof)]
    pub enum What {
        #[prost(string, tag = "3")]
        FileVersion(String),
        #[prost(message, tag = "5")]
        Summary(Summary),
        #[prost(message, tag = "7")]
        SessionLog(SessionLog),
    }

    pub const SESSION_START: i32 = 1;

    #[derive(Clone, PartialEq, Message)]
    pub struct SessionLog {
        #[prost(int32, tag = "1")]
        pub status: i32,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Summary {
        #[prost(message, repeated, tag = "1")]
        pub value: Vec<Value>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Value {
        #[prost(string, tag = "1")]
        pub tag: String,
        #[prost(oneof = "Kind", tags = "2, 4, 5")]
        pub kind: Option<Kind>,
    }

    #[derive(Clone, PartialEq, Oneof)]
    pub enum Kind {
        #[prost(float, tag = "2")]
        Simple(f32),
        #[prost(message, tag = "4")]
        Image(Image),
        #[prost(message, tag = "5")]
        Histogram(Histogram),
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Image {
        #[prost(int32, tag = "1")]
        pub height: i32,
        #[prost(int32, tag = "2")]
        pub width: i32,
        /// Channels: 3 is RGB.
        #[prost(int32, tag = "3")]
        pub colorspace: i32,
        /// PNG.
        #[prost(bytes = "vec", tag = "4")]
        pub encoded_image_string: Vec<u8>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Histogram {
        #[prost(double, tag = "1")]
        pub min: f64,
        #[prost(double, tag = "2")]
        pub max: f64,
        #[prost(double, tag = "3")]
        pub num: f64,
        #[prost(double, tag = "4")]
        pub sum: f64,
        #[prost(double, tag = "5")]
        pub sum_squares: f64,
        /// The upper edge of each bin.
        #[prost(double, repeated, tag = "6")]
        pub bucket_limit: Vec<f64>,
        /// How many numbers each bin has.
        #[prost(double, repeated, tag = "7")]
        pub bucket: Vec<f64>,
    }

    impl From<&crate::track::Histogram> for Histogram {
        fn from(histogram: &crate::track::Histogram) -> Self {
            let bucket: Vec<f64> = histogram.counts.iter().map(|&count| count as f64).collect();
            Histogram {
                min: histogram.min,
                max: histogram.max,
                num: bucket.iter().sum(),
                sum: histogram.sum,
                sum_squares: histogram.sum_of_squares,
                bucket_limit: histogram.edges().split_off(1),
                bucket,
            }
        }
    }
}
