//! Convolution, pooling and normalisation over the visible cells of a masked image, for the price of what is visible.
//!
//! A [`FeatureMap`] is dense, or sparse: then it stands for zero at every hidden position, and its operations see and
//! make visible positions only. A network written once over [`FeatureMap`] runs both ways with the same parameters.
//!
//! A sparse map is kept as the rows of its visible positions, `(N, C)`. Norms, ReLU, sums and 1×1 convolutions are those
//! of the rows. A 3×3 convolution takes visible positions two by two, with less than half of the arithmetic
//! ([`winograd`](jepa_plugin_api::winograd)); any other multiplies what its windows see with the weights, and nothing else
//! (`conv`); where nearly everything is visible, the convolution of the whole map is cheaper. [`Way`] chooses. Networks touch
//! tensors only when they enter ([`FeatureMap::images`]) and leave ([`FeatureMap::into_map`]).

mod canvas;
mod conv;
mod cuda;
mod depthwise;
mod feature_map;
mod pool;
mod product;
mod visible;
mod way;

pub use feature_map::FeatureMap;
pub use visible::Visible;
pub use way::Way;
