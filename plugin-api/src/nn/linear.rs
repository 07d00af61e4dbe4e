//! Fully connected layer.

use tch::{Device, Kind, Tensor};

use super::Init;
use crate::matmul::{self, Layout, Packed, Rows};
use crate::memory::{filled, values};
use crate::{Params, autograd};

/// y = x Wᵀ + b.
///
/// ```
/// use jepa_plugin_api::nn::Linear;
/// use jepa_plugin_api::{Params, tch};
/// let classifier = Linear::new(&Params::new(tch::Device::Cpu), 64, 10, true);
/// let features = tch::Tensor::zeros([4, 64], (tch::Kind::Float, tch::Device::Cpu));
/// assert_eq!(classifier.forward(&features).size(), [4, 10]);
/// ```
#[derive(Debug)]
pub struct Linear {
    /// `(out, in)`.
    pub weight: Tensor,
    /// `(out)`.
    pub bias: Option<Tensor>,
}

impl Linear {
    /// Registers `weight` and, if asked, `bias`.
    pub fn new(params: &Params, features_in: i64, features_out: i64, bias: bool) -> Self {
        Self::with_init(params, features_in, features_out, bias, Init::Uniform)
    }

    /// The same with other initial values.
    pub fn with_init(params: &Params, features_in: i64, features_out: i64, bias: bool, init: Init) -> Self {
        let weight = init.weight(&[features_out, features_in], params.device());
        let weight = params.parameter("weight", weight);
        let initial_bias = || init.bias(features_out, features_in, params.device());
        let bias = bias.then(|| params.parameter("bias", initial_bias()));
        Linear { weight, bias }
    }

    /// `(…, in)` to `(…, out)`. On the CPU in fp32, for many rows, there is no second derivative, and `x` and the weight must
    /// not be changed in place before the backward pass.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        linear(x, &self.weight, self.bias.as_ref())
    }
}

/// For fewer rows, packing the weights would take longer than it saves.
const LEAST_ROWS: i64 = 128;

/// `(…, in)` to `(…, out)` with a weight `(out, in)`, or `(out, in, 1, 1)`. On the CPU, in fp32 and with many rows, by
/// [`matmul`], which then has no second derivative.
pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let weight = weight.flatten(1, -1);
    let (outputs, inputs) = weight.size2().expect("flattened to two dimensions");
    let tensors = [Some(x), Some(&weight), bias].into_iter().flatten();
    let ours = tensors.clone().all(|x| x.device() == Device::Cpu && x.kind() == Kind::Float)
        && autograd::autocast_kind(x) == Kind::Float
        && x.size().last() == Some(&inputs)
        && x.numel() as i64 >= LEAST_ROWS * inputs
        && inputs > 0
        && outputs > 0;
    if !ours {
        return x.linear(&weight, bias);
    }
    let rows = x.detach().contiguous();
    let kept = weight.detach().contiguous();
    let y = {
        let packed = Packed::new(values(&kept), &Layout::linear(outputs as usize, inputs as usize));
        let bias = bias.map(|bias| bias.detach().contiguous());
        matmul::product(as_rows(&rows, &starts(&rows)), &packed, bias.as_ref().map(values))
    };
    let mut shape = x.size();
    *shape.last_mut().expect("rows have a dimension") = outputs;
    let tensors: Vec<&Tensor> = tensors.collect();
    let wanted: Vec<bool> = tensors.iter().map(|x| autograd::is_recorded(x)).collect();
    let y = autograd::record("Linear", &tensors, y, move |grad| {
        let grad = grad.contiguous();
        let (outputs, inputs) = (outputs as usize, inputs as usize);
        let of_x = || {
            let packed = Packed::new(values(&kept), &Layout::linear_transposed(outputs, inputs));
            matmul::product(as_rows(&grad, &starts(&grad)), &packed, None).view(rows.size().as_slice())
        };
        let of_weight = || {
            filled(&kept.size(), |weight| {
                let layout = Layout::linear(outputs, inputs);
                matmul::gradient(as_rows(&rows, &starts(&rows)), values(&grad), &layout, weight);
            })
        };
        let of_bias = || grad.sum_dim_intlist(0, false, Kind::Float);
        let mut gradients = vec![wanted[0].then(of_x), wanted[1].then(of_weight)];
        gradients.extend(wanted.get(2).map(|wanted| wanted.then(of_bias)));
        gradients
    });
    y.view(shape.as_slice())
}

/// Where each row of a contiguous `(…, C)` begins.
fn starts(x: &Tensor) -> Vec<usize> {
    let channels = x.size().last().copied().unwrap_or(1) as usize;
    (0..x.numel()).step_by(channels).collect()
}

fn as_rows<'a>(x: &'a Tensor, starts: &'a [usize]) -> Rows<'a> {
    let length = x.size().last().copied().unwrap_or(1) as usize;
    Rows { values: values(x), starts, pieces: 1, length, pitch: 0 }
}
