//! The linear probe: one linear layer on frozen features, trained with softmax cross-entropy and Adam.
//!
//! The gradient of softmax regression is written out: it needs a few products per batch and no graph.

use jepa_plugin_api::Rng;
use tch::{Device, Kind, Tensor};

use super::error::{EvalError, GoOn};
use super::features::Features;
use super::topk::Hits;

/// Purposes of random numbers.
const WEIGHTS: u64 = 0x6c69_6e65_6172_0001;
const ORDER: u64 = 0x6c69_6e65_6172_0002;

/// Adam's constants, which nobody tunes for a probe (Kingma & Ba, arXiv 1412.6980).
const BETAS: (f64, f64) = (0.9, 0.999);
const EPS: f64 = 1e-8;

/// Held-out images scored at once.
const BLOCK: i64 = 8192;

/// How the probe is trained.
#[derive(Clone, Debug)]
pub struct Options {
    /// Passes over the training features.
    pub epochs: u64,
    /// Learning rate, constant.
    pub lr: f64,
    /// Features in one step; the last batch of an epoch may be smaller.
    pub batch_size: usize,
    /// Keys the first weights and the order of batches.
    pub seed: u64,
}

/// Accuracies on held-out images, in [0, 1].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinearResult {
    /// The best top-1 of all epochs. Optimistic: the held-out images chose the epoch.
    pub top1: f64,
    /// The best top-5 of all epochs.
    pub top5: f64,
    /// Top-1 after the last epoch.
    pub top1_final: f64,
    /// Top-5 after the last epoch.
    pub top5_final: f64,
}

/// Trains the probe on `train` and judges it on `val` after every epoch. Computes on the device of `train`; the same
/// seed gives the same result to the bit there.
///
/// # Errors
/// Labels that are no class, sets of different encoders, weights that diverge; what `go_on` says, asked every epoch.
pub fn probe(
    train: &Features,
    val: &Features,
    classes: i64,
    options: &Options,
    go_on: GoOn<'_>,
) -> Result<LinearResult, EvalError> {
    if options.epochs == 0 || options.batch_size == 0 {
        return Err(EvalError::Option("the linear probe needs at least one epoch and one feature per step"));
    }
    Features::check_pair(train, val, classes)?;
    let _no_grad = tch::no_grad_guard();
    let mut layer = Layer::new(train.dimensions(), classes, options.seed, train.x.device())?;
    let val = Features { x: val.x.f_to_device(train.x.device())?, y: val.y.f_to_device(train.x.device())? };
    let mut order: Vec<i64> = (0..train.images()).collect();
    let mut best = (0f64, 0f64);
    let mut last = best;
    for epoch in 0..options.epochs {
        go_on().map_err(EvalError::Stopped)?;
        Rng::keyed(options.seed, epoch, 0, ORDER).shuffle(&mut order);
        let places = Tensor::f_from_slice(&order)?.f_to_device(train.x.device())?;
        let batches = places.f_split(options.batch_size as i64, 0)?;
        for batch in &batches {
            layer.step(&train.x.f_index_select(0, batch)?, &train.y.f_index_select(0, batch)?, options.lr)?;
        }
        if !layer.is_finite()? {
            return Err(EvalError::Diverged { epoch });
        }
        last = layer.judge(&val)?;
        best = (best.0.max(last.0), best.1.max(last.1));
    }
    Ok(LinearResult { top1: best.0, top5: best.1, top1_final: last.0, top5_final: last.1 })
}

/// Weights and bias with Adam's two averages of their gradients, each (D + 1, C) with the bias in the last row.
struct Layer {
    weights: Tensor,
    mean: Tensor,
    square: Tensor,
    dimensions: i64,
    steps: i32,
}

impl Layer {
    /// Weights and biases uniform in ±1/√D.
    fn new(dimensions: i64, classes: i64, seed: u64, device: Device) -> Result<Self, EvalError> {
        let bound = 1.0 / (dimensions as f64).sqrt();
        let mut rng = Rng::keyed(seed, 0, 0, WEIGHTS);
        let count = (dimensions + 1) * classes;
        let first: Vec<f32> = (0..count).map(|_| rng.uniform(-bound, bound) as f32).collect();
        Layer::with(Tensor::f_from_slice(&first)?.f_view([dimensions + 1, classes])?.f_to_device(device)?)
    }

    /// Begins with these weights (D + 1, C).
    fn with(weights: Tensor) -> Result<Self, EvalError> {
        Ok(Layer {
            mean: weights.f_zeros_like()?,
            square: weights.f_zeros_like()?,
            dimensions: weights.size()[0] - 1,
            weights,
            steps: 0,
        })
    }

    /// (B, D) to (B, C).
    fn logits(&self, x: &Tensor) -> Result<Tensor, EvalError> {
        let bias = self.weights.f_select(0, self.dimensions)?;
        Ok(bias.f_addmm(x, &self.weights.f_narrow(0, 0, self.dimensions)?)?)
    }

    /// One step of Adam on the mean cross-entropy of a batch.
    fn step(&mut self, x: &Tensor, y: &Tensor, lr: f64) -> Result<(), EvalError> {
        let rows = x.size()[0];
        // d loss / d logits = (softmax − one-hot) / B
        let mut slope = self.logits(x)?.f_softmax(1, Kind::Float)?;
        let ones = Tensor::f_full([rows, 1], -1.0, (Kind::Float, x.device()))?;
        let _ = slope.f_scatter_add_(1, &y.f_unsqueeze(1)?, &ones)?;
        let _ = slope.f_div_scalar_(rows as f64)?;
        let bias = slope.f_sum_dim_intlist(0, true, Kind::Float)?;
        let gradient = Tensor::f_cat(&[x.f_transpose(0, 1)?.f_mm(&slope)?, bias], 0)?;

        self.steps += 1;
        let _ = self.mean.f_lerp_(&gradient, 1.0 - BETAS.0)?;
        let _ = self.square.f_lerp_(&gradient.f_square()?, 1.0 - BETAS.1)?;
        let (rise, spread) = (1.0 - BETAS.0.powi(self.steps), 1.0 - BETAS.1.powi(self.steps));
        let mut scale = self.square.f_sqrt()?;
        let _ = scale.f_div_scalar_(spread.sqrt())?.f_add_scalar_(EPS)?;
        let mut update = self.mean.f_div(&scale)?;
        let _ = self.weights.f_sub_(&update.f_mul_scalar_(lr / rise)?)?;
        Ok(())
    }

    fn is_finite(&self) -> Result<bool, EvalError> {
        Ok(self.weights.f_isfinite()?.f_all()?.f_int64_value(&[])? == 1)
    }

    /// (top-1, top-5) on held-out features.
    fn judge(&self, val: &Features) -> Result<(f64, f64), EvalError> {
        let mut hits = Hits::default();
        for (x, y) in val.x.f_split(BLOCK, 0)?.iter().zip(&val.y.f_split(BLOCK, 0)?) {
            hits.add(&self.logits(x)?, y)?;
        }
        Ok(hits.shares())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;
    use crate::checkpoint::read_tensors;

    #[test]
    fn steps_equal_those_of_torch_adam_on_cross_entropy() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/linear_probe.safetensors");
        let fixture: BTreeMap<String, Tensor> = read_tensors(&path).unwrap().into_iter().collect();
        let joined = |prefix: &str| {
            let weight = fixture[&format!("{prefix}.weight")].transpose(0, 1);
            Tensor::cat(&[weight, fixture[&format!("{prefix}.bias")].unsqueeze(0)], 0)
        };
        let mut layer = Layer::with(joined("param")).unwrap();
        for _ in 0..5 {
            layer.step(&fixture["input.bank"], &fixture["input.bank_labels"], 1e-3).unwrap();
        }
        assert!(layer.weights.allclose(&joined("after"), 1e-5, 1e-6, false));
        assert!(layer.logits(&fixture["input.queries"]).unwrap().allclose(
            &fixture["output.logits"],
            1e-5,
            1e-5,
            false
        ));
    }
}
