//! The trait of a backbone, and the handle by which a method uses one.

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{Params, Result};

/// A convolutional network that turns images into a map of features.
///
/// ```
/// use jepa_plugin_api::nn::{Conv2d, ConvOptions};
/// use jepa_plugin_api::tch::{Device, Kind, Tensor};
/// use jepa_plugin_api::{Backbone, BackboneInfo, NoOptions, NormKind, Params, Result, ensure};
///
/// /// One layer of windows of 8 pixels.
/// struct Windows(Conv2d);
///
/// impl Backbone for Windows {
///     const NAMES: &'static [&'static str] = &["windows8"];
///     type Options = NoOptions;
///
///     fn new(_name: &str, _: NoOptions, params: &Params) -> Result<Self> {
///         let window = ConvOptions { stride: 8, ..ConvOptions::default() };
///         Ok(Windows(Conv2d::new(&params.sub("conv"), 3, 16, 8, window)))
///     }
///
///     fn info(&self) -> BackboneInfo {
///         BackboneInfo::new(16, 8, NormKind::Batch)
///     }
///
///     fn forward(&self, images: &Tensor, mask: Option<&Tensor>, _train: bool) -> Result<Tensor> {
///         ensure!(mask.is_none(), "windows8 has no sparse mode");
///         Ok(self.0.forward(images).relu())
///     }
/// }
///
/// let net = Windows::new("windows8", NoOptions {}, &Params::new(Device::Cpu))?;
/// let images = Tensor::zeros([2, 3, 32, 32], (Kind::Float, Device::Cpu));
/// assert_eq!(net.forward(&images, None, true)?.size(), [2, 16, 4, 4]);
/// # Ok::<(), jepa_plugin_api::Error>(())
/// ```
pub trait Backbone: Send + Sized + 'static {
    /// The names in `backbone.name` that this type builds: timm's, where timm has the architecture.
    const NAMES: &'static [&'static str];

    /// The keys under `backbone.`: a struct with a serde default for every field.
    type Options: DeserializeOwned + Serialize + JsonSchema;

    /// Builds architecture `name`, one of [`NAMES`](Backbone::NAMES), registering its tensors with timm's names.
    fn new(name: &str, options: Self::Options, params: &Params) -> Result<Self>;

    /// What a method has to know about it.
    fn info(&self) -> BackboneInfo;

    /// The feature map `(B, C, S / r, S / r)` of `images` f32 `(B, 3, S, S)`, without global pooling; f32, or what
    /// autocast makes of it.
    ///
    /// With a `mask`, bool `(B, 1, S / r, S / r)` and true where visible, the network runs in sparse mode: it sees the
    /// visible cells only, every output is zero at hidden cells, and statistics are taken over visible positions. The mask
    /// may be on the CPU while images are on a GPU, so that nobody waits to learn how much is visible.
    /// `train` chooses batch statistics (and updates running ones) over running statistics.
    fn forward(&self, images: &Tensor, mask: Option<&Tensor>, train: bool) -> Result<Tensor>;
}

/// The normalisation that a family of backbones uses; a predictor on top of one follows it.
///
/// ```
/// use jepa_plugin_api::{NormKind, Params, nn::Norm, tch::Device};
/// let norm = Norm::new(NormKind::Batch, &Params::new(Device::Cpu), 8);
/// assert!(matches!(norm, Norm::Batch(_)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum NormKind {
    /// Batch norm over (B, H, W).
    Batch,
    /// Layer norm over C at each position.
    Layer,
}

/// What a method has to know about a backbone. Written with [`new`](BackboneInfo::new), a source also compiles when a later
/// minor version adds a field.
///
/// ```
/// use jepa_plugin_api::testing::SmallBackbone;
/// use jepa_plugin_api::{Backbone as _, BackboneInfo, NormKind, Params, tch::Device};
/// let info = SmallBackbone::new(&Params::new(Device::Cpu))?.info();
/// assert_eq!(info, BackboneInfo::new(8, 4, NormKind::Batch).with_sparse_mode());
/// # Ok::<(), jepa_plugin_api::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackboneInfo {
    /// Channels C of the feature map.
    pub channels: i64,
    /// Pixels r that a cell of the feature map spans, each way.
    pub downsample: i64,
    /// The family's normalisation.
    pub norm: NormKind,
    /// Whether `forward` takes a mask.
    pub sparse: bool,
}

impl BackboneInfo {
    /// Of a backbone with a map of C = `channels` and cells of r = `downsample` pixels, without a sparse mode.
    pub fn new(channels: i64, downsample: i64, norm: NormKind) -> Self {
        BackboneInfo { channels, downsample, norm, sparse: false }
    }

    /// Of a backbone whose `forward` takes a mask.
    pub fn with_sparse_mode(self) -> Self {
        BackboneInfo { sparse: true, ..self }
    }
}
