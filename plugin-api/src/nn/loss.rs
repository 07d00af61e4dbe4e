//! Losses and what they are made of.

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
