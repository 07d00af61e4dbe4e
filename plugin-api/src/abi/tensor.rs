//! Tensors across the boundary: one owned pointer to libtorch's `at::Tensor`, autograd graph and all.

use std::ffi::c_void;
use std::mem::ManuallyDrop;

use abi_stable::StableAbi;
use tch::Tensor;

/// An owned `at::Tensor*`. Both sides call the same bridge, so either may free it.
///
/// OWNERSHIP: whoever holds the value frees it, by dropping it or by turning it into a [`Tensor`].
#[repr(transparent)]
#[derive(StableAbi)]
pub struct TensorOwned(*mut c_void);

// SAFETY: a tensor may be moved to another thread; tch declares its own tensors `Send` for the same reason.
unsafe impl Send for TensorOwned {}

impl From<Tensor> for TensorOwned {
    fn from(tensor: Tensor) -> Self {
        TensorOwned(ManuallyDrop::new(tensor).as_mut_ptr().cast())
    }
}

impl From<TensorOwned> for Tensor {
    fn from(owned: TensorOwned) -> Self {
        let pointer = ManuallyDrop::new(owned).0;
        // SAFETY: the pointer came out of a Tensor, is owned by nobody else, and the wrapper that held it is forgotten.
        unsafe { Tensor::from_ptr(pointer.cast()) }
    }
}

impl Drop for TensorOwned {
    fn drop(&mut self) {
        // SAFETY: as above; the field is not read again after drop.
        drop(unsafe { Tensor::from_ptr(self.0.cast()) });
    }
}
