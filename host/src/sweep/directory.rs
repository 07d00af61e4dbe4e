//! What a sweep keeps on the disk: its definition, and for each trial what was run and how it ended. Whoever is killed
//! goes on from here.
//!
//! ```text
//! runs/<sweep>/sweep.yaml             the definition
//!              trial-0001/trial.json  parameters, command, end
//!                         output.log  what it has printed
//!                         version_0/  its run
//! ```

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::command::render;
use super::definition::Definition;
use super::error::SweepError;
use super::search::Parameters;
use crate::checkpoint::{find_run, replace_file};
use crate::files::hold;
use crate::report::format::number;

const DEFINITION: &str = "sweep.yaml";
const TRIAL: &str = "trial.json";
const LOCK: &str = "sweep.lock";
const PREFIX: &str = "trial-";

/// The directory of a sweep, held by this process while the value lives.
#[derive(Debug)]
pub struct SweepDir {
    path: PathBuf,
    /// Unlocked when dropped, and by the system when the process dies.
    _lock: File,
}

/// A trial that has begun.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Its number, from 1 on.
    pub number: u64,
    /// What it tries.
    pub parameters: Parameters,
    /// The program and its arguments, as they were last begun: for people.
    pub command: Vec<String>,
    /// Compute threads that it has unless its settings say otherwise.
    pub threads: usize,
    /// How it ended. A trial without an end is gone on with.
    pub end: Option<End>,
}

/// How a trial ended for good.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "how", rename_all = "snake_case")]
pub enum End {
    /// It came to its last step.
    Done,
    /// NaN, or features that have become the same.
    Diverged {
        /// Its last words.
        error: String,
    },
    /// Others were better when they had come as far.
    Stopped {
        /// How many values of the metric were compared.
        iteration: usize,
        /// Its value.
        value: f64,
        /// What it would have needed.
        threshold: f64,
    },
    /// Something else ended it.
    Failed {
        /// Its last words.
        error: String,
    },
}

impl End {
    /// Why a trial ended before its last step.
    pub fn why(&self) -> Option<String> {
        match self {
            End::Done => None,
            End::Diverged { error } | End::Failed { error } => Some(error.clone()),
            End::Stopped { iteration, value, threshold } => Some(format!(
                "{} after {iteration} values of the metric, where {} was needed",
                number(*value),
                number(*threshold)
            )),
        }
    }
}

impl Trial {
    /// A trial of the sweep in `directory` that has not begun. Its command says, after what `definition` says, where
    /// its run lies, and that it goes on where it stopped.
    pub fn new(
        number: u64,
        parameters: Parameters,
        definition: &Definition,
        directory: &Path,
        threads: usize,
    ) -> Self {
        let mut command = render(definition, &parameters);
        command.push(format!("run.dir={}", json!(directory)));
        command.push(format!("run.name={}", name_of(number)));
        if !command.iter().any(|word| word.starts_with("--resume")) {
            command.extend(["--resume", "auto"].map(str::to_owned));
        }
        Trial { number, parameters, command, threads, end: None }
    }

    /// What it is called.
    pub fn name(&self) -> String {
        name_of(self.number)
    }
}

fn name_of(number: u64) -> String {
    format!("{PREFIX}{number:04}")
}

impl SweepDir {
    /// Makes the directory, or takes up the one that is there, for the sweep that the file `source` defines.
    ///
    /// # Errors
    /// [`SweepError::Another`] when it holds another sweep, [`SweepError::Occupied`] when it holds something else;
    /// [`SweepError::Busy`] while another process has it.
    pub fn open(path: &Path, definition: &Definition, source: &Path) -> Result<Self, SweepError> {
        let kept = path.join(DEFINITION);
        if let (false, Some(folder)) = (kept.exists(), folder_in(path)) {
            return Err(SweepError::Occupied { path: path.to_owned(), folder });
        }
        fs::create_dir_all(path).map_err(io_error("cannot be created", path))?;
        let lock_path = path.join(LOCK);
        let lock = hold(&lock_path).map_err(io_error("cannot be opened", &lock_path))?;
        let lock = lock.ok_or_else(|| SweepError::Busy { path: path.to_owned() })?;
        if kept.exists() {
            let differences = Definition::read(&kept)?.differences(definition);
            if !differences.is_empty() && !forget_trials(path)? {
                return Err(SweepError::Another {
                    path: path.to_owned(),
                    differences: differences.join(", "),
                });
            }
        }
        let text = fs::read(source).map_err(io_error("cannot be read", source))?;
        write(&kept, &text)?;
        Ok(SweepDir { path: path.to_owned(), _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The trials so far by number.
    ///
    /// # Errors
    /// A directory or a trial that cannot be read.
    pub fn trials(&self) -> Result<Vec<Trial>, SweepError> {
        read_trials(&self.path)
    }

    /// Keeps `trial` as it stands.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn keep(&self, trial: &Trial) -> Result<(), SweepError> {
        let folder = self.folder(trial);
        fs::create_dir_all(&folder).map_err(io_error("cannot be created", &folder))?;
        let text = serde_json::to_vec_pretty(trial).expect("a trial is JSON");
        write(&folder.join(TRIAL), &text)
    }

    /// The folder of `trial`.
    pub fn folder(&self, trial: &Trial) -> PathBuf {
        self.path.join(trial.name())
    }

    /// What `trial` has printed.
    pub fn log(&self, trial: &Trial) -> PathBuf {
        self.folder(trial).join("output.log")
    }
}

/// The sweep in `path`, and its trials by number; none when there is no sweep.
///
/// # Errors
/// A definition, a directory or a trial that cannot be read.
pub fn read_sweep(path: &Path) -> Result<Option<(Definition, Vec<Trial>)>, SweepError> {
    let kept = path.join(DEFINITION);
    if !kept.exists() {
        return Ok(None);
    }
    Ok(Some((Definition::read(&kept)?, read_trials(path)?)))
}

/// The trial whose run `run`, a version, is; none of a run outside a sweep.
///
/// # Errors
/// A trial that cannot be read.
pub fn trial_of(run: &Path) -> Result<Option<Trial>, SweepError> {
    run.parent().map_or(Ok(None), read_trial)
}

/// The trials of the sweep in `path` by number.
///
/// # Errors
/// A directory or a trial that cannot be read.
pub fn read_trials(path: &Path) -> Result<Vec<Trial>, SweepError> {
    let mut trials = Vec::new();
    for entry in fs::read_dir(path).map_err(io_error("cannot be read", path))? {
        trials.extend(read_trial(&entry.map_err(io_error("cannot be read", path))?.path())?);
    }
    trials.sort_by_key(|trial| trial.number);
    Ok(trials)
}

fn read_trial(folder: &Path) -> Result<Option<Trial>, SweepError> {
    let file = folder.join(TRIAL);
    let text = match fs::read(&file) {
        Ok(text) => text,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(io_error("cannot be read", &file)(error)),
    };
    let trial: Trial = serde_json::from_slice(&text).map_err(|why| SweepError::Io {
        action: "is no trial; delete this file, and its run goes on as a trial of the same number",
        path: file,
        why: why.to_string(),
    })?;
    // A copy that somebody has made is no trial.
    Ok(Some(trial).filter(|trial| trial.number > 0 && folder.ends_with(trial.name())))
}

/// The name of a folder in `path`, where there is one.
fn folder_in(path: &Path) -> Option<String> {
    let mut folders = fs::read_dir(path).ok()?.flatten().filter(|entry| entry.path().is_dir());
    Some(folders.next()?.file_name().to_string_lossy().into_owned())
}

/// Removes the trials in `path` if none of them has come to be a run: then nothing is lost. Returns whether it was so.
fn forget_trials(path: &Path) -> Result<bool, SweepError> {
    let folders: Vec<PathBuf> = read_trials(path)?.iter().map(|trial| path.join(trial.name())).collect();
    if folders.iter().any(|folder| find_run(folder).is_ok()) {
        return Ok(false);
    }
    for folder in folders {
        fs::remove_file(folder.join(TRIAL)).map_err(io_error("cannot be emptied", &folder))?;
    }
    Ok(true)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), SweepError> {
    replace_file(path, bytes).map_err(io_error("cannot be written", path))
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SweepError {
    move |error| SweepError::Io { action, path: path.to_owned(), why: error.to_string() }
}
