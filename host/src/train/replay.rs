//! Steps out of a CUDA graph (`trainer.cuda_graphs`): the forward and backward pass of one batch are recorded, and from then on
//! those of each batch are queued as a whole. Small networks, which queue a thousand small operations, are bound by that
//! queueing otherwise.

use jepa_plugin_api::tch::{TchError, Tensor};
use jepa_plugin_api::{Batch, Step};

use super::TrainError;
use crate::device::{DeviceError, Graph, copy_all, gradients, set_gradients, zero_gradients};

/// Steps that are computed before one is recorded: libraries choose their kernels and get their memory in them.
const COMPUTED_FIRST: u32 = 2;

/// By how much of it a replayed loss may be off the computed one: what is recorded are the same kernels.
const TOLERANCE: f64 = 0.01;

/// Where a run stands with it.
pub enum Replay {
    /// Every step is computed.
    Never,
    /// So many more steps are computed first.
    After(u32),
    /// Recorded, and with the first batch that it was not recorded from to be compared yet.
    Untried(Recording),
    /// Every batch of that size is replayed.
    Of(Recording),
}

impl Replay {
    /// Recorded before long, if that is wanted.
    pub fn new(wanted: bool) -> Self {
        if wanted { Replay::After(COMPUTED_FIRST) } else { Replay::Never }
    }
}

/// The passes of a batch, recorded.
pub struct Recording {
    /// Where they read a batch.
    inputs: Batch,
    /// Where they leave loss and metrics.
    output: Step,
    trained: Vec<Tensor>,
    /// Where they leave the gradients of these.
    gradients: Vec<Option<Tensor>>,
    graph: Graph,
}

impl Recording {
    /// Records what `passes` does with a batch such as this, forward and backward to the parameters `trained`. Nothing is
    /// done yet.
    ///
    /// # Errors
    /// Those of `passes`: one that waits for the GPU cannot be recorded.
    pub fn new(
        device_number: usize,
        batch: &Batch,
        trained: Vec<Tensor>,
        passes: impl FnOnce(Batch) -> anyhow::Result<Step>,
    ) -> anyhow::Result<Self> {
        let inputs = with_views(batch, batch.views.iter().map(Tensor::copy).collect(), batch.labels.copy());
        let (graph, output) = Graph::record(device_number, || passes(same(&inputs)))?;
        // A graph of libtorch's behind it would keep what the backward pass is through with.
        let detached = |(name, value): (String, Tensor)| (name, value.detach());
        let output =
            Step { loss: output.loss.detach(), metrics: output.metrics.into_iter().map(detached).collect() };
        let gradients = gradients(&trained)?;
        zero_gradients(&trained)?;
        Ok(Recording { inputs, output, trained, gradients, graph })
    }

    /// Whether it is about batches of this size.
    pub fn fits(&self, batch: &Batch) -> bool {
        let sizes = |batch: &Batch| batch.views.iter().map(Tensor::size).collect::<Vec<_>>();
        sizes(batch) == sizes(&self.inputs) && batch.labels.size() == self.inputs.labels.size()
    }

    /// Does it with this batch, as far as the GPU's queue goes: its gradients become the parameters'. Loss and metrics stay what
    /// they are until the next time.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn run(&self, batch: &Batch) -> Result<Step, DeviceError> {
        let tensors = |batch: &Batch| {
            batch.views.iter().chain([&batch.labels]).map(Tensor::shallow_clone).collect::<Vec<_>>()
        };
        copy_all(&tensors(&self.inputs), &tensors(batch))?;
        self.graph.replay()?;
        set_gradients(&self.trained, &self.gradients)?;
        let metrics = self.output.metrics.iter();
        Ok(Step {
            loss: self.output.loss.shallow_clone(),
            metrics: metrics.map(|(name, value)| (name.clone(), value.shallow_clone())).collect(),
        })
    }
}

/// Whether what was replayed is what is computed, of the same batch.
///
/// # Errors
/// [`TrainError::NotCapturable`]; whatever libtorch reports. NaN is for others to tell.
pub fn compare(replayed: &Tensor, computed: &Tensor) -> Result<(), TrainError> {
    let number = |loss: &Tensor| -> Result<f64, TchError> { loss.f_double_value(&[]) };
    let (replayed, computed) = (number(replayed)?, number(computed)?);
    if (replayed - computed).abs() > TOLERANCE * computed.abs() {
        return Err(TrainError::NotCapturable { replayed, computed });
    }
    Ok(())
}

/// The same batch.
pub fn same(batch: &Batch) -> Batch {
    let views = batch.views.iter().map(Tensor::shallow_clone).collect();
    with_views(batch, views, batch.labels.shallow_clone())
}

fn with_views(batch: &Batch, views: Vec<Tensor>, labels: Tensor) -> Batch {
    Batch { views, labels, samples: batch.samples.clone(), ..*batch }
}
