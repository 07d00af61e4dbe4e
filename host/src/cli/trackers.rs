//! The trackers that a run's settings ask for.

use std::collections::BTreeMap;
use std::env;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};

use super::session::Session;
use crate::checkpoint::RunDir;
use crate::config::{Config, WandbMode};
use crate::device::libtorch;
use crate::track::tensorboard::TensorBoard;
use crate::track::wandb::core::{Program, TESTED};
use crate::track::wandb::{Wandb, WandbRun, mode};
use crate::track::{Tracker, Trackers};

/// Opens the trackers of a run. One that cannot be had is said, and left out: its records can be sent later.
///
/// # Errors
/// When `metrics.jsonl` cannot be opened.
pub(super) fn open_trackers(session: &Session, directory: &RunDir) -> anyhow::Result<Trackers> {
    let mut others: Vec<Box<dyn Tracker>> = Vec::new();
    let name = format!("{}/{}", session.config().run_name(&session.method), directory.version());
    match wandb(session.config(), directory.path(), &name, None) {
        Ok(Some(run)) => {
            if !run.program.is_tested() {
                let version = run.program.version.as_deref().unwrap_or("unknown");
                let tested = TESTED.join(", ");
                tracing::warn!("wandb-core is of version {version}, which was not tried (tried: {tested})");
            }
            others.push(Box::new(Wandb::new(run)));
        }
        Ok(None) => {}
        Err(error) => tracing::warn!("W&B is off: {error:#}"),
    }
    if session.config().track.tensorboard {
        others.push(Box::new(TensorBoard::new(directory.path())));
    }
    Trackers::open(directory.path(), others)
}

/// The W&B run of the run in `directory`; none when that is not wanted. `wanted` wins over settings and environment.
pub(super) fn wandb(
    config: &Config,
    directory: &Path,
    name: &str,
    wanted: Option<WandbMode>,
) -> anyhow::Result<Option<WandbRun>> {
    let options = &config.track.wandb;
    let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let mode = match wanted {
        Some(mode) => mode,
        None => mode(options, &variable)?,
    };
    if mode == WandbMode::Disabled {
        return Ok(None);
    }
    let program = Program::find(beside_bridge().as_deref())?;
    let mut config = with_provenance(json!(config), directory);
    if let Some(file) = variable("WANDB_SWEEP_PARAM_PATH") {
        add_sweep_parameters(&mut config, Path::new(&file));
    }
    WandbRun::resolve(options, &variable, mode, program, directory, name, config).map(Some)
}

/// The folder that `make setup` fills.
pub(super) fn beside_bridge() -> Option<std::path::PathBuf> {
    Some(libtorch().bridge?.parent()?.to_owned())
}

/// The settings, and what the last session ran on.
fn with_provenance(mut config: Value, directory: &Path) -> Value {
    let sessions = std::fs::read(directory.join("provenance.json")).context("no provenance");
    let sessions = sessions.and_then(|bytes| Ok(serde_json::from_slice::<Value>(&bytes)?));
    if let Some(last) = sessions.ok().as_ref().and_then(|sessions| sessions.as_array()?.last()) {
        config["provenance"] = last.clone();
    }
    config
}

/// Adds what a sweep tries under its own names, such as `optimizer.lr`: by those, W&B knows which trials it has had.
/// `file` is where an agent writes them.
fn add_sweep_parameters(config: &mut Value, file: &Path) {
    let text = std::fs::read_to_string(file).map_err(anyhow::Error::from);
    let entries = text.and_then(|text| Ok(serde_saphyr::from_str::<BTreeMap<String, Value>>(&text)?));
    let entries = entries.unwrap_or_else(|error| {
        tracing::warn!("W&B will not know the parameters of this trial: {}: {error:#}", file.display());
        BTreeMap::new()
    });
    for (name, entry) in entries {
        if let (Some(value), None) = (entry.get("value"), config.get(&name)) {
            config[name] = value.clone();
        }
    }
}

/// How long trackers may take at the end. Whoever interrupts a run may kill it soon, as an agent of W&B does after half
/// a minute; whoever waits for a result has time, and may interrupt.
pub(super) fn patience_at_end(exit_code: u8) -> Duration {
    Duration::from_secs(if exit_code >= 128 { 15 } else { 120 })
}
