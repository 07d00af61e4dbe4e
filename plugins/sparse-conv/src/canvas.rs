//! Between rows at visible positions and whole maps with zeros at the others.
//!
//! A kernel that looks at neighbours finds them on a canvas: the whole map, channels last, with a border, into which the
//! visible rows are copied. That costs little beside the work on what it finds there, and needs no table of neighbours.

use std::ops::Range;
use std::sync::Arc;

use jepa_plugin_api::memory::{Element, values, values_mut};
use jepa_plugin_api::{autograd, memory, parallel};
use tch::{Device, Kind, Tensor};

use crate::cuda;
use crate::visible::{Level, Places};

/// Calls a function of an element type for that of a tensor.
macro_rules! for_element {
    ($tensor:expr, $function:ident $arguments:tt) => {
        match $tensor.kind() {
            tch::Kind::Float => $function::<f32> $arguments,
            tch::Kind::BFloat16 => $function::<jepa_plugin_api::memory::bf16> $arguments,
            kind => panic!("sparse convolution on the CPU computes in fp32 or bf16, not in {kind:?}"),
        }
    };
}
pub(crate) use for_element;

/// Whether the kernels of this crate for the CPU take it.
pub(crate) fn has_kernels(x: &Tensor) -> bool {
    x.device() == Device::Cpu && matches!(x.kind(), Kind::Float | Kind::BFloat16)
}

/// Maps `(B, H + 2 · border, W + 2 · border, C)`, contiguous.
pub(crate) struct Canvas {
    pub map: Tensor,
    border: usize,
}

impl Canvas {
    /// Zeros.
    pub fn blank<T: Element>(places: &Places, channels: usize, border: usize) -> Self {
        let sides = [places.images(), places.height + 2 * border, places.width + 2 * border, channels];
        Canvas { map: Tensor::zeros(sides.map(|side| side as i64), (T::KIND, Device::Cpu)), border }
    }

    /// Zeros, but for `rows` `(N, C)` at visible positions.
    pub fn paint<T: Element>(rows: &Tensor, places: &Places, border: usize) -> Self {
        let channels = rows.size()[1] as usize;
        let mut canvas = Self::blank::<T>(places, channels, border);
        let (frame, rows) = (canvas.frame(), values::<T>(rows));
        let images = values_mut::<T>(&mut canvas.map).chunks_mut(frame.area);
        parallel::for_each(images.zip(places.images_of(rows, channels)), |(image, (range, rows))| {
            for (at, row) in places.at[range].iter().zip(rows.chunks_exact(channels)) {
                image[frame.at(*at, border)].copy_from_slice(row);
            }
        });
        canvas
    }

    /// The rows `(N, C)` at visible positions.
    pub fn pick<T: Element>(&self, places: &Places) -> Tensor {
        let (frame, border) = (self.frame(), self.border);
        let channels = frame.channels;
        memory::filled::<T>(&[places.at.len() as i64, channels as i64], |rows| {
            let images = values::<T>(&self.map).chunks(frame.area);
            parallel::for_each(images.zip(places.images_of_mut(rows, channels)), |(image, (range, rows))| {
                for (at, row) in places.at[range].iter().zip(rows.chunks_exact_mut(channels)) {
                    row.copy_from_slice(&image[frame.at(*at, border)]);
                }
            });
        })
    }

    /// How the numbers lie in memory.
    pub fn frame(&self) -> Frame {
        let [_, height, width, channels] = self.map.size()[..] else {
            unreachable!("a canvas has four dimensions")
        };
        let (channels, pitch) = (channels as usize, (width * channels) as usize);
        Frame { channels, pitch, area: height as usize * pitch }
    }
}

/// Where the numbers of a canvas are.
#[derive(Clone, Copy)]
pub(crate) struct Frame {
    /// C.
    pub channels: usize,
    /// From a row of an image to the next.
    pub pitch: usize,
    /// From an image to the next.
    pub area: usize,
}

impl Frame {
    /// A position's channels in its image, behind a border.
    fn at(self, (y, x): (u32, u32), border: usize) -> Range<usize> {
        let start = (y as usize + border) * self.pitch + (x as usize + border) * self.channels;
        start..start + self.channels
    }
}

impl Places {
    /// `rows` of C numbers, split into those of each image, with the numbers of their positions.
    pub fn images_of<'a, T>(
        &'a self,
        rows: &'a [T],
        channels: usize,
    ) -> impl Iterator<Item = (Range<usize>, &'a [T])> {
        self.starts.windows(2).map(move |at| (at[0]..at[1], &rows[at[0] * channels..at[1] * channels]))
    }

    /// The same, to be changed.
    pub fn images_of_mut<'a, T>(
        &'a self,
        mut rows: &'a mut [T],
        channels: usize,
    ) -> impl Iterator<Item = (Range<usize>, &'a mut [T])> {
        self.starts.windows(2).map(move |at| {
            let (image, rest) = std::mem::take(&mut rows).split_at_mut((at[1] - at[0]) * channels);
            rows = rest;
            (at[0]..at[1], image)
        })
    }
}

/// The map `(B, C, H, W)`, channels last in memory, with `rows` `(N, C)` at visible positions and zero elsewhere.
pub(crate) fn scatter(rows: &Tensor, level: &Level) -> Tensor {
    if cuda::copies(rows) {
        return cuda::scatter(rows, level).permute([0, 3, 1, 2]);
    }
    if !has_kernels(rows) {
        let ((height, width), channels) = (level.size, rows.size()[1]);
        let zeros = Tensor::zeros([level.batch * height * width, channels], (rows.kind(), rows.device()));
        let map = zeros.index_copy(0, level.positions(), rows);
        return map.view([level.batch, height, width, channels]).permute([0, 3, 1, 2]);
    }
    let places = Arc::clone(&level.places);
    let map = for_element!(rows, paint(&rows.detach(), &places));
    let map = autograd::record("SparseScatter", &[rows], map, move |grad| {
        vec![Some(for_element!(grad, pick(grad, &places)))]
    });
    map.permute([0, 3, 1, 2])
}

/// The values `(N, C)` at visible positions of a map `(B, C, H, W)`.
pub(crate) fn gather(map: &Tensor, level: &Level) -> Tensor {
    let map = map.permute([0, 2, 3, 1]);
    if cuda::copies(&map) {
        return cuda::gather(&map, level);
    }
    if !has_kernels(&map) {
        return map.reshape([-1, map.size()[3]]).index_select(0, level.positions());
    }
    let places = Arc::clone(&level.places);
    let rows = for_element!(map, pick(&map.detach(), &places));
    autograd::record("SparseGather", &[&map], rows, move |grad| {
        vec![Some(for_element!(grad, paint(grad, &places)))]
    })
}

/// `(N, C)` to `(B, H, W, C)`.
fn paint<T: Element>(rows: &Tensor, places: &Places) -> Tensor {
    Canvas::paint::<T>(&rows.contiguous(), places, 0).map
}

/// `(B, H, W, C)` to `(N, C)`.
fn pick<T: Element>(map: &Tensor, places: &Places) -> Tensor {
    Canvas { map: map.contiguous(), border: 0 }.pick::<T>(places)
}
