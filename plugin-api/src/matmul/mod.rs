//! Matrix products in f32 whose left side is read where it lies. Since 1.1.
//!
//! A convolution is a product of windows of a map with the weights. The windows of a channels-last map are pieces of it,
//! one for each line of the kernel, so a kernel that is told where each begins needs no copy of them: [`Rows`]. The rows of
//! a matrix are the case of a single piece. The right side, the weights, is packed once for each product: [`Packed`].
//!
//! A thread computes a tile of some rows by some vectors of columns in registers, and takes K in blocks whose part of the
//! right side stays in its cache. Which numbers are added up in which order depends on K and its pieces, or for [`gradient`]
//! on the number of rows: a result has the same bytes for any number of threads.

pub(crate) mod tile;
mod weights;

use pulp::{Arch, Simd, WithSimd};
use tch::Tensor;

use self::tile::{Target, Vectors, for_tile, gradient_tiles, rows_of_tiles};
pub(crate) use self::weights::STAGED;
pub use self::weights::{Layout, Packed};
use crate::memory;
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
    layout.write_rows(vectors.columns.min(weights::STAGED), row, weights);
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
pub(crate) struct Block {
    /// Where it begins in a row, and in K.
    pub offset: usize,
    pub k: usize,
    pub pieces: usize,
    pub length: usize,
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
        let mut copied = vec![0.0; if width == columns { 0 } else { POSITIONS * width }];
        let positions = rows.starts.chunks(POSITIONS).zip(grad.chunks(POSITIONS * columns));
        for (i, (starts, grad)) in positions.enumerate() {
            let panel = if copied.is_empty() {
                grad
            } else {
                let lines = copied.chunks_exact_mut(width).zip(grad.chunks_exact(columns));
                lines.for_each(|(to, grad)| to[..present].copy_from_slice(&grad[column..][..present]));
                &copied[..width * starts.len()]
            };
            let rows = Rows { starts, ..rows };
            let target = Target { columns: width, first: 0, begins: i == 0, bias: None };
            for_tile!(S, width / S::F32_LANES, gradient_tiles(simd, rows, panel, first, target, out));
        }
    }
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
