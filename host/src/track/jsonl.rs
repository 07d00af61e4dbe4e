//! `metrics.jsonl`: one JSON object a line, the truth that every other tracker is fed from.

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::Record;

/// The file's name in a run directory.
pub const METRICS_FILE: &str = "metrics.jsonl";

pub(super) struct Jsonl {
    path: PathBuf,
    file: File,
    /// Lines in the file and in `unwritten`.
    lines: u64,
    /// What the file holds, in bytes.
    length: u64,
    /// What the disk did not take yet, for want of room for one.
    unwritten: Vec<u8>,
}

impl Jsonl {
    /// Opens the file for appending, and makes it when it is not there.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let failed = || format!("cannot open {}", path.display());
        let file = OpenOptions::new().create(true).append(true).read(true).open(path).with_context(failed)?;
        let lines = BufReader::new(&file).split(b'\n').count() as u64;
        let length = file.metadata().with_context(failed)?.len();
        Ok(Jsonl { path: path.to_owned(), file, lines, length, unwritten: Vec::new() })
    }

    /// Appends one line. What cannot be written is kept, and tried again with the next line.
    pub fn append(&mut self, record: &Record) {
        let in_trouble = !self.unwritten.is_empty();
        let line = serde_json::to_string(record).expect("a record has text keys and finite values");
        self.unwritten.extend(format!("{line}\n").into_bytes());
        self.lines += 1;
        match self.write() {
            Err(error) if !in_trouble => tracing::error!("{error:#}; what it lacks is kept and tried again"),
            _ => {}
        }
    }

    fn write(&mut self) -> anyhow::Result<()> {
        if let Err(error) = self.file.write_all(&self.unwritten) {
            // No half of a line may stay, for the next try writes the whole again.
            self.file.set_len(self.length).with_context(|| format!("cannot cut {}", self.path.display()))?;
            return Err(error).with_context(|| format!("cannot write {}", self.path.display()));
        }
        self.length += self.unwritten.len() as u64;
        self.unwritten.clear();
        Ok(())
    }

    /// Brings the file to the disk and returns its number of lines.
    pub fn sync(&mut self) -> anyhow::Result<u64> {
        self.write()?;
        self.file.sync_data().with_context(|| format!("cannot write {} to the disk", self.path.display()))?;
        Ok(self.lines)
    }
}
