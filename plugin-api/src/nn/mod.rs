//! Building blocks in tch: layers that register their tensors in [`Params`](crate::Params), and losses.
//!
//! Parameter names and initial values are PyTorch's and timm's. Initial values come from torch's global generator,
//! which the host seeds. Layers take and give maps `(B, C, H, W)` unless they say otherwise.
//!
//! ```
//! use jepa_plugin_api::nn::{Conv2d, ConvOptions, Norm};
//! use jepa_plugin_api::{NormKind, Params, tch};
//!
//! let params = Params::new(tch::Device::Cpu);
//! let conv = Conv2d::new(&params.sub("conv"), 3, 64, 3, ConvOptions { padding: 1, ..Default::default() });
//! let norm = Norm::new(NormKind::Batch, &params.sub("norm"), 64);
//! let images = tch::Tensor::zeros([2, 3, 32, 32], (tch::Kind::Float, tch::Device::Cpu));
//! assert_eq!(norm.forward(&conv.forward(&images), true).relu().size(), [2, 64, 32, 32]);
//! ```

mod conv;
mod fused;
mod fused_cuda;
mod init;
mod linear;
mod loss;
mod mlp;
mod moments;
mod norm;

pub use conv::{Conv2d, ConvOptions};
pub use init::{Init, truncated_normal};
pub use linear::Linear;
pub use loss::{
    covariance_loss, deviation, l2_normalize, masked_mean, negative_cosine, nt_xent, smooth_l1, spread,
    variance_loss,
};
pub use mlp::Mlp;
pub use norm::{BatchNorm, LayerNorm2d, Norm};
