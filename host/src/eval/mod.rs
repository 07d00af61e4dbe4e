//! Judges representations: probes over the cached features of a frozen encoder.
//!
//! The probes are functions of features and labels; [`Evaluation`] feeds them during training. When that happens is the
//! loop's business.

pub mod descriptors;
mod error;
mod features;
pub mod knn;
pub mod linear;
mod online;
mod plugin;
mod topk;

pub use error::{EvalError, GoOn};
pub use features::{Features, extract};
pub use online::{Evaluation, FIGURES, feature_loader};
pub use plugin::PluginProbe;
