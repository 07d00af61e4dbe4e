//! From errors to exit codes, and to the words on the terminal.

use std::io::{self, Write as _};

use jepa_plugin_api::abi::{Failure, FailureKind};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::data::DataError;
use crate::device::DeviceError;
use crate::dist::{DistError, Ending};
use crate::plugin::scaffold::ScaffoldError;
use crate::plugin::{LockError, PluginError};
use crate::sweep::SweepError;
use crate::track::console::speaker;
use crate::train::{TrainError, has_diverged};

/// A command line that makes no sense, beyond what the parser sees.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Usage(pub String);

/// Prints `error` on the standard error, and behind it each cause that it does not tell itself. Where a signal met the
/// program is nobody's concern.
pub(super) fn report(error: &anyhow::Error) {
    let interrupted = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref(), Some(TrainError::Interrupted { .. } | TrainError::Stopped { .. }))
    };
    let first = error.chain().position(interrupted).unwrap_or(0);
    let mut text = String::new();
    for cause in error.chain().skip(first).map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    // Nobody may be left to read it: the exit code still tells.
    let _ = writeln!(io::stderr(), "error: {}{text}", speaker());
}

/// The exit code of `error`: that of the first cause that has one.
pub(super) fn code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(code_of).unwrap_or(1)
}

/// Ends this process by the signal that `code` stands for, if it stands for one: a shell sees 130 or 143 either way, and
/// who started it sees that nothing has failed. An agent of W&B gives up on a sweep when runs that it ends seem to fail.
pub(super) fn die_of_signal(code: u8) {
    // The first process of a container does not die of its own signals.
    if let Some(signal @ (SIGINT | SIGTERM)) = code.checked_sub(128).map(i32::from)
        && std::process::id() != 1
    {
        let _ = io::stdout().flush();
        // Where it does not work, the exit code tells.
        let _ = signal_hook::low_level::emulate_default_handler(signal);
    }
}

fn code_of(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if cause.is::<ConfigError>() || cause.is::<Usage>() || cause.is::<LockError>() {
        return Some(2);
    }
    if let Some(DataError::Exists { .. } | DataError::View { .. } | DataError::Options(_)) =
        cause.downcast_ref()
    {
        return Some(2);
    }
    if let Some(error) = cause.downcast_ref() {
        return Some(if matches!(error, ScaffoldError::Write { .. }) { 1 } else { 2 });
    }
    match cause.downcast_ref() {
        Some(DistError::Environment { .. } | DistError::Differ(_)) => return Some(2),
        Some(DistError::Broken { failed, .. }) => {
            let signal = failed.iter().find_map(|(_, ending)| match ending {
                Ending::Signal(signal) => Some(128 + *signal as u8),
                _ => None,
            });
            return Some(signal.unwrap_or(1));
        }
        _ => {}
    }
    if let Some(DeviceError::NoCuda { .. }) = cause.downcast_ref() {
        return Some(2);
    }
    if cause.is::<PluginError>() {
        return Some(3);
    }
    if let Some(DataError::Write { .. }) = cause.downcast_ref() {
        return Some(1);
    }
    if cause.is::<DataError>() {
        return Some(4);
    }
    match cause.downcast_ref() {
        Some(CheckpointError::NotACheckpoint { .. } | CheckpointError::NotARun { .. }) => return Some(2),
        Some(_) => return Some(1),
        None => {}
    }
    if let Some(error) = cause.downcast_ref() {
        return Some(
            if matches!(
                error,
                SweepError::Io { .. } | SweepError::Failing { .. } | SweepError::Unfinished { .. }
            ) {
                1
            } else {
                2
            },
        );
    }
    if let Some(failure) = cause.downcast_ref::<Failure>() {
        return Some(match failure.kind {
            FailureKind::Options => 2,
            FailureKind::Unfit => 3,
            FailureKind::Error | FailureKind::Panic => 6,
        });
    }
    if has_diverged(cause) {
        return Some(5);
    }
    match cause.downcast_ref::<TrainError>()? {
        TrainError::Interrupted { signal, .. } | TrainError::Stopped { signal } => Some(128 + *signal as u8),
        TrainError::Declaration { .. } | TrainError::NotCapturable { .. } => Some(6),
        TrainError::NoStep { .. } => Some(2),
        TrainError::Diverged { .. }
        | TrainError::Collapsed { .. }
        | TrainError::Device(_)
        | TrainError::Torch(_) => None,
    }
}
