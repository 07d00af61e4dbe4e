//! The memory of one batch, filled by many threads at once without a copy.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};

use tch::kind::Element;
use tch::{Device, Tensor};

use crate::device::{DeviceError, pinned};

/// The tensors of a batch while they are being filled: one `(B, 3, S, S)` of T, f32 or u8, per view.
///
/// Each sample's place is handed out once, as slices that overlap with no others, so filling needs no lock.
#[derive(Debug)]
pub(super) struct BatchMemory<T> {
    views: Vec<View>,
    /// Number of T of one sample in one view.
    sample_len: usize,
    /// Which samples have been handed out.
    taken: Box<[AtomicBool]>,
    elements: PhantomData<T>,
}

#[derive(Debug)]
struct View {
    /// Owns the memory behind `start`.
    tensor: Tensor,
    start: *mut u8,
}

// SAFETY: a tensor may move between threads. Sharing `&BatchMemory` gives no access to a tensor (only `into_views`
// does, by value), and `sample` hands out each part of the memory behind `start` to one caller only.
unsafe impl<T: Send> Send for BatchMemory<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for BatchMemory<T> {}

/// Of which any bytes are a value.
pub(super) trait Number: Element {}
impl Number for f32 {}
impl Number for u8 {}

impl<T: Number> BatchMemory<T> {
    /// Allocates, without clearing, `views` tensors for `samples` images of `size × size`; of memory for a GPU, if it is to be
    /// pinned.
    pub fn new(
        views: usize,
        samples: usize,
        size: u32,
        is_pinned: bool,
    ) -> Result<BatchMemory<T>, DeviceError> {
        let shape = [samples as i64, 3, i64::from(size), i64::from(size)];
        let views = (0..views)
            .map(|_| {
                let tensor = match is_pinned {
                    true => pinned(&shape, T::KIND)?,
                    false => Tensor::f_empty(shape, (T::KIND, Device::Cpu))
                        .map_err(|error| DeviceError::Torch(error.to_string()))?,
                };
                Ok(View { start: tensor.data_ptr().cast(), tensor })
            })
            .collect::<Result<_, DeviceError>>()?;
        let sample_len = 3 * size as usize * size as usize;
        let taken = (0..samples).map(|_| AtomicBool::new(false)).collect();
        Ok(BatchMemory { views, sample_len, taken, elements: PhantomData })
    }

    /// The places of one sample, one slice per view. What they hold before they are written is not specified.
    ///
    /// # Panics
    /// When the place is asked for a second time, or lies beyond the batch.
    #[expect(clippy::mut_from_ref, reason = "`taken` makes sure that no two calls return the same memory")]
    pub fn sample(&self, position: usize) -> Vec<&mut [T]> {
        let taken = self.taken[position].swap(true, Ordering::Relaxed);
        assert!(!taken, "place {position} of a batch is filled twice");
        self.views
            .iter()
            .map(|view| {
                // SAFETY: the tensor is contiguous and of T's kind, with `taken.len() × sample_len` elements, and `position`
                // is below `taken.len()`. It stays alive as long as `self`, from which the slice is borrowed. No other
                // slice covers these elements, because `taken` lets each position pass once. Any bytes are a number;
                // the allocator wrote or mapped these pages, and nothing reads them before they are written.
                unsafe {
                    let start = view.start.cast::<T>().add(position * self.sample_len);
                    std::slice::from_raw_parts_mut(start, self.sample_len)
                }
            })
            .collect()
    }

    /// The tensors, when every sample is in its place.
    pub fn into_views(self) -> Vec<Tensor> {
        self.views.into_iter().map(|view| view.tensor).collect()
    }
}
