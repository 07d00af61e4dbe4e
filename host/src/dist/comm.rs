//! The ranks of a run, and what they do together.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use jepa_plugin_api::tch::Tensor;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::meet::{Entry, Met, call_together, follow, left};
use super::{DistError, Keeper, Launch};
use crate::device::{DeviceError, Exchange, ProcessGroup, Store, Traffic, has_cuda_library};

/// How long ranks that have lost another wait to hear from all that are left.
const GRACE: Duration = Duration::from_secs(10);

/// How often is looked for what others have to say.
const LOOK: Duration = Duration::from_secs(1);

/// How often rank 0, which works while others wait, says that it does.
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);

/// Under which key of the store the run is noted that is under way.
const UNDER_WAY: &str = "run under way";

/// And one that is complete.
fn complete(settings: &str) -> String {
    format!("complete run of {:08x}", crc32c::crc32c(settings.as_bytes()))
}

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
    group: ProcessGroup,
    launch: Launch,
    peers: Vec<Peer>,
    local_rank: u32,
    cores_shared_by: usize,
    /// What the keys of these ranks begin with: another name for every time that they meet.
    round: String,
    timeout: Duration,
    /// How many messages there have been.
    messages: Cell<u64>,
    /// When was last asked for signals that others have got.
    asked: Cell<Option<Instant>>,
}

impl Comm {
    /// Meets the others, and waits for all of them, and later for what each has to do, for `timeout` at most.
    ///
    /// # Errors
    /// When the store is not reached or a rank does not come: who.
    pub fn join(launch: Launch, timeout: Duration) -> Result<Comm, DistError> {
        let until = Instant::now() + timeout;
        let prefix = format!("jepa-host/{}", launch.group);
        let mut group = ProcessGroup::open(&launch.host, launch.port, launch.keeps_store(), &prefix, timeout)
            .map_err(|error| unreachable(&launch, timeout, error))?;
        let me = Entry::of_this_process();
        let met = match launch.rank {
            0 => call_together(group.store(), &launch, &me, until),
            _ => follow(group.store(), &launch, &me, until),
        };
        let (round, entries) = match met.map_err(|error| lost(&launch, "meets them", error))? {
            Met::All { round, entries } => (round, entries),
            Met::Missing(missing) => return Err(DistError::Missing { missing, size: launch.size, timeout }),
            Met::OtherSize(called) => {
                let Launch { launcher, rank, size, .. } = launch;
                let problem = format!("rank 0 is one of {called}, and this is rank {rank} of {size}");
                return Err(DistError::Environment { launcher, problem });
            }
        };
        // Ranks of one machine talk within it: its name may not be one that it finds itself by.
        let of_one_machine = entries.iter().all(|entry| entry.is_beside(&entries[0]));
        let address = of_one_machine.then_some("127.0.0.1");
        group
            .join(&round, launch.rank, launch.size, address)
            .map_err(|error| lost(&launch, "joins them (GLOO_SOCKET_IFNAME chooses the interface)", error))?;
        let here = |entry: &&Entry| entry.system == me.system;
        let before = entries[..launch.rank as usize].iter().filter(here).count();
        let local_rank = launch.local_rank.unwrap_or(before as u32);
        let cores_shared_by = entries.iter().filter(|entry| entry.shares_cores(&me)).count();
        let peers = (0..).zip(entries);
        let peers = peers.map(|(rank, entry)| Peer { rank, machine: entry.machine, process: entry.process });
        Ok(Comm {
            peers: peers.collect(),
            local_rank,
            cores_shared_by,
            group,
            launch,
            round,
            timeout,
            messages: Cell::new(0),
            asked: Cell::new(None),
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

    /// The number of this process on its machine, from 0: as the launcher says, or how many of lower rank are there.
    pub fn local_rank(&self) -> u32 {
        self.local_rank
    }

    /// How many of them, this one too, run on the cores that this one runs on: 1 where a launcher gives each its own.
    pub fn cores_shared_by(&self) -> usize {
        self.cores_shared_by
    }

    /// Replaces a tensor, in place, by the sum or the maximum over all ranks.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn all_reduce(&self, tensor: &mut Tensor, reduce: Reduce) -> Result<(), DistError> {
        let done = self.group.all_reduce(tensor, reduce == Reduce::Max);
        done.map_err(|error| lost(&self.launch, "adds up a tensor", error))
    }

    /// Replaces a tensor, in place, by that of rank `from`.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn broadcast(&self, tensor: &mut Tensor, from: u32) -> Result<(), DistError> {
        let done = self.group.broadcast(tensor, from);
        done.map_err(|error| lost(&self.launch, "takes over a tensor", error))
    }

    /// The rows of all ranks' tensors, which have equal shapes, in the order of ranks.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Tensor, DistError> {
        let done = self.group.all_gather(tensor, self.launch.size);
        done.map_err(|error| lost(&self.launch, "collects a tensor", error))
    }

    /// Waits until all ranks are here.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn wait_for_all(&self) -> Result<(), DistError> {
        let done = self.group.all_reduce(&mut Tensor::from_slice(&[0i32]), false);
        done.map_err(|error| lost(&self.launch, "waits for them", error))
    }

    /// What lies on GPUs goes over NCCL from here on, where all ranks have that: whether it does.
    ///
    /// # Errors
    /// [`DistError::Lost`], whatever else NCCL reports included.
    pub fn join_gpus(&self) -> Result<bool, DistError> {
        let own = Tensor::from_slice(&[i64::from(has_cuda_library())]);
        let all = self.all_gather(&own)?;
        let lacking: Vec<String> = (0..i64::from(self.launch.size))
            .filter(|rank| all.int64_value(&[*rank]) == 0)
            .map(|rank| rank.to_string())
            .collect();
        if !lacking.is_empty() {
            if self.launch.rank == 0 {
                tracing::warn!(
                    "GPUs talk by way of the CPU's memory, which is slow: make setup CUDA=1 builds libjepa_cuda.so, for NCCL, and \
                     ranks {} have none",
                    lacking.join(", ")
                );
            }
            return Ok(false);
        }
        self.group
            .join_gpus(&self.round)
            .map_err(|error| lost(&self.launch, "joins them over NCCL", error))?;
        Ok(true)
    }

    /// What plugins compute from here on, they compute with the other ranks, or alone.
    ///
    /// # Errors
    /// Without the native library.
    pub fn let_plugins_join(&self, join: bool) -> Result<(), DistError> {
        match join {
            true => self.group.install(self.launch.rank, self.launch.size)?,
            false => self.group.uninstall(),
        }
        Ok(())
    }

    /// Makes the mean of these parameters' gradients, in parts of `bucket_bytes`.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn exchange(&self, params: &[Tensor], bucket_bytes: u64) -> Result<Exchange, DistError> {
        Ok(Exchange::open(&self.group, params, bucket_bytes)?)
    }

    /// What this rank has handed over to the others so far.
    pub fn traffic(&self) -> Traffic {
        self.group.traffic()
    }

    /// An error of [`Exchange`] as one of these ranks.
    pub fn lost_gradients(&self, error: DeviceError) -> DistError {
        lost(&self.launch, "exchanges gradients", error)
    }

    /// For rank 0, before the others wait for it in [`from_first`](Self::from_first): what it does meanwhile.
    pub fn at_work(&self) -> AtWork {
        AtWork { store: self.group.store().clone(), key: self.key("alive") }
    }

    /// What rank 0 makes, on all ranks. The others wait as long as it lives.
    ///
    /// # Errors
    /// Those of `make`, on rank 0; there, the others have to be [told](Self::part). [`DistError::Lost`] on these.
    pub fn from_first<T: Serialize + DeserializeOwned>(
        &self,
        make: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        self.from_first_unless(&|| None, make)
    }

    /// The same. The signal that another rank has got meanwhile, by `pending`, rank 0 learns from
    /// [`signal_of_others`](Self::signal_of_others).
    ///
    /// # Errors
    /// As [`from_first`](Self::from_first).
    pub fn from_first_unless<T: Serialize + DeserializeOwned>(
        &self,
        pending: &dyn Fn() -> Option<i32>,
        make: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let key = self.next_key("told");
        if self.launch.rank > 0 {
            let text = self.hear(&key, 0, pending)?;
            return serde_json::from_str(&text).context("what rank 0 says makes no sense");
        }
        let made = self.at_work().during(make)?;
        self.say(&key, &serde_json::to_string(&made)?)?;
        Ok(made)
    }

    /// A signal that another rank has got while it waits in [`from_first_unless`](Self::from_first_unless).
    pub fn signal_of_others(&self) -> Option<i32> {
        if self.asked.get().is_some_and(|last| last.elapsed() < LOOK) {
            return None;
        }
        self.asked.set(Some(Instant::now()));
        // A store that is not there any more shows soon enough.
        let signal = self.group.store().get(&self.key("signal"), Duration::from_millis(1));
        signal.ok().flatten()?.parse().ok()
    }

    /// What each rank says, by rank, on rank 0; `None` on the others.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn collect(&self, own: &str) -> Result<Option<Vec<String>>, DistError> {
        let key = self.next_key("said");
        if self.launch.rank > 0 {
            self.say(&format!("{key}/{}", self.launch.rank), own)?;
            return Ok(None);
        }
        let others = (1..self.launch.size).map(|rank| self.hear(&format!("{key}/{rank}"), rank, &|| None));
        std::iter::once(Ok(own.to_owned())).chain(others).collect::<Result<_, _>>().map(Some)
    }

    /// Notes that `run` is under way, for the ranks that a launcher with a store of its own starts when these have failed.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn note_run(&self, run: &Path) -> Result<(), DistError> {
        self.note(UNDER_WAY, &run.display().to_string())
    }

    /// Notes that `run`, of these `settings`, is complete: a script's next command with others begins a run of its own, and one
    /// that fails behind the last step, and is started again, does not train anew.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn note_complete(&self, run: &Path, settings: &str) -> Result<(), DistError> {
        self.note(&complete(settings), &run.display().to_string())?;
        self.note(UNDER_WAY, "")
    }

    /// The run that earlier ranks were at, or have completed with the same `settings`.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn noted_run(&self, settings: &str) -> Result<Option<PathBuf>, DistError> {
        for key in [UNDER_WAY.to_owned(), complete(settings)] {
            let run = self.group.store().get(&key, Duration::from_millis(1));
            let run = run.map_err(|error| lost(&self.launch, "looks for a note", error))?;
            if let Some(run) = run.filter(|run| !run.is_empty()) {
                return Ok(Some(run.into()));
            }
        }
        Ok(None)
    }

    fn note(&self, key: &str, text: &str) -> Result<(), DistError> {
        self.group.store().set(key, text).map_err(|error| lost(&self.launch, "leaves a note", error))
    }

    /// Whether something that all do together has failed, in a plugin's hands for one.
    pub fn is_lost(&self) -> bool {
        self.group.is_lost()
    }

    /// Tells the others why this process ends, and leaves the process group, so that they notice. What follows is
    /// [`part`](Self::part).
    pub fn announce(&self, own: &Ending) {
        let said = serde_json::to_string(own).unwrap_or_default();
        // A store that is not there shows when this process parts.
        let _ = self.group.store().set(&self.key_of("end", self.launch.rank), &said);
        // A signal has come to all, and nobody is waited for.
        if !matches!(own, Ending::Signal(_)) {
            self.group.leave();
        }
    }

    /// The last word, after [`announce`](Self::announce). One that has lost others waits, for 10 s at most, to hear from all, and
    /// learns who has ended without a word, and who has failed and how. After a signal all stay until rank 0 has saved, for its
    /// launcher may end what is left when the first of them ends. Whoever keeps the store stays until all know, for another 10 s
    /// at most.
    pub fn part(&self, own: &Ending) -> Option<DistError> {
        let me = self.launch.rank;
        let endings = match own {
            Ending::Lost => self.ask_for_endings(),
            Ending::Signal(_) if me > 0 => {
                let _ = self.group.store().get(&self.key_of("parted", 0), self.timeout);
                Endings::default()
            }
            _ => Endings::default(),
        };
        let _ = self.group.store().set(&self.key_of("parted", me), "");
        if self.launch.keeps_store() {
            let until = Instant::now() + GRACE;
            for peer in self.others().filter(|peer| !endings.gone.contains(peer)) {
                let _ = self.group.store().get(&self.key_of("parted", peer.rank), left(until));
            }
        }
        let Endings { gone, failed, store_is_lost } = endings;
        let Launch { launcher, ref host, port, .. } = self.launch;
        match own {
            Ending::Lost if store_is_lost && failed.is_empty() => {
                Some(DistError::StoreLost { rank: me, launcher, host: host.clone(), port })
            }
            Ending::Lost => Some(DistError::Broken { rank: me, gone, failed }),
            _ => None,
        }
    }

    /// Once it is known who has failed, nobody waits for the rest.
    fn ask_for_endings(&self) -> Endings {
        let (until, mut found) = (Instant::now() + GRACE, Endings::default());
        for peer in self.others() {
            let until = if found.failed.is_empty() { until } else { Instant::now() };
            match self.group.store().get(&self.key_of("end", peer.rank), left(until)) {
                Ok(Some(said)) => match serde_json::from_str(&said) {
                    Ok(Ending::Lost) | Err(_) => {}
                    Ok(ending) => found.failed.push((peer.rank, ending)),
                },
                Ok(None) => found.gone.push(peer.clone()),
                // Nobody is asked any more, and nobody else is blamed for it.
                Err(_) => {
                    found.gone = match self.launch.keeper {
                        Keeper::First => vec![self.peers[0].clone()],
                        Keeper::Launcher => Vec::new(),
                    };
                    found.store_is_lost = self.launch.keeper == Keeper::Launcher;
                    return found;
                }
            }
        }
        if !found.failed.is_empty() {
            found.gone.clear();
        }
        found
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
        self.group.store().set(key, text).map_err(|error| lost(&self.launch, "tells them something", error))
    }

    /// Waits for what rank `from` says.
    fn hear(&self, key: &str, from: u32, pending: &dyn Fn() -> Option<i32>) -> Result<String, DistError> {
        let failed = |error| lost(&self.launch, "waits for their word", error);
        let silent = |what: &str| failed(DeviceError::Torch(format!("rank {from} {what}")));
        let at_once = Duration::from_millis(1);
        let (mut until, mut alive, mut told) = (Instant::now() + self.timeout, None, false);
        loop {
            if let (Some(signal), false) = (pending(), told) {
                self.say(&self.key("signal"), &signal.to_string())?;
                told = true;
            }
            if let Some(text) = self.group.store().get(key, LOOK).map_err(failed)? {
                return Ok(text);
            }
            if self.group.store().get(&self.key_of("end", from), at_once).map_err(failed)?.is_some() {
                return Err(silent("has ended"));
            }
            let sign = self.group.store().get(&self.key("alive"), at_once).map_err(failed)?;
            if sign != alive {
                (alive, until) = (sign, Instant::now() + self.timeout);
            }
            if Instant::now() >= until {
                return Err(silent("says nothing"));
            }
        }
    }
}

/// What has become of the others, for one that has lost some.
#[derive(Debug, Default)]
struct Endings {
    /// Who is silent.
    gone: Vec<Peer>,
    /// Who has ended, and why.
    failed: Vec<(u32, Ending)>,
    /// Whether the store does not answer that the launcher keeps.
    store_is_lost: bool,
}

/// Rank 0, at something for which the others wait.
pub struct AtWork {
    store: Store,
    key: String,
}

impl AtWork {
    /// Does the work, while a thread says that this process lives: it may take long in one piece.
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        thread::scope(|scope| {
            let (_done, ended) = mpsc::channel::<()>();
            scope.spawn(move || {
                while ended.recv_timeout(SIGN_OF_LIFE) == Err(RecvTimeoutError::Timeout) {
                    // A store that is not there any more shows soon enough.
                    let _ = self.store.set(&self.key, &format!("{:?}", Instant::now()));
                }
            });
            work()
        })
    }
}

fn unreachable(launch: &Launch, timeout: Duration, error: DeviceError) -> DistError {
    let Launch { host, port, .. } = launch;
    let (host, port, reason) = (host.clone(), *port, words(error));
    match launch.keeps_store() {
        true => DistError::Store { host, port, reason },
        false => DistError::Unreachable { host, port, timeout, reason },
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
