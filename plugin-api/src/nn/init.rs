//! Initial values of weights, drawn from torch's global generator.

use tch::{Device, Kind, Tensor};

/// How the weight of a layer begins.
///
/// ```
/// use jepa_plugin_api::nn::{Init, Linear};
/// use jepa_plugin_api::{Params, tch::Device};
/// let head = Linear::with_init(&Params::new(Device::Cpu), 64, 10, true, Init::Normal);
/// assert_eq!(f64::try_from(head.bias.unwrap().abs().max()).unwrap(), 0.0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// PyTorch's default for convolutions and linear layers: uniform in ±1/√fan_in.
    #[default]
    Uniform,
    /// Normal with variance 2 / fan_out, for convolutions followed by ReLU: timm's ResNet.
    KaimingFanOut,
    /// Normal with standard deviation 0.02, and no bias at first: timm's ConvNeXt, which cuts at ±2, where nothing is.
    Normal,
}

impl Init {
    /// A weight `(out, in / groups, …)` f32.
    pub(super) fn weight(self, shape: &[i64], device: Device) -> Tensor {
        let receptive: i64 = shape[2..].iter().product();
        let mut weight = Tensor::empty(shape, (Kind::Float, device));
        match self {
            Init::Uniform => {
                let bound = uniform_bound(shape[1] * receptive);
                weight.uniform_(-bound, bound)
            }
            Init::KaimingFanOut => weight.normal_(0.0, (2.0 / (shape[0] * receptive) as f64).sqrt()),
            Init::Normal => weight.normal_(0.0, 0.02),
        }
    }

    /// The bias `(out)` f32 of a layer whose units have `fan_in` inputs: PyTorch's, or zero.
    pub(super) fn bias(self, out: i64, fan_in: i64, device: Device) -> Tensor {
        let mut bias = Tensor::zeros([out], (Kind::Float, device));
        match self {
            Init::Uniform | Init::KaimingFanOut => {
                let bound = uniform_bound(fan_in);
                bias.uniform_(-bound, bound)
            }
            Init::Normal => bias,
        }
    }
}

fn uniform_bound(fan_in: i64) -> f64 {
    1.0 / (fan_in.max(1) as f64).sqrt()
}

/// Normal numbers f32 of mean 0 and standard deviation `std`, conditioned on lying within ±`cut`.
///
/// ```
/// use jepa_plugin_api::{nn::truncated_normal, tch::Device};
/// let token = truncated_normal(&[1, 64], 0.02, 0.04, Device::Cpu);
/// assert!(f64::try_from(token.abs().max()).unwrap() <= 0.04);
/// ```
pub fn truncated_normal(shape: &[i64], std: f64, cut: f64, device: Device) -> Tensor {
    // The inverse distribution function, applied to uniform numbers between its values at both ends: Φ is
    // (1 + erf(x / √2)) / 2, so erf itself is what is uniform.
    let scale = std * std::f64::consts::SQRT_2;
    let end = f64::try_from(Tensor::from(cut / scale).erf()).expect("a number has an error function");
    let erf = Tensor::empty(shape, (Kind::Float, device)).uniform_(-end, end);
    (erf.erfinv() * scale).clamp(-cut, cut)
}
