//! How ranks find each other in the store: rank 0 calls a round, and every other rank answers it.

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::{Keeper, Launch};
use crate::device::{DeviceError, Store};

/// What a process says of itself where all meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub process: u32,
    /// Nanoseconds since 1970: another for every process that ever has this number.
    began: u128,
    /// The running system: the same for all processes of a machine, of its containers too.
    pub system: String,
    /// The part of its network that the process sees.
    network: String,
    /// The cores that it may run on, as a list: those of a launcher that hands out cores, or all.
    cores: String,
    /// The machine's name.
    pub machine: String,
}

impl Entry {
    pub(super) fn of_this_process() -> Entry {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let machine = read("/proc/sys/kernel/hostname");
        let network = std::fs::read_link("/proc/self/ns/net").unwrap_or_default();
        let status = read("/proc/self/status");
        let cores = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        // Words in a line: none is empty.
        let or = |text: &str, other: &str| if text.is_empty() { other.to_owned() } else { text.to_owned() };
        Entry {
            process: std::process::id(),
            began: began.as_nanos(),
            system: or(&read("/proc/sys/kernel/random/boot_id"), &machine),
            network: or(&network.display().to_string(), "-"),
            cores: or(cores.unwrap_or_default().trim(), "-"),
            machine,
        }
    }

    /// Whether they reach each other by 127.0.0.1.
    pub(super) fn is_beside(&self, other: &Entry) -> bool {
        (&self.system, &self.network) == (&other.system, &other.network)
    }

    /// Whether they run on the same cores, and have to divide them.
    pub(super) fn shares_cores(&self, other: &Entry) -> bool {
        (&self.system, &self.cores) == (&other.system, &other.cores)
    }

    fn to_line(&self) -> String {
        let Entry { process, began, system, network, cores, machine } = self;
        format!("{process} {began} {system} {network} {cores} {machine}")
    }

    fn from_line(line: &str) -> Option<Entry> {
        let mut words = line.splitn(6, ' ');
        let (process, began) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let mut word = || words.next().map(str::to_owned);
        Some(Entry { process, began, system: word()?, network: word()?, cores: word()?, machine: word()? })
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
    /// Rank 0 is one of so many, and this process of others.
    OtherSize(u32),
}

/// Where the store has the name of the round that is called. Torchrun's store outlives a restart, so there may be older ones.
const ROUND: &str = "round";

/// How often is looked whether something new is called.
const LOOK: Duration = Duration::from_millis(200);

/// How long others may take to start before they are waited for aloud.
const PATIENCE: Duration = Duration::from_secs(5);

/// Rank 0: calls a new round, waits for all, and says who they are, or who is missing.
pub(super) fn call_together(
    store: &Store,
    launch: &Launch,
    me: &Entry,
    until: Instant,
) -> Result<Met, DeviceError> {
    let round = format!("{}-{}-{}", me.process, me.began, launch.size);
    store.set(ROUND, &round)?;
    let answers = |until: Instant| -> Result<(Vec<Entry>, Vec<u32>), DeviceError> {
        let (mut entries, mut missing) = (vec![me.clone()], Vec::new());
        for rank in 1..launch.size {
            match store.get(&format!("{round}/{rank}"), left(until))?.as_deref().and_then(Entry::from_line) {
                Some(entry) => entries.push(entry),
                None => missing.push(rank),
            }
        }
        Ok((entries, missing))
    };
    let (mut entries, mut missing) = answers(until.min(Instant::now() + PATIENCE))?;
    if !missing.is_empty() {
        tracing::info!(
            "waiting for ranks {}, for {} s at most",
            super::list(&missing),
            left(until).as_secs()
        );
        (entries, missing) = answers(until)?;
    }
    if missing.is_empty() {
        let lines: Vec<String> = entries.iter().map(Entry::to_line).collect();
        store.set(&format!("{round}/all"), &lines.join("\n"))?;
        return Ok(Met::All { round, entries });
    }
    let words: Vec<String> = missing.iter().map(u32::to_string).collect();
    let lines = std::iter::once(words.join(" ")).chain(entries.iter().map(Entry::to_line));
    store.set(&format!("{round}/missing"), &lines.collect::<Vec<_>>().join("\n"))?;
    // The store may end with this process: the others shall have heard it.
    thread::sleep(2 * LOOK);
    Ok(Met::Missing(missing))
}

/// Every other rank: answers whatever round is called, until one has it among all.
pub(super) fn follow(store: &Store, launch: &Launch, me: &Entry, until: Instant) -> Result<Met, DeviceError> {
    let (rank, size, line) = (launch.rank, launch.size, me.to_line());
    // Rank 0's time may have begun a little later.
    let until = until + 4 * LOOK;
    while let Some(round) = store.get(ROUND, left(until))? {
        let called = round.rsplit('-').next().and_then(|size| size.parse().ok()).unwrap_or(size);
        // Of an older round in a store that outlives ranks, their number may be another.
        if called != size && (launch.keeper == Keeper::First || Instant::now() >= until) {
            return Ok(Met::OtherSize(called));
        }
        store.set(&format!("{round}/{rank}"), &line)?;
        let all = store.get(&format!("{round}/all"), LOOK.min(left(until)))?.unwrap_or_default();
        // Of an older round, others are all.
        if all.lines().any(|other| other == line) {
            let entries: Option<Vec<Entry>> = all.lines().map(Entry::from_line).collect();
            if let Some(entries) = entries.filter(|entries| entries.len() == size as usize) {
                return Ok(Met::All { round, entries });
            }
        } else if !all.is_empty() {
            thread::sleep(LOOK);
        }
        // An older round, which this process came too late for, has missed others than this one will. The launcher's number of
        // restarts would not tell: torchrun counts them for each machine, and not those after another machine has failed.
        if let Some(text) = store.get(&format!("{round}/missing"), Duration::from_millis(1))?
            && let Some((missing, came)) = text.split_once('\n')
            && came.lines().any(|other| other == line)
        {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_shared_by_those_that_may_run_on_the_same_ones_of_a_machine() {
        let me = Entry::of_this_process();
        assert_eq!(Entry::from_line(&me.to_line()), Some(me.clone()));
        assert!(me.shares_cores(&me) && me.is_beside(&me));
        let bound = Entry { cores: "640-641".to_owned(), ..me.clone() };
        assert!(!me.shares_cores(&bound) && me.is_beside(&bound));
        let in_a_container = Entry { network: "net:[1]".to_owned(), ..me.clone() };
        assert!(me.shares_cores(&in_a_container) && !me.is_beside(&in_a_container));
        let elsewhere = Entry { system: "another".to_owned(), ..me.clone() };
        assert!(!me.shares_cores(&elsewhere) && !me.is_beside(&elsewhere));
    }
}
