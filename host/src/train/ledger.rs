//! Where the time of an optimizer step goes, by the host's clock.
//!
//! Nothing waits for the device here, unless [`Ledger::synchronize`] asks for it. On CUDA, kernels run after the call that
//! queued them has come back, so a part has the time that the host spent in it, and what the device takes longer is in
//! [`Part::Sync`], where figures are read.

use std::sync::Arc;
use std::time::Instant;

use jepa_plugin_api::tch::{Cuda, Device};

use crate::data::{Clock, Work};
use crate::trace::Trace;

/// A part of an optimizer step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Until the pipeline has a batch.
    Wait,
    /// Of the batch to the device.
    Copy,
    /// The method's step.
    Forward,
    /// From the loss to gradients.
    Backward,
    /// Until the gradients of all ranks are there: what their exchange takes beyond the backward pass.
    Exchange,
    /// Gradients, their norm, clipping and the update.
    Optimizer,
    /// EMA targets follow, and buffers are remembered.
    Ema,
    /// Until the device has what was measured, in each step on the CPU and with a log line on a GPU.
    Sync,
    /// Example images, the progress bar and the log line, which counts with the steps after it.
    Log,
}

impl Part {
    /// Every part, in the order in which a report shows them.
    pub const ALL: [Part; 9] = [
        Part::Wait,
        Part::Copy,
        Part::Forward,
        Part::Backward,
        Part::Exchange,
        Part::Optimizer,
        Part::Ema,
        Part::Sync,
        Part::Log,
    ];

    /// A word for it.
    pub fn name(self) -> &'static str {
        &self.metric()["time/".len()..]
    }

    /// The metric with its mean over steps, in seconds.
    pub fn metric(self) -> &'static str {
        match self {
            Part::Wait => "time/wait",
            Part::Copy => "time/copy",
            Part::Forward => "time/forward",
            Part::Backward => "time/backward",
            Part::Exchange => "time/exchange",
            Part::Optimizer => "time/optimizer",
            Part::Ema => "time/ema",
            Part::Sync => "time/sync",
            Part::Log => "time/log",
        }
    }
}

/// Seconds by part.
pub type Seconds = [f64; Part::ALL.len()];

/// Seconds by part, and images, since the last log line of the epoch.
pub struct Ledger {
    since: Instant,
    step: Instant,
    lap: Instant,
    seconds: Seconds,
    steps: u64,
    images: usize,
    /// Of the last step that is done.
    last_step: Seconds,
    /// What the loader's threads do, and had done when this began to count.
    loader: Arc<Clock>,
    loader_before: [f64; Work::ALL.len()],
    trace: Option<Trace>,
    synchronize: Option<usize>,
}

impl Ledger {
    /// An empty one, from now on. Parts go into `trace` as well, if there is one.
    pub fn new(loader: Arc<Clock>, trace: Option<Trace>) -> Self {
        let now = Instant::now();
        Ledger {
            since: now,
            step: now,
            lap: now,
            seconds: Seconds::default(),
            steps: 0,
            images: 0,
            last_step: Seconds::default(),
            loader_before: loader.seconds(),
            loader,
            trace,
            synchronize: None,
        }
    }

    /// Waits for `device` at the end of each part from now on, so that a part has the time of its own kernels: for
    /// measurements, as it costs speed. The CPU needs no waiting for.
    pub fn synchronize(&mut self, device: Device) {
        self.synchronize = if let Device::Cuda(number) = device { Some(number) } else { None };
    }

    /// Counts from now on.
    pub fn restart(&mut self) {
        let now = Instant::now();
        (self.since, self.lap) = (now, now);
        (self.seconds, self.steps, self.images) = (Seconds::default(), 0, 0);
        self.loader_before = self.loader.seconds();
    }

    /// A step begins: what came between, such as a checkpoint, is no part of it.
    pub fn start_step(&mut self) {
        self.lap = Instant::now();
        self.step = self.lap;
        self.last_step = Seconds::default();
    }

    /// The time since the last lap went into `part`.
    pub fn lap(&mut self, part: Part) {
        if let Some(number) = self.synchronize {
            Cuda::synchronize(number as i64);
        }
        let now = Instant::now();
        let seconds = (now - self.lap).as_secs_f64();
        self.seconds[part as usize] += seconds;
        self.last_step[part as usize] += seconds;
        if let Some(trace) = &self.trace {
            trace.span(part.name(), self.lap, now);
        }
        self.lap = now;
    }

    /// The step with this number, from 1, goes into the trace as a whole.
    pub fn trace_step(&self, number: u64) {
        if let Some(trace) = &self.trace {
            trace.step(number, self.step, self.lap);
        }
    }

    /// A step of so many images is done.
    pub fn finish_step(&mut self, images: usize) {
        self.steps += 1;
        self.images += images;
    }

    /// Training images per second.
    pub fn images_per_s(&self) -> f64 {
        self.images as f64 / self.elapsed()
    }

    /// Share of the time that went into waiting for data, 0 to 1.
    pub fn data_wait(&self) -> f64 {
        self.seconds[Part::Wait as usize] / self.elapsed()
    }

    /// Each part's seconds per step, by metric name: of the step, and of the loader's threads beside it.
    pub fn seconds_per_step(&self) -> impl Iterator<Item = (String, f64)> {
        let steps = self.steps.max(1) as f64;
        let step = Part::ALL.into_iter().zip(self.seconds).map(|(part, s)| (part.metric(), s));
        let beside = self.loader.seconds().into_iter().zip(self.loader_before).map(|(now, then)| now - then);
        let beside = Work::ALL.into_iter().zip(beside).map(|(work, s)| (work.metric(), s));
        step.chain(beside).map(move |(metric, s)| (metric.to_owned(), s / steps))
    }

    /// The parts of the last step.
    pub fn last_step(&self) -> Seconds {
        self.last_step
    }

    fn elapsed(&self) -> f64 {
        self.since.elapsed().as_secs_f64().max(1e-9)
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_part_has_its_own_time() {
        let mut ledger = Ledger::new(Arc::default(), None);
        for _ in 0..2 {
            sleep(Duration::from_millis(20)); // A checkpoint.
            ledger.start_step();
            sleep(Duration::from_millis(10));
            ledger.lap(Part::Wait);
            sleep(Duration::from_millis(5));
            ledger.lap(Part::Log);
            ledger.finish_step(32);
        }
        let parts: Vec<f64> = ledger.seconds_per_step().map(|(_, seconds)| seconds).collect();
        let elapsed = ledger.elapsed();
        assert!(parts[0] >= 0.010 && parts[8] >= 0.005, "{parts:?}");
        assert_eq!(parts[1..8], [0.0; 7]);
        assert_eq!(parts[9..], [0.0; 3], "no loader");
        assert!(ledger.last_step()[0] >= 0.010 && ledger.last_step()[0] < parts[0] * 2.0);
        assert!(parts[..9].iter().sum::<f64>() * 2.0 <= elapsed - 0.040, "{parts:?} in {elapsed}");
        assert!((ledger.data_wait() - 2.0 * parts[0] / elapsed).abs() < 0.01);
    }
}
