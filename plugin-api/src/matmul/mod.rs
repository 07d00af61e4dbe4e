//! Matrix products in f32 whose left side is read where it lies. Since 1.1.
//!
//! A convolution is a product of windows of a map with the weights. The windows of a channels-last map are pieces of it,
//! one for each line of the kernel, so a kernel that is told where each begins needs no copy of them: [`Rows`]. The rows of
//! a matrix are the case of a single piece. The right side, the weights, is packed once for each product: [`Packed`].
//!
//! A thread computes a tile of some rows by some vectors of columns in registers, and takes K in blocks whose part of the
//! right side stays in its cache. Which numbers are added up in which order depends on the sizes of the sides alone: a result has
//! the same bytes for any number of threads.

pub(crate) mod tile;
mod weights;

use std::ops::Range;

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
    // In chunks of K and groups of columns, each in panels like a packed matrix. Where these are few, positions are divided too,
    // in the same way for any number of threads: that is what sums depend on.
    let vectors = Vectors::here();
    let panels: Vec<(usize, usize)> = vectors.panels(columns).collect();
    let padded = columns.next_multiple_of(vectors.lanes);
    let groups: Vec<Range<usize>> =
        (0..columns).step_by(GROUP).map(|first| first..columns.min(first + GROUP)).collect();
    let positions = rows.starts.len();
    let parts = depth.div_ceil(CHUNK) * groups.len();
    let divided = (32 / parts.max(1)).clamp(1, (positions / 512).max(1));
    let some = positions.div_ceil(divided);
    let chunks = parallel::parts(depth, 24, CHUNK, groups.len() * divided);
    let of_chunk = chunks.first().map_or(1, Range::len);

    let mut sums = vec![0.0; divided * depth * padded];
    let mut rest = sums.as_mut_slice();
    let mut parts = Vec::new();
    for chunk in &chunks {
        for i in 0..divided {
            let range = positions.min(i * some)..positions.min((i + 1) * some);
            let grad = &grad[range.start * columns..range.end * columns];
            let starts = &rows.starts[range];
            for group in &groups {
                let width = group.len().next_multiple_of(vectors.lanes);
                let (out, behind) = std::mem::take(&mut rest).split_at_mut(chunk.len() * width);
                rest = behind;
                let (chunk, group) = (chunk.clone(), group.clone());
                parts.push(Gradient { rows: Rows { starts, ..rows }, grad, columns, chunk, group, out });
            }
        }
    }
    parallel::for_each(parts, |part| Arch::new().dispatch(part));
    if divided > 1 {
        let of_chunks = sums.chunks_mut((divided * of_chunk * padded).max(1));
        parallel::for_each(of_chunks, |sums| {
            let (sum, others) = sums.split_at_mut(sums.len() / divided);
            for other in others.chunks_exact(sum.len()) {
                sum.iter_mut().zip(other).for_each(|(sum, x)| *sum += x);
            }
        });
    }
    let row = |k: usize, n: usize| {
        let (chunk, (column, width)) = (&chunks[k / of_chunk], panels[n / vectors.columns]);
        let panel = divided * chunk.start * padded + chunk.len() * column;
        &sums[panel + (k - chunk.start) * width + (n - column)..]
    };
    // Within a panel, whose width is a power of two.
    layout.write_rows(vectors.columns.min(weights::STAGED), row, weights);
}

/// Rows for each thread at a time: for a few turns each, and whole tiles.
fn share(rows: usize) -> usize {
    let turns = 4 * tch::get_num_threads().max(1) as usize;
    rows.div_ceil(turns).next_multiple_of(24).clamp(24, 192)
}

/// Numbers of K in a block.
const DEPTH: usize = 256;
/// Numbers of K in a part of a gradient, at most.
const CHUNK: usize = 192;
/// Positions that a gradient adds up in registers before it adds them to memory: a panel of so many stays in a core's first
/// cache, and a chunk and a group of them in its second.
const POSITIONS: usize = 128;
/// Numbers from a row to the next up to which rows are read where they lie.
const APART: usize = 256;
/// Columns in a part of a gradient: some panels.
const GROUP: usize = 512;

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

/// The sum over some positions of a chunk of K and a group of columns, panel by panel.
struct Gradient<'a> {
    rows: Rows<'a>,
    grad: &'a [f32],
    columns: usize,
    chunk: Range<usize>,
    group: Range<usize>,
    out: &'a mut [f32],
}

impl WithSimd for Gradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Gradient { rows, grad, columns, chunk, group, out } = self;
        let vectors = Vectors::of::<S>();
        // Lines that lie far apart share few lines of the cache, so they are copied side by side.
        let runs = rows.runs(&chunk);
        let apart = rows.starts.windows(2).next().map_or(0, |starts| starts[1].abs_diff(starts[0]));
        let in_place = runs.len() == 1 && apart <= APART;
        let pitch = chunk.len() + 16;
        let mut seen = vec![0.0; if in_place { 0 } else { POSITIONS * pitch }];
        let of_seen: Vec<usize> = (0..POSITIONS).map(|i| i * pitch).collect();
        // A panel of all columns needs no copy.
        let is_panel = vectors.panels(columns).eq([(0, columns)]);
        let padded = group.len().next_multiple_of(vectors.lanes);
        let mut copied = vec![0.0; if is_panel { 0 } else { POSITIONS * padded }];
        let positions = rows.starts.chunks(POSITIONS).zip(grad.chunks(POSITIONS * columns));
        for (i, (positions, grad)) in positions.enumerate() {
            let count = positions.len();
            let (values, starts) = if in_place {
                (&rows.values[runs[0].0..], positions)
            } else {
                for (start, to) in positions.iter().zip(seen.chunks_exact_mut(pitch)) {
                    for &(offset, at, length) in &runs {
                        copy::<S>(&rows.values[start + offset..][..length], &mut to[at..][..length]);
                    }
                }
                (&seen[..], &of_seen[..count])
            };
            if !is_panel {
                for (row, grad) in grad.chunks_exact(columns).enumerate() {
                    let grad = &grad[group.clone()];
                    for (column, width) in vectors.panels(grad.len()) {
                        let from = &grad[column..][..width.min(grad.len() - column)];
                        copy::<S>(from, &mut copied[column * count + row * width..][..from.len()]);
                    }
                }
            }
            for (column, width) in vectors.panels(group.len()) {
                let panel = if is_panel { grad } else { &copied[column * count..][..width * count] };
                let target = Target { columns: width, first: 0, begins: i == 0, bias: None };
                let out = &mut out[column * chunk.len()..][..width * chunk.len()];
                for_tile!(S, width / S::F32_LANES, gradient_tiles(simd, values, starts, panel, target, out));
            }
        }
    }
}

/// What `copy_from_slice` does, without a call for these few numbers.
#[inline(always)]
fn copy<S: Simd>(from: &[f32], to: &mut [f32]) {
    let (vectors, rest) = S::as_simd_f32s(from);
    let (of_vectors, of_rest) = S::as_mut_simd_f32s(to);
    of_vectors.iter_mut().zip(vectors).for_each(|(to, from)| *to = *from);
    of_rest.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
}

impl Rows<'_> {
    /// The runs that some numbers of a row are in: where each begins in the row, where among these numbers, and how long it is.
    fn runs(&self, numbers: &Range<usize>) -> Vec<(usize, usize, usize)> {
        let mut runs = Vec::new();
        let mut k = numbers.start;
        while k < numbers.end {
            let (piece, within) = (k / self.length, k % self.length);
            let length = (self.length - within).min(numbers.end - k);
            runs.push((piece * self.pitch + within, k - numbers.start, length));
            k += length;
        }
        runs
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
        let out = &mut sums;
        let part = Gradient { rows, grad: &grad, columns: 5, chunk: 0..6, group: 0..5, out };
        pulp::Scalar::new().vectorize(part);
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
