//! Which checkpoint `--resume auto|PATH` means.

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

/// The checkpoint that `request` means. `auto`: the newest of the newest version of the run `name` under `runs` that
/// has one; `None` when no version has any, so that the same command can start a run and take it up again. A path: a
/// run directory, a version of it, or a checkpoint in it.
///
/// # Errors
/// A path that leads to no checkpoint. Whether the checkpoint is whole shows when it is loaded.
pub fn resolve_resume(request: &str, runs: &Path, name: &str) -> Result<Option<Resume>, CheckpointError> {
    if request == "auto" {
        return newest(&runs.join(name));
    }
    let path = Path::new(request);
    let nothing = |why: &str| CheckpointError::NotACheckpoint { path: path.to_owned(), why: why.to_owned() };
    // Absolute, so that `.` has a parent.
    let full = path.canonicalize().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => nothing("it does not exist"),
        _ => CheckpointError::io("cannot be read", path)(error),
    })?;
    if full.join(STATE).exists()
        || full.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step_"))
    {
        let folder = full.parent().filter(|folder| folder.ends_with(FOLDER));
        let run = folder.and_then(Path::parent);
        let run = run.ok_or_else(|| nothing("it lies outside a run, which would have nowhere to go on"))?;
        return Ok(Some(Resume { run: run.to_owned(), checkpoint: full.clone() }));
    }
    let run = if full.ends_with(FOLDER) { full.parent().unwrap_or(&full) } else { &full };
    if run.join(FOLDER).is_dir() {
        return of_version(run)?
            .map(Some)
            .ok_or_else(|| nothing("the run stopped before its first checkpoint"));
    }
    newest(&full)?.map(Some).ok_or_else(|| nothing("there is none in it"))
}

fn newest(run: &Path) -> Result<Option<Resume>, CheckpointError> {
    for (_, version) in versions(run)?.into_iter().rev() {
        if let Some(resume) = of_version(&version)? {
            return Ok(Some(resume));
        }
    }
    Ok(None)
}

fn of_version(version: &Path) -> Result<Option<Resume>, CheckpointError> {
    let checkpoint = store::latest(version)?;
    Ok(checkpoint.map(|checkpoint| Resume { run: version.to_owned(), checkpoint }))
}
