//! What made a run: `config.toml` and `provenance.json` in its directory, for people who ask later.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::checkpoint::{State, replace_file};
use crate::config::ResolvedConfig;
use crate::device::libtorch;
use crate::dist::Peer;

/// Writes the resolved configuration, with the source of each value, and what it ran on: `ranks`, if they are several. A resumed run adds to
/// `provenance.json` instead of replacing it.
///
/// # Errors
/// When a file cannot be written.
pub fn write(
    directory: &Path,
    settings: &ResolvedConfig,
    state: &State,
    ranks: &[Peer],
) -> anyhow::Result<()> {
    let write = |name: &str, text: String| {
        let path = directory.join(name);
        replace_file(&path, text.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
    };
    let mut sessions = earlier_sessions(&directory.join("provenance.json"))?;
    sessions.push(session(state, ranks));
    write("provenance.json", format!("{:#}\n", Value::Array(sessions)))?;
    write("config.toml", settings.print())
}

/// Notes in the last session of `provenance.json` how it ended. A run that was killed has no such note.
///
/// # Errors
/// When the file cannot be read or written.
pub fn note_end(directory: &Path, exit_code: u8, error: Option<&anyhow::Error>) -> anyhow::Result<()> {
    let path = directory.join("provenance.json");
    let mut sessions = earlier_sessions(&path)?;
    let Some(last) = sessions.last_mut().and_then(Value::as_object_mut) else { return Ok(()) };
    let error = error.map(|error| format!("{error:#}"));
    last.insert(
        "end".to_owned(),
        json!({ "unix_s": unix_seconds(), "exit_code": exit_code, "error": error }),
    );
    let text = format!("{:#}\n", Value::Array(sessions));
    replace_file(&path, text.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A damaged file is put aside: it is no reason to refuse a good checkpoint.
fn earlier_sessions(path: &Path) -> anyhow::Result<Vec<Value>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    serde_json::from_slice(&bytes).or_else(|error| {
        let aside = path.with_extension("damaged.json");
        tracing::warn!("{} is damaged ({error}): kept as {}", path.display(), aside.display());
        fs::rename(path, &aside).with_context(|| format!("cannot rename {}", path.display()))?;
        Ok(Vec::new())
    })
}

fn session(state: &State, ranks: &[Peer]) -> Value {
    let torch = libtorch();
    let plugins: Vec<Value> = state
        .plugins
        .iter()
        .map(|plugin| json!({ "name": plugin.name, "version": plugin.version, "sha256": plugin.sha256 }))
        .collect();
    json!({
        "started_unix_s": unix_seconds(),
        "from_step": state.step,
        "command": std::env::args().collect::<Vec<_>>(),
        "host": { "name": output("uname", &["-n"]), "system": output("uname", &["-srm"]) },
        "jepa-host": state.host,
        "git": output("git", &["describe", "--always", "--dirty", "--abbrev=40"]),
        "libtorch": torch,
        "device": state.device,
        "threads": state.threads,
        "plugins": plugins,
        "data_fingerprint": state.data_fingerprint,
        "ranks": ranks,
        "slurm_job": slurm_job(),
    })
}

/// Whether the run in `directory` was last worked on by this process's SLURM job, before that was requeued.
pub fn is_of_this_job(directory: &Path) -> bool {
    let sessions = earlier_sessions(&directory.join("provenance.json")).unwrap_or_default();
    let last = sessions.last().and_then(|session| session["slurm_job"].as_str());
    last.is_some() && last == slurm_job().as_deref()
}

fn slurm_job() -> Option<String> {
    std::env::var("SLURM_JOB_ID").ok()
}

/// The first line that a program prints; null when it is not there or fails, as git does outside a repository.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output =
        Command::new(program).args(arguments).output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok().map(|text| text.trim().to_owned())
}
