//! The directory of one version of a run: made once, written to by one process at a time.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use tch::Tensor;

use super::error::CheckpointError;
use super::state::State;
use super::store;
use crate::files::hold;

const VERSION: &str = "version_";
const LOCK: &str = "run.lock";

/// `<run.dir>/<run.name>/version_<n>/`, held by this process while the value lives.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Unlocked when dropped, and by the system when the process dies. None where another process holds it.
    _lock: Option<File>,
}

impl RunDir {
    /// Makes the next free version of the run `name` under `runs`. Two processes never get the same one.
    pub fn create(runs: &Path, name: &str) -> Result<Self, CheckpointError> {
        let run = runs.join(name);
        fs::create_dir_all(&run).map_err(CheckpointError::io("cannot be created", &run))?;
        let mut number = versions(&run)?.last().map_or(0, |(number, _)| number + 1);
        loop {
            let path = run.join(format!("{VERSION}{number}"));
            match fs::create_dir(&path) {
                Ok(()) => return RunDir::open(&path),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(CheckpointError::io("cannot be created", path)(error)),
            }
        }
    }

    /// Takes up a version that exists.
    ///
    /// # Errors
    /// [`CheckpointError::Busy`] while another process has it.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let lock_path = path.join(LOCK);
        let lock = hold(&lock_path).map_err(CheckpointError::io("cannot be opened", &lock_path))?;
        let lock = lock.ok_or_else(|| CheckpointError::Busy { path: path.to_owned() })?;
        Ok(RunDir { path: path.to_owned(), _lock: Some(lock) })
    }

    /// That of the first rank, for the others, which write nothing.
    pub fn of_first(path: PathBuf) -> Self {
        RunDir { path, _lock: None }
    }

    /// Whether a process writes to the run in `path`. Where there are no locks, nobody knows, and it says no.
    pub fn is_held(path: &Path) -> bool {
        // A shared lock for this moment only: it would have to meet the very moment in which a run takes its own.
        let lock = File::open(path.join(LOCK));
        lock.is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory's own name, such as `version_3`.
    pub fn version(&self) -> &str {
        self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    }

    /// A file of this run, such as `metrics.jsonl`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Saves a checkpoint as `checkpoints/step_<step>/`, then removes all but the newest `keep` and the one that
    /// `state.best` names. A checkpoint of the same step is replaced. Returns the folder.
    ///
    /// # Errors
    /// [`CheckpointError::Save`] when it cannot be written, a full disk included: earlier ones are untouched then.
    pub fn save(
        &self,
        state: &State,
        model: &[(String, Tensor)],
        optimizer: &[(String, Tensor)],
        keep: usize,
    ) -> Result<PathBuf, CheckpointError> {
        store::save(&self.path.join(store::FOLDER), state, model, optimizer, keep)
    }

    /// Goes back to `state`: cuts `metrics` (a file name) to the lines that it had, and puts later checkpoints aside
    /// as `checkpoints/superseded_…`. Returns those.
    ///
    /// # Errors
    /// A metrics file that is missing or shorter than it was.
    pub fn rewind(&self, state: &State, metrics: &str) -> Result<Vec<PathBuf>, CheckpointError> {
        let path = self.file(metrics);
        let damaged = |why: String| CheckpointError::Damaged {
            file: path.clone(),
            why,
            others: store::list(&self.path).unwrap_or_default(),
        };
        if state.metrics_lines > 0 || path.exists() {
            let bytes = fs::read(&path).map_err(|error| damaged(error.to_string()))?;
            let mut ends =
                bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at as u64 + 1);
            let length = match state.metrics_lines.checked_sub(1) {
                None => 0,
                Some(last) => ends.nth(last as usize).ok_or_else(|| {
                    let (has, had) =
                        (bytes.iter().filter(|byte| **byte == b'\n').count(), state.metrics_lines);
                    damaged(format!("it has {has} lines and had {had} when step {} was saved", state.step))
                })?,
            };
            let file =
                OpenOptions::new().write(true).open(&path).map_err(|error| damaged(error.to_string()))?;
            file.set_len(length)
                .and_then(|()| file.sync_all())
                .map_err(CheckpointError::io("cannot be cut", &path))?;
        }
        store::supersede_after(&self.path.join(store::FOLDER), state.step)
    }
}

/// The directory of the run that `path` means: that of a version, or the newest version of a run.
///
/// # Errors
/// [`CheckpointError::NotARun`] when it is neither.
pub fn find_run(path: &Path) -> Result<PathBuf, CheckpointError> {
    let no_run = |why| CheckpointError::NotARun { path: path.to_owned(), why };
    if !path.is_dir() {
        return Err(no_run(if path.exists() { "it is no directory" } else { "it does not exist" }));
    }
    if is_run(path) {
        return Ok(path.to_owned());
    }
    let newest = versions(path)?.pop();
    newest
        .map(|(_, version)| version)
        .ok_or_else(|| no_run("it has neither metrics.jsonl nor a folder version_…"))
}

/// Whether `path` is a version's directory.
pub(crate) fn is_run(path: &Path) -> bool {
    ["metrics.jsonl", "config.toml", LOCK, "checkpoints"].iter().any(|name| path.join(name).exists())
}

/// The versions of a run by number. A directory that is not there holds none.
pub(crate) fn versions(run: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let entries = match fs::read_dir(run) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(CheckpointError::io("cannot be read", run)(error)),
    };
    let mut versions = Vec::new();
    for entry in entries {
        let path = entry.map_err(CheckpointError::io("cannot be read", run))?.path();
        let number = path.file_name().and_then(|name| name.to_str()?.strip_prefix(VERSION)?.parse().ok());
        if let Some(number) = number {
            versions.push((number, path));
        }
    }
    versions.sort();
    Ok(versions)
}
