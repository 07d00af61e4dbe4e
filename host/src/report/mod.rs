//! What runs have left behind, for people: a page with curves, tables and a verdict, and a list of runs.
//!
//! It reads run directories only, with whatever is damaged in them, and knows nothing of the process that trains; so it
//! is no tracker, and works for runs of other machines and of older versions.

mod charts;
mod features;
pub mod format;
mod html;
mod list;
mod page;
mod run;
mod serve;
mod settings;
mod step_time;
mod verdict;
mod views;

pub use features::FeatureMap;
pub use list::find_runs;
pub use page::{Report, SweepOfTrials};
pub use run::{SavedRun, Status};
pub use serve::serve;
pub use settings::{Setting, parse as parse_settings};
pub use verdict::{Finding, Tone, findings};
