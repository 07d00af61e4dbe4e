//! The process of a trial, and of all that it starts.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

/// Starts `words`, the program and its arguments, with these variables of the environment. What it prints goes to
/// `output`. It is the first of a process group: a Ctrl-C at the terminal is for this process, which passes it on once.
/// When this process dies, however that may be, the program gets SIGTERM, so that it leaves a checkpoint; this must be
/// called on the thread that lives as long as the process.
///
/// # Errors
/// When the program cannot be started.
pub(super) fn start(words: &[String], variables: &[(&str, String)], output: File) -> io::Result<Child> {
    let (program, arguments) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(program);
    command.args(arguments).envs(variables.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).process_group(0);
    let parent = std::process::id() as libc::pid_t;
    // SAFETY: between fork and exec only prctl and getppid are called, which are async-signal-safe and allocate nothing.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) != 0 {
                return Err(io::Error::last_os_error());
            }
            // A parent that has died already sends nothing.
            if libc::getppid() != parent { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
        });
    }
    command.spawn()
}

/// The last error in what a program has printed, else its last line.
pub(super) fn last_words(output: &[u8]) -> String {
    let output = String::from_utf8_lossy(output);
    let mut lines = output.lines().rev().map(str::trim).filter(|line| !line.is_empty());
    let last = lines.next().unwrap_or("nothing at all");
    let error = std::iter::once(last).chain(lines).find_map(|line| line.strip_prefix("error: "));
    error.unwrap_or(last).to_owned()
}

/// Sends `signal` to `child`, which has not been waited for, and to all that it has started.
pub(super) fn signal(child: &Child, signal: libc::c_int) {
    // SAFETY: kill takes numbers only. The child has not been waited for, so that its group's number is its own.
    unsafe { libc::kill(-(child.id() as libc::pid_t), signal) };
}
