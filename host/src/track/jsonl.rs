//! `metrics.jsonl`: one JSON object a line, the truth that every other tracker is fed from.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::{Map, Value};

/// The file's name in a run directory.
pub(super) const FILE: &str = "metrics.jsonl";

pub(super) struct Jsonl {
    path: PathBuf,
    file: File,
    lines: u64,
}

impl Jsonl {
    /// Opens the file for appending, and makes it when it is not there.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let failed = || format!("cannot open {}", path.display());
        let file = OpenOptions::new().create(true).append(true).read(true).open(path).with_context(failed)?;
        let lines = BufReader::new(&file).split(b'\n').count() as u64;
        Ok(Jsonl { path: path.to_owned(), file, lines })
    }

    /// Appends one line: `step`, `epoch`, and the figures by name.
    pub fn append(&mut self, step: u64, epoch: f64, figures: &BTreeMap<String, f64>) -> anyhow::Result<()> {
        let mut record = Map::new();
        record.insert("step".to_owned(), step.into());
        record.insert("epoch".to_owned(), epoch.into());
        record.extend(figures.iter().map(|(name, value)| (name.clone(), Value::from(*value))));
        let line = format!("{}\n", Value::Object(record));
        self.file
            .write_all(line.as_bytes())
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        self.lines += 1;
        Ok(())
    }

    /// Brings the file to the disk and returns its number of lines.
    pub fn sync(&mut self) -> anyhow::Result<u64> {
        self.file.sync_data().with_context(|| format!("cannot write {} to the disk", self.path.display()))?;
        Ok(self.lines)
    }
}
