//! Normalisation.

use tch::{Device, Kind, Tensor};

use super::fused::{self, Then};
use super::{fused_cuda, moments};
use crate::memory::bf16;
use crate::{NormKind, Params, autograd, ranks};

/// Batch norm of maps `(B, C, H, W)` or of vectors `(B, C)`, with PyTorch's ε = 10⁻⁵ and momentum 0.1.
///
/// The biased variance of the batch normalises it, the unbiased one goes into the running variance. The batch is that of
/// all [`ranks`], weighted by how many values each has: visible cells, in a sparse encoder.
///
/// Training on vectors or on maps in the channels-last format has no second derivative, and what it was given or has made must
/// not be changed in place before the backward pass: kernels of ours do it, on the CPU and on a GPU. With several ranks that holds everywhere.
///
/// ```
/// use jepa_plugin_api::nn::BatchNorm;
/// use jepa_plugin_api::{Params, tch};
/// let norm = BatchNorm::new(&Params::new(tch::Device::Cpu), 8);
/// let x = tch::Tensor::randn([4, 8, 6, 6], (tch::Kind::Float, tch::Device::Cpu)) + 3.0;
/// let mean = norm.forward(&x, true).mean(tch::Kind::Float);
/// assert!(f64::try_from(mean).unwrap().abs() < 1e-5);
/// ```
///
/// ```should_panic
/// # use jepa_plugin_api::nn::BatchNorm;
/// # use jepa_plugin_api::{Params, tch};
/// # let norm = BatchNorm::new(&Params::new(tch::Device::Cpu), 8);
/// norm.forward(&tch::Tensor::zeros([1, 8], (tch::Kind::Float, tch::Device::Cpu)), true);
/// ```
#[derive(Debug)]
pub struct BatchNorm {
    /// Scale γ `(C)`.
    pub weight: Tensor,
    /// Shift β `(C)`.
    pub bias: Tensor,
    /// Buffer `(C)`.
    pub running_mean: Tensor,
    /// Buffer `(C)`.
    pub running_var: Tensor,
    /// Buffer, i64 scalar: batches seen. Nothing here reads it; PyTorch wants it in a file.
    pub num_batches_tracked: Tensor,
}

impl BatchNorm {
    /// Added to the variance before its root is taken.
    pub const EPS: f64 = 1e-5;
    /// Share of a batch's statistics in the running ones.
    pub const MOMENTUM: f64 = 0.1;

    /// Registers weight 1, bias 0, and the running statistics 0 and 1.
    pub fn new(params: &Params, channels: i64) -> Self {
        Self::with_weight(params, channels, 1.0)
    }

    /// The same with another initial scale: 0 makes a residual branch begin as nothing.
    pub fn with_weight(params: &Params, channels: i64, weight: f64) -> Self {
        let of = |value: f64| Tensor::full([channels], value, (Kind::Float, params.device()));
        BatchNorm {
            weight: params.parameter("weight", of(weight)),
            bias: params.parameter("bias", of(0.0)),
            running_mean: params.buffer("running_mean", of(0.0)),
            running_var: params.buffer("running_var", of(1.0)),
            num_batches_tracked: params
                .buffer("num_batches_tracked", Tensor::zeros([], (Kind::Int64, params.device()))),
        }
    }

    /// Same shape as `x`. With `train`, takes the batch's statistics and updates the running ones.
    ///
    /// # Panics
    /// When it is to train on a single value for each channel, which has no variance, as PyTorch's does not.
    pub fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        self.forward_then(x, train, Then::Nothing)
    }

    /// ReLU of [`forward`](Self::forward), in one pass over memory. Since 1.1.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn forward_relu(&self, x: &Tensor, train: bool) -> Tensor {
        self.forward_then(x, train, Then::Relu)
    }

    /// ReLU of the sum of [`forward`](Self::forward) and `other`, of the shape of `x`, in one pass over memory: the end
    /// of a residual block. Since 1.1.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn forward_add_relu(&self, x: &Tensor, other: &Tensor, train: bool) -> Tensor {
        self.forward_then(x, train, Then::AddRelu(other))
    }

    fn forward_then(&self, x: &Tensor, train: bool, then: Then) -> Tensor {
        if train {
            assert!(
                ranks::size() > 1 || x.numel() as i64 > x.size()[1],
                "batch norm cannot train on a single value per channel, {:?}: raise optimizer.batch_size",
                x.size()
            );
        }
        if let Some(y) = self.fused(x, train, then) {
            return y;
        }
        if train {
            self.count_batch();
        }
        let y = if train && ranks::size() > 1 {
            moments::batch_norm(self, x)
        } else {
            x.batch_norm(
                Some(&self.weight),
                Some(&self.bias),
                Some(&self.running_mean),
                Some(&self.running_var),
                train,
                Self::MOMENTUM,
                Self::EPS,
                true,
            )
        };
        match then {
            Then::Nothing => y,
            Then::Relu => y.relu(),
            Then::AddRelu(other) => (y + other).relu(),
        }
    }

    /// For rows of channels in memory: vectors, or maps in the channels-last format. On a GPU, in training by one process.
    fn fused(&self, x: &Tensor, train: bool, then: Then) -> Option<Tensor> {
        let channels = self.weight.size()[0];
        let on_cpu = x.device() == Device::Cpu;
        let takes_device = on_cpu || x.device().is_cuda() && train && ranks::size() == 1;
        let takes_kind = matches!(x.kind(), Kind::Float | Kind::BFloat16);
        if !takes_device || !takes_kind || x.dim() < 2 || x.size()[1] != channels || x.numel() == 0 {
            return None;
        }
        let as_rows = |x: &Tensor| match x.dim() {
            2 => Some(x.shallow_clone()),
            4 => Some(x.permute([0, 2, 3, 1])).filter(Tensor::is_contiguous).map(|x| x.view([-1, channels])),
            _ => None,
        };
        let same = |other: &Tensor| other.size() == x.size() && other.kind() == x.kind();
        let rows = as_rows(x).filter(|rows| {
            let own = [&self.weight, &self.bias, &self.running_mean, &self.running_var];
            let other = if let Then::AddRelu(other) = then { other } else { x };
            let with_gradient = [x, other, &self.weight, &self.bias].into_iter().any(autograd::is_recorded);
            rows.is_contiguous()
                && own.iter().all(|x| x.kind() == Kind::Float && x.is_contiguous())
                && (train || !with_gradient)
        })?;
        let other;
        let then = match then {
            Then::AddRelu(x) if same(x) => {
                other = as_rows(x)?.contiguous();
                Then::AddRelu(&other)
            }
            Then::AddRelu(_) => return None,
            then => then,
        };
        if !on_cpu && !fused_cuda::takes(&rows) {
            return None;
        }
        if train && on_cpu {
            self.count_batch();
        }
        let y = match (x.kind(), train) {
            _ if !on_cpu => fused_cuda::train(self, &rows, then),
            (Kind::Float, true) => fused::train::<f32>(self, &rows, then),
            (Kind::Float, false) => fused::eval::<f32>(self, &rows, then),
            (Kind::BFloat16, true) => fused::train::<bf16>(self, &rows, then),
            (Kind::BFloat16, false) => fused::eval::<bf16>(self, &rows, then),
            _ => return None,
        };
        Some(match x.size().as_slice() {
            &[batch, _, height, width] => y.view([batch, height, width, channels]).permute([0, 3, 1, 2]),
            _ => y,
        })
    }

    fn count_batch(&self) {
        let _ = self.num_batches_tracked.shallow_clone().g_add_scalar_(1);
    }
}

/// Layer norm over the channels of each position, with ε = 10⁻⁶ as in ConvNeXt.
///
/// ```
/// use jepa_plugin_api::nn::LayerNorm2d;
/// use jepa_plugin_api::{Params, tch};
/// let norm = LayerNorm2d::new(&Params::new(tch::Device::Cpu), 8);
/// let x = tch::Tensor::randn([4, 8, 6, 6], (tch::Kind::Float, tch::Device::Cpu));
/// let of_a_position = norm.forward(&x).mean_dim([1i64].as_slice(), false, tch::Kind::Float);
/// assert!(f64::try_from(of_a_position.abs().max()).unwrap() < 1e-5);
/// ```
#[derive(Debug)]
pub struct LayerNorm2d {
    /// Scale `(C)`.
    pub weight: Tensor,
    /// Shift `(C)`.
    pub bias: Tensor,
}

impl LayerNorm2d {
    /// Added to the variance before its root is taken.
    pub const EPS: f64 = 1e-6;

    /// Registers weight 1 and bias 0.
    pub fn new(params: &Params, channels: i64) -> Self {
        let of = |value: f64| Tensor::full([channels], value, (Kind::Float, params.device()));
        LayerNorm2d { weight: params.parameter("weight", of(1.0)), bias: params.parameter("bias", of(0.0)) }
    }

    /// `(B, C, H, W)` to the same.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.last_dimension(&x.permute([0, 2, 3, 1])).permute([0, 3, 1, 2])
    }

    /// `(…, C)` to the same: the norm of maps whose channels come last.
    pub fn last_dimension(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), Self::EPS, true)
    }
}

/// The normalisation that goes with a family of backbones.
///
/// ```
/// use jepa_plugin_api::nn::Norm;
/// use jepa_plugin_api::{NormKind, Params, tch};
/// let norm = Norm::new(NormKind::Layer, &Params::new(tch::Device::Cpu), 8);
/// let x = tch::Tensor::randn([4, 8, 6, 6], (tch::Kind::Float, tch::Device::Cpu));
/// assert_eq!(norm.forward(&x, true).size(), x.size());
/// ```
#[derive(Debug)]
pub enum Norm {
    /// Batch norm.
    Batch(BatchNorm),
    /// Layer norm over channels.
    Layer(LayerNorm2d),
}

impl Norm {
    /// Registers the tensors of a norm of this kind.
    pub fn new(kind: NormKind, params: &Params, channels: i64) -> Self {
        match kind {
            NormKind::Batch => Norm::Batch(BatchNorm::new(params, channels)),
            NormKind::Layer => Norm::Layer(LayerNorm2d::new(params, channels)),
        }
    }

    /// `(B, C, H, W)` to the same; `train` matters to batch norm only.
    pub fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        match self {
            Norm::Batch(norm) => norm.forward(x, train),
            Norm::Layer(norm) => norm.forward(x),
        }
    }

    /// ReLU of [`forward`](Self::forward). Since 1.1.
    pub fn forward_relu(&self, x: &Tensor, train: bool) -> Tensor {
        match self {
            Norm::Batch(norm) => norm.forward_relu(x, train),
            Norm::Layer(norm) => norm.forward(x).relu(),
        }
    }
}
