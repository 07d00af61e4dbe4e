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
    Ok(Descriptors { std: mean_std(x)?, rankme: rankme(x)? })
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

/// From the eigenvalues of the smaller Gram matrix, which are the squared singular values.
fn rankme(x: &Tensor) -> Result<f64, EvalError> {
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
    let singular = gram.f_linalg_eigvalsh("L")?.f_clamp_min(0.0)?.f_sqrt()?;
    let total = singular.f_sum(Kind::Double)?.f_double_value(&[])?;
    if total == 0.0 {
        return Ok(0.0);
    }
    let share = singular.f_div_scalar(total)?.f_add_scalar(1e-7)?;
    let entropy = -share.f_mul(&share.f_log()?)?.f_sum(Kind::Double)?.f_double_value(&[])?;
    Ok(entropy.exp())
}
