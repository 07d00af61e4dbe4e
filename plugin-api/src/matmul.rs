//! Matrix products in f32 whose left side is read where it lies. Since 1.1.
//!
//! A convolution is a product of windows of a map with the weights. The windows of a channels-last map are pieces of it,
//! one for each line of the kernel, so a kernel that is told where each begins needs no copy of them: [`Rows`]. The rows of
//! a matrix are the case of a single piece. The right side, the weights, is packed once for each product: [`Packed`].
//!
//! A thread computes a tile of some rows by some vectors of columns in registers, and takes K in blocks whose part of the
//! right side stays in its cache. Which numbers are added up in which order depends on K and its pieces, or for [`gradient`]
//! on the number of rows: a result has the same bytes for any number of threads.

use pulp::{Arch, Simd, WithSimd};
use tch::Tensor;

use crate::memory::{self, Element};
use crate::parallel;

/// The left side `(M, K)`: row i is `pieces` runs of `length` numbers in `values`, the first of which begins at
/// `starts[i]`, and each other `pitch` after the one before. Rows may share numbers.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Where the numbers are.
    pub values: &'a [f32],
    /// Where each row begins: M numbers.
    pub starts: &'a [usize],
    /// Runs in a row, at least 1.
    pub pieces: usize,
    /// Numbers in a run, at least 1; K is `pieces` · `length`.
    pub length: usize,
    /// From the beginning of a run to that of the next.
    pub pitch: usize,
}

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

    fn depth(&self) -> usize {
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
            for (row, out) in self.rows().zip(matrix.chunks_exact_mut(columns.max(1))) {
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
        self.write_rows(TOGETHER, |k, first| &matrix[k * columns + first..], weights);
    }

    /// The same from rows of a matrix: `row(k, n)` begins with the numbers of row k from column n on, a multiple of
    /// `together`, and has that many of them, or up to the last column.
    fn write_rows<'a, T: Element>(
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
        let parts = weights.chunks_mut((together * column_stride).max(1)).enumerate();
        parallel::for_each(parts, |(part, weights)| {
            let (first, some) = (part * together, weights.len() / column_stride);
            for i in 0..self.inner.0 {
                for (t, tap) in self.taps.iter().enumerate() {
                    let from = &row(t * self.inner.0 + i, first)[..some];
                    let to = weights[tap + i * self.inner.1..].iter_mut().step_by(column_stride);
                    to.zip(from).for_each(|(to, x)| *to = T::narrow(*x));
                }
            }
        });
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

    /// Where each row of the matrix begins.
    fn rows(&self) -> impl Iterator<Item = usize> {
        let (inner, stride) = self.inner;
        self.taps.iter().flat_map(move |tap| (0..inner).map(move |i| tap + i * stride))
    }
}

/// Columns that are written at once, so that what is read is used while it is in the cache.
const TOGETHER: usize = 8;

/// The right side `(K, N)`, in panels of as many columns as a tile has.
#[derive(Debug)]
pub struct Packed {
    /// Panel by panel, each `(K, columns)`; the last is filled up with zeros to whole vectors.
    values: Vec<f32>,
    depth: usize,
    columns: usize,
}

/// The vectors of this machine.
#[derive(Clone, Copy)]
struct Vectors {
    lanes: usize,
    /// Columns of a tile.
    columns: usize,
}

impl Vectors {
    #[inline(always)]
    fn of<S: Simd>() -> Self {
        let in_tile = if S::REGISTER_COUNT >= 32 { 4 } else { 2 };
        Vectors { lanes: S::F32_LANES, columns: in_tile * S::F32_LANES }
    }

    fn here() -> Self {
        struct Here;
        impl WithSimd for Here {
            type Output = Vectors;
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) -> Vectors {
                Vectors::of::<S>()
            }
        }
        Arch::new().dispatch(Here)
    }

    /// Of so many columns, where each panel begins, and how wide it is in whole vectors.
    #[inline(always)]
    fn panels(self, columns: usize) -> impl Iterator<Item = (usize, usize)> {
        let padded = columns.next_multiple_of(self.lanes);
        (0..padded).step_by(self.columns).map(move |first| (first, self.columns.min(padded - first)))
    }
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
            let present = width.min(columns - first);
            let weights = &weights[first * column_stride..];
            let (inner, inner_stride) = layout.inner;
            for i in 0..inner {
                for (t, tap) in layout.taps.iter().enumerate() {
                    let from = &weights[tap + i * inner_stride..];
                    let to = &mut panel[(t * inner + i) * width..][..present];
                    match column_stride {
                        1 => to.copy_from_slice(&from[..present]),
                        _ => {
                            to.iter_mut().zip(from.iter().step_by(column_stride)).for_each(|(to, x)| *to = *x)
                        }
                    }
                }
            }
        });
        Packed { values, depth, columns }
    }
}

/// `(M, N)`: `rows` times `right`, plus a number for each column.
///
/// # Panics
/// When K or N differ, or a row reaches beyond its values.
pub fn product(rows: Rows, right: &Packed, bias: Option<&[f32]>) -> Tensor {
    let (count, columns) = (rows.starts.len(), right.columns);
    assert!(rows.pieces > 0 && rows.length > 0, "a row has no numbers");
    assert_eq!(rows.pieces * rows.length, right.depth, "the sides of a matrix product do not match");
    assert!(bias.is_none_or(|bias| bias.len() == columns), "a bias has a number for each column");
    let blocks = blocks(rows);
    memory::filled(&[count as i64, columns as i64], |out| {
        let some = share(count);
        let parts = rows.starts.chunks(some).zip(out.chunks_mut((some * columns).max(1)));
        parallel::for_each(parts, |(starts, out)| {
            let rows = Rows { starts, ..rows };
            Arch::new().dispatch(Product { rows, blocks: &blocks, right, bias, out });
        });
    })
}

/// The gradient of the weights: `rows` transposed, times `grad` `(M, N)`, written as by [`Layout::write`].
///
/// # Panics
/// When K, M or the number of weights differ, or a row reaches beyond its values.
pub fn gradient(rows: Rows, grad: &[f32], layout: &Layout, weights: &mut [f32]) {
    let (depth, columns) = (layout.depth(), layout.columns.0);
    assert!(rows.pieces > 0 && rows.length > 0, "a row has no numbers");
    assert_eq!(rows.pieces * rows.length, depth, "the sides of a matrix product do not match");
    assert_eq!(rows.starts.len() * columns, grad.len(), "a gradient has a row for each output");
    // In panels, like a packed matrix, each in parts of some rows: a part reads all of its columns of `grad` once.
    let vectors = Vectors::here();
    let panels: Vec<(usize, usize)> = vectors.panels(columns).collect();
    let some = gradient_rows(depth, panels.len());
    let mut sums = vec![0.0; depth * columns.next_multiple_of(vectors.lanes)];
    let mut rest = sums.as_mut_slice();
    let mut parts = Vec::new();
    for &(column, width) in &panels {
        let (panel, behind) = std::mem::take(&mut rest).split_at_mut(depth * width);
        rest = behind;
        let chunks = panel.chunks_mut(some * width).enumerate();
        parts.extend(chunks.map(|(i, out)| Gradient {
            rows,
            grad,
            columns,
            column,
            width,
            first: i * some,
            out,
        }));
    }
    parallel::for_each(parts, |part| Arch::new().dispatch(part));
    let row = |k: usize, n: usize| {
        let (column, width) = panels[n / vectors.columns];
        &sums[column * depth + k * width + (n - column)..]
    };
    // Within a panel, whose width is a power of two.
    layout.write_rows(vectors.columns.min(TOGETHER), row, weights);
}

/// Rows for each thread at a time: for a few turns each, and whole tiles.
fn share(rows: usize) -> usize {
    let turns = 4 * tch::get_num_threads().max(1) as usize;
    rows.div_ceil(turns).next_multiple_of(24).clamp(24, 192)
}

/// Rows of a gradient for each thread at a time: many, as all of them use what a panel's columns are copied for.
fn gradient_rows(depth: usize, panels: usize) -> usize {
    let parts = (2 * tch::get_num_threads().max(1) as usize).div_ceil(panels.max(1));
    depth.div_ceil(parts).next_multiple_of(24).min(192)
}

/// Numbers of K in a block.
const DEPTH: usize = 256;
/// Rows that a gradient adds up in registers before it adds them to memory.
const POSITIONS: usize = 128;

/// A part of K: whole runs, or a part of one.
#[derive(Clone, Copy)]
struct Block {
    /// Where it begins in a row, and in K.
    offset: usize,
    k: usize,
    pieces: usize,
    length: usize,
}

fn blocks(rows: Rows) -> Vec<Block> {
    let Rows { pieces, length, pitch, .. } = rows;
    if 2 * length <= DEPTH {
        let together = DEPTH / length;
        let groups = (0..pieces).step_by(together);
        let block =
            |p: usize| Block { offset: p * pitch, k: p * length, pieces: together.min(pieces - p), length };
        return groups.map(block).collect();
    }
    let parts = length.div_ceil(DEPTH);
    let bound = |part: usize| length * part / parts;
    let block = |p: usize, part: usize| {
        let (from, to) = (bound(part), bound(part + 1));
        Block { offset: p * pitch + from, k: p * length + from, pieces: 1, length: to - from }
    };
    (0..pieces).flat_map(|p| (0..parts).map(move |part| block(p, part))).collect()
}

/// Where a tile goes in `(rows, columns)`.
#[derive(Clone, Copy)]
struct Target<'a> {
    columns: usize,
    first: usize,
    /// Whether it is written, with the bias, or added to what is there.
    begins: bool,
    bias: Option<&'a [f32]>,
}

/// Calls a function of the number of rows and of vectors in a tile: as many as the registers hold, for a panel of so many
/// vectors.
macro_rules! for_tile {
    ($simd:ident, $vectors:expr, $function:ident $arguments:tt) => {
        match ($vectors, $simd::REGISTER_COUNT >= 32) {
            (4, _) => $function::<$simd, 6, 4> $arguments,
            (3, _) => $function::<$simd, 8, 3> $arguments,
            (2, true) => $function::<$simd, 8, 2> $arguments,
            (2, false) => $function::<$simd, 6, 2> $arguments,
            _ => $function::<$simd, 12, 1> $arguments,
        }
    };
}

struct Product<'a> {
    rows: Rows<'a>,
    blocks: &'a [Block],
    right: &'a Packed,
    bias: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Product { rows, blocks, right, bias, out } = self;
        for (i, block) in blocks.iter().enumerate() {
            for (first, width) in Vectors::of::<S>().panels(right.columns) {
                let panel = &right.values[first * right.depth..][..width * right.depth];
                let panel = &panel[block.k * width..][..block.pieces * block.length * width];
                let target = Target { columns: right.columns, first, begins: i == 0, bias };
                for_tile!(S, width / S::F32_LANES, rows_of_tiles(simd, rows, *block, panel, target, out));
            }
        }
    }
}

#[inline(always)]
fn rows_of_tiles<S: Simd, const M: usize, const V: usize>(
    simd: S,
    rows: Rows,
    block: Block,
    panel: &[f32],
    target: Target,
    out: &mut [f32],
) {
    let Rows { values, starts, pitch, .. } = rows;
    let (whole, rest) = starts.as_chunks::<M>();
    let mut out = out.chunks_mut(target.columns);
    for starts in whole {
        let sums = tile::<S, M, V>(simd, values, starts, (block, pitch), panel);
        store(simd, &sums, target, &mut out);
    }
    let (fours, rest) = rest.as_chunks::<4>();
    for starts in fours {
        let sums = tile::<S, 4, V>(simd, values, starts, (block, pitch), panel);
        store(simd, &sums, target, &mut out);
    }
    for start in rest {
        let sums = tile::<S, 1, V>(simd, values, &[*start], (block, pitch), panel);
        store(simd, &sums, target, &mut out);
    }
}

/// A block of the product for M rows and V vectors of columns.
#[inline(always)]
fn tile<S: Simd, const M: usize, const V: usize>(
    simd: S,
    values: &[f32],
    starts: &[usize; M],
    (block, pitch): (Block, usize),
    panel: &[f32],
) -> [[S::f32s; V]; M] {
    let mut sums = [[simd.splat_f32s(0.0); V]; M];
    let (panel, _) = S::as_simd_f32s(panel).0.as_chunks::<V>();
    for piece in 0..block.pieces {
        let mut rows = [&[][..]; M];
        for (row, start) in rows.iter_mut().zip(starts) {
            *row = &values[start + block.offset + piece * pitch..][..block.length];
        }
        let panel = &panel[piece * block.length..][..block.length];
        for (k, vectors) in panel.iter().enumerate() {
            for (sums, row) in sums.iter_mut().zip(rows) {
                let x = simd.splat_f32s(row[k]);
                for (sum, vector) in sums.iter_mut().zip(vectors) {
                    *sum = simd.mul_add_f32s(x, *vector, *sum);
                }
            }
        }
    }
    sums
}

/// Writes a tile to the next rows of the result.
#[inline(always)]
fn store<'a, S: Simd, const M: usize, const V: usize>(
    simd: S,
    sums: &[[S::f32s; V]; M],
    target: Target,
    out: &mut impl Iterator<Item = &'a mut [f32]>,
) {
    let Target { columns, first, begins, bias } = target;
    for (sums, out) in sums.iter().zip(out) {
        for (v, sum) in sums.iter().enumerate() {
            let from = first + v * S::F32_LANES;
            let here = from..columns.min(from + S::F32_LANES);
            let mut sum = *sum;
            if here.len() < S::F32_LANES {
                if let Some(bias) = bias.filter(|_| begins) {
                    sum = simd.add_f32s(sum, simd.partial_load_f32s(&bias[here.clone()]));
                }
                if !begins {
                    sum = simd.add_f32s(sum, simd.partial_load_f32s(&out[here.clone()]));
                }
                simd.partial_store_f32s(&mut out[here], sum);
                continue;
            }
            if let Some(bias) = bias.filter(|_| begins) {
                sum = simd.add_f32s(sum, S::as_simd_f32s(&bias[here.clone()]).0[0]);
            }
            let out = &mut S::as_mut_simd_f32s(&mut out[here]).0[0];
            *out = if begins { sum } else { simd.add_f32s(sum, *out) };
        }
    }
}

/// Some rows of a panel of the gradient.
struct Gradient<'a> {
    rows: Rows<'a>,
    grad: &'a [f32],
    columns: usize,
    /// The panel's first column, and how wide it is.
    column: usize,
    width: usize,
    /// The first row in K.
    first: usize,
    out: &'a mut [f32],
}

impl WithSimd for Gradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Gradient { rows, grad, columns, column, width, first, out } = self;
        let present = width.min(columns - column);
        let mut panel = vec![0.0; if present == columns && width == columns { 0 } else { POSITIONS * width }];
        let positions = rows.starts.chunks(POSITIONS).zip(grad.chunks(POSITIONS * columns));
        for (i, (starts, grad)) in positions.enumerate() {
            let panel = if panel.is_empty() {
                grad
            } else {
                let lines = panel.chunks_exact_mut(width).zip(grad.chunks_exact(columns));
                lines.for_each(|(to, grad)| to[..present].copy_from_slice(&grad[column..][..present]));
                &panel[..width * starts.len()]
            };
            let rows = Rows { starts, ..rows };
            let target = Target { columns: width, first: 0, begins: i == 0, bias: None };
            for_tile!(S, width / S::F32_LANES, gradient_tiles(simd, rows, panel, first, target, out));
        }
    }
}

#[inline(always)]
fn gradient_tiles<S: Simd, const M: usize, const V: usize>(
    simd: S,
    rows: Rows,
    panel: &[f32],
    first: usize,
    target: Target,
    out: &mut [f32],
) {
    let (from, to) = (first, first + out.len() / target.columns);
    let mut out = out.chunks_mut(target.columns);
    let mut k = from;
    while k < to {
        // A tile reads neighbours, so it does not reach over the end of a run.
        let (piece, within) = (k / rows.length, k % rows.length);
        let left = (rows.length - within).min(to - k);
        let values = &rows.values[piece * rows.pitch + within..];
        if left >= M {
            store(simd, &gradient_tile::<S, M, V>(simd, values, rows.starts, panel), target, &mut out);
            k += M;
        } else if left >= 4 {
            store(simd, &gradient_tile::<S, 4, V>(simd, values, rows.starts, panel), target, &mut out);
            k += 4;
        } else {
            store(simd, &gradient_tile::<S, 1, V>(simd, values, rows.starts, panel), target, &mut out);
            k += 1;
        }
    }
}

/// For M numbers of each row and V vectors of columns, the sum of their products over the rows.
#[inline(always)]
fn gradient_tile<S: Simd, const M: usize, const V: usize>(
    simd: S,
    values: &[f32],
    starts: &[usize],
    panel: &[f32],
) -> [[S::f32s; V]; M] {
    let mut sums = [[simd.splat_f32s(0.0); V]; M];
    let (panel, _) = S::as_simd_f32s(panel).0.as_chunks::<V>();
    for (start, vectors) in starts.iter().zip(panel) {
        let numbers: &[f32; M] = values[*start..].first_chunk().expect("a row lies within its values");
        for (sums, x) in sums.iter_mut().zip(numbers) {
            let x = simd.splat_f32s(*x);
            for (sum, vector) in sums.iter_mut().zip(vectors) {
                *sum = simd.mul_add_f32s(x, *vector, *sum);
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The gradient's parts by the vectors of a machine that has none: panels of two columns.
    #[test]
    fn narrow_panels_are_written_where_they_belong() {
        let layout = Layout { taps: vec![0, 1], inner: (3, 2), columns: (5, 6) };
        let vectors = pulp::Scalar::new().vectorize(Of);
        assert_eq!((vectors.lanes, vectors.columns), (1, 2));
        let panels: Vec<(usize, usize)> = vectors.panels(5).collect();
        assert_eq!(panels, [(0, 2), (2, 2), (4, 1)]);
        let values: Vec<f32> = (0..40).map(|i| (i * i % 17) as f32).collect();
        let (starts, grad) = ([0usize, 4, 9], (0..15).map(|i| i as f32 - 7.0).collect::<Vec<f32>>());
        let rows = Rows { values: &values, starts: &starts, pieces: 2, length: 3, pitch: 7 };
        let mut sums = [0.0; 6 * 5];
        for &(column, width) in &panels {
            let out = &mut sums[column * 6..][..width * 6];
            let part = Gradient { rows, grad: &grad, columns: 5, column, width, first: 0, out };
            pulp::Scalar::new().vectorize(part);
        }
        let row = |k: usize, n: usize| {
            let (column, width) = panels[n / 2];
            &sums[column * 6 + k * width + (n - column)..]
        };
        let mut weights = [f32::NAN; 30];
        layout.write_rows(2, row, &mut weights);
        for n in 0..5 {
            for k in 0..6 {
                let (tap, i) = (k / 3, k % 3);
                let product = |m: usize| values[starts[m] + tap * 7 + i] * grad[m * 5 + n];
                let expected: f32 = (0..3).map(product).sum();
                assert_eq!(weights[n * 6 + i * 2 + tap], expected, "row {k}, column {n}");
            }
        }
    }

    struct Of;

    impl WithSimd for Of {
        type Output = Vectors;
        fn with_simd<S: Simd>(self, _: S) -> Vectors {
            Vectors::of::<S>()
        }
    }
}
