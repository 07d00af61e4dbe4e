//! Where the time of an optimizer step goes, by the host's clock.
//!
//! Nothing waits for the device here. On CUDA, kernels run after the call that queued them has come back, so a part has
//! the time that the host spent in it: one that reads a value, as the loss is read after the forward pass, waits for all
//! that was queued before it.

use std::time::Instant;

/// A part of an optimizer step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Until the pipeline has a batch.
    Wait,
    /// Of the batch to the device.
    Copy,
    /// The method's step, until its loss is read.
    Forward,
    /// From the loss to gradients, until the method's metrics are read.
    Backward,
    /// Gradients, their norm, clipping and the update.
    Optimizer,
    /// EMA targets follow, and buffers are remembered.
    Ema,
    /// Example images, the progress bar and the log line, which counts with the steps after it.
    Log,
}

impl Part {
    /// Every part, in the order in which a report shows them.
    pub const ALL: [Part; 7] =
        [Part::Wait, Part::Copy, Part::Forward, Part::Backward, Part::Optimizer, Part::Ema, Part::Log];

    /// The metric with its mean over steps, in seconds.
    pub fn metric(self) -> &'static str {
        match self {
            Part::Wait => "time/wait",
            Part::Copy => "time/copy",
            Part::Forward => "time/forward",
            Part::Backward => "time/backward",
            Part::Optimizer => "time/optimizer",
            Part::Ema => "time/ema",
            Part::Log => "time/log",
        }
    }
}

/// Seconds by part, and images, since the last log line of the epoch.
pub struct Ledger {
    since: Instant,
    lap: Instant,
    seconds: [f64; Part::ALL.len()],
    steps: u64,
    images: usize,
}

impl Ledger {
    /// An empty one, from now on.
    pub fn new() -> Self {
        let now = Instant::now();
        Ledger { since: now, lap: now, seconds: [0.0; Part::ALL.len()], steps: 0, images: 0 }
    }

    /// Counts from now on.
    pub fn restart(&mut self) {
        *self = Ledger::new();
    }

    /// A step begins: what came between, such as a checkpoint, is no part of it.
    pub fn start_step(&mut self) {
        self.lap = Instant::now();
    }

    /// The time since the last lap went into `part`.
    pub fn lap(&mut self, part: Part) {
        let now = Instant::now();
        self.seconds[part as usize] += (now - self.lap).as_secs_f64();
        self.lap = now;
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

    /// Each part's seconds per step, by metric name.
    pub fn seconds_per_step(&self) -> impl Iterator<Item = (String, f64)> {
        let steps = self.steps.max(1) as f64;
        Part::ALL.into_iter().zip(self.seconds).map(move |(part, s)| (part.metric().to_owned(), s / steps))
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
        let mut ledger = Ledger::new();
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
        assert!(parts[0] >= 0.010 && parts[6] >= 0.005, "{parts:?}");
        assert_eq!(parts[1..6], [0.0; 5]);
        assert!(parts.iter().sum::<f64>() * 2.0 <= elapsed - 0.040, "{parts:?} in {elapsed}");
        assert!((ledger.data_wait() - 2.0 * parts[0] / elapsed).abs() < 0.01);
    }
}
