//! The memory of one batch, filled by many threads at once without a copy, and used again for a later one.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tch::Tensor;
use tch::kind::Element;

use crate::device::{DeviceError, pinned, tensor_over};

/// Where batches lie. What has been dropped of one serves a later one: to ask the system for new memory is to have it cleared
/// page by page, which takes as long as a third of a decoding.
#[derive(Clone, Debug)]
pub(super) enum Pool {
    /// Memory that a GPU reads by itself, which libtorch keeps.
    Pinned,
    /// Other memory.
    Kept(Arc<Kept>),
}

/// Memory that no tensor lies in.
#[derive(Debug)]
pub(super) struct Kept {
    blocks: Mutex<Vec<Block>>,
    /// More than so many are freed.
    most: usize,
}

/// As long as a cache line, and aligned like one, so for any number.
#[derive(Clone, Debug)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "only its address is used")] [u8; 64]);

type Block = Vec<Line>;

/// A block that a tensor lies in.
struct Lent {
    block: Block,
    from: Arc<Kept>,
}

impl Pool {
    /// Of which at most so many tensors are kept.
    pub fn new(is_pinned: bool, most: usize) -> Pool {
        match is_pinned {
            true => Pool::Pinned,
            false => Pool::Kept(Arc::new(Kept { blocks: Mutex::default(), most })),
        }
    }

    /// A contiguous tensor of any values.
    fn tensor<T: Number>(&self, shape: &[i64]) -> Result<Tensor, DeviceError> {
        let Pool::Kept(kept) = self else { return pinned(shape, T::KIND) };
        let bytes = shape.iter().product::<i64>() as usize * size_of::<T>();
        let mut block = kept.take(bytes.div_ceil(size_of::<Line>()));
        let start = block.as_mut_ptr().cast();
        // SAFETY: the block has so many bytes at least, aligned for any number. They are not moved when what owns the block is,
        // and nobody else knows of them until that is dropped.
        unsafe { tensor_over(shape, T::KIND, start, Lent { block, from: kept.clone() }) }
    }
}

impl Kept {
    /// Room for so many lines.
    fn take(&self, lines: usize) -> Block {
        let kept = self.blocks.lock().unwrap_or_else(PoisonError::into_inner).pop();
        // Only a last batch that is not full leaves one that is too small.
        kept.filter(|block| block.len() >= lines).unwrap_or_else(|| vec![Line([0; 64]); lines])
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut blocks = self.from.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        if blocks.len() < self.from.most {
            blocks.push(std::mem::take(&mut self.block));
        }
    }
}

/// The tensors of a batch while they are being filled: one `(B, 3, S, S)` of T, f32 or u8, per view; or one for all views, of u8,
/// where each image has a slot as long as a picture of S × S, and its shape says nothing about what lies in it.
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

/// A number of a tensor.
///
/// # Safety
/// Any bytes are a value of it.
pub(super) unsafe trait Number: Element {}
// SAFETY: they are.
unsafe impl Number for f32 {}
// SAFETY: they are.
unsafe impl Number for u8 {}

impl<T: Number> BatchMemory<T> {
    /// Takes from the pool, as it is, the memory of `views` tensors for `samples` images of `size × size`.
    pub fn new(pool: &Pool, views: usize, samples: usize, size: u32) -> Result<BatchMemory<T>, DeviceError> {
        let shape = [samples as i64, 3, i64::from(size), i64::from(size)];
        let views = (0..views)
            .map(|_| {
                let tensor = pool.tensor::<T>(&shape)?;
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
                // slice covers these elements, because `taken` lets each position pass once. Any bytes are a
                // number; a block was cleared when it was made, and pinned memory is what the system has mapped.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(pool: &Pool, samples: usize) -> Tensor {
        BatchMemory::<f32>::new(pool, 1, samples, 4).unwrap().into_views().remove(0)
    }

    #[test]
    fn what_is_dropped_serves_the_next_batch_and_what_is_held_does_not() {
        let pool = Pool::new(false, 2);
        let first = batch(&pool, 5);
        let place = first.data_ptr();
        // A view of it, as a method may keep one.
        let held = first.narrow(0, 1, 2);
        drop(first);
        let second = batch(&pool, 5);
        assert_ne!(second.data_ptr(), place);
        drop(held);
        // A smaller one finds room there too, and a larger one is not put where there is none.
        let third = batch(&pool, 3);
        assert_eq!((third.data_ptr(), third.size()), (place, vec![3, 3, 4, 4]));
        drop(third);
        let Pool::Kept(kept) = &pool else { panic!("it is not pinned") };
        assert_eq!(kept.blocks.lock().unwrap()[0].len() * 64, 5 * 48 * 4);
        assert!(kept.take(1000).len() >= 1000);
        assert!(kept.blocks.lock().unwrap().is_empty());
    }

    #[test]
    fn no_more_is_kept_than_may_be() {
        let pool = Pool::new(false, 2);
        let batches: Vec<Tensor> = (0..5).map(|_| batch(&pool, 1)).collect();
        let Pool::Kept(kept) = &pool else { panic!("it is not pinned") };
        drop(batches);
        assert_eq!(kept.blocks.lock().unwrap().len(), 2);
    }

    #[test]
    fn memory_stays_as_long_as_its_tensor_and_no_longer() {
        let pool = Pool::new(false, 1);
        let Pool::Kept(kept) = &pool else { panic!("it is not pinned") };
        let kept = Arc::downgrade(kept);
        let held = batch(&pool, 2);
        drop(pool);
        assert!(kept.upgrade().is_some_and(|kept| kept.blocks.lock().unwrap().is_empty()));
        drop(held);
        assert!(kept.upgrade().is_none());
    }
}
