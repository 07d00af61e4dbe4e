//! 3×3 convolutions with less arithmetic, in f32: F(2 × 2, 3 × 3) of Winograd's minimal filtering (Lavin and Gray, arXiv
//! 1509.09308). Since 1.1.
//!
//! Four outputs of a 3×3 kernel of stride 1, two by two, see a window of 4 × 4. Windows and kernels are transformed, so that
//! of each pair of channels 16 products make these four outputs, where a convolution has 36. What is left is 16 matrix
//! products, with the channels as K: those of [`matmul`](crate::matmul), whose tiles of registers are no tiles of outputs. The
//! transforms are sums and halves of neighbours, and rounding is about that of the convolution. Of a window with an infinite
//! number, outputs may be NaN where a convolution's are infinite.
//!
//! Positions are rows `(N, C)`. [`Tiles`] says which rows a window sees, so that whole maps and visible positions are the same
//! to it, and neither borders nor hidden neighbours have to be written. The gradient of the input is a convolution of the same
//! tiles with the kernel turned round, and that of the weights the transposed product of the same windows. A result has the
//! same bytes for any number of threads.

mod tiles;
mod transform;

use std::array;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use tch::Tensor;

pub use self::tiles::Tiles;
use self::tiles::{INNER, NOWHERE};
use self::transform::{AREA, SIDE, apply, both_ways, square};
use crate::matmul::tile::{Target, Vectors, for_tile, gradient_tiles, rows_of_tiles};
use crate::matmul::{Block, Layout, Packed, Rows};
use crate::memory;
use crate::parallel;

/// The channels of an input and of an output come in groups of so many.
pub const CHANNELS: usize = 16;

/// Kernels `(C', C, 3, 3)`, transformed.
#[derive(Debug)]
pub struct Kernels {
    /// Panel by panel of output channels, each `(16, C, columns)`.
    values: Vec<f32>,
    inputs: usize,
    outputs: usize,
}

impl Kernels {
    /// Those whose matrix `(9 · C, C')` lies in `weights` like this, with the taps (positions of a kernel) line by line:
    /// [`Layout::convolution`] of a kernel of 3, or for the gradient of the input [`Layout::convolution_transposed`].
    ///
    /// # Panics
    /// When there are not nine taps, channels do not come in [`CHANNELS`], or the matrix reaches beyond the weights.
    pub fn new(weights: &[f32], layout: &Layout) -> Self {
        let (inputs, outputs) = channels(layout);
        let taps = Packed::new(weights, layout);
        let mut values = vec![0.0; AREA * inputs * outputs];
        let mut rest = values.as_mut_slice();
        let panels = Vectors::here().panels(outputs).map(|(first, width)| {
            let (made, behind) = std::mem::take(&mut rest).split_at_mut(AREA * inputs * width);
            rest = behind;
            (&taps.values[first * taps.depth..][..width * taps.depth], made)
        });
        parallel::for_each(panels, |(taps, made)| Arch::new().dispatch(Transform { taps, made }));
        Kernels { values, inputs, outputs }
    }
}

/// C and C' of a matrix of 3×3 kernels.
fn channels(layout: &Layout) -> (usize, usize) {
    let (inputs, outputs) = (layout.inner.0, layout.columns.0);
    assert_eq!(layout.taps.len(), 9, "a 3×3 kernel has nine taps");
    assert!(
        inputs > 0 && outputs > 0 && inputs % CHANNELS == 0 && outputs % CHANNELS == 0,
        "channels come in groups of {CHANNELS}, not {inputs} and {outputs}"
    );
    (inputs, outputs)
}

/// `(9, n)` to `(16, n)`.
struct Transform<'a> {
    taps: &'a [f32],
    made: &'a mut [f32],
}

impl WithSimd for Transform<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Transform { taps, made } = self;
        let count = taps.len() / 9;
        let taps: [&[S::f32s]; 9] = array::from_fn(|tap| S::as_simd_f32s(&taps[tap * count..][..count]).0);
        let mut made = planes::<S>(made, count, 0..count);
        for v in 0..count / S::F32_LANES {
            apply(simd, &taps, &mut made, v, transform::kernel);
        }
    }
}

/// The same numbers of each of the 16 planes.
#[inline(always)]
fn planes<S: Simd>(values: &mut [f32], plane: usize, part: Range<usize>) -> [&mut [S::f32s]; AREA] {
    let mut planes = values.chunks_mut(plane);
    array::from_fn(|_| {
        let plane = planes.next().expect("there are 16 planes");
        S::as_mut_simd_f32s(&mut plane[part.clone()]).0
    })
}

/// Numbers of a plane with so many: a little more, or the same numbers of all planes would share lines of the cache.
fn plane(numbers: usize) -> usize {
    numbers + CHANNELS
}

/// The windows of some tiles, transformed: for each the channels `part` of all, in planes of `(tiles, part)`.
#[inline(always)]
fn transform_input<S: Simd>(
    simd: S,
    (x, channels): (&[f32], usize),
    part: Range<usize>,
    (tiles, range): (&Tiles, Range<usize>),
    zeros: &[f32],
    (seen, plane): (&mut [f32], usize),
) {
    let length = part.len();
    for (t, tile) in range.enumerate() {
        let (window, offset) = tiles.window(tile);
        let rows: [&[S::f32s]; AREA] = array::from_fn(|i| {
            let row = match window[i] {
                NOWHERE => &zeros[..length],
                row => &x[(offset + row as usize) * channels + part.start..][..length],
            };
            S::as_simd_f32s(row).0
        });
        let mut to = planes::<S>(seen, plane, t * length..(t + 1) * length);
        for v in 0..length / S::F32_LANES {
            apply(simd, &rows, &mut to, v, transform::input);
        }
    }
}

/// `x` `(N, C)` convolved: `(N, C')`.
///
/// # Panics
/// When `x` has not C numbers for each of the tiles' rows.
pub fn convolution(x: &[f32], tiles: &Tiles, kernels: &Kernels) -> Tensor {
    let Kernels { inputs, outputs, .. } = *kernels;
    assert_eq!(x.len(), tiles.rows() * inputs, "a convolution's input has a row for each position");
    let zeros = vec![0.0; inputs];
    memory::filled(&[tiles.rows() as i64, outputs as i64], |mut out: &mut [f32]| {
        let groups = tiles.groups(share(tiles.count()));
        let parts = groups.into_iter().map(|(range, rows)| {
            let (made, rest) = std::mem::take(&mut out).split_at_mut(rows.len() * outputs);
            out = rest;
            Convolution { x, tiles, range, first: rows.start, kernels, zeros: &zeros, out: made }
        });
        parallel::for_each(parts, |part| Arch::new().dispatch(part));
    })
}

/// Tiles for each thread at a time: for a few turns each.
fn share(tiles: usize) -> usize {
    let turns = 4 * tch::get_num_threads().max(1) as usize;
    tiles.div_ceil(turns).clamp(24, 1024)
}

/// Tiles whose transformed windows stay in a core's cache.
fn at_once(channels: usize) -> usize {
    const NUMBERS: usize = 1 << 17;
    (NUMBERS / (AREA * channels)).next_multiple_of(6).clamp(24, 96)
}

struct Convolution<'a> {
    x: &'a [f32],
    tiles: &'a Tiles,
    range: Range<usize>,
    /// The first row of `out` among all.
    first: usize,
    kernels: &'a Kernels,
    zeros: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Convolution<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Convolution { x, tiles, range, first, kernels, zeros, out } = self;
        let Kernels { ref values, inputs, outputs } = *kernels;
        let some = at_once(inputs).min(range.len());
        let vectors = Vectors::of::<S>();
        let (seen_plane, made_plane) = (plane(some * inputs), plane(some * vectors.columns));
        let (mut seen, mut made) = (vec![0.0; AREA * seen_plane], vec![0.0; AREA * made_plane]);
        let starts: Vec<usize> = (0..some).map(|t| t * inputs).collect();
        let block = Block { offset: 0, k: 0, pieces: 1, length: inputs };
        for from in range.clone().step_by(some) {
            let range = from..range.end.min(from + some);
            transform_input(
                simd,
                (x, inputs),
                0..inputs,
                (tiles, range.clone()),
                zeros,
                (&mut seen, seen_plane),
            );
            for (column, width) in vectors.panels(outputs) {
                let panel = &values[AREA * inputs * column..][..AREA * inputs * width];
                let planes = seen.chunks(seen_plane).zip(made.chunks_mut(made_plane));
                for ((seen, made), panel) in planes.zip(panel.chunks_exact(inputs * width)) {
                    let rows = Rows {
                        values: seen,
                        starts: &starts[..range.len()],
                        pieces: 1,
                        length: inputs,
                        pitch: 0,
                    };
                    let target = Target { columns: width, first: 0, begins: true, bias: None };
                    let made = &mut made[..range.len() * width];
                    for_tile!(S, width / S::F32_LANES, rows_of_tiles(simd, rows, block, panel, target, made));
                }
                let tiles = range.clone().map(|tile| tiles.window(tile));
                transform_output(simd, tiles, (&made, made_plane, width), first, (out, column, outputs));
            }
        }
    }
}

/// Takes products of some tiles and a panel of channels to the rows that they make.
#[inline(always)]
fn transform_output<'a, S: Simd>(
    simd: S,
    tiles: impl Iterator<Item = (&'a [u32; AREA], usize)>,
    (made, plane, width): (&[f32], usize, usize),
    first: usize,
    (out, column, outputs): (&mut [f32], usize, usize),
) {
    for (t, (window, offset)) in tiles.enumerate() {
        let from: [&[S::f32s]; AREA] =
            array::from_fn(|i| S::as_simd_f32s(&made[i * plane + t * width..][..width]).0);
        for v in 0..width / S::F32_LANES {
            let values = both_ways(simd, &square(simd, &from, v), transform::output);
            for (i, inner) in INNER.into_iter().enumerate() {
                if window[inner] != NOWHERE {
                    let row = offset + window[inner] as usize - first;
                    let at = row * outputs + column + v * S::F32_LANES;
                    S::as_mut_simd_f32s(&mut out[at..][..S::F32_LANES]).0[0] = values[i / 2][i % 2];
                }
            }
        }
    }
}

/// The gradient of the kernels, from `x` `(N, C)` and the gradient `grad` `(N, C')` of their convolution, written as by
/// [`Layout::write`].
///
/// # Panics
/// As [`Kernels::new`], and when `x` or `grad` has another size, or there is another number of weights.
pub fn gradient(x: &[f32], grad: &[f32], tiles: &Tiles, layout: &Layout, weights: &mut [f32]) {
    let (inputs, outputs) = channels(layout);
    assert_eq!(x.len(), tiles.rows() * inputs, "a convolution's input has a row for each position");
    assert_eq!(grad.len(), tiles.rows() * outputs, "a gradient has a row for each position");
    let vectors = Vectors::here();
    let panels: Vec<(usize, usize)> = vectors.panels(outputs).collect();
    // Where there are few parts, tiles are divided too, in the same way for any number of threads: that is what sums depend on.
    let divided =
        (32 / (panels.len() * inputs.div_ceil(INPUTS))).clamp(1, tiles.count().div_ceil(512).max(1));
    let some = tiles.count().div_ceil(divided);
    let blocks = parallel::parts(inputs, CHANNELS, INPUTS, panels.len() * divided);
    let zeros = vec![0.0; INPUTS.max(vectors.columns)];

    let mut sums = vec![0.0; divided * AREA * inputs * outputs];
    let mut rest = sums.as_mut_slice();
    let mut parts = Vec::new();
    for &(column, width) in &panels {
        for block in &blocks {
            for i in 0..divided {
                let (sums, behind) = std::mem::take(&mut rest).split_at_mut(AREA * block.len() * width);
                rest = behind;
                let range = tiles.count().min(i * some)..tiles.count().min((i + 1) * some);
                parts.push(Gradient {
                    x: (x, inputs, block.clone()),
                    grad: (grad, outputs, column..column + width),
                    tiles,
                    range,
                    zeros: &zeros,
                    sums,
                });
            }
        }
    }
    parallel::for_each(parts, |part| Arch::new().dispatch(part));

    // In panels `(9, C, width)`.
    let depth = 9 * inputs;
    let mut taps = vec![0.0; depth * outputs];
    let mut rest = taps.as_mut_slice();
    let of_panels = panels.iter().map(|&(column, width)| {
        let (taps, behind) = std::mem::take(&mut rest).split_at_mut(depth * width);
        rest = behind;
        (&sums[divided * AREA * inputs * column..][..divided * AREA * inputs * width], taps, width)
    });
    parallel::for_each(of_panels, |(sums, taps, width)| {
        let mut rest = sums;
        for block in &blocks {
            let (sums, behind) = rest.split_at(divided * AREA * block.len() * width);
            rest = behind;
            let part = block.start * width..block.end * width;
            Arch::new().dispatch(Sum { sums, taps, plane: inputs * width, part });
        }
    });
    let row = |k: usize, n: usize| {
        let (column, width) = panels[n / vectors.columns];
        &taps[column * depth + k * width + (n - column)..]
    };
    layout.write_rows(vectors.columns.min(crate::matmul::STAGED), row, weights);
}

/// Input channels of a part of the gradient, at most.
const INPUTS: usize = 64;
/// Tiles whose products are added up in registers.
const TILES: usize = 64;

/// The sums `(16, part of C, part of C')` over some tiles.
struct Gradient<'a> {
    x: (&'a [f32], usize, Range<usize>),
    grad: (&'a [f32], usize, Range<usize>),
    tiles: &'a Tiles,
    range: Range<usize>,
    zeros: &'a [f32],
    sums: &'a mut [f32],
}

impl WithSimd for Gradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Gradient { x: (x, inputs, block), grad: (grad, outputs, columns), tiles, range, zeros, sums } =
            self;
        let (length, width) = (block.len(), columns.len());
        let (seen_plane, grad_plane) = (plane(TILES * length), plane(TILES * width));
        let (mut seen, mut made) = (vec![0.0; AREA * seen_plane], vec![0.0; AREA * grad_plane]);
        let starts: Vec<usize> = (0..TILES).map(|t| t * length).collect();
        for from in range.clone().step_by(TILES) {
            let some = from..range.end.min(from + TILES);
            transform_input(
                simd,
                (x, inputs),
                block.clone(),
                (tiles, some.clone()),
                zeros,
                (&mut seen, seen_plane),
            );
            let windows = some.clone().map(|tile| tiles.window(tile));
            transform_gradient(
                simd,
                windows,
                (grad, outputs),
                columns.clone(),
                zeros,
                (&mut made, grad_plane),
            );
            let planes = seen.chunks(seen_plane).zip(made.chunks(grad_plane));
            for ((seen, made), sums) in planes.zip(sums.chunks_exact_mut(length * width)) {
                let starts = &starts[..some.len()];
                let target = Target { columns: width, first: 0, begins: from == range.start, bias: None };
                let panel = &made[..some.len() * width];
                for_tile!(S, width / S::F32_LANES, gradient_tiles(simd, seen, starts, panel, target, sums));
            }
        }
    }
}

/// The gradients of what some tiles make, as gradients of their products: for each the channels `part` of all, in planes of
/// `(tiles, part)`.
#[inline(always)]
fn transform_gradient<'a, S: Simd>(
    simd: S,
    tiles: impl Iterator<Item = (&'a [u32; AREA], usize)>,
    (grad, channels): (&[f32], usize),
    part: Range<usize>,
    zeros: &[f32],
    (made, plane): (&mut [f32], usize),
) {
    let length = part.len();
    for (t, (window, offset)) in tiles.enumerate() {
        let rows: [&[S::f32s]; INNER.len()] = array::from_fn(|i| {
            let row = match window[INNER[i]] {
                NOWHERE => &zeros[..length],
                row => &grad[(offset + row as usize) * channels + part.start..][..length],
            };
            S::as_simd_f32s(row).0
        });
        let mut to = planes::<S>(made, plane, t * length..(t + 1) * length);
        for v in 0..length / S::F32_LANES {
            apply(simd, &rows, &mut to, v, transform::output_gradient);
        }
    }
}

/// Adds up the parts `(16, n)` of a gradient, and takes them to taps: the numbers `part` of nine planes.
struct Sum<'a> {
    sums: &'a [f32],
    taps: &'a mut [f32],
    plane: usize,
    part: Range<usize>,
}

impl WithSimd for Sum<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Sum { sums, taps, plane, part } = self;
        let zero = simd.splat_f32s(0.0);
        let length = part.len();
        let mut planes = taps.chunks_exact_mut(plane);
        let mut taps: [&mut [S::f32s]; 9] = array::from_fn(|_| {
            let plane = planes.next().expect("a kernel has nine taps");
            S::as_mut_simd_f32s(&mut plane[part.clone()]).0
        });
        let sums = S::as_simd_f32s(sums).0;
        let count = length / S::F32_LANES;
        for v in 0..count {
            let mut sum = [[zero; SIDE]; SIDE];
            for part in sums.chunks_exact(AREA * count) {
                for i in 0..AREA {
                    let sum = &mut sum[i / SIDE][i % SIDE];
                    *sum = simd.add_f32s(*sum, part[i * count + v]);
                }
            }
            let kernel = both_ways(simd, &sum, transform::kernel_gradient);
            for (i, to) in taps.iter_mut().enumerate() {
                to[v] = kernel[i / 3][i % 3];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IN: usize = 3;
    const OUT: usize = 5;

    fn numbers(count: usize, modulo: usize) -> Vec<f32> {
        (0..count).map(|i| (i * i % modulo) as f32 - 7.0).collect()
    }

    /// The parts by the vectors of a machine that has none: panels of two columns. All numbers are whole, and so are halves of
    /// sums of them that are left, so results are exact.
    #[test]
    fn narrow_panels_are_written_where_they_belong() {
        let simd = pulp::Scalar::new();
        let (height, width) = (3, 4);
        let tiles = Tiles::of_maps((height, width), 2);
        let (x, grad) = (numbers(tiles.rows() * IN, 17), numbers(tiles.rows() * OUT, 13));
        // (9, C, C')
        let taps: Vec<f32> = numbers(9 * IN * OUT, 11).iter().map(|x| 4.0 * x).collect();
        let tap = |t: usize, c: usize, n: usize| taps[(t * IN + c) * OUT + n];
        let panels = [(0, 2), (2, 2), (4, 1)];

        let mut values = Vec::new();
        for (column, width) in panels {
            let of_panel = |i: usize| tap(i / width / IN, i / width % IN, column + i % width);
            let taps: Vec<f32> = (0..9 * IN * width).map(of_panel).collect();
            let mut made = vec![f32::NAN; AREA * IN * width];
            simd.vectorize(Transform { taps: &taps, made: &mut made });
            values.extend(made);
        }
        let kernels = Kernels { values, inputs: IN, outputs: OUT };
        let (mut out, zeros) = (vec![f32::NAN; tiles.rows() * OUT], [0.0; IN + OUT]);
        let range = 0..tiles.count();
        let (tiles, kernels, zeros) = (&tiles, &kernels, &zeros[..]);
        simd.vectorize(Convolution {
            x: &x,
            tiles,
            range: range.clone(),
            first: 0,
            kernels,
            zeros,
            out: &mut out,
        });

        let mut of_taps = vec![0.0; taps.len()];
        for (row, out) in out.chunks(OUT).enumerate() {
            let (image, y, x_at) = (row / width / height, row / width % height, row % width);
            for (n, out) in out.iter().enumerate() {
                let mut expected = 0.0;
                for t in 0..9 {
                    let (y, x_at) = ((y + t / 3).wrapping_sub(1), (x_at + t % 3).wrapping_sub(1));
                    if y >= height || x_at >= width {
                        continue;
                    }
                    for c in 0..IN {
                        let seen = x[((image * height + y) * width + x_at) * IN + c];
                        expected += seen * tap(t, c, n);
                        of_taps[(t * IN + c) * OUT + n] += seen * grad[row * OUT + n];
                    }
                }
                assert_eq!(*out, expected, "row {row}, output {n}");
            }
        }

        for (column, width) in panels {
            // Two parts of the tiles, which are added up.
            let mut sums = vec![f32::NAN; 2 * AREA * IN * width];
            let (first, second) = sums.split_at_mut(AREA * IN * width);
            for (range, sums) in [(0..3, first), (3..range.end, second)] {
                let (x, grad) = ((&x[..], IN, 0..IN), (&grad[..], OUT, column..column + width));
                simd.vectorize(Gradient { x, grad, tiles, range, zeros, sums });
            }
            let plane = IN * width;
            let mut made = vec![f32::NAN; 9 * plane];
            simd.vectorize(Sum { sums: &sums, taps: &mut made, plane, part: 0..plane });
            for (i, made) in made.iter().enumerate() {
                let (t, c, n) = (i / plane, i / width % IN, column + i % width);
                assert_eq!(*made, of_taps[(t * IN + c) * OUT + n], "tap {t}, {c} to {n}");
            }
        }
    }
}
