//! A method that fails on request: what the host must survive, report and recover from.

use jepa_plugin_api::tch::{self, Kind, Tensor};
use jepa_plugin_api::{
    Batch, Context, Host, Interpolation, Method, Result, Step, ViewSpec, bail, ranks, tracing,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

jepa_plugin_api::export_plugin! { methods: [Faulty] }

/// The keys under `method.`. Steps count from 0: step n is the one that n steps came before.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FaultyOptions {
    /// Panic in this step.
    pub panic_at_step: Option<u64>,
    /// Return an error in this step.
    pub error_at_step: Option<u64>,
    /// Give a loss that is not a number in this step.
    pub nan_at_step: Option<u64>,
    /// Give a metric that is infinite in this step.
    pub infinite_metric_at_step: Option<u64>,
    /// Give gradients that are not numbers, behind a loss that is one, in this step.
    pub nan_gradient_at_step: Option<u64>,
    /// Panic in this forward pass of training, counted from 0 over the accumulated batches.
    pub panic_at_pass: Option<i64>,
    /// Give a loss without a graph in this step.
    pub detached_loss_at_step: Option<u64>,
    /// Give a loss that is no scalar in this step.
    pub vector_loss_at_step: Option<u64>,
    /// Add tensors whose shapes do not fit in this step.
    pub misfit_at_step: Option<u64>,
    /// What evaluation gets.
    pub features: Features,
    /// Panic while the method is built.
    pub panic_in_new: bool,
    /// Register a parameter that takes no part in the loss.
    pub idle_parameter: bool,
    /// Register a buffer of so many numbers, for the sake of its size.
    pub ballast: i64,
    /// Start from a colour that no seed tells.
    pub unseeded: bool,
    /// Remember the number of steps where no checkpoint sees it.
    pub hidden_state: bool,
    /// Give a loss that is not a number under autocast.
    pub fragile_in_bf16: bool,
    /// Keep every batch.
    pub keep_batches: bool,
    /// Start a thread in every step, which never ends.
    pub keep_threads: bool,
    /// End the process when a batch has no view.
    pub abort_on_misfit: bool,
    /// Add to the loss a number of torch's own generator.
    pub torch_noise: bool,
    /// Return so many metrics.
    pub metrics: u32,
    /// Return one metric more on this rank.
    pub one_more_metric_on_rank: Option<usize>,
    /// Return an error that panics when it is told, in this step.
    pub unspeakable_error_at_step: Option<u64>,
    /// Panic in a thread of its own in this step.
    pub panic_in_thread_at_step: Option<u64>,
    /// Panic where libtorch records no graph, when a batch has no view.
    pub panic_under_no_grad_on_misfit: bool,
    /// Panic when the method is dropped.
    pub panic_in_drop: bool,
    /// Declare an EMA pair whose subtrees do not exist.
    pub ema_of_nothing: bool,
}

/// What `encode` gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Features {
    /// The pixels: features that a probe can learn from.
    #[default]
    Good,
    /// A panic, once training has begun.
    Panic,
    /// A map that is not pooled, once training has begun.
    Map,
    /// Numbers that are none.
    Nan,
    /// Nearly the same for all images.
    Collapsed,
}

/// Learns the mean colour of the images: one parameter, one that follows it, and a count of the steps.
pub struct Faulty {
    options: FaultyOptions,
    /// `(3)`.
    colour: Tensor,
    /// Forward passes in training, one that fails included: a scalar buffer.
    begun: Tensor,
    /// Steps of this object.
    steps: u32,
}

impl Method for Faulty {
    const NAME: &'static str = "faulty";
    const ENCODER: &'static str = "none";
    /// So it says: `hidden_state` and `panic_at_pass` are not.
    const CAPTURABLE: bool = true;

    type Options = FaultyOptions;

    fn new(options: FaultyOptions, host: &mut Host) -> Result<Self> {
        if options.panic_in_new {
            panic!("the method cannot be built");
        }
        let device = host.device();
        let colour = |side: &str| {
            host.params().sub(side).parameter("colour", Tensor::zeros([3], (Kind::Float, device)))
        };
        let (colour, _follower) = (colour("online"), colour("target"));
        let begun = host.params().buffer("begun", Tensor::zeros([], (Kind::Float, device)));
        host.ema("online", "target", jepa_plugin_api::EmaSchedule { from: 0.9, to: 1.0 });
        if options.idle_parameter {
            let _ = host.params().parameter("idle", Tensor::zeros([2], (Kind::Float, device)));
        }
        if options.ballast > 0 {
            let _ = host.params().buffer("ballast", Tensor::zeros([options.ballast], (Kind::Float, device)));
        }
        if options.ema_of_nothing {
            host.ema("nowhere", "nothing", jepa_plugin_api::EmaSchedule { from: 0.9, to: 1.0 });
        }
        tracing::info!(batch_size = host.facts().batch_size, "the faulty method is built");
        tracing::debug!("only for those who ask");
        if options.unseeded {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
            let _ = tch::no_grad(|| colour.shallow_clone().fill_(f64::from(now.subsec_nanos()) * 1e-9));
        }
        Ok(Faulty { options, colour, begun, steps: 0 })
    }

    fn views(&self) -> Vec<ViewSpec> {
        vec![ViewSpec::new("image").resize_center_crop(1.0, Interpolation::Bilinear).normalize_imagenet()]
    }

    fn step(&mut self, batch: &Batch) -> Result<Step> {
        let now = Some(batch.step);
        if batch.train {
            let _ = self.begun.g_add_scalar_(1.0);
            // To look at it is to wait for a GPU.
            if let Some(last) = self.options.panic_at_pass {
                let pass = i64::try_from(&self.begun)? - 1;
                assert!(pass != last, "the method gives up in pass {pass}");
            }
        }
        if self.options.panic_at_step == now {
            panic!("the method gives up at step {}", batch.step);
        }
        if self.options.error_at_step == now {
            cannot_go_on().with_context(|| format!("step {} went wrong", batch.step))?;
        }
        if self.options.unspeakable_error_at_step == now {
            return Err(Unspeakable.into());
        }
        if self.options.panic_in_thread_at_step == now {
            let thread = std::thread::Builder::new().name("helper".to_owned());
            let _ = thread.spawn(|| panic!("the helper gives up"))?.join();
        }
        if batch.step == 1 {
            tracing::warn!("one step is behind us");
        }
        if batch.views.is_empty() && self.options.abort_on_misfit {
            std::process::abort();
        }
        if batch.views.is_empty() && self.options.panic_under_no_grad_on_misfit {
            tch::no_grad(|| panic!("there is nothing to see"));
        }
        if self.options.keep_batches {
            batch.views.iter().for_each(|view| std::mem::forget(view.copy()));
        }
        if self.options.keep_threads {
            std::thread::spawn(|| {
                loop {
                    std::thread::park();
                }
            });
        }
        self.steps += 1;
        let mean = batch.views[0].mean_dim([0i64, 2, 3].as_slice(), false, Kind::Float);
        let mut loss = (&self.colour - &mean).square().mean(Kind::Float);
        if self.options.hidden_state {
            loss *= f64::from(self.steps);
        }
        if self.options.torch_noise {
            loss += Tensor::rand([], (Kind::Float, loss.device()));
        }
        let fragile = self.options.fragile_in_bf16;
        if fragile && mean.f_matmul(&mean.tr())?.kind() == Kind::BFloat16 {
            loss *= f64::NAN;
        }
        if self.options.nan_at_step == now {
            loss *= f64::NAN;
        }
        if self.options.nan_gradient_at_step == now {
            // The derivative of √x at 0 is infinite, and infinity times 0 is no number.
            loss += (&self.colour * 0.0).square().sum(Kind::Float).sqrt();
        }
        if self.options.misfit_at_step == now {
            let _ = Tensor::zeros([2], (Kind::Float, self.colour.device())) + &self.colour;
        }
        if self.options.detached_loss_at_step == now {
            loss = loss.detach();
        }
        if self.options.vector_loss_at_step == now {
            loss = loss.repeat([2]);
        }
        let distance = (&self.colour - &mean).abs().max();
        let infinite = self.options.infinite_metric_at_step == now;
        let distance = if infinite { distance * f64::INFINITY } else { distance };
        let step = Step::new(loss).metric("distance", &distance);
        let more = self.options.one_more_metric_on_rank == Some(ranks::rank());
        Ok((0..self.options.metrics + u32::from(more))
            .fold(step, |step, i| step.metric(&format!("distance_{i}"), &distance)))
    }

    fn encode(&mut self, images: &Tensor) -> Result<Tensor> {
        let begun = f64::try_from(&self.begun)? > 0.0;
        Ok(match self.options.features {
            Features::Panic | Features::Map if !begun => images.flatten(1, 3),
            Features::Good => images.flatten(1, 3),
            Features::Panic => panic!("the method cannot look at it"),
            Features::Map => images.shallow_clone(),
            Features::Collapsed => images.flatten(1, 3) * 1e-6 + 1.0,
            Features::Nan => images.flatten(1, 3) * f64::NAN,
        })
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        if self.options.panic_in_drop {
            panic!("the method cannot let go");
        }
    }
}

/// An error whose words cannot be had.
#[derive(Debug)]
struct Unspeakable;

impl std::error::Error for Unspeakable {}

impl std::fmt::Display for Unspeakable {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        panic!("words fail it")
    }
}

fn cannot_go_on() -> Result<()> {
    bail!("there is nothing left to learn")
}
