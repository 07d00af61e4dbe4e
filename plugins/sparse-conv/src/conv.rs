//! Convolution at visible positions only, by windows.
//!
//! Visible inputs are painted on a canvas, and the windows of visible outputs are multiplied with the weights: all that is
//! computed is visible. In fp32 the product reads the windows where they lie on the canvas
//! ([`matmul`](jepa_plugin_api::matmul)); for bf16, whose products libtorch does best, they are copied into a panel of some
//! hundred rows, which is used again for the next ones and so stays in the cache.
//!
//! The gradient of the input is a convolution again, of the gradient of the output with the weights turned round. With a
//! stride, an input meets every stride-th tap only, and which of them follows from its position: positions are sorted into
//! stride² phases, and each is a convolution with the taps that it meets.

use std::ops::Range;
use std::sync::Arc;

use jepa_plugin_api::matmul::Layout;
use jepa_plugin_api::memory::{Element, filled, values};
use jepa_plugin_api::nn::Conv2d;
use jepa_plugin_api::{autograd, parallel};
use tch::Tensor;

use crate::canvas::{Canvas, Frame, for_element};
use crate::depthwise::{
    backward as depthwise_backward, forward as depthwise_forward,
    weight_gradient as depthwise_weight_gradient,
};
use crate::product::{Product, Windows};
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

    /// What the windows of the outputs look at, and where each begins: the canvas, or `rows` themselves for windows of a
    /// single position.
    fn seen<T: Element>(&self, rows: &Tensor) -> (Tensor, Windows) {
        if let Some(places) = self.single_positions() {
            let channels = rows.size()[1] as usize;
            let starts = places.into_iter().map(|place| place * channels).collect();
            return (rows.shallow_clone(), Windows { starts, lines: 1, line: channels, pitch: 0 });
        }
        let canvas = self.canvas::<T>(rows);
        let (frame, lines) = (canvas.frame(), self.window.kernel);
        let starts = self.window.starts(frame, &self.to, 0..self.to.at.len()).collect();
        (canvas.map, Windows { starts, lines, line: lines * frame.channels, pitch: frame.pitch })
    }

    /// For windows of one position: which of the inputs each output sees, if all of these are visible.
    fn single_positions(&self) -> Option<Vec<usize>> {
        let Window { kernel: 1, stride, padding: 0 } = self.window else { return None };
        let images = self.to.starts.windows(2).zip(&self.from.starts).zip(self.from.starts[1..].iter());
        let of_image = |((to, from), end): ((&[usize], &usize), &usize)| {
            let inputs = &self.from.at[*from..*end];
            let seen = |(y, x): &(u32, u32)| (y * stride as u32, x * stride as u32);
            let place = |at: &(u32, u32)| inputs.binary_search(&seen(at)).ok().map(|place| from + place);
            self.to.at[to[0]..to[1]].iter().map(place).collect::<Vec<_>>()
        };
        images.flat_map(of_image).collect()
    }
}

/// Whether each channel has a kernel of its own, and sees no other.
pub(crate) fn is_depthwise(conv: &Conv2d) -> bool {
    conv.groups > 1 && conv.groups == conv.weight.size()[0] && conv.weight.size()[1] == 1
}

/// `rows` `(N, C)` at the visible positions of one map to `(N', C')` at those of the next.
pub(crate) fn conv(rows: &Tensor, conv: &Conv2d, from: &Level, to: &Level) -> Tensor {
    let (rows, weight) = (autograd::autocast(rows), autograd::autocast(&conv.weight));
    let [x, w] = [&rows, &weight].map(|x| x.detach().contiguous());
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
        let of_x = grads[0].then(|| match depthwise {
            false => for_element!(x, backward(&grad, &w, &geometry)),
            true => for_element!(x, depthwise_backward(&grad, &w, &geometry)),
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

/// C', C and k.
fn sides(weight: &Tensor) -> [usize; 3] {
    let shape = weight.size();
    [shape[0], shape[1], shape[3]].map(|side| side as usize)
}

/// Where the weights `(C', C, k, k)` are in the product with windows `(k, k, C)`.
fn layout(weight: &Tensor) -> Layout {
    let [outputs, inputs, kernel] = sides(weight);
    Layout::convolution(outputs, inputs, kernel)
}

fn forward<T: Product>(x: &Tensor, weight: &Tensor, geometry: &Geometry) -> Tensor {
    let (seen, windows) = geometry.seen::<T>(x);
    T::product(values(&seen), &windows, values(weight), &layout(weight))
}

fn weight_gradient<T: Product>(grad: &Tensor, x: &Tensor, weight: &Tensor, geometry: &Geometry) -> Tensor {
    let (seen, windows) = geometry.seen::<T>(x);
    filled(&weight.size(), |out| T::gradient(values(&seen), &windows, grad, &layout(weight), out))
}

/// The inputs at positions with (y + padding) mod stride = `first.0`, and so for x: they meet the taps `first`, `first` +
/// stride, … of the kernel.
struct Phase {
    first: (usize, usize),
    /// How many taps these are.
    taps: (usize, usize),
    /// Where each input's window on the canvas of the outputs' gradients begins.
    starts: Vec<usize>,
}

/// The gradient of x. An input at y meets tap t of the output at (y + padding − t) / stride, where that is whole.
fn backward<T: Product>(grad: &Tensor, weight: &Tensor, geometry: &Geometry) -> Tensor {
    let Geometry { window: Window { kernel, stride, padding }, from, to } = geometry;
    let [outputs, inputs, _] = sides(weight);
    let taps_from = |first: usize| kernel.saturating_sub(first).div_ceil(*stride);
    // The last output that an input meets, and how far such windows reach over the outputs' map.
    let last = |at: usize, first: usize| (at + padding - first) / stride;
    let over = |side: usize, outputs: usize| {
        // Before the map by what a phase's first input looks back further than it has outputs behind it.
        let before = |first: usize| {
            (taps_from(first) - 1).saturating_sub(padding.saturating_sub(first).div_ceil(*stride))
        };
        // Behind it by at most what the last input of any phase reaches.
        let behind = ((side - 1 + padding) / stride).saturating_sub(outputs - 1);
        (0..*kernel.min(stride)).map(before).fold(behind, usize::max)
    };
    let border = over(from.height, to.height).max(over(from.width, to.width));
    let canvas = Canvas::paint::<T>(grad, to, border);
    let frame = canvas.frame();

    let mut phases: Vec<Phase> = (0..stride * stride)
        .map(|i| (i / stride, i % stride))
        .map(|first| Phase { first, taps: (taps_from(first.0), taps_from(first.1)), starts: Vec::new() })
        .collect();
    let mut rows = Vec::with_capacity(from.at.len());
    for (image, range) in from.starts.windows(2).map(|at| at[0]..at[1]).enumerate() {
        for &(y, x) in &from.at[range] {
            let (y, x) = (y as usize, x as usize);
            let number = (y + padding) % stride * stride + (x + padding) % stride;
            let phase = &mut phases[number];
            rows.push((number, phase.starts.len()));
            let begin = |at: usize, first: usize, taps: usize| last(at, first) + border + 1 - taps;
            if phase.taps.0 > 0 && phase.taps.1 > 0 {
                let line = begin(y, phase.first.0, phase.taps.0);
                let column = begin(x, phase.first.1, phase.taps.1);
                phase.starts.push(image * frame.area + line * frame.pitch + column * frame.channels);
            }
        }
    }
    let products: Vec<Option<Tensor>> = phases
        .into_iter()
        .map(|phase| {
            let (lines, columns) = phase.taps;
            if phase.starts.is_empty() {
                return None;
            }
            let tap = |line: usize, column: usize| {
                (phase.first.0 + (lines - 1 - line) * stride) * kernel
                    + phase.first.1
                    + (columns - 1 - column) * stride
            };
            let area = kernel * kernel;
            let layout = Layout {
                taps: (0..lines * columns).map(|i| tap(i / columns, i % columns)).collect(),
                inner: (outputs, inputs * area),
                columns: (inputs, area),
            };
            let windows =
                Windows { starts: phase.starts, lines, line: columns * outputs, pitch: frame.pitch };
            Some(T::product(values(&canvas.map), &windows, values(weight), &layout))
        })
        .collect();
    if let [Some(product)] = products.as_slice() {
        return product.shallow_clone();
    }
    let products: Vec<&[T]> =
        products.iter().map(|product| product.as_ref().map_or(&[][..], |product| values(product))).collect();
    const ROWS: usize = 256;
    filled(&[rows.len() as i64, inputs as i64], |out: &mut [T]| {
        let parts = rows.chunks(ROWS).zip(out.chunks_mut(ROWS * inputs));
        parallel::for_each(parts, |(rows, out)| {
            for (&(phase, row), out) in rows.iter().zip(out.chunks_exact_mut(inputs)) {
                match products[phase].get(row * inputs..(row + 1) * inputs) {
                    Some(gradient) => out.copy_from_slice(gradient),
                    // No tap meets it.
                    None => out.fill(T::default()),
                }
            }
        });
    })
}
