//! Convolution.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::Init;
use super::linear::{linear, strided};
use crate::matmul::Layout;
use crate::memory::{filled, values};
use crate::winograd::{self, Kernels, Tiles};
use crate::{Params, autograd};

/// What [`Conv2d::new`] takes beside the sizes. The default is stride 1, no padding, one group, with bias.
///
/// ```
/// use jepa_plugin_api::nn::{ConvOptions, Init};
/// let depthwise = ConvOptions { padding: 3, groups: 96, init: Init::Normal, ..ConvOptions::default() };
/// assert!(depthwise.bias && depthwise.stride == 1);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ConvOptions {
    /// Step between outputs, both ways.
    pub stride: i64,
    /// Zeros added on each side.
    pub padding: i64,
    /// Groups of channels that see each other only; as many as there are channels for a depthwise convolution.
    pub groups: i64,
    /// Whether a bias is added.
    pub bias: bool,
    /// How weight and bias begin.
    pub init: Init,
}

impl Default for ConvOptions {
    fn default() -> Self {
        ConvOptions { stride: 1, padding: 0, groups: 1, bias: true, init: Init::Uniform }
    }
}

/// A convolution with a square kernel.
///
/// ```
/// use jepa_plugin_api::nn::{Conv2d, ConvOptions};
/// use jepa_plugin_api::{Params, tch};
/// let params = Params::new(tch::Device::Cpu);
/// let conv = Conv2d::new(&params.sub("stem"), 3, 8, 3, ConvOptions { stride: 2, padding: 1, ..Default::default() });
/// let x = tch::Tensor::zeros([4, 3, 32, 32], (tch::Kind::Float, tch::Device::Cpu));
/// assert_eq!(conv.forward(&x).size(), [4, 8, 16, 16]);
/// assert_eq!(params.entries()[0].name, "stem.weight");
/// ```
#[derive(Debug)]
pub struct Conv2d {
    /// `(out, in / groups, k, k)`.
    pub weight: Tensor,
    /// `(out)`.
    pub bias: Option<Tensor>,
    /// Step between outputs, both ways.
    pub stride: i64,
    /// Zeros added on each side.
    pub padding: i64,
    /// Groups of channels.
    pub groups: i64,
}

impl Conv2d {
    /// Registers `weight` and, unless switched off, `bias`.
    pub fn new(
        params: &Params,
        channels_in: i64,
        channels_out: i64,
        kernel: i64,
        options: ConvOptions,
    ) -> Self {
        let ConvOptions { stride, padding, groups, bias, init } = options;
        let per_group = channels_in / groups;
        let weight = init.weight(&[channels_out, per_group, kernel, kernel], params.device());
        let weight = params.parameter("weight", weight);
        let initial_bias = || init.bias(channels_out, per_group * kernel * kernel, params.device());
        let bias = bias.then(|| params.parameter("bias", initial_bias()));
        Conv2d { weight, bias, stride, padding, groups }
    }

    /// `(B, in, H, W)` to `(B, out, H', W')` with H' = ⌊(H + 2 · padding − k) / stride⌋ + 1.
    ///
    /// In memory the result is as libtorch makes it, but on the CPU that of a [pointwise](Self::is_pointwise) convolution, and of a
    /// 3×3 one that is computed [in tiles](Self::by_tiles), as those are where that [pays](Tiles::pay): channels last, so do not
    /// count on strides. These have in fp32 no second derivative, and `x` and the weight must not be changed in place before the
    /// backward pass.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        if self.is_pointwise() && x.dim() == 4 && x.device() == Device::Cpu {
            // A matrix product. Besides, oneDNN's gradient of one with a stride and few channels never returns on a CPU
            // with AVX2 and no AVX-512 (libtorch 2.11).
            let rows = x.permute([0, 2, 3, 1]).contiguous();
            let y = match self.stride {
                1 => self.pointwise(&rows),
                stride => strided(&rows, stride, &self.weight, self.bias.as_ref()),
            };
            return y.permute([0, 3, 1, 2]);
        }
        if let &[batch, channels, height, width] = x.size().as_slice()
            && self.takes_tiles(x)
        {
            let tiles = Tiles::of_maps((height as usize, width as usize), batch as usize);
            if tiles.pay(channels as usize, self.weight.size()[0] as usize) {
                let y = self.by_tiles(&x.permute([0, 2, 3, 1]).reshape([-1, channels]), &Arc::new(tiles));
                return y.view([batch, height, width, -1]).permute([0, 3, 1, 2]);
            }
        }
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        x.conv2d(&self.weight, self.bias.as_ref(), stride, padding, [1, 1], self.groups)
    }

    /// Of a 1×1 convolution, what it makes of the channels of each position: `(…, in)` to `(…, out)`, as [`Linear`](super::Linear)
    /// does. Since 1.1.
    pub fn pointwise(&self, x: &Tensor) -> Tensor {
        linear(x, &self.weight, self.bias.as_ref())
    }

    /// Of a 3×3 convolution that [takes tiles](Self::takes_tiles), the same for any positions of its maps: `(N, in)` to `(N, out)`,
    /// with zeros at all others. Rows come image by image, and line by line, as positions do in the tiles. Since 1.1.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use jepa_plugin_api::nn::{Conv2d, ConvOptions};
    /// # use jepa_plugin_api::winograd::Tiles;
    /// # use jepa_plugin_api::{Params, tch};
    /// let params = Params::new(tch::Device::Cpu);
    /// let conv = Conv2d::new(&params, 32, 48, 3, ConvOptions { padding: 1, ..ConvOptions::default() });
    /// // What is visible of two maps of 8 × 8: a square of one, and a line of the other.
    /// let square: Vec<(u32, u32)> = (0..4).flat_map(|y| (0..4).map(move |x| (y, x))).collect();
    /// let line: Vec<(u32, u32)> = (0..8).map(|x| (5, x)).collect();
    /// let tiles = Arc::new(Tiles::of_positions((8, 8), [&square[..], &line[..]]));
    /// let rows = tch::Tensor::zeros([16 + 8, 32], (tch::Kind::Float, tch::Device::Cpu));
    /// assert_eq!(conv.by_tiles(&rows, &tiles).size(), [16 + 8, 48]);
    /// ```
    ///
    /// # Panics
    /// When it does not take `rows` in tiles, or they are not a row for each position of these.
    pub fn by_tiles(&self, rows: &Tensor, tiles: &Arc<Tiles>) -> Tensor {
        assert!(rows.dim() == 2 && self.takes_tiles(rows), "{self:?} takes no tiles of {rows:?}");
        let [x, w] = [rows, &self.weight].map(|x| x.detach().contiguous());
        let (outputs, inputs) = (w.size()[0] as usize, w.size()[1] as usize);
        let layout = Layout::convolution(outputs, inputs, 3);
        let y = winograd::convolution(values(&x), tiles, &Kernels::new(values(&w), &layout));
        let wanted = [rows, &self.weight].map(autograd::is_recorded);
        let tiles = Arc::clone(tiles);
        let y = autograd::record("WinogradConv", &[rows, &self.weight], y, move |grad| {
            let grad = grad.contiguous();
            let of_x = || {
                let kernels = Kernels::new(values(&w), &Layout::convolution_transposed(outputs, inputs, 3));
                winograd::convolution(values(&grad), &tiles, &kernels)
            };
            let of_weight = || {
                filled(&w.size(), |out| {
                    winograd::gradient(values(&x), values(&grad), &tiles, &layout, out);
                })
            };
            vec![wanted[0].then(of_x), wanted[1].then(of_weight)]
        });
        match &self.bias {
            None => y,
            Some(bias) => y + bias,
        }
    }

    /// Whether [`winograd`](crate::winograd) can compute it of `x` `(N, in)` or `(B, in, H, W)`: a 3×3 kernel with a stride and a
    /// padding of 1 and a single group, channels that come in groups of [`winograd::CHANNELS`], on the CPU and in fp32. Since 1.1.
    pub fn takes_tiles(&self, x: &Tensor) -> bool {
        let shape = self.weight.size();
        let in_groups = |channels: i64| channels > 0 && channels % winograd::CHANNELS as i64 == 0;
        (self.kernel(), self.stride, self.padding, self.groups) == (3, 1, 1, 1)
            && in_groups(shape[0])
            && in_groups(shape[1])
            && matches!(x.dim(), 2 | 4)
            && x.size()[1] == shape[1]
            && [x, &self.weight].iter().all(|x| x.device() == Device::Cpu && x.kind() == Kind::Float)
            && autograd::autocast_kind(x) == Kind::Float
    }

    /// Whether an output is made of a single position: a kernel of 1, without padding and groups.
    pub fn is_pointwise(&self) -> bool {
        self.kernel() == 1 && self.padding == 0 && self.groups == 1
    }

    /// Side of the kernel.
    pub fn kernel(&self) -> i64 {
        self.weight.size()[3]
    }
}
