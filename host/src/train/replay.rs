//! Steps that a GPU replays (`trainer.cuda_graphs`): both passes of one batch are captured as a CUDA graph, and from then on
//! those of each batch are queued as a whole. Small networks, which queue a thousand small operations, are bound by that
//! queueing otherwise.

use jepa_plugin_api::tch::{Kind, Tensor};
use jepa_plugin_api::{Batch, Step};

use super::{Model, TrainError};
use crate::device::{
    DeviceError, Graph, autocast_bf16, copy_all, gradients, set_gradients, total_norm, zero_gradients,
};

/// Steps that are computed before one is captured: libraries choose their kernels and get their memory in them.
const COMPUTED_FIRST: u32 = 2;

/// By how much of it a replayed loss may be off the computed one: what is replayed are the same kernels.
const LOSS_TOLERANCE: f64 = 0.01;

/// The same of all gradients together. Those of another batch, or of other random numbers, are off by about as much as they are
/// long.
const GRADIENT_TOLERANCE: f64 = 0.05;

/// How a batch of a step is computed.
pub struct Passes<'r> {
    /// The method.
    pub model: &'r mut Model,
    /// With autocast to bf16.
    pub bf16: bool,
    /// Puts libtorch's generator where this batch draws from.
    pub seed: &'r dyn Fn(),
    /// Batches of the step.
    pub batches: usize,
}

impl Passes<'_> {
    /// The loss and metrics of a batch.
    ///
    /// # Errors
    /// The method's.
    pub fn forward(&mut self, batch: Batch) -> anyhow::Result<Step> {
        (self.seed)();
        self.draw_and_compute(batch)
    }

    /// The same, from wherever libtorch's generator stands.
    fn draw_and_compute(&mut self, batch: Batch) -> anyhow::Result<Step> {
        let device = batch.labels.device();
        Ok(autocast_bf16(self.bf16, device, || self.model.method.step(batch))??)
    }

    /// Adds its share of the gradients to the parameters'.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn backward(&self, output: &Step) -> Result<(), TrainError> {
        Ok((output.loss.f_to_kind(Kind::Float)? / self.batches as f64).f_backward()?)
    }

    fn trained(&self) -> Vec<Tensor> {
        self.model.trained().iter().map(|(_, tensor)| tensor.shallow_clone()).collect()
    }
}

/// Where a run stands with it.
pub enum Replay {
    /// Every step is computed.
    Never,
    /// So many more steps are computed before one is captured.
    After(u32),
    /// Captured, and not compared yet with a step that it was not captured from.
    Unchecked(Captured),
    /// Every batch of that size is replayed.
    Checked(Captured),
}

impl Replay {
    /// That of a run that begins, or goes on.
    pub fn new(wanted: bool) -> Self {
        if wanted { Replay::After(COMPUTED_FIRST) } else { Replay::Never }
    }

    /// The loss and metrics of `batch`, the only one of its step on a GPU, with its gradients at the parameters; `None` where
    /// that is still to be computed. One step is captured, which is computed as well; the next is replayed and computed, and
    /// what was computed is what counts; then all are replayed. Loss and metrics stay what they are until the next batch.
    ///
    /// # Errors
    /// [`TrainError::NotCapturable`]; those of the method, which may not wait for the GPU while it is captured; whatever libtorch
    /// reports.
    pub fn step(&mut self, gpu: usize, batch: &Batch, passes: &mut Passes) -> anyhow::Result<Option<Step>> {
        match self {
            Replay::After(0) => *self = Replay::Unchecked(Captured::new(gpu, batch, passes)?),
            Replay::After(steps) => *steps -= 1,
            Replay::Unchecked(captured) if captured.fits(batch) => {
                let computed = captured.check(batch, passes)?;
                let Replay::Unchecked(captured) = std::mem::replace(self, Replay::Never) else {
                    unreachable!("it was that above")
                };
                *self = Replay::Checked(captured);
                tracing::info!("steps are replayed as a CUDA graph from here on");
                return Ok(Some(computed));
            }
            Replay::Checked(captured) if captured.fits(batch) => {
                (passes.seed)();
                let output = captured.replay(batch)?;
                set_gradients(&passes.trained(), &captured.gradients)?;
                return Ok(Some(output));
            }
            _ => {}
        }
        Ok(None)
    }
}

/// Both passes of a batch as a graph.
pub struct Captured {
    /// Where they read a batch.
    inputs: Batch,
    /// Where they leave loss and metrics.
    output: Step,
    /// Where they leave the gradients of the trained parameters.
    gradients: Vec<Option<Tensor>>,
    graph: Graph,
}

impl Captured {
    /// Captures what `passes` do with a batch such as this; nothing of it is done yet.
    fn new(gpu: usize, batch: &Batch, passes: &mut Passes) -> anyhow::Result<Self> {
        let inputs = with_tensors(batch, batch.views.iter().map(Tensor::copy).collect(), batch.labels.copy());
        // The generator cannot be put anywhere while a graph is captured, which draws from where it stands when it is replayed.
        let (graph, output) = Graph::capture(gpu, || {
            let output = passes.draw_and_compute(same(&inputs))?;
            passes.backward(&output)?;
            anyhow::Ok(output)
        })
        .map_err(|error| error.context("no step can be captured: use trainer.cuda_graphs=false"))?;
        // libtorch's graph behind it would keep what the backward pass is through with.
        let detached = |(name, value): (String, Tensor)| (name, value.detach());
        let output =
            Step { loss: output.loss.detach(), metrics: output.metrics.into_iter().map(detached).collect() };
        let trained = passes.trained();
        let gradients = gradients(&trained)?;
        zero_gradients(&trained)?;
        Ok(Captured { inputs, output, gradients, graph })
    }

    /// Whether it is about batches of this size.
    fn fits(&self, batch: &Batch) -> bool {
        let sizes = |batch: &Batch| batch.views.iter().map(Tensor::size).collect::<Vec<_>>();
        sizes(batch) == sizes(&self.inputs) && batch.labels.size() == self.inputs.labels.size()
    }

    /// Does it with this batch, as far as the GPU's queue goes.
    fn replay(&self, batch: &Batch) -> Result<Step, DeviceError> {
        let tensors = |batch: &Batch| {
            batch.views.iter().chain([&batch.labels]).map(Tensor::shallow_clone).collect::<Vec<_>>()
        };
        copy_all(&tensors(&self.inputs), &tensors(batch))?;
        self.graph.replay()?;
        let metrics = self.output.metrics.iter();
        Ok(Step {
            loss: self.output.loss.shallow_clone(),
            metrics: metrics.map(|(name, value)| (name.clone(), value.shallow_clone())).collect(),
        })
    }

    /// Replays this batch and computes it, and compares what comes of both.
    fn check(&self, batch: &Batch, passes: &mut Passes) -> anyhow::Result<Step> {
        (passes.seed)();
        let replayed = self.replay(batch)?;
        passes.model.restore_buffers()?;
        let computed = passes.forward(same(batch))?;
        passes.backward(&computed)?;
        let losses = [&replayed.loss, &computed.loss].map(|loss| loss.f_double_value(&[]));
        let [loss, computed_loss] = losses;
        agree(loss?, computed_loss?, difference(&self.gradients, &gradients(&passes.trained())?)?)?;
        Ok(computed)
    }
}

/// The norm of the difference of two lists, of that of the second: infinite where one has a tensor that the other lacks.
fn difference(list: &[Option<Tensor>], other: &[Option<Tensor>]) -> Result<f64, TrainError> {
    if list.iter().zip(other).any(|(a, b)| a.is_some() != b.is_some()) {
        return Ok(f64::INFINITY);
    }
    let pairs = list.iter().flatten().zip(other.iter().flatten());
    let differences = pairs.map(|(a, b)| a.f_sub(b)).collect::<Result<Vec<_>, _>>()?;
    let others: Vec<Tensor> = other.iter().flatten().map(Tensor::shallow_clone).collect();
    let [difference, scale] = [total_norm(&differences)?, total_norm(&others)?];
    Ok((difference / scale).f_double_value(&[])?)
}

/// Whether a replayed step is the computed one. That the computed one is a number is for others to see to.
fn agree(loss: f64, computed: f64, gradients_off: f64) -> Result<(), TrainError> {
    let same = (loss - computed).abs() <= LOSS_TOLERANCE * computed.abs().max(LOSS_TOLERANCE)
        && gradients_off <= GRADIENT_TOLERANCE;
    if same || !computed.is_finite() {
        Ok(())
    } else {
        Err(TrainError::NotCapturable { loss, computed, gradients_off })
    }
}

/// The same batch.
fn same(batch: &Batch) -> Batch {
    let views = batch.views.iter().map(Tensor::shallow_clone).collect();
    with_tensors(batch, views, batch.labels.shallow_clone())
}

fn with_tensors(batch: &Batch, views: Vec<Tensor>, labels: Tensor) -> Batch {
    Batch { views, labels, samples: batch.samples.clone(), ..*batch }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replayed_step_is_the_computed_one_or_the_run_ends() {
        assert!(agree(2.001, 2.0, 0.01).is_ok());
        assert!(agree(2.1, 2.0, 0.01).is_err(), "another loss");
        assert!(agree(2.0, 2.0, 0.9).is_err(), "the same loss, of another batch");
        assert!(agree(1e-6, 0.0, 0.0).is_ok(), "nothing is left to lose");
        for (loss, off) in [(f64::NAN, 0.0), (2.0, f64::NAN), (2.0, f64::INFINITY)] {
            assert!(agree(loss, 2.0, off).is_err());
        }
        assert!(agree(f64::NAN, f64::NAN, f64::NAN).is_ok(), "the run has diverged, which is another error");
    }

    #[test]
    fn gradients_differ_by_a_share_of_their_norm() {
        let list = |numbers: [f32; 2]| vec![Some(Tensor::from_slice(&numbers)), None];
        let off = |a: &[_], b: &[_]| difference(a, b).unwrap();
        assert_eq!(off(&list([3.0, 4.0]), &list([3.0, 4.0])), 0.0);
        assert_eq!(off(&list([3.0, 9.0]), &list([3.0, 4.0])), 1.0);
        assert_eq!(off(&[None, None], &list([3.0, 4.0])), f64::INFINITY);
    }
}
