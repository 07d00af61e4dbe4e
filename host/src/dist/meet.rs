//! How ranks find each other in the store: rank 0 calls a round, and every other rank answers it.

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::Launch;
use crate::device::{DeviceError, Ranks};

/// What a process says of itself where all meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub process: u32,
    /// Nanoseconds since 1970: another for every process that ever has this number.
    began: u128,
    /// The running system and its network: the same for processes that reach each other by 127.0.0.1.
    pub system: String,
    pub machine: String,
}

impl Entry {
    pub(super) fn of_this_process() -> Entry {
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
pub(super) enum Met {
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
pub(super) fn call_together(
    ranks: &Ranks,
    launch: &Launch,
    me: &Entry,
    until: Instant,
) -> Result<Met, DeviceError> {
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
pub(super) fn follow(
    ranks: &Ranks,
    rank: u32,
    size: u32,
    me: &Entry,
    until: Instant,
) -> Result<Met, DeviceError> {
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
pub(super) fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}
