//! What made a run: `config.toml` and `provenance.json` in its directory, for people who ask later.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::checkpoint::State;
use crate::config::ResolvedConfig;
use crate::device::libtorch;

/// Writes the resolved configuration, with the source of each value, and what it ran on. A resumed run adds to
/// `provenance.json` instead of replacing it.
///
/// # Errors
/// When a file cannot be written.
pub fn write(directory: &Path, settings: &ResolvedConfig, state: &State) -> anyhow::Result<()> {
    let write = |name: &str, text: String| {
        let path = directory.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    let path = directory.join("provenance.json");
    let mut sessions: Vec<Value> = match fs::read(&path) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))?
        }
        Err(_) => Vec::new(),
    };
    sessions.push(session(state));
    write("provenance.json", format!("{:#}\n", Value::Array(sessions)))?;
    write("config.toml", settings.print())
}

fn session(state: &State) -> Value {
    let torch = libtorch();
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let plugins: Vec<Value> = state
        .plugins
        .iter()
        .map(|plugin| json!({ "name": plugin.name, "version": plugin.version, "sha256": plugin.sha256 }))
        .collect();
    json!({
        "started_unix_s": since_epoch.as_secs(),
        "from_step": state.step,
        "command": std::env::args().collect::<Vec<_>>(),
        "host": { "name": output("uname", &["-n"]), "system": output("uname", &["-srm"]) },
        "jepa-host": env!("CARGO_PKG_VERSION"),
        "git": output("git", &["describe", "--always", "--dirty", "--abbrev=40"]),
        "libtorch": torch,
        "threads": state.threads,
        "plugins": plugins,
        "data_fingerprint": state.data_fingerprint,
    })
}

/// The first line that a program prints; null when it is not there or fails, as git does outside a repository.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output =
        Command::new(program).args(arguments).output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok().map(|text| text.trim().to_owned())
}
