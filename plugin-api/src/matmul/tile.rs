//! What a thread holds in registers: tiles of some rows by some vectors of columns.

use pulp::{Arch, Simd, WithSimd};

use super::{Block, Rows};

/// The vectors of this machine.
#[derive(Clone, Copy)]
pub(crate) struct Vectors {
    pub lanes: usize,
    /// Columns of a tile.
    pub columns: usize,
}

impl Vectors {
    #[inline(always)]
    pub fn of<S: Simd>() -> Self {
        let in_tile = if S::REGISTER_COUNT >= 32 { 4 } else { 2 };
        Vectors { lanes: S::F32_LANES, columns: in_tile * S::F32_LANES }
    }

    pub fn here() -> Self {
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
    pub fn panels(self, columns: usize) -> impl Iterator<Item = (usize, usize)> {
        let padded = columns.next_multiple_of(self.lanes);
        (0..padded).step_by(self.columns).map(move |first| (first, self.columns.min(padded - first)))
    }
}

/// Where a tile goes in `(rows, columns)`.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub columns: usize,
    pub first: usize,
    /// Whether it is written, with the bias, or added to what is there.
    pub begins: bool,
    pub bias: Option<&'a [f32]>,
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
pub(crate) use for_tile;

/// The product of some rows with a panel, for a block of K.
#[inline(always)]
pub(crate) fn rows_of_tiles<S: Simd, const M: usize, const V: usize>(
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
    let bias = bias.filter(|_| begins);
    let whole = first + V * S::F32_LANES <= columns;
    if whole && bias.is_none() {
        // Unrolled, so that sums stay in their registers.
        for sums in sums {
            let Some(out) = out.next() else { return };
            let vectors = S::as_mut_simd_f32s(&mut out[first..]).0;
            let vectors: &mut [S::f32s; V] = vectors.first_chunk_mut().expect("whole vectors");
            for v in 0..V {
                vectors[v] = if begins { sums[v] } else { simd.add_f32s(sums[v], vectors[v]) };
            }
        }
        return;
    }
    for (sums, out) in sums.iter().zip(out) {
        for (v, sum) in sums.iter().enumerate() {
            let from = first + v * S::F32_LANES;
            let here = from..columns.min(from + S::F32_LANES);
            let mut sum = *sum;
            if here.len() < S::F32_LANES {
                if let Some(bias) = bias {
                    sum = simd.add_f32s(sum, simd.partial_load_f32s(&bias[here.clone()]));
                }
                if !begins {
                    sum = simd.add_f32s(sum, simd.partial_load_f32s(&out[here.clone()]));
                }
                simd.partial_store_f32s(&mut out[here], sum);
                continue;
            }
            if let Some(bias) = bias {
                sum = simd.add_f32s(sum, S::as_simd_f32s(&bias[here.clone()]).0[0]);
            }
            let out = &mut S::as_mut_simd_f32s(&mut out[here]).0[0];
            *out = if begins { sum } else { simd.add_f32s(sum, *out) };
        }
    }
}

/// For each number of the rows that begin at `starts`, and each column of a panel with a row for each of these, the sum of
/// their products over the rows: as many numbers as `out` has lines.
#[inline(always)]
pub(crate) fn gradient_tiles<S: Simd, const M: usize, const V: usize>(
    simd: S,
    values: &[f32],
    starts: &[usize],
    panel: &[f32],
    target: Target,
    out: &mut [f32],
) {
    let length = out.len() / target.columns;
    let mut out = out.chunks_mut(target.columns);
    let mut k = 0;
    while k < length {
        let values = &values[k..];
        if length - k >= M {
            store(simd, &gradient_tile::<S, M, V>(simd, values, starts, panel), target, &mut out);
            k += M;
        } else if length - k >= 4 {
            store(simd, &gradient_tile::<S, 4, V>(simd, values, starts, panel), target, &mut out);
            k += 4;
        } else {
            store(simd, &gradient_tile::<S, 1, V>(simd, values, starts, panel), target, &mut out);
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
