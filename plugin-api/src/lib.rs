//! Everything a plugin author needs.

pub mod rng;
mod view;

pub use rng::Rng;
pub use view::{IMAGENET_MEAN_STD, Interpolation, Transform, ViewSpec};
