//! Judges representations: probes over the cached features of a frozen encoder.
//!
//! Everything here is a function of features and labels. Which images are encoded, by what and when, is the training
//! loop's business.

pub mod descriptors;
mod error;
mod features;
pub mod knn;
pub mod linear;
mod topk;

pub use error::EvalError;
pub use features::{Features, extract};
