//! Fully connected layer.

use tch::{Device, Kind, Tensor};

use super::Init;
use crate::matmul::{self, Layout, Packed, Rows};
use crate::memory::{filled, values};
use crate::{Params, autograd, parallel};

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
const LEAST_ROWS: usize = 128;

/// `(…, in)` to `(…, out)` with a weight `(out, in)`, or `(out, in, 1, 1)`. On the CPU, in fp32 and with many rows, by
/// [`matmul`], which then has no second derivative.
pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let rows = x.numel() / x.size().last().copied().unwrap_or(1).max(1) as usize;
    if !is_ours(x, weight, bias, rows) {
        return x.linear(&weight.flatten(1, -1), bias);
    }
    let mut shape = x.size();
    *shape.last_mut().expect("rows have a dimension") = weight.size()[0];
    product(x, weight, bias, Seen::All).view(shape.as_slice())
}

/// The same at every `stride`-th position, both ways, of `x` `(B, H, W, in)`.
pub(super) fn strided(x: &Tensor, stride: i64, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let &[batch, height, width, _] = x.size().as_slice() else {
        panic!("positions of maps have 4 dimensions")
    };
    let seen = |side: i64| (side + stride - 1) / stride;
    let shape = [batch, seen(height), seen(width), weight.size()[0]];
    if !is_ours(x, weight, bias, (shape[0] * shape[1] * shape[2]) as usize) {
        let x = x.slice(1, None, None, stride).slice(2, None, None, stride);
        return x.linear(&weight.flatten(1, -1), bias);
    }
    let [height, width, stride] = [height, width, stride].map(|side| side as usize);
    product(x, weight, bias, Seen::Every { stride, height, width }).view(shape)
}

fn is_ours(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, rows: usize) -> bool {
    let inputs = weight.size()[1];
    let tensors = [Some(x), Some(weight), bias].into_iter().flatten();
    tensors.clone().all(|x| x.device() == Device::Cpu && x.kind() == Kind::Float)
        && autograd::autocast_kind(x) == Kind::Float
        && x.size().last() == Some(&inputs)
        && weight.size()[2..].iter().all(|side| *side == 1)
        && rows >= LEAST_ROWS
        && weight.numel() > 0
}

/// Which rows of an input are multiplied.
#[derive(Clone, Copy)]
enum Seen {
    All,
    /// Those at every `stride`-th position, both ways, of maps of this size.
    Every {
        stride: usize,
        height: usize,
        width: usize,
    },
}

impl Seen {
    /// Where they begin, in rows of so many channels.
    fn starts(self, rows: usize, channels: usize) -> Vec<usize> {
        match self {
            Seen::All => (0..rows).map(|row| row * channels).collect(),
            Seen::Every { stride, height, width } => {
                let lines = (0..rows / width).filter(|line| line % height % stride == 0);
                lines
                    .flat_map(|line| (0..width).step_by(stride).map(move |x| (line * width + x) * channels))
                    .collect()
            }
        }
    }

    /// Gradients of those that are seen `(M, C)` as ones of all `(rows, C)`: the others have none.
    fn spread(self, gradient: Tensor, rows: usize) -> Tensor {
        let Seen::Every { stride, height, width } = self else { return gradient };
        let channels = gradient.size()[1] as usize;
        let mut seen = values::<f32>(&gradient).chunks(channels * width.div_ceil(stride));
        filled(&[rows as i64, channels as i64], |out: &mut [f32]| {
            let lines = out.chunks_mut(width * channels).enumerate().map(|(line, out)| {
                let seen = if line % height % stride == 0 { seen.next() } else { None };
                (seen, out)
            });
            parallel::for_each(lines, |(seen, out)| match seen {
                None => out.fill(0.0),
                Some(seen) => {
                    let positions = out.chunks_mut(stride * channels).zip(seen.chunks_exact(channels));
                    for (out, seen) in positions {
                        let (here, others) = out.split_at_mut(channels);
                        here.copy_from_slice(seen);
                        others.fill(0.0);
                    }
                }
            });
        })
    }
}

/// The rows of `x` `(…, in)` that are seen, times the weight: `(M, out)`.
fn product(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, seen: Seen) -> Tensor {
    let (outputs, inputs) = (weight.size()[0] as usize, weight.size()[1] as usize);
    let (rows, kept) = (x.detach().contiguous(), weight.detach().contiguous());
    let count = rows.numel() / inputs;
    let y = {
        let packed = Packed::new(values(&kept), &Layout::linear(outputs, inputs));
        let bias = bias.map(|bias| bias.detach().contiguous());
        let starts = seen.starts(count, inputs);
        matmul::product(as_rows(&rows, &starts, inputs), &packed, bias.as_ref().map(values))
    };
    let tensors: Vec<&Tensor> = [Some(x), Some(weight), bias].into_iter().flatten().collect();
    let wanted: Vec<bool> = tensors.iter().map(|x| autograd::is_recorded(x)).collect();
    autograd::record("Linear", &tensors, y, move |grad| {
        let grad = grad.contiguous();
        let of_x = || {
            let packed = Packed::new(values(&kept), &Layout::linear_transposed(outputs, inputs));
            let starts = Seen::All.starts(grad.size()[0] as usize, outputs);
            let gradient = matmul::product(as_rows(&grad, &starts, outputs), &packed, None);
            seen.spread(gradient, count).view(rows.size().as_slice())
        };
        let of_weight = || {
            filled(&kept.size(), |weight| {
                let starts = seen.starts(count, inputs);
                let layout = Layout::linear(outputs, inputs);
                matmul::gradient(as_rows(&rows, &starts, inputs), values(&grad), &layout, weight);
            })
        };
        let of_bias = || grad.sum_dim_intlist(0, false, Kind::Float);
        let mut gradients = vec![wanted[0].then(of_x), wanted[1].then(of_weight)];
        gradients.extend(wanted.get(2).map(|wanted| wanted.then(of_bias)));
        gradients
    })
}

fn as_rows<'a>(x: &'a Tensor, starts: &'a [usize], length: usize) -> Rows<'a> {
    Rows { values: values(x), starts, pieces: 1, length, pitch: 0 }
}
