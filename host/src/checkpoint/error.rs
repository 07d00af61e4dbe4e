//! What can go wrong with saved states. Every message names the file and says what to do.

use std::io;
use std::path::PathBuf;

/// A state that cannot be saved, found, read or put back.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A run directory that cannot be made, read or changed.
    #[error("{}: {action}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A checkpoint that cannot be written.
    #[error(
        "cannot save the checkpoint {} ({} needed): {source}. Earlier checkpoints are untouched; free some space or \
         lower checkpoint.keep, then go on with --resume auto",
        path.display(),
        size(*needed)
    )]
    Save {
        /// Where it was to be.
        path: PathBuf,
        /// Its size in bytes.
        needed: u64,
        /// Why it failed.
        source: io::Error,
    },
    /// A state that would not come back from its file as it is.
    #[error("cannot save the checkpoint {}: its state holds a number that is not finite", path.display())]
    State {
        /// Where it was to be.
        path: PathBuf,
    },
    /// A run directory that another process is writing to.
    #[error("another process is writing to {}: stop it first, or start a new run without --resume", path.display())]
    Busy {
        /// The run directory.
        path: PathBuf,
    },
    /// A path where a checkpoint was asked for and there is none.
    #[error("{} is no checkpoint: {why}. Give a run directory, one of its versions, or a folder checkpoints/step_…", path.display())]
    NotACheckpoint {
        /// The path.
        path: PathBuf,
        /// What is missing.
        why: String,
    },
    /// A path where a run was asked for and there is none.
    #[error("{} is no run: {why}. Give runs/<name> or one of its versions; `jepa-host ls` lists what there is", path.display())]
    NotARun {
        /// The path.
        path: PathBuf,
        /// What is missing.
        why: &'static str,
    },
    /// A file of a checkpoint that is missing or unreadable.
    #[error("{} cannot be used: {why}. {}", file.display(), instead(others))]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
        /// Other checkpoints of the same run.
        others: Vec<PathBuf>,
    },
    /// A checkpoint of another version of this program.
    #[error("{} has checkpoint format {found}, and this program reads format {supported}: use the version that wrote it", file.display())]
    Format {
        /// The state file.
        file: PathBuf,
        /// Its format.
        found: String,
        /// The format that can be read.
        supported: u32,
    },
    /// Saved tensors that are not those of the model or optimizer they should go into.
    #[error("the saved tensors do not fit: {}. Use the method, backbone and options that they were saved with", .0.join("; "))]
    Mismatch(Vec<String>),
    /// A tensor that cannot be saved or rebuilt.
    #[error("tensor {name}: {why}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong.
        why: String,
    },
}

impl CheckpointError {
    pub(super) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| CheckpointError::Io { action, path, source }
    }
}

fn instead(others: &[PathBuf]) -> String {
    match others {
        [] => "This run has no other checkpoint".to_owned(),
        others => {
            let paths: Vec<String> = others.iter().map(|path| path.display().to_string()).collect();
            format!("Resume from another one: --resume {}", paths.join(" or "))
        }
    }
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}
