//! Which checkpoint a path means, and `--resume auto|PATH`.

use std::path::{Path, PathBuf};

use super::error::CheckpointError;
use super::run_dir::versions;
use super::store::{self, FOLDER, STATE};

/// Where to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resume {
    /// The version directory.
    pub run: PathBuf,
    /// The checkpoint in it.
    pub checkpoint: PathBuf,
}

/// The checkpoint that `request` means for a run that is to go on. `auto`: the newest of the newest version of the run
/// `name` under `runs` that has one; `None` when no version has any, so that the same command can start a run and take
/// it up again. A path: as [`find_checkpoint`] has it, in a run.
///
/// # Errors
/// A path that leads to no checkpoint, or to one outside a run. Whether it is whole shows when it is loaded.
pub fn resolve_resume(request: &str, runs: &Path, name: &str) -> Result<Option<Resume>, CheckpointError> {
    if request == "auto" {
        return newest(&runs.join(name));
    }
    let checkpoint = find_checkpoint(request.as_ref())?;
    let folder = checkpoint.parent().filter(|folder| folder.ends_with(FOLDER));
    match folder.and_then(Path::parent) {
        Some(run) => Ok(Some(Resume { run: run.to_owned(), checkpoint })),
        None => Err(nothing(request.as_ref(), "it lies outside a run, which would have nowhere to go on")),
    }
}

/// The checkpoint at `path`: the newest of a run directory or of a version of it, or a checkpoint's own folder,
/// wherever that has been copied to. The path that comes back is absolute.
///
/// # Errors
/// When there is none. Whether it is whole shows when it is loaded.
pub fn find_checkpoint(path: &Path) -> Result<PathBuf, CheckpointError> {
    // Absolute, so that `.` has a parent.
    let full = path.canonicalize().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => nothing(path, "it does not exist"),
        _ => CheckpointError::io("cannot be read", path)(error),
    })?;
    if full.join(STATE).exists()
        || full.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step_"))
    {
        return Ok(full);
    }
    let run = if full.ends_with(FOLDER) { full.parent().unwrap_or(&full) } else { &full };
    if run.join(FOLDER).is_dir() {
        let checkpoint = store::latest(run)?;
        return checkpoint.ok_or_else(|| nothing(path, "the run stopped before its first checkpoint"));
    }
    let found = newest(&full)?.ok_or_else(|| nothing(path, "there is none in it"))?;
    Ok(found.checkpoint)
}

fn nothing(path: &Path, why: &str) -> CheckpointError {
    CheckpointError::NotACheckpoint { path: path.to_owned(), why: why.to_owned() }
}

fn newest(run: &Path) -> Result<Option<Resume>, CheckpointError> {
    for (_, version) in versions(run)?.into_iter().rev() {
        if let Some(checkpoint) = store::latest(&version)? {
            return Ok(Some(Resume { run: version, checkpoint }));
        }
    }
    Ok(None)
}
