//! Depthwise convolution at visible positions only: every tap is a row of the canvas times a row of weights.

use jepa_plugin_api::memory::{self, Element, values, vectorized};
use jepa_plugin_api::parallel;
use tch::Tensor;

use crate::canvas::{Canvas, Frame};
use crate::conv::{Geometry, Window};
use crate::visible::Places;

/// Channels whose sums a depthwise kernel keeps in registers.
const LANES: usize = 32;

/// `weight` `(C, 1, k, k)` as (k · k, C), in f32.
fn taps(weight: &Tensor) -> Tensor {
    weight.flatten(1, -1).tr().to_kind(tch::Kind::Float).contiguous()
}

pub(crate) fn forward<T: Element>(x: &Tensor, weight: &Tensor, geometry: &Geometry) -> Tensor {
    correlated::<T>(&geometry.canvas::<T>(x), &taps(weight), geometry.window, &geometry.to)
}

/// The gradient of x, for a stride of 1.
pub(crate) fn backward<T: Element>(grad: &Tensor, weight: &Tensor, geometry: &Geometry) -> Tensor {
    let back = geometry.reversed();
    correlated::<T>(&back.canvas::<T>(grad), &taps(&weight.flip([2, 3])), back.window, &back.to)
}

/// Outputs that one call of a depthwise kernel makes.
const OUTPUTS: usize = 64;

fn correlated<T: Element>(canvas: &Canvas, taps: &Tensor, window: Window, to: &Places) -> Tensor {
    let (frame, outputs) = (canvas.frame(), to.at.len());
    let (map, taps, channels) = (values::<T>(&canvas.map), values::<f32>(taps), frame.channels);
    memory::filled(&[outputs as i64, channels as i64], |y: &mut [T]| {
        let parts = (0..outputs).step_by(OUTPUTS).zip(y.chunks_mut(OUTPUTS * channels));
        parallel::for_each(parts, |(first, y)| {
            let starts: Vec<usize> = window.starts(frame, to, first..first + y.len() / channels).collect();
            vectorized(
                #[inline(always)]
                || correlate(map, &starts, (window.kernel, frame), taps, y),
            );
        });
    })
}

pub(crate) fn weight_gradient<T: Element>(
    grad: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    geometry: &Geometry,
) -> Tensor {
    let (canvas, Geometry { window, to, .. }) = (geometry.canvas::<T>(x), geometry);
    let (frame, outputs, kernel) = (canvas.frame(), to.at.len(), window.kernel);
    let (map, grad, channels) = (values::<T>(&canvas.map), values::<T>(grad), frame.channels);
    // Sums are in f32 within a part of these many outputs, whatever the number of threads.
    let part = 16 * OUTPUTS;
    let size = kernel * kernel * channels;
    let mut sums = vec![0.0f32; size * outputs.div_ceil(part)];
    parallel::for_each((0..outputs).step_by(part).zip(sums.chunks_mut(size)), |(first, sums)| {
        let starts = window.starts(frame, to, first..(first + part).min(outputs));
        let grads = grad[first * channels..].chunks_exact(channels);
        vectorized(
            #[inline(always)]
            || {
                for (start, grad) in starts.zip(grads) {
                    add_products(map, start, (kernel, frame), grad, sums);
                }
            },
        );
    });
    let sums = Tensor::from_slice(&sums).view([-1, size as i64]).sum_dim_intlist(0, false, tch::Kind::Double);
    sums.view([(kernel * kernel) as i64, -1]).tr().to_kind(weight.kind()).reshape(weight.size())
}

/// y\[i, c\] = Σ over taps of map\[starts\[i\] + tap, c\] · taps\[tap, c\].
#[inline(always)]
fn correlate<T: Element>(
    map: &[T],
    starts: &[usize],
    (kernel, frame): (usize, Frame),
    taps: &[f32],
    y: &mut [T],
) {
    let Frame { channels, pitch, .. } = frame;
    for (start, y) in starts.iter().zip(y.chunks_exact_mut(channels)) {
        let mut c = 0;
        while c + LANES <= channels {
            let mut sums = [0.0f32; LANES];
            for ky in 0..kernel {
                for kx in 0..kernel {
                    let seen = &map[start + ky * pitch + kx * channels + c..][..LANES];
                    let tap = &taps[(ky * kernel + kx) * channels + c..][..LANES];
                    for lane in 0..LANES {
                        sums[lane] = seen[lane].widen().mul_add(tap[lane], sums[lane]);
                    }
                }
            }
            for (y, sum) in y[c..c + LANES].iter_mut().zip(sums) {
                *y = T::narrow(sum);
            }
            c += LANES;
        }
        for c in c..channels {
            let mut sum = 0.0f32;
            for ky in 0..kernel {
                for kx in 0..kernel {
                    let seen = map[start + ky * pitch + kx * channels + c];
                    sum = seen.widen().mul_add(taps[(ky * kernel + kx) * channels + c], sum);
                }
            }
            y[c] = T::narrow(sum);
        }
    }
}

/// sums\[tap, c\] += map\[start + tap, c\] · grad\[c\].
#[inline(always)]
fn add_products<T: Element>(
    map: &[T],
    start: usize,
    (kernel, frame): (usize, Frame),
    grad: &[T],
    sums: &mut [f32],
) {
    let Frame { channels, pitch, .. } = frame;
    for (tap, sums) in sums.chunks_exact_mut(channels).enumerate() {
        let seen = &map[start + tap / kernel * pitch + tap % kernel * channels..][..channels];
        for c in 0..channels {
            sums[c] = seen[c].widen().mul_add(grad[c].widen(), sums[c]);
        }
    }
}
