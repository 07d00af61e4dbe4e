//! The trait of a probe: what a person wants to know of frozen features, beyond the host's own evaluation.

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::Tensor;

use crate::Result;

/// An evaluation of frozen features, such as a classifier on top of them or a measure of their clusters.
///
/// The host computes features of both data sets with the method's [`encode`](crate::Method::encode), as for its own
/// probes, whenever it evaluates. Since API 1.1.
///
/// ```
/// use jepa_plugin_api::tch::{Kind, Tensor};
/// use jepa_plugin_api::{FrozenFeatures, LabelledFeatures, NoOptions, Probe, Result};
///
/// /// How long features are.
/// struct Norms;
///
/// impl Probe for Norms {
///     const NAME: &'static str = "norms";
///     type Options = NoOptions;
///
///     fn new(_: NoOptions) -> Result<Self> {
///         Ok(Norms)
///     }
///
///     fn evaluate(&mut self, features: &FrozenFeatures) -> Result<Vec<(String, f64)>> {
///         let norms = features.held_out.x.norm_scalaropt_dim(2, [1], false);
///         Ok(vec![("mean".to_owned(), f64::try_from(norms.mean(Kind::Float))?)])
///     }
/// }
///
/// let set = || LabelledFeatures { x: Tensor::from_slice(&[3f32, 4.0]).view([1, 2]), y: Tensor::from_slice(&[0i64]) };
/// let features = FrozenFeatures { train: set(), held_out: set(), classes: 1, seed: 0 };
/// assert_eq!(Norms.evaluate(&features)?, [("mean".to_owned(), 5.0)]);
/// # Ok::<(), jepa_plugin_api::Error>(())
/// ```
pub trait Probe: Send + Sized + 'static {
    /// The name under `eval.probes.`, in `snake_case`.
    const NAME: &'static str;

    /// The keys under `eval.probes.NAME.`: a struct with a serde default for every field. `enabled` is the host's.
    type Options: DeserializeOwned + Serialize + JsonSchema;

    /// Builds the probe, anew for each evaluation. An error says which option does not fit.
    fn new(options: Self::Options) -> Result<Self>;

    /// Evaluates the features: named metrics, which the host logs as `eval/NAME/<name>`. Where the host keeps the best
    /// checkpoint by one of them, more is better, unless its name ends in `loss`.
    fn evaluate(&mut self, features: &FrozenFeatures) -> Result<Vec<(String, f64)>>;
}

/// What a [`Probe`] evaluates.
///
/// ```
/// use jepa_plugin_api::{FrozenFeatures, LabelledFeatures, tch::Tensor};
/// let set = || LabelledFeatures { x: Tensor::from_slice(&[0f32, 1.0]).view([2, 1]), y: Tensor::from_slice(&[0i64, 1]) };
/// let features = FrozenFeatures { train: set(), held_out: set(), classes: 2, seed: 0 };
/// assert_eq!(features.train.x.size()[0], features.train.y.size()[0]);
/// ```
#[derive(Debug)]
pub struct FrozenFeatures {
    /// Of training images: what a probe may learn from.
    pub train: LabelledFeatures,
    /// Of held-out images: what it is measured on.
    pub held_out: LabelledFeatures,
    /// Classes in the data.
    pub classes: i64,
    /// The run's seed, for [`Rng::keyed`](crate::Rng::keyed): equal features have to give equal metrics.
    pub seed: u64,
}

/// Features of a set of images, with their labels in the same order, on one device.
///
/// ```
/// use jepa_plugin_api::{LabelledFeatures, tch::Tensor};
/// let two = LabelledFeatures { x: Tensor::from_slice(&[0f32, 1.0]).view([2, 1]), y: Tensor::from_slice(&[0i64, 1]) };
/// assert_eq!(two.x.size(), [2, 1]);
/// ```
#[derive(Debug)]
pub struct LabelledFeatures {
    /// f32 `(N, D)`.
    pub x: Tensor,
    /// Class numbers from 0, i64 `(N)`.
    pub y: Tensor,
}
