//! Batch norm over rows of channels, in one pass with the ReLU and the sum that follow it.
//!
//! A network spends much of its time outside convolutions on reading and writing activations. Rows `(N, C)` are taken in
//! parts that stay in a core's cache; the parts do not depend on the number of threads, nor does the result.

use tch::Tensor;

use super::{BatchNorm, moments};
use crate::memory::{Element, filled, values, values_mut, vectorized};
use crate::{autograd, parallel, ranks};

/// What follows the norm.
#[derive(Clone, Copy)]
pub(super) enum Then<'a> {
    Nothing,
    Relu,
    /// The ReLU of the sum with this, of the same shape.
    AddRelu(&'a Tensor),
}

impl<'a> Then<'a> {
    /// What is added.
    pub(super) fn other(self) -> Option<&'a Tensor> {
        if let Then::AddRelu(other) = self { Some(other) } else { None }
    }
}

/// Numbers in a part at most: 128 KiB of f32.
const PART: usize = 1 << 15;
/// Rows in a part at most: sums within one are in f32, and lose the more the longer they are.
const ROWS: usize = 128;

/// Numbers in a part of whole rows.
fn part(channels: usize) -> usize {
    (PART / channels).clamp(1, ROWS) * channels
}

/// The coefficients of y = x · scale + shift for each channel, and what they come from.
struct Affine {
    scale: Vec<f32>,
    shift: Vec<f32>,
    mean: Vec<f32>,
    inverse_std: Vec<f32>,
    /// Rows of which mean and variance are, on all ranks.
    count: f64,
}

impl Affine {
    fn new(norm: &BatchNorm, mean: Vec<f32>, var: &[f32], count: f64) -> Self {
        let inverse_std: Vec<f32> =
            var.iter().map(|var| (1.0 / (f64::from(*var) + BatchNorm::EPS).sqrt()) as f32).collect();
        let (weight, bias) = (norm.weight.detach(), norm.bias.detach());
        let scale: Vec<f32> = values::<f32>(&weight).iter().zip(&inverse_std).map(|(w, s)| w * s).collect();
        let shift = values::<f32>(&bias).iter().zip(&mean).zip(&scale).map(|((b, m), s)| b - m * s).collect();
        Affine { scale, shift, mean, inverse_std, count }
    }
}

/// Batch norm of `x` `(N, C)` and what follows, with the batch's statistics, which also go into the running ones.
pub(super) fn train<T: Element>(norm: &BatchNorm, x: &Tensor, then: Then) -> Tensor {
    let rows = x.detach();
    let (mean, var) = moments_of(values::<T>(&rows), norm.weight.size()[0] as usize);
    let (count, mean, var) = moments::of_all_ranks(rows.size()[0] as f64, mean, var);
    let mean: Vec<f32> = mean.into_iter().map(|mean| mean as f32).collect();
    let var: Vec<f32> = var.into_iter().map(|var| var as f32).collect();
    update_running(norm, &mean, &var, count);
    let affine = Affine::new(norm, mean, &var, count);
    let y = apply::<T>(&rows, &affine, then);

    let weight = norm.weight.detach();
    match then {
        Then::AddRelu(other) => {
            let result = y.detach();
            autograd::record("BatchNormAddRelu", &[x, &norm.weight, &norm.bias, other], y, move |grad| {
                let grad = grad.contiguous();
                // What the ReLU lets through is the gradient of both terms of the sum.
                let mut passed = Tensor::empty_like(&grad);
                let sums = sums_of_passed::<T>(&grad, &result, &rows, &affine, values_mut(&mut passed));
                let [x, w, b] = gradients::<T>(&passed, &rows, &affine, &weight, f32::NEG_INFINITY, &sums);
                vec![x, w, b, Some(passed)]
            })
        }
        _ => {
            // A ReLU holds back what belongs to y ≤ 0, and as in PyTorch nothing where y is NaN.
            let threshold = if matches!(then, Then::Relu) { 0.0 } else { f32::NEG_INFINITY };
            autograd::record("BatchNorm", &[x, &norm.weight, &norm.bias], y, move |grad| {
                let grad = grad.contiguous();
                let parts = parts_of(values::<T>(&grad), &affine).zip(parts_of(values::<T>(&rows), &affine));
                let sums = sums(
                    parts,
                    affine.scale.len(),
                    #[inline(always)]
                    |(g, x), sums| add_gradients(g, x, &affine, threshold, sums),
                );
                gradients::<T>(&grad, &rows, &affine, &weight, threshold, &sums).into()
            })
        }
    }
}

/// The same with the running statistics, without a graph.
pub(super) fn eval<T: Element>(norm: &BatchNorm, x: &Tensor, then: Then) -> Tensor {
    let (mean, var) = (norm.running_mean.detach(), norm.running_var.detach());
    let affine = Affine::new(norm, values::<f32>(&mean).to_vec(), values::<f32>(&var), f64::NAN);
    apply::<T>(&x.detach(), &affine, then)
}

fn apply<T: Element>(x: &Tensor, affine: &Affine, then: Then) -> Tensor {
    filled(&x.size(), |y| {
        let (x, part) = (values::<T>(x), part(affine.scale.len()));
        match then {
            Then::AddRelu(other) => {
                let other = other.detach();
                let parts = x.chunks(part).zip(values::<T>(&other).chunks(part)).zip(y.chunks_mut(part));
                parallel::for_each(parts, |((x, other), y)| {
                    vectorized(
                        #[inline(always)]
                        || add_relu(x, other, affine, y),
                    )
                });
            }
            _ => {
                let floor = if matches!(then, Then::Relu) { 0.0 } else { f32::NEG_INFINITY };
                let parts = x.chunks(part).zip(y.chunks_mut(part));
                parallel::for_each(parts, |(x, y)| {
                    vectorized(
                        #[inline(always)]
                        || normalise(x, affine, floor, y),
                    )
                });
            }
        }
    })
}

/// Mean and biased variance of each channel.
fn moments_of<T: Element>(x: &[T], channels: usize) -> (Vec<f64>, Vec<f64>) {
    // Sums of differences from one of the values lose little to rounding where the mean is far from zero.
    let origin: Vec<f32> = x[..channels].iter().map(|x| x.widen()).collect();
    let parts = x.chunks(part(channels));
    let sums = sums(
        parts,
        channels,
        #[inline(always)]
        |x, sums| add_moments(x, &origin, sums),
    );
    let count = (x.len() / channels) as f64;
    let (first, second) = sums.split_at(channels);
    let of_channel = |((first, second), origin): ((&f64, &f64), &f32)| {
        let mean = first / count;
        (f64::from(*origin) + mean, variance(second / count - mean * mean))
    };
    first.iter().zip(second).zip(&origin).map(of_channel).unzip()
}

/// What rounding has made less than zero is zero; NaN stays so.
fn variance(difference: f64) -> f64 {
    if difference < 0.0 { 0.0 } else { difference }
}

pub(super) fn update_running(norm: &BatchNorm, mean: &[f32], var: &[f32], count: f64) {
    let unbias = (count / (count - 1.0)) as f32;
    let momentum = BatchNorm::MOMENTUM as f32;
    let mut running = norm.running_mean.detach();
    for (running, mean) in values_mut::<f32>(&mut running).iter_mut().zip(mean) {
        *running = momentum * mean + (1.0 - momentum) * *running;
    }
    let mut running = norm.running_var.detach();
    for (running, var) in values_mut::<f32>(&mut running).iter_mut().zip(var) {
        *running = momentum * (var * unbias) + (1.0 - momentum) * *running;
    }
}

fn parts_of<'a, T>(x: &'a [T], affine: &Affine) -> std::slice::Chunks<'a, T> {
    x.chunks(part(affine.scale.len()))
}

/// Writes to `passed` the gradients for which `y`, a ReLU's result, is not zero, and adds them up as [`add_gradients`].
fn sums_of_passed<T: Element>(
    grad: &Tensor,
    y: &Tensor,
    x: &Tensor,
    affine: &Affine,
    passed: &mut [T],
) -> Vec<f64> {
    let channels = affine.scale.len();
    let [g, y, x] = [grad, y, x].map(|tensor| parts_of(values::<T>(tensor), affine));
    sums(
        g.zip(y).zip(x).zip(passed.chunks_mut(part(channels))),
        channels,
        #[inline(always)]
        |(((g, y), x), passed), sums| {
            for ((g, y), passed) in g.iter().zip(y).zip(passed.iter_mut()) {
                *passed = if y.widen() <= 0.0 { T::narrow(0.0) } else { *g };
            }
            add_gradients(passed, x, affine, f32::NEG_INFINITY, sums);
        },
    )
}

/// The gradients of x, weight and bias from `grad`, as far as y is over the threshold, and its sums.
fn gradients<T: Element>(
    grad: &Tensor,
    x: &Tensor,
    affine: &Affine,
    weight: &Tensor,
    threshold: f32,
    sums: &[f64],
) -> [Option<Tensor>; 3] {
    let (g, rows) = (values::<T>(grad), values::<T>(x));
    let channels = affine.scale.len();
    let part = part(channels);
    let mut of_all = sums.to_vec();
    ranks::sum(&mut of_all);
    let (of_bias, of_product) = sums.split_at(channels);
    let of_weight: Vec<f32> =
        of_product.iter().zip(&affine.inverse_std).map(|(sum, s)| (sum * f64::from(*s)) as f32).collect();
    // ∂x = scale · (g − mean(g) − (x − mean) · inverse_std² · mean(g · (x − mean))), as scale · g + slope · x + offset.
    let coefficients = (0..channels).map(|c| {
        let (scale, s) = (f64::from(affine.scale[c]), f64::from(affine.inverse_std[c]));
        let slope = -scale * s * s * of_all[channels + c] / affine.count;
        let offset = -scale * of_all[c] / affine.count - slope * f64::from(affine.mean[c]);
        (slope as f32, offset as f32)
    });
    let (slope, offset): (Vec<f32>, Vec<f32>) = coefficients.unzip();
    let of_x = filled(&x.size(), |out| {
        let parts = g.chunks(part).zip(rows.chunks(part)).zip(out.chunks_mut(part));
        parallel::for_each(parts, |((g, x), out)| {
            vectorized(
                #[inline(always)]
                || gradient::<T>(g, x, affine, threshold, (&slope, &offset), out),
            );
        });
    });
    let of_bias: Vec<f32> = of_bias.iter().map(|sum| *sum as f32).collect();
    let shape = weight.size();
    let vector = |values: &[f32]| Some(Tensor::from_slice(values).view(shape.as_slice()));
    [Some(of_x), vector(&of_weight), vector(&of_bias)]
}

/// Two sums for each channel, of what `add` adds for each part: within a part in f32, over the parts in f64.
fn sums<P: Send>(
    parts: impl ExactSizeIterator<Item = P>,
    channels: usize,
    add: impl Fn(P, &mut [f32]) + Sync,
) -> Vec<f64> {
    let mut partial = vec![0.0f32; 2 * channels * parts.len()];
    parallel::for_each(parts.zip(partial.chunks_mut(2 * channels)), |(part, sums)| {
        vectorized(
            #[inline(always)]
            || add(part, sums),
        );
    });
    let mut total = vec![0.0f64; 2 * channels];
    for partial in partial.chunks(2 * channels) {
        total.iter_mut().zip(partial).for_each(|(total, partial)| *total += f64::from(*partial));
    }
    total
}

// The kernels: rows of as many numbers as there are channels, one after the other.

#[inline(always)]
fn normalise<T: Element>(x: &[T], affine: &Affine, floor: f32, y: &mut [T]) {
    let channels = affine.scale.len();
    let (scale, shift) = (&affine.scale[..channels], &affine.shift[..channels]);
    for (x, y) in x.chunks_exact(channels).zip(y.chunks_exact_mut(channels)) {
        for c in 0..channels {
            let value = x[c].widen().mul_add(scale[c], shift[c]);
            // Not `max`: it would make a number of what is none.
            y[c] = T::narrow(if value < floor { floor } else { value });
        }
    }
}

#[inline(always)]
fn add_relu<T: Element>(x: &[T], other: &[T], affine: &Affine, y: &mut [T]) {
    let channels = affine.scale.len();
    let (scale, shift) = (&affine.scale[..channels], &affine.shift[..channels]);
    let rows = x.chunks_exact(channels).zip(other.chunks_exact(channels)).zip(y.chunks_exact_mut(channels));
    for ((x, other), y) in rows {
        for c in 0..channels {
            let value = x[c].widen().mul_add(scale[c], shift[c]) + other[c].widen();
            y[c] = T::narrow(if value < 0.0 { 0.0 } else { value });
        }
    }
}

#[inline(always)]
fn add_moments<T: Element>(x: &[T], origin: &[f32], sums: &mut [f32]) {
    let channels = origin.len();
    let (first, second) = sums.split_at_mut(channels);
    let (first, second) = (&mut first[..channels], &mut second[..channels]);
    let mut fours = x.chunks_exact(4 * channels);
    for rows in &mut fours {
        let (a, rest) = rows.split_at(channels);
        let (b, rest) = rest.split_at(channels);
        let (c, d) = rest.split_at(channels);
        let d = &d[..channels];
        for i in 0..channels {
            let [a, b, c, d] = [a[i], b[i], c[i], d[i]].map(|x| x.widen() - origin[i]);
            first[i] += (a + b) + (c + d);
            second[i] += a.mul_add(a, b * b) + c.mul_add(c, d * d);
        }
    }
    for row in fours.remainder().chunks_exact(channels) {
        for i in 0..channels {
            let difference = row[i].widen() - origin[i];
            first[i] += difference;
            second[i] += difference * difference;
        }
    }
}

#[inline(always)]
fn passed<T: Element>(g: T, y: f32, threshold: f32) -> f32 {
    if y <= threshold { 0.0 } else { g.widen() }
}

/// Adds up g and g · (x − mean), where x · scale + shift is not below the threshold.
#[inline(always)]
fn add_gradients<T: Element>(g: &[T], x: &[T], affine: &Affine, threshold: f32, sums: &mut [f32]) {
    let channels = affine.scale.len();
    let (scale, shift, mean) =
        (&affine.scale[..channels], &affine.shift[..channels], &affine.mean[..channels]);
    let (first, second) = sums.split_at_mut(channels);
    let (first, second) = (&mut first[..channels], &mut second[..channels]);
    let (mut pairs_of_g, mut pairs_of_x) = (g.chunks_exact(2 * channels), x.chunks_exact(2 * channels));
    for (g, x) in (&mut pairs_of_g).zip(&mut pairs_of_x) {
        let ((g, h), (x, y)) = (g.split_at(channels), x.split_at(channels));
        for c in 0..channels {
            let (x, y) = (x[c].widen(), y[c].widen());
            let g = passed(g[c], x.mul_add(scale[c], shift[c]), threshold);
            let h = passed(h[c], y.mul_add(scale[c], shift[c]), threshold);
            first[c] += g + h;
            second[c] += g.mul_add(x - mean[c], h * (y - mean[c]));
        }
    }
    for (c, (g, x)) in pairs_of_g.remainder().iter().zip(pairs_of_x.remainder()).enumerate() {
        let x = x.widen();
        let g = passed(*g, x.mul_add(scale[c], shift[c]), threshold);
        first[c] += g;
        second[c] += g * (x - mean[c]);
    }
}

#[inline(always)]
fn gradient<T: Element>(
    g: &[T],
    x: &[T],
    affine: &Affine,
    threshold: f32,
    (slope, offset): (&[f32], &[f32]),
    out: &mut [T],
) {
    let channels = affine.scale.len();
    let (scale, shift) = (&affine.scale[..channels], &affine.shift[..channels]);
    let (slope, offset) = (&slope[..channels], &offset[..channels]);
    let rows = g.chunks_exact(channels).zip(x.chunks_exact(channels)).zip(out.chunks_exact_mut(channels));
    for ((g, x), out) in rows {
        for c in 0..channels {
            let x = x[c].widen();
            let g = passed(g[c], x.mul_add(scale[c], shift[c]), threshold);
            out[c] = T::narrow(g.mul_add(scale[c], x.mul_add(slope[c], offset[c])));
        }
    }
}
