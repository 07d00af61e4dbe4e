//! Convolution, pooling and normalisation over the visible cells of a masked image.
//!
//! A [`FeatureMap`] is dense, or sparse: then it stands for zero at every hidden position, and its operations see and
//! make visible positions only. A network written once over [`FeatureMap`] runs both ways with the same parameters.
//!
//! How visible positions are stored and computed is this crate's own affair: networks touch tensors only when they
//! enter ([`FeatureMap::images`]) and leave ([`FeatureMap::into_map`]).

mod feature_map;
mod visible;

pub use feature_map::FeatureMap;
pub use visible::Visible;
