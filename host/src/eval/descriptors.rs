//! Signs of collapse that need no labels.

use tch::{Kind, Tensor};

use super::error::EvalError;

/// Features read at once where sums are taken in f64.
const BLOCK: i64 = 8192;

/// How much of their space features fill.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Descriptors {
    /// Standard deviation of each dimension of the L2-normalised features, averaged: 0 when all features are the same,
    /// about 1/√D when they point everywhere.
    pub std: f64,
    /// `std` × √D: 1 when features point everywhere, 0 when all are the same, whatever D is.
    pub spread: f64,
    /// Number of singular values above max(N, D) × 1.2e-7 of the greatest: the rank in f32.
    pub rank: f64,
    /// `rank` over the greatest that is possible, min(N, D).
    pub rank_ratio: f64,
    /// Correlation of two dimensions, its absolute value averaged over all pairs: 0 when none tells of another. A
    /// dimension that does not vary counts as correlated with all.
    pub correlation: f64,
    /// Share of the greatest squared singular value in the sum of all: 1 when features lie on one line.
    pub anisotropy: f64,
    /// exp of the entropy of the normalised singular values of the features (RankMe, arXiv 2210.02885, eq. 1): 1 to
    /// min(N, D); 0 when all features are zero.
    pub rankme: f64,
}

/// Describes features (N, D) as they are.
///
/// # Errors
/// Another shape, or no features.
pub fn describe(x: &Tensor) -> Result<Descriptors, EvalError> {
    let [rows, columns] = *x.size() else {
        let features = format!("{:?} of {:?}", x.size(), x.kind());
        return Err(EvalError::Shape { features, labels: "not needed".to_owned() });
    };
    if rows == 0 || columns == 0 {
        return Err(EvalError::Empty);
    }
    let _no_grad = tch::no_grad_guard();
    let std = mean_std(x)?;
    let singular = singular_values(x)?;
    let most = rows.min(columns) as f64;
    let floor = singular.f_max()?.f_mul_scalar(rows.max(columns) as f64 * f64::from(f32::EPSILON))?;
    let rank = singular.f_gt_tensor(&floor)?.f_sum(Kind::Double)?.f_double_value(&[])?;
    let squares = singular.f_square()?;
    let energy = squares.f_sum(Kind::Double)?.f_double_value(&[])?;
    let anisotropy = if energy == 0.0 { 1.0 } else { squares.f_max()?.f_double_value(&[])? / energy };
    Ok(Descriptors {
        std,
        spread: std * (columns as f64).sqrt(),
        rank,
        rank_ratio: rank / most,
        correlation: correlation(x)?,
        anisotropy,
        rankme: rankme(&singular)?,
    })
}

/// Pearson's correlation of each pair of dimensions, in f64.
fn correlation(x: &Tensor) -> Result<f64, EvalError> {
    let (rows, columns) = (x.size()[0], x.size()[1]);
    if columns < 2 {
        return Ok(0.0);
    }
    let mean = x.f_mean_dim([0i64].as_slice(), true, Kind::Double)?;
    let mut covariance = Tensor::f_zeros([columns, columns], (Kind::Double, x.device()))?;
    for block in x.f_split(BLOCK, 0)? {
        let block = block.f_to_kind(Kind::Double)?.f_sub(&mean)?;
        covariance = covariance.f_addmm(&block.f_transpose(0, 1)?, &block)?;
    }
    let deviation = covariance.f_diagonal(0, 0, 1)?.f_sqrt()?;
    let scale = deviation.f_outer(&deviation)?;
    // Rounding alone makes a constant dimension vary by about 1e-16 of its size.
    let size = x.f_abs()?.f_max()?.f_double_value(&[])?;
    let constant = scale.f_le(1e-12 * rows as f64 * size * size)?;
    let correlation = covariance.f_div(&scale)?.f_abs()?.f_masked_fill(&constant, 1.0)?;
    let off_diagonal = correlation.f_sum(Kind::Double)?.f_double_value(&[])? - columns as f64;
    Ok(off_diagonal / (columns * (columns - 1)) as f64)
}

fn mean_std(x: &Tensor) -> Result<f64, EvalError> {
    let columns = x.size()[1];
    let options = (Kind::Double, x.device());
    let (mut sum, mut squares) = (Tensor::f_zeros([columns], options)?, Tensor::f_zeros([columns], options)?);
    for block in x.f_split(BLOCK, 0)? {
        let block = block.f_to_kind(Kind::Double)?;
        let norms = block.f_norm_scalaropt_dim(2.0, [1i64].as_slice(), true)?.f_clamp_min(1e-12)?;
        let unit = block.f_div(&norms)?;
        sum = sum.f_add(&unit.f_sum_dim_intlist(0, false, Kind::Double)?)?;
        squares = squares.f_add(&unit.f_square()?.f_sum_dim_intlist(0, false, Kind::Double)?)?;
    }
    let rows = x.size()[0] as f64;
    let mean = sum.f_div_scalar(rows)?;
    let variance = squares.f_div_scalar(rows)?.f_sub(&mean.f_square()?)?.f_clamp_min(0.0)?;
    Ok(variance.f_sqrt()?.f_mean(Kind::Double)?.f_double_value(&[])?)
}

/// From the eigenvalues of the smaller Gram matrix, which are their squares.
fn singular_values(x: &Tensor) -> Result<Tensor, EvalError> {
    let (rows, columns) = (x.size()[0], x.size()[1]);
    let gram = if rows <= columns {
        let x = x.f_to_kind(Kind::Double)?;
        x.f_mm(&x.f_transpose(0, 1)?)?
    } else {
        let mut gram = Tensor::f_zeros([columns, columns], (Kind::Double, x.device()))?;
        for block in x.f_split(BLOCK, 0)? {
            let block = block.f_to_kind(Kind::Double)?;
            gram = gram.f_addmm(&block.f_transpose(0, 1)?, &block)?;
        }
        gram
    };
    Ok(gram.f_linalg_eigvalsh("L")?.f_clamp_min(0.0)?.f_sqrt()?)
}

fn rankme(singular: &Tensor) -> Result<f64, EvalError> {
    let total = singular.f_sum(Kind::Double)?.f_double_value(&[])?;
    if total == 0.0 {
        return Ok(0.0);
    }
    let share = singular.f_div_scalar(total)?.f_add_scalar(1e-7)?;
    let entropy = -share.f_mul(&share.f_log()?)?.f_sum(Kind::Double)?.f_double_value(&[])?;
    Ok(entropy.exp())
}
