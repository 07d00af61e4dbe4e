//! Convolution at visible positions only.
//!
//! The neighbourhoods of visible outputs, K = k · k · C numbers each, are copied from a canvas into the rows of a panel,
//! and a matrix product with the weights makes the outputs of them: all that is computed is visible. A panel holds some
//! hundred rows and is used again for the next ones, so it stays in the cache, and nothing of it is kept for the backward
//! pass.

use std::ops::Range;
use std::sync::Arc;

use jepa_plugin_api::memory::{Element, values, values_mut, vectorized};
use jepa_plugin_api::nn::Conv2d;
use jepa_plugin_api::{autograd, parallel};
use tch::{Device, Tensor};

use crate::canvas::{Canvas, Frame, for_element};
use crate::depthwise::{
    backward as depthwise_backward, forward as depthwise_forward,
    weight_gradient as depthwise_weight_gradient,
};
use crate::visible::{Level, Places, Size};

/// The square that a convolution or a pool looks at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub kernel: usize,
    pub stride: usize,
    pub padding: usize,
}

impl Window {
    pub fn of(conv: &Conv2d) -> Self {
        let [kernel, stride, padding] = [conv.kernel(), conv.stride, conv.padding].map(|x| x as usize);
        Window { kernel, stride, padding }
    }

    /// The size of the map that it makes of one of this size.
    ///
    /// # Panics
    /// When that has no room for the kernel.
    pub fn map_size(&self, (height, width): Size) -> Size {
        let [kernel, stride, padding] = [self.kernel, self.stride, self.padding].map(|x| x as i64);
        let room = height.min(width) + 2 * padding;
        assert!(
            room >= kernel,
            "a map of {height} × {width}, with padding {padding}, has no room for a kernel of {kernel}"
        );
        ((height + 2 * padding - kernel) / stride + 1, (width + 2 * padding - kernel) / stride + 1)
    }

    /// Where the window of an output begins, in its image on a canvas whose border is the padding.
    #[inline(always)]
    pub fn start(&self, (y, x): (u32, u32), frame: Frame) -> usize {
        (y as usize * frame.pitch + x as usize * frame.channels) * self.stride
    }

    /// The same on the whole canvas, for each of these outputs.
    pub fn starts(self, frame: Frame, to: &Places, outputs: Range<usize>) -> impl Iterator<Item = usize> {
        let mut image = to.starts.partition_point(|start| *start <= outputs.start) - 1;
        outputs.map(move |i| {
            while i >= to.starts[image + 1] {
                image += 1;
            }
            image * frame.area + self.start(to.at[i], frame)
        })
    }

    /// Of a stride of 1: the window through which an input is seen by the outputs that it goes into.
    fn reversed(&self) -> Self {
        Window { padding: self.kernel - 1 - self.padding, ..*self }
    }
}

/// The outputs of a convolution, at `to`, and the inputs that their windows see, at `from`.
pub(crate) struct Geometry {
    pub window: Window,
    pub from: Arc<Places>,
    pub to: Arc<Places>,
}

impl Geometry {
    /// Of a stride of 1: the inputs, as outputs of the gradient's way back.
    pub fn reversed(&self) -> Self {
        Geometry { window: self.window.reversed(), from: Arc::clone(&self.to), to: Arc::clone(&self.from) }
    }

    /// The canvas that the windows look at, with `rows` at the inputs.
    pub fn canvas<T: Element>(&self, rows: &Tensor) -> Canvas {
        Canvas::paint::<T>(rows, &self.from, self.window.padding)
    }
}

/// Whether each channel has a kernel of its own, and sees no other.
pub(crate) fn is_depthwise(conv: &Conv2d) -> bool {
    conv.groups > 1 && conv.groups == conv.weight.size()[0] && conv.weight.size()[1] == 1
}

/// `rows` `(N, C)` at the visible positions of one map to `(N', C')` at those of the next.
pub(crate) fn conv(rows: &Tensor, conv: &Conv2d, from: &Level, to: &Level) -> Tensor {
    let (rows, weight) = (autograd::autocast(rows), autograd::autocast(&conv.weight));
    let (x, w) = (rows.detach().contiguous(), weight.detach());
    let (from, to) = (Arc::clone(&from.places), Arc::clone(&to.places));
    let geometry = Geometry { window: Window::of(conv), from, to };
    let grads = [&rows, &weight].map(autograd::is_recorded);
    let depthwise = is_depthwise(conv);

    let (y, name) = match depthwise {
        false => (for_element!(x, forward(&x, &w, &geometry)), "SparseConv"),
        true => (for_element!(x, depthwise_forward(&x, &w, &geometry)), "SparseDepthwiseConv"),
    };
    let y = autograd::record(name, &[&rows, &weight], y, move |grad| {
        let grad = grad.contiguous();
        let of_x = grads[0].then(|| match (depthwise, geometry.window.stride) {
            (true, _) => for_element!(x, depthwise_backward(&grad, &w, &geometry)),
            (false, 1) => for_element!(x, backward(&grad, &w, &geometry)),
            (false, _) => for_element!(x, backward_strided(&grad, &w, &geometry)),
        });
        let of_weight = grads[1].then(|| match depthwise {
            false => for_element!(x, weight_gradient(&grad, &x, &w, &geometry)),
            true => for_element!(x, depthwise_weight_gradient(&grad, &x, &w, &geometry)),
        });
        vec![of_x, of_weight]
    });
    match &conv.bias {
        None => y,
        Some(bias) => &y + bias.to_kind(y.kind()),
    }
}

/// Numbers in a panel, unless that are too few rows for an efficient product.
const PANEL: usize = 1 << 19;
const LEAST_ROWS: usize = 512;

/// The outputs of a panel of K columns each, one after the other.
fn panels(outputs: usize, columns: usize) -> impl Iterator<Item = Range<usize>> {
    let rows = (PANEL / columns).max(LEAST_ROWS);
    (0..outputs).step_by(rows).map(move |first| first..(first + rows).min(outputs))
}

/// An empty panel for [`panels`].
fn panel<T: Element>(outputs: usize, columns: usize) -> Tensor {
    let rows = panels(outputs, columns).next().map_or(0, |first| first.len());
    Tensor::empty([rows as i64, columns as i64], (T::KIND, Device::Cpu))
}

fn part(x: &Tensor, range: &Range<usize>) -> Tensor {
    x.narrow(0, range.start as i64, range.len() as i64)
}

/// Copies what the windows of some outputs see on the canvas, in the order (ky, kx, C), into the panel's first rows.
fn fill<T: Element>(
    panel: &mut Tensor,
    canvas: &Canvas,
    window: Window,
    to: &Places,
    outputs: &Range<usize>,
) -> Tensor {
    let (frame, map) = (canvas.frame(), values::<T>(&canvas.map));
    let line = window.kernel * frame.channels;
    let columns = window.kernel * line;
    // A few rows for each thread at a time.
    const ROWS: usize = 32;
    let rows = values_mut::<T>(panel)[..outputs.len() * columns].chunks_mut(ROWS * columns);
    parallel::for_each(outputs.clone().step_by(ROWS).zip(rows), |(first, rows)| {
        let starts = window.starts(frame, to, first..first + rows.len() / columns);
        for (start, row) in starts.zip(rows.chunks_exact_mut(columns)) {
            for (ky, line) in row.chunks_exact_mut(line).enumerate() {
                line.copy_from_slice(&map[start + ky * frame.pitch..][..line.len()]);
            }
        }
    });
    panel.narrow(0, 0, outputs.len() as i64)
}

/// What a panel filled through `window` is multiplied with, `(K, C')`, summed up for all of `outputs`.
fn product<T: Element>(canvas: &Canvas, matrix: &Tensor, window: Window, to: &Places) -> Tensor {
    let outputs = to.at.len();
    let [columns, channels] = matrix.size()[..] else { unreachable!("a matrix has two dimensions") };
    let mut panel = panel::<T>(outputs, columns as usize);
    let y = Tensor::empty([outputs as i64, channels], (T::KIND, Device::Cpu));
    for outputs in panels(outputs, columns as usize) {
        let seen = fill::<T>(&mut panel, canvas, window, to, &outputs);
        let _ = seen.mm_out(&part(&y, &outputs), matrix);
    }
    y
}

fn forward<T: Element>(x: &Tensor, weight: &Tensor, geometry: &Geometry) -> Tensor {
    let matrix = weight.permute([0, 2, 3, 1]).flatten(1, -1).tr();
    product::<T>(&geometry.canvas::<T>(x), &matrix, geometry.window, &geometry.to)
}

/// The gradient of x for a stride of 1: a convolution of that of y with the weights turned round.
fn backward<T: Element>(grad: &Tensor, weight: &Tensor, geometry: &Geometry) -> Tensor {
    let back = geometry.reversed();
    let matrix = weight.flip([2, 3]).permute([2, 3, 0, 1]).flatten(0, 2).contiguous();
    product::<T>(&back.canvas::<T>(grad), &matrix, back.window, &back.to)
}

/// The gradient of x for any stride: what every output has to say to its window, added up on a canvas.
fn backward_strided<T: Element>(grad: &Tensor, weight: &Tensor, geometry: &Geometry) -> Tensor {
    let Geometry { window, from, to } = geometry;
    let channels = weight.size()[1] as usize;
    let line = window.kernel * channels;
    let columns = window.kernel * line;
    let matrix = weight.permute([0, 2, 3, 1]).flatten(1, -1).contiguous();
    let mut canvas = Canvas::blank::<T>(from, channels, window.padding);
    let frame = canvas.frame();
    let mut images = values_mut::<T>(&mut canvas.map).chunks_mut(frame.area);
    // Whole images, so that no two threads add to one.
    let mut first = 0;
    while first < to.images() {
        let start = to.starts[first];
        let fits = |end: &&usize| (**end - start) * columns <= 4 * PANEL;
        let some = to.starts[first + 1..].iter().take_while(fits).count().max(1);
        let last = first + some;
        let said = part(grad, &(start..to.starts[last])).mm(&matrix);
        let said = values::<T>(&said);
        parallel::for_each((first..last).zip(images.by_ref().take(some)), |(i, image)| {
            let outputs = to.starts[i]..to.starts[i + 1];
            let said = said[(outputs.start - start) * columns..].chunks_exact(columns);
            vectorized(
                #[inline(always)]
                || {
                    for (at, said) in to.at[outputs].iter().zip(said) {
                        let start = window.start(*at, frame);
                        for (ky, said) in said.chunks_exact(line).enumerate() {
                            for (sum, said) in image[start + ky * frame.pitch..][..line].iter_mut().zip(said)
                            {
                                *sum = T::narrow(sum.widen() + said.widen());
                            }
                        }
                    }
                },
            );
        });
        first = last;
    }
    canvas.pick::<T>(from)
}

fn weight_gradient<T: Element>(grad: &Tensor, x: &Tensor, weight: &Tensor, geometry: &Geometry) -> Tensor {
    let (canvas, Geometry { window, to, .. }) = (geometry.canvas::<T>(x), geometry);
    let &[outputs, inputs, kernel, _] = weight.size().as_slice() else {
        unreachable!("the weights of a convolution have four dimensions")
    };
    let columns = (inputs * kernel * kernel) as usize;
    let mut panel = panel::<T>(to.at.len(), columns);
    // Sums of many bf16 products would lose their last ones.
    let mut sum = Tensor::zeros([outputs, columns as i64], (tch::Kind::Float, Device::Cpu));
    for range in panels(to.at.len(), columns) {
        let seen = fill::<T>(&mut panel, &canvas, *window, to, &range);
        let grad = part(grad, &range).tr();
        let _ = match T::KIND {
            tch::Kind::Float => sum.addmm_(&grad, &seen),
            _ => sum.g_add_(&grad.mm(&seen)),
        };
    }
    sum.view([outputs, kernel, kernel, inputs]).permute([0, 3, 1, 2]).to_kind(weight.kind())
}
