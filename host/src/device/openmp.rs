//! Compute threads that give way. libgomp's threads spin for milliseconds before they sleep; when another process wants
//! the cores, that costs a training run most of its speed.

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// How often a thread looks before it sleeps, some microseconds in all.
const SPINS: &str = "1000";
/// The variables by which a user decides it.
const VARIABLES: [&str; 2] = ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"];

/// Begins this program anew, with the same arguments and process number, unless the environment tells already how long
/// threads spin: libgomp asks once, when it is loaded. Does not return when that works.
///
/// # Errors
/// When the program cannot be started; nothing has changed then.
pub fn begin_with_calm_threads() -> io::Result<()> {
    if VARIABLES.iter().any(|name| env::var_os(name).is_some()) {
        return Ok(());
    }
    let mut arguments = env::args_os();
    let name = arguments.next().unwrap_or_else(|| OsString::from("jepa-host"));
    let mut command = Command::new(env::current_exe()?);
    Err(command.arg0(name).args(arguments).env(VARIABLES[0], SPINS).exec())
}
