//! The ranks of a run, and what they do together.

use std::time::{Duration, Instant};

use jepa_plugin_api::tch::Tensor;

use super::{DistError, Launch};
use crate::device::{DeviceError, Ranks};

/// How numbers of all ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Their sum.
    Sum,
    /// The greatest.
    Max,
}

/// A process among the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its number.
    pub rank: u32,
    /// Its machine's name.
    pub machine: String,
    /// Its process number there.
    pub process: u32,
}

/// All ranks of a run, joined. What it does, all of them have to do, in the same order.
#[derive(Debug)]
pub struct Comm {
    ranks: Ranks,
    launch: Launch,
    peers: Vec<Peer>,
}

impl Comm {
    /// Meets the others, and waits for all of them, and later for what each has to do, for `timeout` at most.
    ///
    /// # Errors
    /// When the store is not reached or a rank does not come: who.
    pub fn join(launch: Launch, timeout: Duration) -> Result<Comm, DistError> {
        let began = Instant::now();
        // After a restart, nothing that was said before counts.
        let prefix = format!("jepa-host/{}", launch.attempt);
        let (host, port) = (launch.host.clone(), launch.port);
        let mut ranks =
            Ranks::open(&host, port, launch.keeps_store(), &prefix, timeout).map_err(|error| {
                let (rank, reason) = (launch.rank, words(error));
                DistError::Unreachable { rank, host, port, timeout, reason }
            })?;
        let lost = |error| lost(&launch, "meets them", error);
        ranks
            .set(&format!("rank/{}", launch.rank), &format!("{} {}", std::process::id(), machine()))
            .map_err(lost)?;

        let (mut peers, mut missing) = (Vec::new(), Vec::new());
        for rank in 0..launch.size {
            let left = timeout.saturating_sub(began.elapsed()).max(Duration::from_millis(1));
            match ranks.get(&format!("rank/{rank}"), left).map_err(lost)? {
                Some(text) => {
                    let (process, machine) = text.split_once(' ').unwrap_or_default();
                    let process = process.parse().unwrap_or_default();
                    peers.push(Peer { rank, machine: machine.to_owned(), process });
                }
                None => missing.push(rank),
            }
        }
        if !missing.is_empty() {
            return Err(DistError::Missing { missing, size: launch.size, timeout });
        }
        // Ranks of one machine talk within it: its name may not be one that it finds itself by.
        let of_one_machine = peers.iter().all(|peer| peer.machine == peers[0].machine);
        let address = of_one_machine.then_some("127.0.0.1");
        ranks.join(launch.rank, launch.size, address).map_err(lost)?;
        Ok(Comm { ranks, launch, peers })
    }

    /// The place of this process.
    pub fn launch(&self) -> &Launch {
        &self.launch
    }

    /// Everybody, this process too, by rank.
    pub fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// Replaces a tensor, in place, by the sum or the maximum over all ranks.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn all_reduce(&mut self, tensor: &mut Tensor, reduce: Reduce) -> Result<(), DistError> {
        let done = self.ranks.all_reduce(tensor, reduce == Reduce::Max);
        done.map_err(|error| lost(&self.launch, "adds up a tensor", error))
    }

    /// Replaces a tensor, in place, by that of rank `from`.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn broadcast(&mut self, tensor: &mut Tensor, from: u32) -> Result<(), DistError> {
        let done = self.ranks.broadcast(tensor, from);
        done.map_err(|error| lost(&self.launch, "takes over a tensor", error))
    }

    /// Waits until all ranks are here.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn wait_for_all(&mut self) -> Result<(), DistError> {
        let done = self.ranks.all_reduce(&mut Tensor::from_slice(&[0i32]), false);
        done.map_err(|error| lost(&self.launch, "waits for them", error))
    }
}

fn lost(launch: &Launch, action: &'static str, error: DeviceError) -> DistError {
    DistError::Lost { rank: launch.rank, action, reason: words(error) }
}

fn words(error: DeviceError) -> String {
    match error {
        DeviceError::Torch(words) => words.trim_end_matches('.').to_owned(),
        other => other.to_string(),
    }
}

/// The name of this machine.
fn machine() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}
