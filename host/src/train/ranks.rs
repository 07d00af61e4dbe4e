//! What a run does together with other ranks; in a run of one process, nothing.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::Path;

use anyhow::Context as _;
use jepa_plugin_api::tch::Tensor;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::unread::Unread;
use super::{Figures, Model, TrainError};
use crate::checkpoint::State;
use crate::device::Exchange;
use crate::dist::{AtWork, Comm, DistError, Ending, Reduce};

/// The other ranks of a run, if there are any.
///
/// Each has its share of every batch, and all of them have the same weights: the mean of their gradients moves these, on every
/// rank by the same arithmetic. The first alone evaluates, saves and records.
#[derive(Debug)]
pub struct Ranks {
    rank: usize,
    size: usize,
    others: Option<Others>,
    /// The connection of one that has announced its end.
    left: Option<Comm>,
}

#[derive(Debug)]
struct Others {
    exchange: Exchange,
    /// Figures that are on their way.
    figures: Option<Tensor>,
    comm: Comm,
}

impl Ranks {
    /// A run of one process.
    pub fn alone() -> Self {
        Ranks { rank: 0, size: 1, others: None, left: None }
    }

    /// All ranks of `comm`, with the gradients of `model`, which travel in parts of `bucket_bytes`.
    ///
    /// # Errors
    /// Whatever libtorch reports: the others have been told.
    pub fn new(comm: Comm, model: &Model, bucket_bytes: u64) -> anyhow::Result<Self> {
        let params: Vec<Tensor> = model.trained().iter().map(|(_, tensor)| tensor.shallow_clone()).collect();
        let open = || -> Result<Exchange, DistError> {
            if params.iter().any(|param| param.device().is_cuda()) {
                comm.join_gpus()?;
            }
            let exchange = comm.exchange(&params, bucket_bytes)?;
            comm.let_plugins_join(true)?;
            Ok(exchange)
        };
        let exchange = or_part(Some(&comm), open().map_err(anyhow::Error::from))?;
        let (rank, size) = (comm.rank() as usize, comm.size() as usize);
        Ok(Ranks { rank, size, others: Some(Others { exchange, figures: None, comm }), left: None })
    }

    /// The number of this one, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many there are.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Whether `error` ends what this rank does together with others before it is done: it is no signal.
    pub fn cuts(&self, error: &anyhow::Error) -> bool {
        self.comm().is_some_and(|comm| !matches!(ending(comm, error), Ending::Signal(_)))
    }

    /// Whether this is the one that evaluates, saves and records.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// Their connection.
    pub fn comm(&self) -> Option<&Comm> {
        self.others.as_ref().map(|others| &others.comm)
    }

    /// The signal that any rank has got: all of them end at the same step.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn agree_on_signal(&self, own: Option<i32>) -> Result<Option<i32>, DistError> {
        let Some(comm) = self.comm() else { return Ok(own) };
        let all = comm.all_gather(&Tensor::from_slice(&[i64::from(own.unwrap_or(0))]))?;
        let greatest = all.max().int64_value(&[]);
        Ok(own.or((greatest > 0).then_some(greatest as i32)))
    }

    /// Before the last backward pass of a step: its gradients become the mean of all ranks', as do `figures`.
    ///
    /// # Errors
    /// [`DistError::Lost`]; ranks that have measured different things.
    pub fn begin_exchange(&mut self, figures: &Unread) -> anyhow::Result<()> {
        let Some(others) = &mut self.others else { return Ok(()) };
        refuse_other_figures(&others.comm, figures)?;
        let values = figures.values().map_err(TrainError::from)?;
        others.exchange.begin(&values).map_err(|error| others.comm.lost_gradients(error))?;
        others.figures = Some(values);
        Ok(())
    }

    /// After it: waits for what is on its way.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn finish_exchange(&mut self, figures: &mut Unread) -> Result<(), DistError> {
        let Some(others) = &mut self.others else { return Ok(()) };
        others.exchange.finish().map_err(|error| others.comm.lost_gradients(error))?;
        if let Some(means) = others.figures.take() {
            figures.replace_values(&means);
        }
        Ok(())
    }

    /// What `work` computes with plugins, each rank computes alone.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn each_alone<T>(&self, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let Some(comm) = self.comm() else { return work() };
        comm.let_plugins_join(false)?;
        let result = work();
        comm.let_plugins_join(true)?;
        result
    }

    /// Sums over `images` of each rank's own, by name, become the means over all images. A rank may have had none.
    ///
    /// # Errors
    /// [`DistError::Lost`].
    pub fn mean(&self, sums: Figures, images: usize) -> anyhow::Result<Figures> {
        let names = self.from_first(|| Ok(sums.keys().cloned().collect::<Vec<_>>()))?;
        let own = names.iter().map(|name| sums.get(name).copied().unwrap_or(0.0));
        let mut all = Tensor::from_slice(&std::iter::once(images as f64).chain(own).collect::<Vec<_>>());
        if let Some(comm) = self.comm() {
            comm.all_reduce(&mut all, Reduce::Sum)?;
        }
        let all = Vec::<f64>::try_from(all)?;
        Ok(names.into_iter().zip(&all[1..]).map(|(name, sum)| (name, sum / all[0])).collect())
    }

    /// What the first makes, on all.
    ///
    /// # Errors
    /// Those of `make`; [`DistError::Lost`].
    pub fn from_first<T: Serialize + DeserializeOwned>(
        &self,
        make: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        match self.comm() {
            Some(comm) => comm.from_first(make),
            None => make(),
        }
    }

    /// The same, of what takes long. It is given what asks for the signal that any rank has got; `own` asks for this one's.
    ///
    /// # Errors
    /// As [`from_first`](Self::from_first).
    pub fn from_first_unless<T: Serialize + DeserializeOwned>(
        &self,
        own: &dyn Fn() -> Option<i32>,
        make: impl FnOnce(&dyn Fn() -> Option<i32>) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        match self.comm() {
            Some(comm) => {
                let of_any = || own().or_else(|| comm.signal_of_others());
                comm.from_first_unless(own, || make(&of_any))
            }
            None => make(own),
        }
    }

    /// For the first of several, before the others wait for it in [`from_first`](Self::from_first): what it does meanwhile.
    pub fn at_work(&self) -> Option<AtWork> {
        self.comm().filter(|_| self.is_first()).map(Comm::at_work)
    }

    /// Refuses to go on with ranks whose weights are not the same any more, to the bit.
    ///
    /// # Errors
    /// [`DistError::Drift`].
    pub fn check(&self, model: &Model, step: u64) -> anyhow::Result<()> {
        let Some(comm) = self.comm() else { return Ok(()) };
        let own = model.checksum().map_err(TrainError::from)?;
        let all = Vec::<i64>::try_from(comm.all_gather(&Tensor::from_slice(&[own]))?)?;
        match all.iter().position(|other| *other != all[0]) {
            Some(rank) => Err(DistError::Drift { rank: rank as u32, step }.into()),
            None => Ok(()),
        }
    }

    /// At the end nobody leaves before all are done: the first may keep the store.
    pub fn leave(&self) {
        let Some(comm) = self.comm() else { return };
        if let Err(error) = comm.wait_for_all() {
            tracing::warn!("all is done, and {error}");
        }
    }

    /// Notes, for those that a launcher may start after these, that `run` is complete, which `state` is the last of.
    pub fn note_complete(&self, run: &Path, state: &State) {
        let Some(comm) = self.comm().filter(|_| self.is_first()) else { return };
        if let Err(error) = comm.note_complete(run, &state.config.to_string()) {
            tracing::warn!("the run is complete, and {error}");
        }
    }

    /// Tells the others that this rank ends with `error`. It computes alone from here on.
    pub fn announce(&mut self, error: &anyhow::Error) {
        if let Some(Others { exchange, figures, comm }) = self.others.take() {
            drop((exchange, figures));
            comm.announce(&ending(&comm, error));
            self.left = Some(comm);
        }
    }

    /// After that, and when the first has saved what there is: the error that the run ends with. Where others were lost, that
    /// says who.
    pub fn part(&mut self, error: anyhow::Error) -> anyhow::Error {
        match self.left.take() {
            Some(comm) => conclude(&comm, error),
            None => error,
        }
    }
}

/// What was made before a run begins. Where that has failed, the others of `comm` are told, as by [`Ranks::announce`] and
/// [`Ranks::part`].
///
/// # Errors
/// That of `made`, or who has ended where others were lost.
pub fn or_part<T>(comm: Option<&Comm>, made: anyhow::Result<T>) -> anyhow::Result<T> {
    let Some(comm) = comm else { return made };
    made.map_err(|error| {
        comm.announce(&ending(comm, &error));
        conclude(comm, error)
    })
}

fn conclude(comm: &Comm, error: anyhow::Error) -> anyhow::Error {
    match comm.part(&ending(comm, &error)) {
        Some(broken) => {
            tracing::debug!("{error:#}");
            broken.into()
        }
        None => error,
    }
}

fn ending(comm: &Comm, error: &anyhow::Error) -> Ending {
    let signal = error.chain().find_map(|cause| match cause.downcast_ref() {
        Some(TrainError::Interrupted { signal, .. } | TrainError::Stopped { signal }) => Some(*signal),
        _ => None,
    });
    match signal {
        Some(signal) => Ending::Signal(signal),
        None if comm.is_lost() || error.chain().any(has_lost) => Ending::Lost,
        None => Ending::Failed(format!("{error:#}")),
    }
}

/// Whether `cause` says that others were lost.
fn has_lost(cause: &(dyn std::error::Error + 'static)) -> bool {
    matches!(cause.downcast_ref(), Some(DistError::Lost { .. }))
}

/// Refuses figures that other ranks have not: what is on its way together has one length, and means are of the same thing.
fn refuse_other_figures(comm: &Comm, figures: &Unread) -> anyhow::Result<()> {
    let mut names = DefaultHasher::new();
    figures.names().for_each(|name| name.hash(&mut names));
    // On CPUs: no GPU is waited for.
    let keys = Vec::<i64>::try_from(comm.all_gather(&Tensor::from_slice(&[names.finish() as i64]))?)?;
    if keys.iter().all(|key| *key == keys[0]) {
        return Ok(());
    }
    let own: Vec<&str> = figures.names().collect();
    let of_all = comm.collect(&own.join(", "))?;
    let difference = comm.from_first(|| {
        let of_all = of_all.unwrap_or_default();
        let others = (0..).zip(&of_all).find(|(_, names)| **names != of_all[0]);
        let (rank, names) = others.context("all ranks measure the same, in other words")?;
        Ok(format!("in a step, rank 0 measures {}, and rank {rank} measures {names}", of_all[0]))
    })?;
    Err(DistError::Differ(difference).into())
}
