//! What stands before the first trial: its program says what it would train with, so that a typo is found before
//! anything trains.

use std::env;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::directory::Trial;
use super::error::SweepError;
use super::process::last_words;
use crate::report::{Setting, parse_settings};

/// Has the program of `trial` print its settings. None where it prints something else, as a script may that begins other
/// programs.
///
/// # Errors
/// [`SweepError::Refused`] when the program cannot be started, or refuses the settings.
pub fn rehearse(trial: &Trial) -> Result<Option<Vec<Setting>>, SweepError> {
    let refused = |why: String| SweepError::Refused {
        trial: trial.name(),
        why,
        folder: env::current_dir().unwrap_or_else(|_| PathBuf::from(".")),
        command: trial.command.join(" "),
    };
    let (program, arguments) =
        trial.command.split_first().ok_or_else(|| refused("it is empty".to_owned()))?;
    let mut command = Command::new(program);
    command.args(arguments).arg("--print-config").stdin(Stdio::null());
    let output = command.output().map_err(|error| refused(format!("cannot start {program}: {error}")))?;
    if !output.status.success() {
        return Err(refused(last_words(&[output.stdout, output.stderr].concat())));
    }
    Ok(parse_settings(&String::from_utf8_lossy(&output.stdout)).ok().filter(|settings| !settings.is_empty()))
}
