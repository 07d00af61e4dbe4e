//! Judges representations: probes over the cached features of a frozen encoder.
//!
//! The probes are functions of features and labels; [`Evaluation`] feeds them. When that happens is others' business.

mod contrastive;
pub mod descriptors;
mod error;
mod evaluation;
mod features;
pub mod knn;
pub mod linear;
mod plugin;
mod topk;

pub use error::{EvalError, GoOn};
pub use evaluation::{Evaluation, FIGURES, Seen, evaluation_view, feature_loader};
pub use features::{Features, extract};
pub use plugin::PluginProbe;
