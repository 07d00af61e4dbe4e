//! Losses and what they are made of.
//!
//! They compute in f32 under any autocast of the host, given f32.

use tch::{Kind, Reduction, Tensor};

/// `x / max(‖x‖₂, 10⁻¹²)` over dimension `dim`: unit vectors, same shape.
pub fn l2_normalize(x: &Tensor, dim: i64) -> Tensor {
    x / x.norm_scalaropt_dim(2, [dim], true).clamp_min(1e-12)
}

/// Smooth-L1 of each element, same shape: ½ d² / β where |d| < β, else |d| − ½ β.
pub fn smooth_l1(prediction: &Tensor, target: &Tensor, beta: f64) -> Tensor {
    prediction.smooth_l1_loss(target, Reduction::None, beta)
}

/// Mean of `values` where `mask`, of the same shape, is true: the sum divided by (count + 10⁻⁸), so 0 of nothing.
pub fn masked_mean(values: &Tensor, mask: &Tensor) -> Tensor {
    let mask = mask.to_kind(values.kind());
    (values * &mask).sum(Kind::Float) / (mask.sum(Kind::Float) + 1e-8)
}

/// The mean over rows of −cos(a, b), for `(B, D)` and `(B, D)`: a scalar in [−1, 1].
pub fn negative_cosine(a: &Tensor, b: &Tensor) -> Tensor {
    -Tensor::cosine_similarity(a, b, 1, 1e-8).mean(Kind::Float)
}

/// The matrix product in f32 of two f32 matrices. Autocast would take it to bf16, whose three digits are too few for
/// similarities over a small temperature or for covariances near 0.
fn matmul_f32(a: &Tensor, b: &Tensor) -> Tensor {
    if a.device().is_cuda() {
        return tch::autocast(false, || a.matmul(b));
    }
    // tch reaches CUDA's switch alone. On the CPU, autocast leaves f64 as it is.
    a.to_kind(Kind::Double).matmul(&b.to_kind(Kind::Double)).to_kind(Kind::Float)
}

/// NT-Xent (SimCLR, arXiv 2002.05709, eq. 1) of two views `(B, D)` and `(B, D)`: the cross-entropy, averaged over all
/// 2 B views, of finding the other view of the same image among the 2 B − 1 others by cosine similarity / temperature.
/// Also returns how often the other view is the most similar one. Two scalars.
pub fn nt_xent(a: &Tensor, b: &Tensor, temperature: f64) -> (Tensor, Tensor) {
    let images = a.size()[0];
    let z = l2_normalize(&Tensor::cat(&[a, b], 0), 1);
    let itself = Tensor::eye(2 * images, (Kind::Bool, z.device()));
    let logits = (matmul_f32(&z, &z.transpose(0, 1)) / temperature).masked_fill(&itself, f64::NEG_INFINITY);
    let number = Tensor::arange(images, (Kind::Int64, z.device()));
    let other = Tensor::cat(&[&number + images, number], 0);
    let found = logits.argmax(1, false).eq_tensor(&other);
    (logits.cross_entropy_for_logits(&other), found.to_kind(Kind::Float).mean(Kind::Float))
}

/// VICReg's variance term (arXiv 2105.04906, eq. 1) of `(B, D)`: the mean over dimensions of max(0, 1 − √(var + 10⁻⁴)),
/// with the unbiased variance, 0 for a single row. A scalar in [0, 1].
pub fn variance_loss(x: &Tensor) -> Tensor {
    let variance = centre(x).square().sum_dim_intlist([0i64].as_slice(), false, Kind::Float) / freedom(x);
    let deviation = (variance + 1e-4).sqrt();
    (deviation.neg() + 1.0).relu().mean(Kind::Float)
}

/// VICReg's covariance term (arXiv 2105.04906, eq. 4) of `(B, D)`: the squared unbiased covariances of different
/// dimensions, summed and divided by D; 0 for a single row. A scalar.
pub fn covariance_loss(x: &Tensor) -> Tensor {
    let centred = centre(x);
    let covariance = matmul_f32(&centred.transpose(0, 1), &centred) / freedom(x);
    let squares = covariance.square();
    (squares.sum(Kind::Float) - squares.diagonal(0, 0, 1).sum(Kind::Float)) / x.size()[1] as f64
}

/// `(B, D)` less the mean of its rows.
fn centre(x: &Tensor) -> Tensor {
    x - x.mean_dim([0i64].as_slice(), true, Kind::Float)
}

/// What unbiased moments of `(B, D)` divide by: B − 1. At least 1, so that a last validation batch of one image has a
/// loss.
fn freedom(x: &Tensor) -> f64 {
    (x.size()[0] - 1).max(1) as f64
}

/// How far the rows of `(B, D)` differ in direction: the standard deviation of each dimension of the unit vectors,
/// averaged, times √D. Near 0 where they have collapsed to one, near 1 where they point everywhere. A scalar without a
/// graph.
pub fn spread(x: &Tensor) -> Tensor {
    tch::no_grad(|| {
        let columns = x.size()[1] as f64;
        let unit = l2_normalize(&x.to_kind(Kind::Float), 1);
        unit.std_dim([0i64].as_slice(), false, false).mean(Kind::Float) * columns.sqrt()
    })
}
