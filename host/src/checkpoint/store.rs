//! Checkpoints in a folder: saving so that no kill leaves half of one, pruning, listing, loading.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::Tensor;

use super::error::CheckpointError;
use super::state::{Best, FORMAT, State};
use super::tensors::{self, Layout, NamedTensors};
use crate::files::{TEMPORARY, put_in_place, sync_folder, temporary_beside};

/// Folder of a run's checkpoints.
pub(super) const FOLDER: &str = "checkpoints";
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
pub(super) const STATE: &str = "state.json";
const BEST: &str = "best.json";
const STEP: &str = "step_";
/// An earlier checkpoint of the same step while its successor takes its name.
const REPLACED: &str = ".old_";
/// A checkpoint of steps that a run went back behind.
const SUPERSEDED: &str = "superseded_";

/// A saved state in memory. Tensors are on the CPU.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder it was read from.
    pub path: PathBuf,
    /// Everything but tensors.
    pub state: State,
    /// Parameters and buffers.
    pub model: NamedTensors,
    /// The optimizer's own tensors.
    pub optimizer: NamedTensors,
}

/// Saves a checkpoint in `folder`, then removes old ones: all but the newest `keep` and the best one. Returns its path.
pub(super) fn save(
    folder: &Path,
    state: &State,
    model: &[(String, Tensor)],
    optimizer: &[(String, Tensor)],
    keep: usize,
) -> Result<PathBuf, CheckpointError> {
    fs::create_dir_all(folder).map_err(CheckpointError::io("cannot be created", folder))?;
    recover(folder)?;
    let name = step_name(state.step);
    let (path, temporary) = (folder.join(&name), folder.join(format!("{TEMPORARY}{name}")));
    let (model, optimizer) = (Layout::new(model)?, Layout::new(optimizer)?);
    let state_bytes = json_bytes(state);
    // JSON has no NaN: find out now, not when it is to be loaded.
    if serde_json::from_slice::<State>(&state_bytes).ok().as_ref() != Some(state) {
        return Err(CheckpointError::State { path });
    }
    let needed = model.size() + optimizer.size() + state_bytes.len() as u64;

    let write = || -> io::Result<()> {
        fs::create_dir(&temporary)?;
        model.write(&temporary.join(MODEL))?;
        optimizer.write(&temporary.join(OPTIMIZER))?;
        write_synced(&temporary.join(STATE), &state_bytes)?;
        sync_folder(&temporary)?;
        let replaced = folder.join(format!("{REPLACED}{name}"));
        if path.exists() {
            fs::rename(&path, &replaced)?;
        }
        fs::rename(&temporary, &path)?;
        sync_folder(folder)?;
        if replaced.exists() {
            fs::remove_dir_all(&replaced)?;
        }
        Ok(())
    };
    write().map_err(|source| {
        // Best effort: the next save clears it away too.
        let _ = fs::remove_dir_all(&temporary);
        CheckpointError::Save { path: path.clone(), needed, source }
    })?;

    note_best(folder, state.best.as_ref())?;
    prune(folder, keep, state.best.as_ref().map(|best| best.step))?;
    Ok(path)
}

/// The pointer to the best checkpoint: for people and tools; [`State::best`] is what a run goes by.
fn note_best(folder: &Path, best: Option<&Best>) -> Result<(), CheckpointError> {
    let path = folder.join(BEST);
    let Some(best) = best.filter(|best| folder.join(step_name(best.step)).is_dir()) else { return Ok(()) };
    let bytes = json_bytes(best);
    if fs::read(&path).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    replace_file(&path, &bytes).map_err(CheckpointError::io("cannot be written", path))
}

/// Writes a whole file, or leaves the one that was there: no kill and no full disk leaves half of one.
///
/// # Errors
/// When it cannot be written.
pub fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = temporary_beside(path);
    write_synced(&temporary, bytes).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })?;
    put_in_place(&temporary, path)
}

fn prune(folder: &Path, keep: usize, best: Option<u64>) -> Result<(), CheckpointError> {
    let steps = steps(folder)?;
    let old = &steps[..steps.len().saturating_sub(keep.max(1))];
    for (step, path) in old.iter().filter(|(step, _)| Some(*step) != best) {
        // Renamed first, so that a kill leaves no checkpoint with half of its files.
        let doomed = folder.join(format!("{TEMPORARY}{}", step_name(*step)));
        fs::rename(path, &doomed)
            .and_then(|()| fs::remove_dir_all(&doomed))
            .map_err(CheckpointError::io("cannot be removed", path))?;
    }
    Ok(())
}

/// Clears away what a killed save left behind. Only the process that writes to the run may do so.
fn recover(folder: &Path) -> Result<(), CheckpointError> {
    for path in entries(folder)? {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let done = if let Some(step) = name.strip_prefix(REPLACED) {
            let successor = folder.join(step);
            if successor.exists() { fs::remove_dir_all(&path) } else { fs::rename(&path, &successor) }
        } else if name.starts_with(TEMPORARY) {
            if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }
        } else {
            Ok(())
        };
        done.map_err(CheckpointError::io("cannot be cleared away", path))?;
    }
    Ok(())
}

/// Puts aside the checkpoints after `step`, under names that nothing reads: the run is about to take other steps.
pub(super) fn supersede_after(folder: &Path, step: u64) -> Result<Vec<PathBuf>, CheckpointError> {
    let mut aside = Vec::new();
    for (later, path) in steps(folder)?.into_iter().filter(|(later, _)| *later > step) {
        let name = step_name(later);
        let mut target = folder.join(format!("{SUPERSEDED}{name}"));
        for number in 2.. {
            if !target.exists() {
                break;
            }
            target = folder.join(format!("{SUPERSEDED}{name}_{number}"));
        }
        fs::rename(&path, &target).map_err(CheckpointError::io("cannot be renamed", path))?;
        aside.push(target);
    }
    if let Some(best) = read_best(folder)
        && best.step > step
    {
        let path = folder.join(BEST);
        fs::remove_file(&path).map_err(CheckpointError::io("cannot be removed", path))?;
    }
    Ok(aside)
}

/// The checkpoints of a version directory, oldest first.
pub fn list(run: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    Ok(steps(&run.join(FOLDER))?.into_iter().map(|(_, path)| path).collect())
}

/// The newest checkpoint of a version directory, if there is one.
pub fn latest(run: &Path) -> Result<Option<PathBuf>, CheckpointError> {
    Ok(list(run)?.pop())
}

fn read_best(folder: &Path) -> Option<Best> {
    serde_json::from_slice(&fs::read(folder.join(BEST)).ok()?).ok()
}

/// Loads a whole checkpoint.
///
/// # Errors
/// Any file that is missing, cut short, or of another format, by name.
pub fn load(path: &Path) -> Result<Checkpoint, CheckpointError> {
    let state = load_state(path)?;
    let others = others(path);
    let model = tensors::read_of_checkpoint(&path.join(MODEL), &others)?;
    let optimizer = tensors::read_of_checkpoint(&path.join(OPTIMIZER), &others)?;
    Ok(Checkpoint { path: path.to_owned(), state, model, optimizer })
}

/// Loads a checkpoint's parameters and buffers only, with its state.
///
/// # Errors
/// As [`load`].
pub fn load_model(path: &Path) -> Result<(State, NamedTensors), CheckpointError> {
    Ok((load_state(path)?, tensors::read_of_checkpoint(&path.join(MODEL), &others(path))?))
}

/// Loads a checkpoint's state only.
pub fn load_state(path: &Path) -> Result<State, CheckpointError> {
    let file = path.join(STATE);
    let damaged = |why: String| CheckpointError::Damaged { file: file.clone(), why, others: others(path) };
    let bytes = match fs::read(&file) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !path.join(MODEL).exists() => {
            let why =
                if path.exists() { format!("it holds no {STATE}") } else { "it does not exist".to_owned() };
            return Err(CheckpointError::NotACheckpoint { path: path.to_owned(), why });
        }
        Err(error) => return Err(damaged(error.to_string())),
    };
    let value: Value =
        serde_json::from_slice(&bytes).map_err(|error| damaged(format!("not whole JSON ({error})")))?;
    match value.get("format") {
        Some(format) if format == FORMAT => {}
        Some(format) => {
            return Err(CheckpointError::Format { file, found: format.to_string(), supported: FORMAT });
        }
        None => return Err(damaged("it tells no format".to_owned())),
    }
    serde_json::from_value(value).map_err(|error| damaged(error.to_string()))
}

/// The other checkpoints beside this one, newest first.
fn others(path: &Path) -> Vec<PathBuf> {
    let mut others = path.parent().and_then(|folder| steps(folder).ok()).unwrap_or_default();
    others.retain(|(_, other)| other != path);
    others.into_iter().rev().map(|(_, path)| path).collect()
}

fn step_name(step: u64) -> String {
    format!("{STEP}{step:08}")
}

/// Checkpoints by step, oldest first. A folder that is not there holds none.
fn steps(folder: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let mut steps = Vec::new();
    for path in entries(folder)? {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        // One that was to be replaced when a kill came between the two renames still counts.
        let kept = name.strip_prefix(REPLACED).filter(|name| !folder.join(name).exists());
        if let Some(step) = kept.unwrap_or(name).strip_prefix(STEP).and_then(|step| step.parse().ok()) {
            steps.push((step, path));
        }
    }
    steps.sort();
    Ok(steps)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    match fs::read_dir(folder) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.path()))
            .collect::<io::Result<_>>()
            .map_err(CheckpointError::io("cannot be read", folder)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(CheckpointError::io("cannot be read", folder)(error)),
    }
}

fn json_bytes(value: &impl serde::Serialize) -> Vec<u8> {
    // Only a map with keys other than strings could fail, and none of ours has such keys.
    let mut bytes = serde_json::to_vec_pretty(value).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}
