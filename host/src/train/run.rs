//! The training loop, to be read from top to bottom: [`run`], then an epoch, then a step, then what happens between.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context as _;
use jepa_plugin_api::tch::{self, Cuda, Device, no_grad};
use jepa_plugin_api::{Batch, Rng};

use super::ledger::{Ledger, Part, Seconds};
use super::meter::Meters;
use super::optimizer::Gradients;
use super::replay::{Passes, Replay};
use super::schedule::{Progress, learning_rate, weight_decay};
use super::unread::Unread;
use super::{Model, Optimizer, Ranks, Signals, StepSettings, TrainError};
use crate::checkpoint::{Best, CheckpointError, RunDir, State};
use crate::config::{Collapse, Config, Precision};
use crate::data::{DataError, LoadedBatch, Loader, RawBatch, Work};
use crate::device::{Traffic, autocast_bf16, peak_gpu_bytes};
use crate::dist::{Comm, DistError};
use crate::eval::{EvalError, Evaluation};
use crate::trace::Trace;
use crate::track::{Histogram, StepReport, Trackers};

/// Key of the numbers that libtorch's own generator starts from in each step: dropout, stochastic depth.
const TORCH_RANDOMNESS: u64 = 0x746f_7263_6800_0000;

/// The epoch whose random numbers validation uses, every time: no training epoch has it.
const VALIDATION_EPOCH: u64 = u64::MAX;

/// Figures that may wait on a GPU until they are read, whatever `trainer.log_every_steps` is: so a run that diverges is
/// noticed.
const MOST_UNREAD: usize = 512;

/// Values by metric name.
pub type Figures = BTreeMap<String, f64>;

/// What a run works on and with.
pub struct Resources {
    /// The resolved configuration.
    pub config: Config,
    /// The device that everything is on.
    pub device: Device,
    /// The method and its tensors.
    pub model: Model,
    /// The optimizer over the model's trained parameters.
    pub optimizer: Optimizer,
    /// Training batches.
    pub train: Loader,
    /// Batches for the validation loss.
    pub validation: Option<Loader>,
    /// The probes.
    pub evaluation: Option<Evaluation>,
    /// Where checkpoints go.
    pub directory: RunDir,
    /// Who may ask for the end.
    pub signals: Signals,
    /// Who trains too.
    pub ranks: Ranks,
    /// Where to begin: at zero, or where a checkpoint stopped.
    pub state: State,
    /// Optimizer steps in an epoch, at least 1.
    pub steps_per_epoch: u64,
    /// Where the parts of each step are written.
    pub trace: Option<Trace>,
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// Optimizer steps taken in all.
    pub steps: u64,
    /// The first evaluation: at random initialisation, when `eval.at_start` is on.
    pub first: Option<Figures>,
    /// The last evaluation.
    pub last: Option<Figures>,
    /// The last checkpoint.
    pub checkpoint: Option<PathBuf>,
}

/// Trains to the last epoch, or to `trainer.max_steps`, and records figures with `trackers`.
///
/// # Errors
/// Whatever ends the run early. It leaves a checkpoint of where the run stands; NaN leaves the last good one.
pub fn run(resources: Resources, trackers: &mut Trackers) -> anyhow::Result<Outcome> {
    let mut run = Run::new(resources, trackers);
    match run.until_done() {
        Ok(()) => Ok(Outcome {
            steps: run.state.step,
            first: run.state.first_eval.take(),
            last: run.state.last_eval.take(),
            checkpoint: run.saved.take(),
        }),
        Err(error) => {
            run.trackers.finish();
            tracing::debug!("the run ends at step {}", run.state.step);
            // On a GPU, steps may be queued behind sums of all ranks that are cut now, and be saved with what they make of that. After
            // a signal, which all have agreed on, none is.
            let spoilt = run.device != Device::Cpu && run.ranks.cuts(&error);
            run.ranks.announce(&error);
            let hopeless = |cause: &(dyn Error + 'static)| {
                cause.is::<CheckpointError>() || has_diverged(cause) || has_drifted(cause)
            };
            if spoilt || error.chain().any(hopeless) {
                return Err(run.ranks.part(error));
            }
            let saved = run.undo_step().and_then(|()| run.save());
            let error = run.ranks.part(error);
            match saved {
                Ok(()) => Err(error),
                // Figures that were still unread say so, and it matters more than why the run was ending.
                Err(diverged) if diverged.chain().any(has_diverged) => Err(diverged),
                Err(unsaved) => {
                    tracing::error!("no checkpoint of step {}: {unsaved:#}", run.state.step);
                    Err(error)
                }
            }
        }
    }
}

/// What [`measure`] has measured.
pub struct Measured {
    /// The parts of each step.
    pub steps: Vec<Seconds>,
    /// Seconds of the loader's threads for a step's images, all threads together, as in [`Work::ALL`].
    pub beside: [f64; Work::ALL.len()],
    /// Images in a step, of all ranks together.
    pub images: usize,
    /// What this rank has handed over to the others, if there are any.
    pub traffic: Option<Traffic>,
    /// On a GPU, steps as in a run, where nobody waits for its parts.
    pub unwaited: Option<Unwaited>,
    /// The most memory that tensors have had on the GPU, in bytes.
    pub peak_gpu_bytes: Option<u64>,
}

/// Steps on a GPU for which nobody waits.
#[derive(Clone, Copy, Debug)]
pub struct Unwaited {
    /// Seconds for each, when one follows the other.
    pub step_s: f64,
    /// Seconds that the host needs to queue each part of one: the medians.
    pub queue_s: Seconds,
}

/// Takes `warmup` steps and then `steps` that are measured, waiting for the device after each part. With `same_batch`, all of
/// them are of the first batch, and nothing is loaded meanwhile. Nothing is evaluated or saved.
///
/// # Errors
/// Whatever ends a run.
pub fn measure(
    resources: Resources,
    trackers: &mut Trackers,
    (warmup, steps): (usize, usize),
    same_batch: bool,
) -> anyhow::Result<Measured> {
    let mut run = Run::new(resources, trackers);
    run.measure((warmup, steps), same_batch).map_err(|error| {
        run.trackers.finish();
        run.ranks.announce(&error);
        run.ranks.part(error)
    })
}

/// Whether `cause` says that the weights are no good any more.
pub fn has_diverged(cause: &(dyn Error + 'static)) -> bool {
    matches!(cause.downcast_ref(), Some(TrainError::Diverged { .. } | TrainError::Collapsed { .. }))
        || matches!(cause.downcast_ref(), Some(EvalError::NotFinite { .. } | EvalError::Diverged { .. }))
}

fn has_drifted(cause: &(dyn Error + 'static)) -> bool {
    matches!(cause.downcast_ref(), Some(DistError::Drift { .. }))
}

struct Run<'t> {
    config: Config,
    device: Device,
    model: Model,
    optimizer: Optimizer,
    train: Loader,
    validation: Option<Loader>,
    evaluation: Option<Evaluation>,
    directory: RunDir,
    trackers: &'t mut Trackers,
    signals: Signals,
    ranks: Ranks,
    state: State,

    steps_per_epoch: u64,
    progress: Progress,
    replay: Replay,
    unread: Unread,
    meters: Meters,
    /// Mean since the last log line, as far as it has been read.
    last_loss: f64,
    saved: Option<PathBuf>,
    ledger: Ledger,
    gradients_checked: bool,
    /// While steps are timed, on the device.
    figures_stay: bool,
}

impl<'t> Run<'t> {
    fn new(r: Resources, trackers: &'t mut Trackers) -> Self {
        let (settings, steps_per_epoch) = (&r.config.optimizer, r.steps_per_epoch);
        let progress = Progress {
            total_steps: r.config.trainer.epochs * steps_per_epoch,
            warmup_steps: (settings.warmup_epochs * steps_per_epoch as f64).round() as u64,
        };
        let replay = Replay::new(r.config.trainer.cuda_graphs && r.device.is_cuda());
        Run {
            ledger: Ledger::new(r.train.clock().clone(), r.trace),
            meters: Meters(r.state.meters.clone()),
            config: r.config,
            device: r.device,
            model: r.model,
            optimizer: r.optimizer,
            train: r.train,
            validation: r.validation,
            evaluation: r.evaluation,
            directory: r.directory,
            trackers,
            signals: r.signals,
            ranks: r.ranks,
            state: r.state,
            steps_per_epoch,
            progress,
            replay,
            unread: Unread::default(),
            last_loss: f64::NAN,
            saved: None,
            gradients_checked: false,
            figures_stay: false,
        }
    }

    /// Times `steps` on GPU `number` without waiting for their parts.
    fn unwaited(
        &mut self,
        number: usize,
        steps: usize,
        batches: &mut dyn Iterator<Item = Result<RawBatch, DataError>>,
    ) -> anyhow::Result<Unwaited> {
        let wait = || Cuda::synchronize(number as i64);
        self.ledger.synchronize(Device::Cpu);
        self.figures_stay = true;
        let mut queued = Vec::with_capacity(steps);
        for _ in 0..steps {
            wait();
            self.step(batches)?;
            queued.push(self.ledger.last_step());
        }
        let median = |part: Part| {
            let mut seconds: Vec<f64> = queued.iter().map(|step| step[part as usize]).collect();
            seconds.sort_by(f64::total_cmp);
            seconds[steps / 2]
        };
        let queue_s = Part::ALL.map(median);
        wait();
        let began = Instant::now();
        for _ in 0..steps {
            self.step(batches)?;
        }
        wait();
        let step_s = began.elapsed().as_secs_f64() / steps as f64;
        Ok(Unwaited { step_s, queue_s })
    }

    fn until_done(&mut self) -> anyhow::Result<()> {
        self.trackers.start(self.state.step, self.last_step());
        if self.state.step == 0 && self.state.first_eval.is_none() && self.config.eval.at_start {
            let figures = self.evaluate()?;
            self.state.first_eval = Some(figures.clone());
            self.state.last_eval = Some(figures.clone());
            self.log(&figures);
        }
        while self.state.epoch < self.config.trainer.epochs && self.state.step < self.last_step() {
            self.train_epoch()?;
            self.finish_epoch()?;
        }
        // Stopped in its last evaluation: no step is left, but that.
        if self.state.judged.is_some_and(|step| step != self.state.step) {
            self.finish_epoch()?;
        }
        self.trackers.finish();
        self.ranks.check(&self.model, self.state.step)?;
        self.read_figures()?;
        let saved = self.save_at_work();
        // The others end well only if it has.
        self.ranks.from_first(|| saved)?;
        self.ranks.note_complete(self.directory.path(), &self.state);
        self.ranks.leave();
        Ok(())
    }

    /// See [`measure`].
    fn measure(&mut self, (warmup, steps): (usize, usize), same_batch: bool) -> anyhow::Result<Measured> {
        // Pictures belong to a run's first and last steps.
        (self.config.track.examples, self.config.track.histograms) = (false, false);
        self.ledger.synchronize(self.device);
        let loader = self.train.clone();
        let images = self.config.optimizer.batch_size * self.config.trainer.accumulate;
        let mut batches: Box<dyn Iterator<Item = Result<RawBatch, DataError>>> = match same_batch {
            true => match loader.batches(0, 0).next() {
                Some(first) => {
                    let first = first?;
                    Box::new(std::iter::repeat_with(move || Ok(first.shallow_clone())))
                }
                None => anyhow::bail!("the pipeline makes no batch"),
            },
            false => Box::new((0..).flat_map(move |epoch| loader.batches(epoch, 0))),
        };
        let mut measured = Measured {
            steps: Vec::with_capacity(steps),
            beside: Default::default(),
            images,
            traffic: None,
            unwaited: None,
            peak_gpu_bytes: None,
        };
        let mut before = self.train.clock().seconds();
        let traffic = |run: &Self| run.ranks.comm().map(Comm::traffic);
        let mut traffic_before = None;
        self.trackers.start(0, (warmup + steps) as u64);
        for step in 0..warmup + steps {
            if let Some(signal) = self.ranks.agree_on_signal(self.signals.pending())? {
                return Err(TrainError::Stopped { signal }.into());
            }
            if step == warmup {
                before = self.train.clock().seconds();
                traffic_before = traffic(self);
            }
            self.step(&mut batches)?;
            if step >= warmup {
                measured.steps.push(self.ledger.last_step());
            }
        }
        self.trackers.finish();
        measured.traffic = traffic(self).zip(traffic_before).map(|(now, before)| now - before);
        for ((beside, now), before) in
            measured.beside.iter_mut().zip(self.train.clock().seconds()).zip(before)
        {
            *beside = (now - before) / steps.max(1) as f64;
        }
        if let Device::Cuda(number) = self.device {
            measured.unwaited = Some(self.unwaited(number, steps, &mut batches)?);
        }
        measured.peak_gpu_bytes = peak_gpu_bytes(self.device)?;
        self.ranks.leave();
        Ok(measured)
    }

    /// The number of steps after which the run ends.
    fn last_step(&self) -> u64 {
        let total = self.progress.total_steps;
        self.config.trainer.max_steps.map_or(total, |most| most.min(total))
    }

    fn train_epoch(&mut self) -> anyhow::Result<()> {
        let mut batches = self.train.batches(self.state.epoch, self.state.batch_in_epoch as usize);
        self.ledger.restart();
        while !self.epoch_is_over() && self.state.step < self.last_step() {
            self.check_signals()?;
            self.step(&mut batches)?;
            let due = self.config.checkpoint.every_steps.is_some_and(|n| self.state.step.is_multiple_of(n));
            if due && !self.epoch_is_over() && self.state.step < self.last_step() {
                // Here, for a run that has diverged ends, and one that only cannot be saved goes on.
                self.read_figures()?;
                self.ranks.check(&self.model, self.state.step)?;
                self.save_or_warn()?;
            }
        }
        Ok(())
    }

    fn epoch_is_over(&self) -> bool {
        self.state.batch_in_epoch >= self.steps_per_epoch * self.config.trainer.accumulate as u64
    }

    /// One optimizer step: EMA, then forward and backward for each of its batches, update.
    fn step(&mut self, batches: &mut dyn Iterator<Item = Result<RawBatch, DataError>>) -> anyhow::Result<()> {
        let (epoch, step) = (self.state.epoch, self.state.step);
        let accumulate = self.config.trainer.accumulate;
        self.ledger.start_step();

        let momentum = self.model.ema_momentum(epoch, self.config.trainer.epochs);
        if !self.state.ema_is_ahead {
            self.model.update_ema(epoch, self.config.trainer.epochs)?;
            self.state.ema_is_ahead = true;
        }
        self.model.remember_buffers()?;
        self.ledger.lap(Part::Ema);

        // Counts once the step is done.
        let (mut images, mut replaced, mut measured) = (0, 0, Unread::default());
        for i in 0..accumulate {
            let Some(batch) = batches.next() else {
                anyhow::bail!("the pipeline ended {} batches into the epoch", self.state.batch_in_epoch);
            };
            let batch = batch?;
            self.ledger.lap(Part::Wait);
            images += batch.len();
            let batch = batch.finish(self.device)?;
            replaced += batch.replaced;
            let batch = self.for_method(batch, true);
            self.ledger.lap(Part::Copy);
            if i == 0 {
                self.show_examples(&batch)?;
                self.ledger.lap(Part::Log);
            }
            let of_rank = i * self.ranks.size() + self.ranks.rank();
            let seed = || seed_torch(self.state.seed, step, of_rank);
            let bf16 = self.config.trainer.precision == Precision::Bf16;
            let mut passes = Passes { model: &mut self.model, bf16, seed: &seed, batches: accumulate };
            let replayed = match self.device {
                Device::Cuda(gpu) => self.replay.step(gpu, &batch, &mut passes)?,
                _ => None,
            };
            let has_gradients = replayed.is_some();
            let output = match replayed {
                Some(output) => output,
                None => passes.forward(batch)?,
            };
            measured.push(step, "train/loss".to_owned(), &output.loss)?;
            for (name, value) in &output.metrics {
                let name = format!("train/{}/{name}", self.state.method);
                measured
                    .push(step, name.clone(), value)
                    .with_context(|| format!("{name} is no single number"))?;
            }
            self.ledger.lap(Part::Forward);
            if i + 1 == accumulate {
                let replaced = (replaced * self.ranks.size() as u64) as f64 / accumulate as f64;
                measured.push(step, "train/replaced".to_owned(), &tch::Tensor::from(replaced))?;
                // Gradients are on their way to the other ranks while others are still computed.
                self.ranks.begin_exchange(&measured)?;
            }
            if !has_gradients {
                passes.backward(&output)?;
            }
            self.ledger.lap(Part::Backward);
        }
        self.ranks.finish_exchange(&mut measured)?;
        self.ledger.lap(Part::Exchange);

        let gradients = self.optimizer.gradients()?;
        measured.push(step, "train/grad_norm".to_owned(), gradients.norm())?;
        if !std::mem::replace(&mut self.gradients_checked, true) {
            let idle: Vec<&str> = self.optimizer.without_gradient(&gradients).collect();
            if !idle.is_empty() && self.ranks.is_first() {
                tracing::warn!("no gradient reaches {}: they will not be trained", idle.join(", "));
            }
        }
        self.show_histograms(&gradients);
        let settings = &self.config.optimizer;
        let lr = learning_rate(self.progress, step, self.config.peak_lr(), settings.final_lr_ratio);
        let (base, end) = (settings.weight_decay, settings.weight_decay_end);
        let weight_decay = weight_decay(step, self.progress.total_steps, base, end);
        self.optimizer
            .step(&gradients, StepSettings { lr, weight_decay, max_norm: self.config.trainer.clip })?;
        self.ledger.lap(Part::Optimizer);

        self.state.step += 1;
        self.state.batch_in_epoch += accumulate as u64;
        self.state.ema_is_ahead = false;
        self.unread.append(measured);
        if let Some(momentum) = momentum {
            self.meters.add("train/ema_momentum", momentum);
        }
        if settings.weight_decay_end.is_some() {
            self.meters.add("train/weight_decay", weight_decay);
        }
        self.ledger.finish_step(images * self.ranks.size());
        let due = self.log_is_due() || self.epoch_is_over();
        let wanted = due && !self.figures_stay || self.unread.len() >= MOST_UNREAD;
        if wanted || self.device == Device::Cpu {
            self.read_figures()?;
        }
        self.ledger.lap(Part::Sync);
        self.report_step(lr);
        self.ledger.lap(Part::Log);
        self.ledger.trace_step(self.state.step);
        Ok(())
    }

    /// Waits for what steps have measured, and ends the run when any of it is no number.
    fn read_figures(&mut self) -> anyhow::Result<()> {
        for figure in self.unread.read()? {
            self.require_finite(figure.step, &figure.name, figure.value)?;
            self.meters.add(&figure.name, figure.value);
        }
        self.last_loss = self.meters.mean("train/loss").unwrap_or(self.last_loss);
        Ok(())
    }

    fn log_is_due(&self) -> bool {
        self.state.step.is_multiple_of(self.config.trainer.log_every_steps)
            || self.state.step >= self.last_step()
    }

    /// Records what the method sees, with the first batch of the run and of every epoch that is evaluated.
    fn show_examples(&mut self, batch: &Batch) -> anyhow::Result<()> {
        let every = self.config.eval.every_epochs;
        let evaluated = every > 0 && (self.state.epoch + 1).is_multiple_of(every);
        let due = self.state.epoch == 0 || evaluated;
        if !self.config.track.examples || !due || self.state.batch_in_epoch > 0 {
            return Ok(());
        }
        let columns = no_grad(|| self.model.method.examples(batch))?;
        let views = self.model.method.views();
        self.trackers.log_examples(self.state.step, self.epochs(), views, &columns);
        Ok(())
    }

    /// Records weights and gradients before the last step of the run, and of each epoch that is evaluated.
    fn show_histograms(&mut self, gradients: &Gradients) {
        let (every, batches) = (self.config.eval.every_epochs, self.config.trainer.accumulate as u64);
        let epoch_ends = self.state.batch_in_epoch + batches >= self.steps_per_epoch * batches;
        let evaluated = epoch_ends && every > 0 && (self.state.epoch + 1).is_multiple_of(every);
        let due = evaluated || self.state.step + 1 >= self.last_step();
        if !self.config.track.histograms || !due || !self.ranks.is_first() {
            return;
        }
        self.ledger.lap(Part::Optimizer);
        let tensors = self.optimizer.weights_and_gradients(gradients);
        let histogram = |(name, tensor): (String, tch::Tensor)| match Histogram::of(&tensor) {
            Ok(histogram) => Some((name, histogram)),
            Err(error) => {
                tracing::warn!("no histogram of {name}: {error}");
                None
            }
        };
        let histograms = tensors.filter_map(histogram).collect();
        self.trackers.log_histograms(self.state.step, self.epochs(), histograms);
        self.ledger.lap(Part::Log);
    }

    /// Puts back what a step that failed half-way has changed, but for the EMA update, which the state tells of.
    fn undo_step(&mut self) -> anyhow::Result<()> {
        if self.state.ema_is_ahead {
            self.model.restore_buffers()?;
        }
        Ok(())
    }

    /// Moves the progress bar; every so many steps, and after the last one, logs the means since the last time.
    fn report_step(&mut self, lr: f64) {
        self.trackers.step(&StepReport {
            step: self.state.step,
            epoch: self.state.epoch,
            epochs: self.config.trainer.epochs,
            loss: self.last_loss,
            images_per_s: self.ledger.images_per_s(),
            data_wait: self.ledger.data_wait(),
        });
        if !self.log_is_due() {
            return;
        }
        self.ledger.lap(Part::Log);
        let mut figures = self.meters.take();
        figures.insert("train/lr".to_owned(), lr);
        figures.insert("train/images_per_s".to_owned(), self.ledger.images_per_s());
        figures.insert("train/data_wait".to_owned(), self.ledger.data_wait());
        figures.extend(self.ledger.seconds_per_step());
        self.ledger.restart();
        self.log(&figures);
    }

    /// Validation, evaluation and checkpoint at the end of an epoch or of the run.
    fn finish_epoch(&mut self) -> anyhow::Result<()> {
        let complete = self.epoch_is_over();
        let epochs_done = self.state.epoch + u64::from(complete);
        let last = self.state.step >= self.last_step() || epochs_done >= self.config.trainer.epochs;
        let due = |every: u64| every > 0 && (last || epochs_done.is_multiple_of(every));

        // Logged together and at the end, so that a run that is stopped in here does both again and logs them once.
        let mut figures = self.validate()?;
        if due(self.config.eval.every_epochs) {
            figures.extend(self.evaluate()?);
        }
        if !figures.is_empty() {
            self.state.last_eval.get_or_insert_default().extend(figures.clone());
        }
        let best = self.note_best(&figures);
        self.log(&figures);
        self.state.judged = Some(self.state.step);
        self.check_collapse(&figures)?;
        if complete {
            self.state.epoch += 1;
            self.state.batch_in_epoch = 0;
        }
        if (best || due(self.config.checkpoint.every_epochs)) && !last {
            self.ranks.check(&self.model, self.state.step)?;
            self.save_or_warn()?;
        }
        Ok(())
    }

    /// The method's loss and metrics on the validation set, with running statistics and the same random numbers each time.
    /// Ranks take whole batches, as one alone would, each its share of them.
    fn validate(&mut self) -> anyhow::Result<Figures> {
        let Some(loader) = self.validation.clone() else { return Ok(Figures::new()) };
        let (mut sums, mut images) = (Figures::new(), 0usize);
        for round in loader.rounds(VALIDATION_EPOCH) {
            self.check_signals()?;
            let Some((i, batch)) = round else { continue };
            seed_torch(self.state.seed, VALIDATION_EPOCH, i);
            let batch = self.for_method(batch?.finish(self.device)?, false);
            let size = batch.len();
            let bf16 = self.config.trainer.precision == Precision::Bf16;
            let (method, device) = (&mut self.model.method, self.device);
            let step = || Ok(no_grad(|| autocast_bf16(bf16, device, || method.step(batch)))??);
            let step = self.ranks.each_alone(step)?;
            let metrics =
                step.metrics.iter().map(|(name, value)| (format!("val/{}/{name}", self.state.method), value));
            for (name, value) in metrics.chain([("val/loss".to_owned(), &step.loss)]) {
                *sums.entry(name).or_default() += value.f_double_value(&[])? * size as f64;
            }
            images += size;
        }
        let figures = self.ranks.mean(sums, images)?;
        for (name, value) in &figures {
            self.require_finite(self.state.step, name, *value)?;
        }
        Ok(figures)
    }

    /// The probes on frozen features.
    fn evaluate(&mut self) -> anyhow::Result<Figures> {
        let Some(evaluation) = &self.evaluation else { return Ok(Figures::new()) };
        self.trackers.note("evaluating");
        let (device, ranks, run) = (self.device, &self.ranks, self.directory.path());
        let ended = |signal| match signal {
            Some(signal) => Err(TrainError::Interrupted { signal, run: run.to_owned() }.into()),
            None => Ok(()),
        };
        let model = &mut self.model;
        let mut encode = |images: &tch::Tensor| model.encode(images, device);
        let pending = || self.signals.pending();
        let all_go_on = || ended(ranks.agree_on_signal(pending())?);
        let seen = ranks.each_alone(|| evaluation.look(device, &mut encode, &all_go_on, ranks.comm()))?;
        // The others wait for the first.
        ranks.from_first_unless(&pending, |of_any| {
            evaluation.judge(&seen.context("nothing was seen")?, &|| ended(of_any()))
        })
    }

    /// Applies `eval.collapse`.
    fn check_collapse(&self, figures: &Figures) -> Result<(), TrainError> {
        let (step, limit) = (self.state.step, self.config.eval.collapse_below);
        // Features may stay apart while what the loss compares has become one: then nothing is learned any more.
        let spreads = ["eval/spread".to_owned(), format!("val/{}/spread", self.state.method)];
        let collapsed = |metric: &String| figures.get(metric).is_some_and(|spread| *spread < limit);
        let Some(metric) = spreads.into_iter().find(collapsed) else { return Ok(()) };
        let error = TrainError::Collapsed { step, spread: figures[&metric], metric, limit };
        match self.config.eval.collapse {
            Collapse::Off => Ok(()),
            Collapse::Warn => {
                if self.ranks.is_first() {
                    tracing::warn!("{error}");
                }
                Ok(())
            }
            Collapse::Stop => Err(error),
        }
    }

    /// Whether `figures` are the best so far by the metric of `checkpoint.best`.
    fn note_best(&mut self, figures: &Figures) -> bool {
        let Some(metric) = self.config.checkpoint.best.clone() else { return false };
        let Some(&value) = figures.get(&metric) else { return false };
        let best = &self.state.best;
        let better = best.as_ref().is_none_or(|best| best.metric != metric || best.is_beaten_by(value));
        if better {
            self.state.best = Some(Best { metric, value, step: self.state.step });
        }
        better
    }

    fn log(&mut self, figures: &Figures) {
        if figures.is_empty() {
            return;
        }
        self.trackers.log(self.state.step, self.epochs(), figures);
    }

    /// Epochs done, with the fraction of the current one.
    fn epochs(&self) -> f64 {
        let per_epoch = self.steps_per_epoch * self.config.trainer.accumulate as u64;
        self.state.epoch as f64 + self.state.batch_in_epoch as f64 / per_epoch as f64
    }

    fn save(&mut self) -> anyhow::Result<()> {
        // Nothing that is no number goes into a checkpoint.
        self.read_figures()?;
        if !self.ranks.is_first() {
            return Ok(());
        }
        self.state.meters = self.meters.0.clone();
        self.state.metrics_lines = self.trackers.sync()?;
        let (model, optimizer) = (self.model.tensors(), self.optimizer.tensors());
        let folder = self.directory.save(&self.state, &model, &optimizer, self.config.checkpoint.keep)?;
        tracing::debug!("checkpoint {}", folder.display());
        self.saved = Some(folder);
        Ok(())
    }

    /// The same, while the others wait as long as it takes.
    fn save_at_work(&mut self) -> anyhow::Result<()> {
        match self.ranks.at_work() {
            Some(at_work) => at_work.during(|| self.save()),
            None => self.save(),
        }
    }

    /// A save in mid-run: when it fails, on a full disk for one, the run goes on and tries again at the next.
    fn save_or_warn(&mut self) -> anyhow::Result<()> {
        if let Err(error) = self.save_at_work() {
            tracing::error!("no checkpoint at step {}: {error:#}; training goes on", self.state.step);
        }
        self.ranks.from_first(|| Ok(()))
    }

    fn check_signals(&self) -> anyhow::Result<()> {
        match self.ranks.agree_on_signal(self.signals.pending())? {
            Some(signal) => {
                Err(TrainError::Interrupted { signal, run: self.directory.path().to_owned() }.into())
            }
            None => Ok(()),
        }
    }

    fn require_finite(&self, step: u64, metric: &str, value: f64) -> Result<(), TrainError> {
        if value.is_finite() {
            return Ok(());
        }
        let metric = metric.to_owned();
        let newest = crate::checkpoint::latest(self.directory.path()).ok().flatten();
        Err(TrainError::Diverged { step, metric, value, checkpoint: newest })
    }

    fn for_method(&self, batch: LoadedBatch, train: bool) -> Batch {
        Batch {
            views: batch.views,
            labels: batch.labels,
            samples: batch.indices,
            seed: self.state.seed,
            epoch: self.state.epoch,
            step: if train { self.state.step } else { VALIDATION_EPOCH },
            train,
        }
    }
}

/// Puts libtorch's own generator where batch `i` of a step draws from.
fn seed_torch(seed: u64, step: u64, i: usize) {
    tch::manual_seed(Rng::keyed(seed, step, i as u64, TORCH_RANDOMNESS).bits() as i64);
}
