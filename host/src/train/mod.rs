//! Pretraining: [`run`](run::run) is the loop, and the rest of this room is what the loop calls.
//!
//! The room knows methods, batches and tensors; it does not know HDF5, plugin files or trackers' formats.

mod ema;
mod error;
mod ledger;
mod meter;
mod model;
mod optimizer;
mod ranks;
mod replay;
mod run;
mod schedule;
mod signal;
mod unread;

pub use error::TrainError;
pub use ledger::{Part, Seconds};
pub use model::Model;
pub use optimizer::{Optimizer, StepSettings};
pub use ranks::{Ranks, or_part};
pub use run::{Figures, Measured, Outcome, Resources, Unwaited, has_diverged, measure, run};
pub use schedule::{Progress, ema_momentum, learning_rate, steps_per_epoch, weight_decay};
pub use signal::Signals;
