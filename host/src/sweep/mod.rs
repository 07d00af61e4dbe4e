//! Sweeps over settings, in W&B's YAML, run on this machine: [`Definition`] says what to try, [`Hyperband`] what is not
//! worth going on with, and a [`Scheduler`] runs the trials, each a process of its own.

mod command;
mod definition;
mod directory;
mod distribution;
mod error;
mod hyperband;
mod leaderboard;
mod process;
mod rehearsal;
mod scheduler;
mod search;
mod series;

pub use command::assignment;
pub use definition::{Definition, Goal, Method, Metric};
pub use directory::{End, SweepDir, Trial, read_sweep, trial_of};
pub use distribution::Distribution;
pub use error::SweepError;
pub use hyperband::{Hyperband, Verdict};
pub use leaderboard::{Leaderboard, Row, Standing};
pub use rehearsal::rehearse;
pub use scheduler::{Resources, Scheduler};
pub use search::{Parameters, Search};
pub use series::Point;
