//! Max-pool at visible positions.

use std::sync::Arc;

use jepa_plugin_api::memory::{self, Element, values, values_mut, vectorized};
use jepa_plugin_api::{autograd, parallel};
use tch::Tensor;

use crate::canvas::{Canvas, for_element};
use crate::conv::Window;
use crate::visible::{Level, Places};

/// Whether the kernels here can compute it; libtorch refuses some of the rest, with its reasons.
pub(crate) fn takes(window: Window) -> bool {
    2 * window.padding <= window.kernel && window.kernel.pow(2) <= 256
}

/// `rows` `(N, C)` to `(N', C)`: a window sees zeros at hidden positions, and nothing beyond the map's edge.
pub(crate) fn max_pool(rows: &Tensor, window: Window, from: &Level, to: &Level) -> Tensor {
    let (from, to) = (Arc::clone(&from.places), Arc::clone(&to.places));
    let x = rows.detach().contiguous();
    let (y, greatest) = for_element!(x, forward(&x, window, &from, &to));
    autograd::record("SparseMaxPool", &[rows], y, move |grad| {
        vec![Some(for_element!(grad, backward(&grad.contiguous(), &greatest, window, &from, &to)))]
    })
}

/// The lines and columns of a window that lie on a map of this side.
#[inline(always)]
fn inside(start: u32, window: Window, side: usize) -> std::ops::Range<usize> {
    let first = start as usize * window.stride;
    window.padding.saturating_sub(first)..window.kernel.min(side + window.padding - first)
}

/// And which of the window's places has the greatest value, the first of equals as in PyTorch, for each output.
fn forward<T: Element>(x: &Tensor, window: Window, from: &Places, to: &Places) -> (Tensor, Vec<u8>) {
    let canvas = Canvas::paint::<T>(x, from, window.padding);
    let frame = canvas.frame();
    let channels = frame.channels;
    let mut greatest = vec![0u8; to.at.len() * channels];
    let y = memory::filled::<T>(&[to.at.len() as i64, channels as i64], |y| {
        let images = values::<T>(&canvas.map).chunks(frame.area);
        let outputs = to.images_of_mut(y, channels).zip(to.images_of_mut(&mut greatest, channels));
        parallel::for_each(images.zip(outputs), |(image, ((range, y), (_, greatest)))| {
            let rows = y.chunks_exact_mut(channels).zip(greatest.chunks_exact_mut(channels));
            vectorized(
                #[inline(always)]
                || {
                    for (at, (y, greatest)) in to.at[range].iter().zip(rows) {
                        let start = window.start(*at, frame);
                        let mut is_first = true;
                        for ky in inside(at.0, window, from.height) {
                            for kx in inside(at.1, window, from.width) {
                                let seen = &image[start + ky * frame.pitch + kx * channels..][..channels];
                                let tap = (ky * window.kernel + kx) as u8;
                                take_greater(seen, tap, is_first, y, greatest);
                                is_first = false;
                            }
                        }
                    }
                },
            );
        });
    });
    (y, greatest)
}

#[inline(always)]
fn take_greater<T: Element>(seen: &[T], tap: u8, is_first: bool, y: &mut [T], greatest: &mut [u8]) {
    for ((seen, y), greatest) in seen.iter().zip(y).zip(greatest) {
        let value = seen.widen();
        if is_first || value > y.widen() || value.is_nan() {
            *y = *seen;
            *greatest = tap;
        }
    }
}

fn backward<T: Element>(
    grad: &Tensor,
    greatest: &[u8],
    window: Window,
    from: &Places,
    to: &Places,
) -> Tensor {
    let channels = grad.size()[1] as usize;
    let mut canvas = Canvas::blank::<T>(from, channels, window.padding);
    let frame = canvas.frame();
    let images = values_mut::<T>(&mut canvas.map).chunks_mut(frame.area);
    let outputs = to.images_of(values::<T>(grad), channels).zip(to.images_of(greatest, channels));
    parallel::for_each(images.zip(outputs), |(image, ((range, grad), (_, greatest)))| {
        let rows = grad.chunks_exact(channels).zip(greatest.chunks_exact(channels));
        for (at, (grad, greatest)) in to.at[range].iter().zip(rows) {
            let start = window.start(*at, frame);
            for (c, (grad, tap)) in grad.iter().zip(greatest).enumerate() {
                let (ky, kx) = (*tap as usize / window.kernel, *tap as usize % window.kernel);
                let sum = &mut image[start + ky * frame.pitch + kx * channels + c];
                *sum = T::narrow(sum.widen() + grad.widen());
            }
        }
    });
    canvas.pick::<T>(from)
}
