//! The ranks of a run, and what they do together.

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

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
        let until = Instant::now() + timeout;
        let prefix = format!("jepa-host/{}", launch.group);
        let mut ranks = Ranks::open(&launch.host, launch.port, launch.keeps_store, &prefix, timeout)
            .map_err(|error| unreachable(&launch, timeout, error))?;
        let me = Entry::of_this_process();
        let met = match launch.rank {
            0 => call_together(&mut ranks, &launch, &me, until),
            rank => follow(&mut ranks, rank, launch.size, &me, until),
        };
        let (round, entries) = match met.map_err(|error| lost(&launch, "meets them", error))? {
            Met::All { round, entries } => (round, entries),
            Met::Missing(missing) => return Err(DistError::Missing { missing, size: launch.size, timeout }),
        };
        // Ranks of one machine talk within it: its name may not be one that it finds itself by.
        let of_one_machine = entries.iter().all(|entry| entry.system == entries[0].system);
        let address = of_one_machine.then_some("127.0.0.1");
        ranks
            .join(&round, launch.rank, launch.size, address)
            .map_err(|error| lost(&launch, "joins them (GLOO_SOCKET_IFNAME chooses the interface)", error))?;
        let peers = (0..).zip(entries);
        let peers = peers.map(|(rank, entry)| Peer { rank, machine: entry.machine, process: entry.process });
        Ok(Comm { peers: peers.collect(), ranks, launch })
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

/// What a process says of itself where all meet.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    process: u32,
    /// Nanoseconds since 1970: another for every process that ever has this number.
    began: u128,
    /// The running system and its network: the same for processes that reach each other by 127.0.0.1.
    system: String,
    machine: String,
}

impl Entry {
    fn of_this_process() -> Entry {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let network = std::fs::read_link("/proc/self/ns/net").unwrap_or_default();
        let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Entry {
            process: std::process::id(),
            began: began.as_nanos(),
            system: format!("{}{}", read("/proc/sys/kernel/random/boot_id"), network.display()),
            machine: read("/proc/sys/kernel/hostname"),
        }
    }

    fn to_line(&self) -> String {
        let Entry { process, began, system, machine } = self;
        format!("{process} {began} {system} {machine}")
    }

    fn from_line(line: &str) -> Option<Entry> {
        let mut words = line.splitn(4, ' ');
        let (process, began) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(Entry { process, began, system: words.next()?.to_owned(), machine: words.next()?.to_owned() })
    }
}

/// How a meeting ends.
enum Met {
    /// Everybody is there, by rank; the round is theirs alone.
    All {
        round: String,
        entries: Vec<Entry>,
    },
    Missing(Vec<u32>),
}

/// Where the store has the name of the round that is called. Torchrun's store outlives a restart, so there may be older ones.
const ROUND: &str = "round";

/// How often is looked whether something new is called.
const LOOK: Duration = Duration::from_millis(200);

/// Rank 0: calls a new round, waits for all, and says who they are, or who is missing.
fn call_together(ranks: &mut Ranks, launch: &Launch, me: &Entry, until: Instant) -> Result<Met, DeviceError> {
    let round = format!("{}-{}", me.process, me.began);
    ranks.set(ROUND, &round)?;
    let (mut entries, mut missing) = (vec![me.clone()], Vec::new());
    for rank in 1..launch.size {
        match ranks.get(&format!("{round}/{rank}"), left(until))?.as_deref().and_then(Entry::from_line) {
            Some(entry) => entries.push(entry),
            None => missing.push(rank),
        }
    }
    if missing.is_empty() {
        let lines: Vec<String> = entries.iter().map(Entry::to_line).collect();
        ranks.set(&format!("{round}/all"), &lines.join("\n"))?;
        return Ok(Met::All { round, entries });
    }
    let words: Vec<String> = missing.iter().map(u32::to_string).collect();
    ranks.set(&format!("{round}/missing"), &words.join(" "))?;
    // The store may end with this process: the others shall have heard it.
    thread::sleep(2 * LOOK);
    Ok(Met::Missing(missing))
}

/// Every other rank: answers whatever round is called, until one has it among all.
fn follow(ranks: &mut Ranks, rank: u32, size: u32, me: &Entry, until: Instant) -> Result<Met, DeviceError> {
    let line = me.to_line();
    // Rank 0's time may have begun a little later.
    let until = until + 4 * LOOK;
    while let Some(round) = ranks.get(ROUND, left(until))? {
        ranks.set(&format!("{round}/{rank}"), &line)?;
        let all = ranks.get(&format!("{round}/all"), LOOK.min(left(until)))?.unwrap_or_default();
        // Of an older round, others are all.
        if all.lines().any(|other| other == line) {
            let entries: Option<Vec<Entry>> = all.lines().map(Entry::from_line).collect();
            if let Some(entries) = entries.filter(|entries| entries.len() == size as usize) {
                return Ok(Met::All { round, entries });
            }
        } else if !all.is_empty() {
            thread::sleep(LOOK);
        }
        if let Some(missing) = ranks.get(&format!("{round}/missing"), Duration::from_millis(1))? {
            return Ok(Met::Missing(missing.split(' ').filter_map(|rank| rank.parse().ok()).collect()));
        }
        if Instant::now() >= until {
            let reason = format!("another process is rank {rank}, or rank 0 does not answer");
            return Err(DeviceError::Torch(reason));
        }
    }
    Ok(Met::Missing(vec![0]))
}

/// What is left of the time, and never nothing.
fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

fn unreachable(launch: &Launch, timeout: Duration, error: DeviceError) -> DistError {
    let Launch { rank, host, port, .. } = launch;
    let (rank, host, port, reason) = (*rank, host.clone(), *port, words(error));
    match launch.keeps_store {
        true => DistError::Store { host, port, reason },
        false => DistError::Unreachable { rank, host, port, timeout, reason },
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
