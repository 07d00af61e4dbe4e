//! The ranks of a run: processes that train together, each on its share of every batch.
//!
//! A method needs none of this to work on many. The host averages losses, gradients and metrics over the ranks, and whatever
//! looks at a whole batch here does so over all of it: [`nn::BatchNorm`](crate::nn::BatchNorm),
//! [`nn::nt_xent`](crate::nn::nt_xent), [`nn::masked_mean`](crate::nn::masked_mean) and their like. A loss of your own that
//! is more than a mean over images has to look beyond its rank with the functions below, so that n ranks with b images each
//! train as one with n · b does.
//!
//! All ranks call them with tensors of equal shape, in the same order; which [`Batch`](crate::Batch) they have may matter to
//! the values alone. In validation every rank has batches of its own, and is alone: there, and in a run of one, they give
//! back what they are given.
//!
//! ```
//! use jepa_plugin_api::tch::{Kind, Tensor};
//! use jepa_plugin_api::ranks;
//!
//! /// How far the embeddings `(B, D)` of all images are from their common mean.
//! fn scatter(x: &Tensor) -> Tensor {
//!     let images = x.size()[0] * ranks::size() as i64;
//!     let mean = ranks::all_reduce(&x.sum_dim_intlist([0i64].as_slice(), true, Kind::Float)) / images as f64;
//!     (x - mean).square().sum(Kind::Float) / x.size()[0] as f64
//! }
//!
//! let x = Tensor::from_slice(&[1f32, 3.0]).view([2, 1]);
//! assert_eq!((ranks::rank(), ranks::size()), (0, 1));
//! assert_eq!(f64::try_from(scatter(&x)).unwrap(), 1.0);
//! ```

use std::ffi::{CStr, c_char, c_void};
use std::panic::resume_unwind;
use std::ptr;

use tch::Tensor;

use crate::autograd;

// host/bridge/ranks.cpp
unsafe extern "C" {
    fn jepa_ranks_rank() -> i32;
    fn jepa_ranks_size() -> i32;
    fn jepa_ranks_all_reduce(tensor: *mut c_void, error: *mut *mut c_char) -> bool;
    fn jepa_ranks_all_gather(tensor: *const c_void, all: *mut c_void, error: *mut *mut c_char) -> bool;
    fn free(memory: *mut c_void);
}

/// The number of this process among all that train together, from 0. Since 1.1.
pub fn rank() -> usize {
    // SAFETY: it takes nothing and gives a number.
    unsafe { jepa_ranks_rank() as usize }
}

/// How many train together, each with an equal share of the batch: 1 in a run of one process, and in validation. Since 1.1.
pub fn size() -> usize {
    // SAFETY: as above.
    unsafe { jepa_ranks_size() as usize }
}

/// The sum of the `x` of all ranks, equal on all of them. The gradient of `x` is the sum of those that all ranks have for
/// their results. Since 1.1.
///
/// # Panics
/// When another rank is lost: the host ends the run.
pub fn all_reduce(x: &Tensor) -> Tensor {
    if size() == 1 {
        return x.shallow_clone();
    }
    let sum = tch::no_grad(|| summed(x));
    autograd::record("AllReduce", &[x], sum, |grad| vec![Some(summed(grad))])
}

/// The rows of all ranks, in their order: `(B, …)` to `(size · B, …)`. The gradient of `x` is the sum of those that all ranks
/// have for its rows. Since 1.1.
///
/// # Panics
/// When `x` is a single number, which has no rows. When another rank is lost: the host ends the run.
pub fn gather(x: &Tensor) -> Tensor {
    assert!(
        x.dim() > 0,
        "ranks::gather takes rows (B, …), and a single number has none: give it x.view([1])"
    );
    if size() == 1 {
        return x.shallow_clone();
    }
    let rows = x.size()[0];
    let all = tch::no_grad(|| gathered(x));
    autograd::record("Gather", &[x], all, move |grad| {
        vec![Some(summed(grad).narrow(0, rank() as i64 * rows, rows))]
    })
}

/// The sum over all ranks, without a graph.
pub(crate) fn summed(x: &Tensor) -> Tensor {
    let mut sum = x.detach().copy().contiguous();
    if size() == 1 {
        return sum;
    }
    let mut error = ptr::null_mut();
    // SAFETY: the handle is valid, and the tensor is nobody else's.
    let done = unsafe { jepa_ranks_all_reduce(sum.as_mut_ptr().cast(), &mut error) };
    check(done, error);
    sum
}

/// The rows of all ranks, without a graph.
pub(crate) fn gathered(x: &Tensor) -> Tensor {
    let x = x.detach().contiguous();
    if size() == 1 {
        return x;
    }
    let mut shape = x.size();
    shape[0] *= size() as i64;
    let mut all = Tensor::empty(shape, (x.kind(), x.device()));
    let mut error = ptr::null_mut();
    // SAFETY: both handles are valid, and `all` is nobody else's.
    let done = unsafe { jepa_ranks_all_gather(x.as_ptr().cast(), all.as_mut_ptr().cast(), &mut error) };
    check(done, error);
    all
}

/// Sums of each rank become those of all, in place. No graph is recorded.
pub(crate) fn sum(values: &mut [f64]) {
    if size() > 1 {
        let sum = summed(&Tensor::from_slice(values));
        sum.copy_data(values, values.len());
    }
}

fn check(done: bool, error: *mut c_char) {
    if done {
        return;
    }
    // SAFETY: a false result comes with a message from malloc, which is ours to free.
    let message = unsafe {
        let message = CStr::from_ptr(error).to_string_lossy().into_owned();
        free(error.cast());
        message
    };
    // No bug of this plugin's, whose report would hide what the host has to say.
    resume_unwind(Box::new(format!("another rank is lost: {message}")));
}
