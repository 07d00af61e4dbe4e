//! Learning rate and EMA momentum as functions of how far the run is.

use std::f64::consts::PI;

use jepa_plugin_api::EmaSchedule;

use super::TrainError;

/// How long a run is, and its warm-up, in optimizer steps.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
}

/// Optimizer steps in an epoch of `images`: full batches only, and full steps of `accumulate` batches only.
///
/// # Errors
/// When there is none.
pub fn steps_per_epoch(images: usize, batch_size: usize, accumulate: usize) -> Result<u64, TrainError> {
    match images / batch_size / accumulate {
        0 => Err(TrainError::NoStep { images, batch_size, accumulate }),
        steps => Ok(steps as u64),
    }
}

/// The learning rate of step `step` (from 0): linear from `base / warmup` to `base`, then a half cosine that reaches
/// `base × final_ratio` in the last step.
pub fn learning_rate(progress: Progress, step: u64, base: f64, final_ratio: f64) -> f64 {
    let Progress { total_steps, warmup_steps } = progress;
    if step < warmup_steps {
        return base * (step + 1) as f64 / warmup_steps as f64;
    }
    base * half_cosine(step - warmup_steps, total_steps.saturating_sub(warmup_steps), 1.0, final_ratio)
}

/// The weight decay of step `step` (from 0) of `steps`: a half cosine from `base` to `end`, where there is an end.
pub fn weight_decay(step: u64, steps: u64, base: f64, end: Option<f64>) -> f64 {
    end.map_or(base, |end| half_cosine(step, steps, base, end))
}

/// The momentum of an EMA pair in epoch `epoch` (from 0) of `epochs`: `from` in the first, `to` in the last.
pub fn ema_momentum(schedule: EmaSchedule, epoch: u64, epochs: u64) -> f64 {
    half_cosine(epoch, epochs, schedule.from, schedule.to)
}

/// A half cosine from `start` at step 0 to `end` at the last of `steps`.
fn half_cosine(step: u64, steps: u64, start: f64, end: f64) -> f64 {
    if step + 1 >= steps {
        return end;
    }
    end - (end - start) * ((PI * step as f64 / (steps - 1) as f64).cos() + 1.0) / 2.0
}
