//! Losses and what they are made of.
//!
//! They compute in f32 under any autocast of the host, given f32. What looks at a whole batch looks at that of all [`ranks`]:
//! the mean over ranks of what each gives is what one alone would give for all images.

use tch::{Kind, Reduction, Tensor};

use super::moments;
use crate::ranks;

/// `x / max(‖x‖₂, 10⁻¹²)` over dimension `dim`: unit vectors, same shape.
///
/// ```
/// use jepa_plugin_api::{nn::l2_normalize, tch::Tensor};
/// let x = Tensor::from_slice(&[3f32, 4.0]).view([1, 2]);
/// assert_eq!(Vec::<f32>::try_from(l2_normalize(&x, 1).view(-1)).unwrap(), [0.6, 0.8]);
/// ```
pub fn l2_normalize(x: &Tensor, dim: i64) -> Tensor {
    x / x.norm_scalaropt_dim(2, [dim], true).clamp_min(1e-12)
}

/// Smooth-L1 of each element, same shape: ½ d² / β where |d| < β, else |d| − ½ β.
///
/// ```
/// use jepa_plugin_api::{nn::smooth_l1, tch::Tensor};
/// let (x, y) = (Tensor::from_slice(&[0f32, 0.0]), Tensor::from_slice(&[1f32, 4.0]));
/// assert_eq!(Vec::<f32>::try_from(smooth_l1(&x, &y, 2.0)).unwrap(), [0.25, 3.0]);
/// ```
pub fn smooth_l1(prediction: &Tensor, target: &Tensor, beta: f64) -> Tensor {
    prediction.smooth_l1_loss(target, Reduction::None, beta)
}

/// Mean of `values` where `mask`, of the same shape, is true: the sum divided by (count + 10⁻⁸), so 0 of nothing.
///
/// ```
/// use jepa_plugin_api::{nn::masked_mean, tch::Tensor};
/// let (values, mask) = (Tensor::from_slice(&[1f32, 2.0, 6.0]), Tensor::from_slice(&[true, false, true]));
/// assert_eq!(f64::try_from(masked_mean(&values, &mask)).unwrap(), 3.5);
/// ```
pub fn masked_mean(values: &Tensor, mask: &Tensor) -> Tensor {
    let mask = mask.to_kind(values.kind());
    let count = ranks::all_reduce(&mask.sum(Kind::Float)) / ranks::size() as f64;
    (values * &mask).sum(Kind::Float) / (count + 1e-8)
}

/// The mean over rows of −cos(a, b), for `(B, D)` and `(B, D)`: a scalar in [−1, 1].
///
/// ```
/// use jepa_plugin_api::{nn::negative_cosine, tch::Tensor};
/// let a = Tensor::from_slice(&[1f32, 0.0, 0.0, 2.0]).view([2, 2]);
/// let b = Tensor::from_slice(&[5f32, 0.0, 3.0, 0.0]).view([2, 2]);
/// assert_eq!(f64::try_from(negative_cosine(&a, &b)).unwrap(), -0.5);
/// ```
pub fn negative_cosine(a: &Tensor, b: &Tensor) -> Tensor {
    -Tensor::cosine_similarity(a, b, 1, 1e-8).mean(Kind::Float)
}

/// The matrix product in f32 of two f32 matrices. Autocast would take it to bf16, whose three digits are too few for
/// similarities over a small temperature or for covariances near 0.
fn matmul_f32(a: &Tensor, b: &Tensor) -> Tensor {
    if a.device().is_cuda() {
        return tch::autocast(false, || a.matmul(b));
    }
    // tch reaches CUDA's switch alone: on the CPU a small product tells whether autocast is on. It leaves f64 as it is.
    let one = Tensor::ones([1, 1], (Kind::Float, a.device()));
    if one.matmul(&one).kind() == Kind::Float {
        return a.matmul(b);
    }
    a.to_kind(Kind::Double).matmul(&b.to_kind(Kind::Double)).to_kind(Kind::Float)
}

/// NT-Xent (SimCLR, arXiv 2002.05709, eq. 1) of two views `(B, D)` and `(B, D)`: the cross-entropy, averaged over all
/// 2 B views, of finding the other view of the same image among the 2 B − 1 others by cosine similarity / temperature.
/// Also returns how often the other view is the most similar one. Two scalars.
///
/// ```
/// use jepa_plugin_api::{nn::nt_xent, tch};
/// let views = tch::Tensor::eye(4, (tch::Kind::Float, tch::Device::Cpu));
/// let (loss, accuracy) = nt_xent(&views, &views, 0.1);
/// assert!(f64::try_from(loss).unwrap() < 0.01, "each view has its twin");
/// assert_eq!(f64::try_from(accuracy).unwrap(), 1.0);
/// ```
pub fn nt_xent(a: &Tensor, b: &Tensor, temperature: f64) -> (Tensor, Tensor) {
    let images = a.size()[0];
    let z = l2_normalize(&Tensor::cat(&[a, b], 0), 1);
    // Of each rank first the one views, then the others.
    let all = ranks::gather(&z);
    let first = 2 * images * ranks::rank() as i64;
    let number = Tensor::arange_start(first, first + images, (Kind::Int64, z.device()));
    let (itself, other) =
        (Tensor::cat(&[&number, &(&number + images)], 0), Tensor::cat(&[&(&number + images), &number], 0));
    let itself = itself.unsqueeze(1).eq_tensor(&Tensor::arange(all.size()[0], (Kind::Int64, z.device())));
    let logits = matmul_f32(&z, &all.transpose(0, 1)) / temperature;
    let logits = logits.masked_fill(&itself, f64::NEG_INFINITY);
    let found = logits.argmax(1, false).eq_tensor(&other);
    (logits.cross_entropy_for_logits(&other), found.to_kind(Kind::Float).mean(Kind::Float))
}

/// VICReg's variance term (arXiv 2105.04906, eq. 1) of `(B, D)`: the mean over dimensions of max(0, 1 − √(var + 10⁻⁴)),
/// with the unbiased variance, 0 for a single row. A scalar in [0, 1].
///
/// ```
/// use jepa_plugin_api::{nn::variance_loss, tch};
/// let collapsed = tch::Tensor::ones([4, 8], (tch::Kind::Float, tch::Device::Cpu));
/// assert!((f64::try_from(variance_loss(&collapsed)).unwrap() - 0.99).abs() < 1e-6);
/// ```
pub fn variance_loss(x: &Tensor) -> Tensor {
    let squares = centre(x).square().sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
    let variance = ranks::all_reduce(&squares) / freedom(x);
    let deviation = (variance + 1e-4).sqrt();
    (deviation.neg() + 1.0).relu().mean(Kind::Float)
}

/// VICReg's covariance term (arXiv 2105.04906, eq. 4) of `(B, D)`: the squared unbiased covariances of different
/// dimensions, summed and divided by D; 0 for a single row. A scalar.
///
/// ```
/// use jepa_plugin_api::{nn::covariance_loss, tch::Tensor};
/// let same = Tensor::from_slice(&[1f32, 1.0, -1.0, -1.0]).view([2, 2]);
/// assert_eq!(f64::try_from(covariance_loss(&same)).unwrap(), 4.0, "two covariances of 2, squared, over D = 2");
/// ```
pub fn covariance_loss(x: &Tensor) -> Tensor {
    let centred = ranks::gather(&centre(x));
    // Each rank takes its share of the columns; the mean over ranks is the whole.
    let (columns, ranks) = (x.size()[1], ranks::size() as i64);
    let [first, end] = [0, 1].map(|more| columns * (ranks::rank() as i64 + more) / ranks);
    let share = centred.narrow(1, first, end - first);
    let squares = (matmul_f32(&centred.transpose(0, 1), &share) / freedom(x)).square();
    let of_different = squares.sum(Kind::Float) - squares.diagonal(-first, 0, 1).sum(Kind::Float);
    of_different * (ranks as f64 / columns as f64)
}

/// `(B, D)` less the mean of the rows of all ranks.
fn centre(x: &Tensor) -> Tensor {
    x - ranks::all_reduce(&x.mean_dim([0i64].as_slice(), true, Kind::Float)) / ranks::size() as f64
}

/// What unbiased moments of `(B, D)` divide by: B − 1, of all ranks. At least 1, so that a last validation batch of one image
/// has a loss.
fn freedom(x: &Tensor) -> f64 {
    (x.size()[0] * ranks::size() as i64 - 1).max(1) as f64
}

/// The standard deviation of each dimension of `(B, D)`, averaged. A scalar without a graph. Since 1.1.
///
/// ```
/// use jepa_plugin_api::{nn::deviation, tch::Tensor};
/// let x = Tensor::from_slice(&[1f32, 5.0, 3.0, 5.0]).view([2, 2]);
/// assert_eq!(f64::try_from(deviation(&x)).unwrap(), 0.5, "1 of the first, 0 of the second");
/// ```
pub fn deviation(x: &Tensor) -> Tensor {
    tch::no_grad(|| moments::deviation(x).mean(Kind::Float))
}

/// How far the rows of `(B, D)` differ in direction: the standard deviation of each dimension of the unit vectors,
/// averaged, times √D. Near 0 where they have collapsed to one, near 1 where they point everywhere. A scalar without a
/// graph.
///
/// ```
/// use jepa_plugin_api::{nn::spread, tch};
/// let collapsed = tch::Tensor::ones([4, 8], (tch::Kind::Float, tch::Device::Cpu));
/// assert_eq!(f64::try_from(spread(&collapsed)).unwrap(), 0.0);
/// ```
pub fn spread(x: &Tensor) -> Tensor {
    tch::no_grad(|| deviation(&l2_normalize(&x.to_kind(Kind::Float), 1)) * (x.size()[1] as f64).sqrt())
}
