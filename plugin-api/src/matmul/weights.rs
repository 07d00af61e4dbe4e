//! The right side of a product: where it lies in a tensor of weights, and how it is packed.

use tch::Tensor;

use super::tile::Vectors;
use crate::memory::{self, Element};
use crate::parallel;

/// Where a matrix `(K, N)` lies in a tensor of weights. Row `t · inner + i` and column n are at `taps[t] + i · inner_stride +
/// n · column_stride`.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The slow part of K.
    pub taps: Vec<usize>,
    /// The fast part of K: how many, and from one to the next.
    pub inner: (usize, usize),
    /// N, and from a column to the next.
    pub columns: (usize, usize),
}

impl Layout {
    /// The transpose of a contiguous `(out, in)`: what a linear layer multiplies its input with.
    pub fn linear(outputs: usize, inputs: usize) -> Self {
        Layout { taps: vec![0], inner: (inputs, 1), columns: (outputs, inputs) }
    }

    /// A contiguous `(out, in)` itself: what takes the gradient of a linear layer's output to that of its input.
    pub fn linear_transposed(outputs: usize, inputs: usize) -> Self {
        Layout { taps: vec![0], inner: (outputs, inputs), columns: (inputs, 1) }
    }

    /// What windows `(kernel, kernel, in)` are multiplied with in a convolution whose weights are `(out, in, kernel, kernel)`,
    /// contiguous.
    pub fn convolution(outputs: usize, inputs: usize, kernel: usize) -> Self {
        let taps = kernel * kernel;
        Layout { taps: (0..taps).collect(), inner: (inputs, taps), columns: (outputs, inputs * taps) }
    }

    /// The same for the way back of one with a stride of 1: what windows `(kernel, kernel, out)` of the gradient of its output
    /// are multiplied with, which is the kernel turned round.
    pub fn convolution_transposed(outputs: usize, inputs: usize, kernel: usize) -> Self {
        let taps = kernel * kernel;
        Layout { taps: (0..taps).rev().collect(), inner: (outputs, inputs * taps), columns: (inputs, taps) }
    }

    /// K.
    pub(super) fn depth(&self) -> usize {
        self.taps.len() * self.inner.0
    }

    /// The matrix `(K, N)` itself.
    ///
    /// # Panics
    /// When it reaches beyond the weights.
    pub fn matrix<T: Element>(&self, weights: &[T]) -> Tensor {
        self.check(weights.len());
        let (columns, column_stride) = self.columns;
        memory::filled(&[self.depth() as i64, columns as i64], |matrix: &mut [T]| {
            let (inner, inner_stride) = self.inner;
            let rows = self.taps.iter().flat_map(|tap| (0..inner).map(move |i| tap + i * inner_stride));
            for (row, out) in rows.zip(matrix.chunks_exact_mut(columns.max(1))) {
                out.iter_mut().zip(weights[row..].iter().step_by(column_stride)).for_each(|(to, x)| *to = *x);
            }
        })
    }

    /// Writes `matrix` `(K, N)` to where it lies in `weights`. Those of a column must lie together, and those of the next
    /// behind them, and every number must be met once.
    ///
    /// # Panics
    /// When there are more weights, or fewer.
    pub fn write<T: Element>(&self, matrix: &[f32], weights: &mut [T]) {
        let columns = self.columns.0;
        self.write_rows(STAGED, |k, first| &matrix[k * columns + first..], weights);
    }

    /// The same from rows of a matrix: `row(k, n)` begins with the numbers of row k from column n on, a multiple of
    /// `together` ≤ [`STAGED`], and has that many of them, or up to the last column.
    pub(crate) fn write_rows<'a, T: Element>(
        &self,
        together: usize,
        row: impl Fn(usize, usize) -> &'a [f32] + Sync,
        weights: &mut [T],
    ) {
        let (columns, column_stride) = self.columns;
        assert_eq!(columns * column_stride, weights.len(), "weights lie column by column");
        assert_eq!(
            self.depth(),
            column_stride,
            "a column of weights has a number for each row of the matrix"
        );
        self.check(weights.len());
        let inner = self.inner.0;
        let parts = weights.chunks_mut((together * column_stride).max(1)).enumerate();
        parallel::for_each(parts, |(part, weights)| {
            let (first, present) = (part * together, weights.len() / column_stride);
            let Some(stage) = Stage::of(self).filter(|stage| stage.is_whole) else {
                self.each(|k, offset| {
                    let to = weights[offset..].iter_mut().step_by(column_stride);
                    to.zip(&row(k, first)[..present]).for_each(|(to, x)| *to = T::narrow(*x));
                });
                return;
            };
            let mut lines = stage.lines();
            for (i, some) in stage.parts(inner) {
                self.each_of(i, some, |k, offset| {
                    let from = row(k, first);
                    match from.first_chunk::<STAGED>() {
                        Some(from) if present == STAGED => {
                            (0..STAGED).for_each(|n| lines[n][offset] = from[n]);
                        }
                        _ => from[..present].iter().zip(&mut lines).for_each(|(x, line)| line[offset] = *x),
                    }
                });
                let (begin, length) = stage.span(i, some);
                for (line, column) in lines.iter().zip(weights.chunks_exact_mut(column_stride)) {
                    let to = column[begin..][..length].iter_mut();
                    to.zip(line).for_each(|(to, x)| *to = T::narrow(*x));
                }
            }
        });
    }

    /// Packs `present` columns into rows of `width`; the first begins at the first of the weights.
    fn pack(&self, weights: &[f32], present: usize, panel: &mut [f32], width: usize) {
        let column_stride = self.columns.1;
        let Some(stage) = Stage::of(self) else {
            self.each(|k, offset| {
                let (from, to) = (&weights[offset..], &mut panel[k * width..][..present]);
                match column_stride {
                    1 => to.copy_from_slice(&from[..present]),
                    _ => to.iter_mut().zip(from.iter().step_by(column_stride)).for_each(|(to, x)| *to = *x),
                }
            });
            return;
        };
        let mut lines = stage.lines();
        for first in (0..present).step_by(STAGED) {
            let here = STAGED.min(present - first);
            for (i, some) in stage.parts(self.inner.0) {
                let (begin, length) = stage.span(i, some);
                for (n, line) in lines[..here].iter_mut().enumerate() {
                    let from = &weights[(first + n) * column_stride + begin..];
                    line[..length].copy_from_slice(&from[..length]);
                }
                self.each_of(i, some, |k, offset| {
                    let to = &mut panel[k * width + first..][..here];
                    match to.first_chunk_mut::<STAGED>() {
                        Some(to) => (0..STAGED).for_each(|n| to[n] = lines[n][offset]),
                        None => to.iter_mut().zip(&lines).for_each(|(to, line)| *to = line[offset]),
                    }
                });
            }
        }
    }

    /// Each row and where it begins.
    fn each(&self, row: impl FnMut(usize, usize)) {
        self.each_of(0, self.inner.0, row);
    }

    /// Each row of `some` of the fast part of K, and where it lies behind the first of them.
    #[inline(always)]
    fn each_of(&self, first: usize, some: usize, mut row: impl FnMut(usize, usize)) {
        let (inner, inner_stride) = self.inner;
        for i in 0..some {
            for (t, tap) in self.taps.iter().enumerate() {
                row(t * inner + first + i, tap + i * inner_stride);
            }
        }
    }

    /// Panics unless the whole matrix lies in so many weights.
    fn check(&self, weights: usize) {
        let (taps, (inner, inner_stride), (columns, column_stride)) =
            (self.taps.iter().max(), self.inner, self.columns);
        if let (Some(tap), true, true) = (taps, inner > 0, columns > 0) {
            let last = tap + (inner - 1) * inner_stride + (columns - 1) * column_stride;
            assert!(
                last < weights,
                "a matrix whose last number is at {last} does not lie in {weights} weights"
            );
        }
    }
}

/// Columns that are staged side by side.
pub(crate) const STAGED: usize = 16;
/// Numbers of a line of the stage: no power of two, so that those of one row do not share a line of the cache.
const LINE: usize = 272;

/// How parts of some columns, each of which lies together, are copied side by side before they are turned round. Left where
/// they are, columns a power of two apart would push each other out of the cache.
struct Stage {
    inner_stride: usize,
    /// From the first of the taps to behind the last.
    reach: usize,
    /// How many of the fast part of K fit into a line.
    some: usize,
    /// Whether a part has each number of its span: then a whole span may be written.
    is_whole: bool,
}

impl Stage {
    /// `None` where it is rows that lie together, or no line has room for the taps.
    fn of(layout: &Layout) -> Option<Self> {
        let (inner_stride, reach) = (layout.inner.1.max(1), layout.taps.iter().max()? + 1);
        if inner_stride >= layout.columns.1 || reach > LINE {
            return None;
        }
        let is_whole = inner_stride == layout.taps.len() && reach == inner_stride;
        Some(Stage { inner_stride, reach, some: (LINE - reach) / inner_stride + 1, is_whole })
    }

    fn lines(&self) -> Vec<[f32; LINE]> {
        vec![[0.0; LINE]; STAGED]
    }

    /// The fast part of K in parts: the first of each, and how many.
    fn parts(&self, inner: usize) -> impl Iterator<Item = (usize, usize)> {
        let some = self.some;
        (0..inner).step_by(some).map(move |i| (i, some.min(inner - i)))
    }

    /// Where a part begins in its column, and how long it is.
    fn span(&self, first: usize, some: usize) -> (usize, usize) {
        (first * self.inner_stride, (some - 1) * self.inner_stride + self.reach)
    }
}

/// The right side `(K, N)`, in panels of as many columns as a tile has.
#[derive(Debug)]
pub struct Packed {
    /// Panel by panel, each `(K, columns)`; the last is filled up with zeros to whole vectors.
    pub(crate) values: Vec<f32>,
    pub(crate) depth: usize,
    pub(super) columns: usize,
}

impl Packed {
    /// Packs the matrix that lies in `weights` like this.
    ///
    /// # Panics
    /// When it reaches beyond them.
    pub fn new(weights: &[f32], layout: &Layout) -> Self {
        layout.check(weights.len());
        let (vectors, depth, (columns, column_stride)) = (Vectors::here(), layout.depth(), layout.columns);
        let mut values = vec![0.0; depth * columns.next_multiple_of(vectors.lanes)];
        let mut rest = values.as_mut_slice();
        let panels = vectors.panels(columns).map(|(first, width)| {
            let (panel, behind) = std::mem::take(&mut rest).split_at_mut(depth * width);
            rest = behind;
            (first, width, panel)
        });
        parallel::for_each(panels, |(first, width, panel)| {
            layout.pack(&weights[first * column_stride..], width.min(columns - first), panel, width);
        });
        Packed { values, depth, columns }
    }
}
