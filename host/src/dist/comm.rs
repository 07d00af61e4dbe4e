//! The ranks of a run, and what they do together.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use jepa_plugin_api::tch::Tensor;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::meet::{Entry, Met, call_together, follow, left};
use super::{DistError, Launch};
use crate::device::{DeviceError, Exchange, Ranks, Traffic};

/// How long ranks that have lost another wait to hear from all that are left.
const GRACE: Duration = Duration::from_secs(10);

/// How often is looked for what others have to say.
const LOOK: Duration = Duration::from_secs(1);

/// How often a rank that works while others wait says that it does.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);

/// How numbers of all ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Their sum.
    Sum,
    /// The greatest.
    Max,
}

/// A process among the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Peer {
    /// Its number.
    pub rank: u32,
    /// Its machine's name.
    pub machine: String,
    /// Its process number there.
    pub process: u32,
}

/// Why a process leaves the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// All have agreed to end for this signal, or it has met this one alone.
    Signal(i32),
    /// It has failed by itself, and says how.
    Failed(String),
    /// It has lost others.
    Lost,
}

/// All ranks of a run, joined. What it does, all of them have to do, in the same order.
#[derive(Debug)]
pub struct Comm {
    ranks: Ranks,
    launch: Launch,
    peers: Vec<Peer>,
    /// What the keys of these ranks begin with: another name for every time that they meet.
    round: String,
    timeout: Duration,
    /// How many messages there have been.
    messages: Cell<u64>,
    sign_of_life: Cell<Option<Instant>>,
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
            0 => call_together(&ranks, &launch, &me, until),
            rank => follow(&ranks, rank, launch.size, &me, until),
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
        Ok(Comm {
            peers: peers.collect(),
            ranks,
            launch,
            round,
            timeout,
            messages: Cell::new(0),
            sign_of_life: Cell::new(None),
        })
    }

    /// The place of this process.
    pub fn launch(&self) -> &Launch {
        &self.launch
    }

    /// The number of this process, from 0.
    pub fn rank(&self) -> u32 {
        self.launch.rank
    }

    /// How many there are.
    pub fn size(&self) -> u32 {
        self.launch.size
    }

    /// Everybody, this process too, by rank.
    pub fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// How many there are on this machine.
    pub fn size_here(&self) -> usize {
        let here = &self.peers[self.launch.rank as usize].machine;
        self.peers.iter().filter(|peer| peer.machine == *here).count()
    }

    /// Replaces a tensor, in place, by the sum or the maximum over all ranks.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn all_reduce(&self, tensor: &mut Tensor, reduce: Reduce) -> Result<(), DistError> {
        let done = self.ranks.all_reduce(tensor, reduce == Reduce::Max);
        done.map_err(|error| lost(&self.launch, "adds up a tensor", error))
    }

    /// Replaces a tensor, in place, by that of rank `from`.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn broadcast(&self, tensor: &mut Tensor, from: u32) -> Result<(), DistError> {
        let done = self.ranks.broadcast(tensor, from);
        done.map_err(|error| lost(&self.launch, "takes over a tensor", error))
    }

    /// The rows of all ranks' tensors, which have equal shapes, in the order of ranks.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Tensor, DistError> {
        let done = self.ranks.all_gather(tensor, self.launch.size);
        done.map_err(|error| lost(&self.launch, "collects a tensor", error))
    }

    /// Waits until all ranks are here.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn wait_for_all(&self) -> Result<(), DistError> {
        let done = self.ranks.all_reduce(&mut Tensor::from_slice(&[0i32]), false);
        done.map_err(|error| lost(&self.launch, "waits for them", error))
    }

    /// What lies on GPUs goes over NCCL from here on, where that is there.
    ///
    /// # Errors
    /// [`DistError::Lost`], whatever else NCCL reports included.
    pub fn join_gpus(&self) -> Result<(), DistError> {
        let joined = self.ranks.join_gpus(&self.round);
        if !joined.map_err(|error| lost(&self.launch, "joins them over NCCL", error))?
            && self.launch.rank == 0
        {
            tracing::warn!(
                "GPUs talk by way of the CPU's memory, which is slow: make setup CUDA=1 builds libjepa_nccl.so, for NCCL"
            );
        }
        Ok(())
    }

    /// What plugins compute from here on, they compute with the other ranks, or alone.
    ///
    /// # Errors
    /// Without the native library.
    pub fn let_plugins_join(&self, join: bool) -> Result<(), DistError> {
        match join {
            true => self.ranks.install(self.launch.rank, self.launch.size)?,
            false => self.ranks.uninstall(),
        }
        Ok(())
    }

    /// Makes the mean of these parameters' gradients, in parts of `bucket_bytes`.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn exchange(&self, params: &[Tensor], bucket_bytes: u64) -> Result<Exchange, DistError> {
        Ok(Exchange::open(&self.ranks, params, bucket_bytes)?)
    }

    /// What this rank has handed over to the others so far.
    pub fn traffic(&self) -> Traffic {
        self.ranks.traffic()
    }

    /// An error of [`Exchange`] as one of these ranks.
    pub fn lost_gradients(&self, error: DeviceError) -> DistError {
        lost(&self.launch, "exchanges gradients", error)
    }

    /// What rank 0 makes, on all ranks. The others wait as long as it gives a [`sign_of_life`](Self::sign_of_life) now and
    /// then.
    ///
    /// # Errors
    /// Those of `make`, on rank 0; there, the others have to be [told](Self::part). [`DistError::Lost`] on these.
    pub fn from_first<T: Serialize + DeserializeOwned>(
        &self,
        make: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let key = self.next_key("told");
        if self.launch.rank > 0 {
            let text = self.hear(&key, 0)?;
            return serde_json::from_str(&text).context("what rank 0 says makes no sense");
        }
        let made = make()?;
        self.say(&key, &serde_json::to_string(&made)?)?;
        Ok(made)
    }

    /// What each rank says, by rank, for rank 0; nothing for the others.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn collect(&self, own: &str) -> Result<Vec<String>, DistError> {
        let key = self.next_key("said");
        if self.launch.rank > 0 {
            self.say(&format!("{key}/{}", self.launch.rank), own)?;
            return Ok(Vec::new());
        }
        let others = (1..self.launch.size).map(|rank| self.hear(&format!("{key}/{rank}"), rank));
        std::iter::once(Ok(own.to_owned())).chain(others).collect()
    }

    /// Rank 0 is at work, and nobody gives it up.
    pub fn sign_of_life(&self) {
        if self.sign_of_life.get().is_none_or(|last| last.elapsed() >= SIGN_OF_LIFE) {
            self.sign_of_life.set(Some(Instant::now()));
            // A store that is not there any more shows soon enough.
            let _ = self.ranks.set(&self.key("alive"), &format!("{:?}", Instant::now()));
        }
    }

    /// A text that outlives these ranks, for those that a launcher with a store of its own starts after them.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn leave_behind(&self, text: &str) -> Result<(), DistError> {
        self.ranks.set("left_behind", text).map_err(|error| lost(&self.launch, "leaves a note", error))
    }

    /// The text that earlier ones have left.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn left_behind(&self) -> Result<Option<String>, DistError> {
        let text = self.ranks.get("left_behind", Duration::from_millis(1));
        text.map_err(|error| lost(&self.launch, "looks for a note", error))
    }

    /// Whether something that all do together has failed, in a plugin's hands for one.
    pub fn is_lost(&self) -> bool {
        self.ranks.is_lost()
    }

    /// Tells the others why this process ends, and leaves the process group, so that they notice. What follows is
    /// [`part`](Self::part).
    pub fn announce(&self, own: &Ending) {
        let said = serde_json::to_string(own).unwrap_or_default();
        // A store that is not there shows when this process parts.
        let _ = self.ranks.set(&self.key_of("end", self.launch.rank), &said);
        // A signal has come to all, and nobody is waited for.
        if !matches!(own, Ending::Signal(_)) {
            self.ranks.leave();
        }
    }

    /// The last word, after [`announce`](Self::announce). One that has lost others waits, for 10 s at most, to hear from all, and
    /// learns who has ended without a word, and who has failed and how. After a signal all stay until rank 0 has saved, for its
    /// launcher may end what is left when the first of them ends. Whoever keeps the store stays until all know.
    pub fn part(&self, own: &Ending) -> Option<DistError> {
        let me = self.launch.rank;
        let (gone, failed) = match own {
            Ending::Lost => self.ask_for_endings(),
            Ending::Signal(_) if me > 0 => {
                let _ = self.ranks.get(&self.key_of("parted", 0), self.timeout);
                (Vec::new(), Vec::new())
            }
            _ => (Vec::new(), Vec::new()),
        };
        let _ = self.ranks.set(&self.key_of("parted", me), "");
        if self.launch.keeps_store {
            let until = Instant::now() + GRACE;
            for peer in self.others().filter(|peer| !gone.contains(peer)) {
                let _ = self.ranks.get(&self.key_of("parted", peer.rank), left(until));
            }
        }
        (*own == Ending::Lost).then_some(DistError::Broken { rank: me, gone, failed })
    }

    /// Who is silent, and who has failed and how: once that is known, nobody waits for the rest.
    fn ask_for_endings(&self) -> (Vec<Peer>, Vec<(u32, Ending)>) {
        let (until, mut gone, mut failed) = (Instant::now() + GRACE, Vec::new(), Vec::new());
        for peer in self.others() {
            let until = if failed.is_empty() { until } else { Instant::now() };
            match self.ranks.get(&self.key_of("end", peer.rank), left(until)) {
                Ok(Some(said)) => match serde_json::from_str(&said) {
                    Ok(Ending::Lost) | Err(_) => {}
                    Ok(ending) => failed.push((peer.rank, ending)),
                },
                Ok(None) => gone.push(peer.clone()),
                Err(_) => return (vec![self.peers[0].clone()], failed),
            }
        }
        if !failed.is_empty() {
            gone.clear();
        }
        (gone, failed)
    }

    fn others(&self) -> impl Iterator<Item = &Peer> {
        self.peers.iter().filter(|peer| peer.rank != self.launch.rank)
    }

    fn key_of(&self, what: &str, rank: u32) -> String {
        self.key(&format!("{what}/{rank}"))
    }

    fn key(&self, what: &str) -> String {
        format!("{}/{what}", self.round)
    }

    fn next_key(&self, what: &str) -> String {
        let number = self.messages.replace(self.messages.get() + 1);
        self.key(&format!("{what}/{number}"))
    }

    fn say(&self, key: &str, text: &str) -> Result<(), DistError> {
        self.ranks.set(key, text).map_err(|error| lost(&self.launch, "tells them something", error))
    }

    /// Waits for what rank `from` says.
    fn hear(&self, key: &str, from: u32) -> Result<String, DistError> {
        let failed = |error| lost(&self.launch, "waits for their word", error);
        let silent = |what: &str| failed(DeviceError::Torch(format!("rank {from} {what}")));
        let at_once = Duration::from_millis(1);
        let (mut until, mut alive) = (Instant::now() + self.timeout, None);
        loop {
            if let Some(text) = self.ranks.get(key, LOOK).map_err(failed)? {
                return Ok(text);
            }
            if self.ranks.get(&self.key_of("end", from), at_once).map_err(failed)?.is_some() {
                return Err(silent("has ended"));
            }
            let sign = self.ranks.get(&self.key("alive"), at_once).map_err(failed)?;
            if sign != alive {
                (alive, until) = (sign, Instant::now() + self.timeout);
            }
            if Instant::now() >= until {
                return Err(silent("says nothing"));
            }
        }
    }
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
