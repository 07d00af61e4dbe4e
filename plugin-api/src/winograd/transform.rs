//! The transforms of F(2 × 2, 3 × 3): each is applied to columns, and then to rows.

use pulp::Simd;

/// Side of a window: what 2 × 2 outputs of a 3 × 3 kernel see.
pub(super) const SIDE: usize = 4;
/// Numbers of a window.
pub(super) const AREA: usize = SIDE * SIDE;

/// Of N lines of vectors, the ones at `at`, transformed by `f` both ways, to the same place of as many lines as that makes.
#[inline(always)]
pub(super) fn apply<S: Simd, const A: usize, const N: usize, const B: usize, const M: usize>(
    simd: S,
    from: &[&[S::f32s]; N],
    to: &mut [&mut [S::f32s]; M],
    at: usize,
    f: impl Fn(S, [S::f32s; A]) -> [S::f32s; B],
) {
    let values = both_ways(simd, &square(simd, from, at), f);
    for (i, to) in to.iter_mut().enumerate() {
        to[at] = values[i / B][i % B];
    }
}

/// Of N lines of vectors, the ones at `at`, side by side.
#[inline(always)]
pub(super) fn square<S: Simd, const A: usize, const N: usize>(
    simd: S,
    from: &[&[S::f32s]; N],
    at: usize,
) -> [[S::f32s; A]; A] {
    let mut square = [[simd.splat_f32s(0.0); A]; A];
    for (i, from) in from.iter().enumerate() {
        square[i / A][i % A] = from[at];
    }
    square
}

/// `f` of each column of `x`, and of each row of what that makes.
#[inline(always)]
pub(super) fn both_ways<S: Simd, const A: usize, const B: usize>(
    simd: S,
    x: &[[S::f32s; A]; A],
    f: impl Fn(S, [S::f32s; A]) -> [S::f32s; B],
) -> [[S::f32s; B]; B] {
    let zero = simd.splat_f32s(0.0);
    let mut lines = [[zero; A]; B];
    for j in 0..A {
        let mut column = [zero; A];
        for i in 0..A {
            column[i] = x[i][j];
        }
        let column = f(simd, column);
        for i in 0..B {
            lines[i][j] = column[i];
        }
    }
    let mut made = [[zero; B]; B];
    for i in 0..B {
        made[i] = f(simd, lines[i]);
    }
    made
}

/// Bᵀ: of what is seen.
#[inline(always)]
pub(super) fn input<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; 4]) -> [S::f32s; 4] {
    [simd.sub_f32s(a, c), simd.add_f32s(b, c), simd.sub_f32s(c, b), simd.sub_f32s(b, d)]
}

/// G: of a kernel.
#[inline(always)]
pub(super) fn kernel<S: Simd>(simd: S, [a, b, c]: [S::f32s; 3]) -> [S::f32s; 4] {
    let half = simd.splat_f32s(0.5);
    let (ends, middle) = (simd.mul_f32s(half, simd.add_f32s(a, c)), simd.mul_f32s(half, b));
    [a, simd.add_f32s(ends, middle), simd.sub_f32s(ends, middle), c]
}

/// Gᵀ: takes sums of products to the gradient of a kernel.
#[inline(always)]
pub(super) fn kernel_gradient<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; 4]) -> [S::f32s; 3] {
    let half = simd.splat_f32s(0.5);
    let (sum, difference) =
        (simd.mul_f32s(half, simd.add_f32s(b, c)), simd.mul_f32s(half, simd.sub_f32s(b, c)));
    [simd.add_f32s(a, sum), difference, simd.add_f32s(sum, d)]
}

/// Aᵀ: takes products to outputs.
#[inline(always)]
pub(super) fn output<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; 4]) -> [S::f32s; 2] {
    [simd.add_f32s(simd.add_f32s(a, b), c), simd.sub_f32s(simd.sub_f32s(b, c), d)]
}

/// A: of gradients of outputs.
#[inline(always)]
pub(super) fn output_gradient<S: Simd>(simd: S, [a, b]: [S::f32s; 2]) -> [S::f32s; 4] {
    [a, simd.add_f32s(a, b), simd.sub_f32s(a, b), simd.sub_f32s(simd.splat_f32s(0.0), b)]
}
