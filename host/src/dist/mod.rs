//! Processes that work together: which of them this one is, and what they tell each other, over libtorch's c10d.
//!
//! Launchers are those that people have: `torchrun --no-python`, `srun`, or anything that sets `RANK`, `WORLD_SIZE`,
//! `MASTER_ADDR` and `MASTER_PORT`.

mod comm;
mod launch;
mod meet;

use std::time::Duration;

use thiserror::Error;

pub use comm::{AtWork, Comm, Ending, Peer, Reduce};
pub use launch::{Keeper, Launch, Launcher};

use crate::device::DeviceError;

/// Processes do not come together, or fall apart.
#[derive(Debug, Error)]
pub enum DistError {
    /// The environment says that there are several processes, and not enough about them.
    #[error("{launcher} has started several processes, but {problem}")]
    Environment {
        /// Who has.
        launcher: Launcher,
        /// What is missing or makes no sense, and what to do.
        problem: String,
    },
    /// The store, where all meet, is not reached.
    #[error(
        "{host}:{port} is not reached within {} s: {reason}; is rank 0 running there, and is the port open?",
        timeout.as_secs()
    )]
    Unreachable {
        /// Where.
        host: String,
        /// Where there.
        port: u16,
        /// How long it was tried.
        timeout: Duration,
        /// libtorch's words.
        reason: String,
    },
    /// The store cannot be kept.
    #[error(
        "rank 0 cannot keep the store at {host}:{port}: {reason}; is that this machine, and is the port taken? MASTER_PORT gives another"
    )]
    Store {
        /// Where.
        host: String,
        /// Where there.
        port: u16,
        /// libtorch's words.
        reason: String,
    },
    /// Not everybody has come.
    #[error(
        "{} of {size} ranks have not come within {} s: {}; look at what they have printed",
        missing.len(), timeout.as_secs(), list(missing)
    )]
    Missing {
        /// Who has not.
        missing: Vec<u32>,
        /// How many there are to be.
        size: u32,
        /// How long was waited.
        timeout: Duration,
    },
    /// What all ranks do together has failed on the way: one has ended, or the network has.
    #[error("rank {rank} lost the others while it {action}: {reason}; look at what they have printed")]
    Lost {
        /// Who says so.
        rank: u32,
        /// As in "while it *adds up a tensor*".
        action: &'static str,
        /// libtorch's words.
        reason: String,
    },
    /// What has become of the others, as they say themselves or do not.
    #[error("{}; rank {rank} ends too", broken(gone, failed))]
    Broken {
        /// Who says so.
        rank: u32,
        /// Who is silent.
        gone: Vec<Peer>,
        /// Who has ended, and why.
        failed: Vec<(u32, Ending)>,
    },
    /// The launcher has ended, and the store with it.
    #[error(
        "the store at {host}:{port}, which {launcher} keeps, does not answer any more; look at what {launcher} has printed; rank \
         {rank} ends too"
    )]
    StoreLost {
        /// Who says so.
        rank: u32,
        /// Who keeps it.
        launcher: Launcher,
        /// Where.
        host: String,
        /// Where there.
        port: u16,
    },
    /// They would not do the same.
    #[error("{0}: give all ranks the same settings, plugins, data and libraries")]
    Differ(String),
    /// They have computed the same, and it has become something else.
    #[error(
        "the weights of rank {rank} are not those of rank 0 any more at step {step}: its machine may be faulty, or the method \
         computes there what it does not compute elsewhere; go on from the last checkpoint"
    )]
    Drift {
        /// Whose weights.
        rank: u32,
        /// Optimizer steps taken.
        step: u64,
    },
    /// The library that does it.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

fn broken(gone: &[Peer], failed: &[(u32, Ending)]) -> String {
    let silent = gone.iter().map(|Peer { rank, machine, process }| {
        format!("rank {rank} (process {process} on {machine}) has ended or does not answer")
    });
    let failed = failed.iter().map(|(rank, ending)| match ending {
        Ending::Failed(how) => format!("rank {rank} has failed: {how}"),
        Ending::Signal(signal) => format!("rank {rank} was interrupted by signal {signal}"),
        Ending::Lost => format!("rank {rank} has lost others"),
    });
    let all: Vec<String> = silent.chain(failed).collect();
    match all.as_slice() {
        [] => "the connection of the ranks is broken, and all of them still answer".to_owned(),
        all => all.join("; "),
    }
}

fn list(ranks: &[u32]) -> String {
    const MOST: usize = 16;
    let shown: Vec<String> = ranks.iter().take(MOST).map(u32::to_string).collect();
    shown.join(", ") + if ranks.len() > MOST { ", …" } else { "" }
}
