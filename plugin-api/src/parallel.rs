//! Work on libtorch's own threads, as many as the host lets it have (`trainer.threads`).

use std::any::Any;
use std::ffi::c_void;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

// host/bridge/parallel.cpp
unsafe extern "C" {
    fn jepa_parallel_for(
        begin: i64,
        end: i64,
        grain: i64,
        body: extern "C" fn(*mut c_void, i64, i64),
        data: *mut c_void,
    );
}

/// `0..end` in parts of one size, which is a multiple of `unit` and at most `most`: so small that `times` as many parts are
/// enough for all threads.
pub(crate) fn parts(end: usize, unit: usize, most: usize, times: usize) -> Vec<Range<usize>> {
    let wanted = (2 * tch::get_num_threads().max(1) as usize).div_ceil(times.max(1));
    let some = end.div_ceil(wanted).next_multiple_of(unit).clamp(unit, most);
    (0..end).step_by(some).map(|first| first..end.min(first + some)).collect()
}

struct Work<I, F> {
    items: Vec<Mutex<Option<I>>>,
    /// The next that nobody has taken.
    next: AtomicUsize,
    body: F,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Calls `body` with each of `items`, at once on the threads that libtorch computes with, and returns when all are done.
/// A thread that is done with one takes the next, in their order, so that none waits for a slower one: for results that do
/// not depend on the number of threads, let the items be the same for any. Since 1.1.
///
/// ```
/// let mut squares = [1, 2, 3, 4, 5];
/// jepa_plugin_api::parallel::for_each(squares.chunks_mut(2), |part| part.iter_mut().for_each(|x| *x *= *x));
/// assert_eq!(squares, [1, 4, 9, 16, 25]);
/// ```
///
/// # Panics
/// When `body` panics; the rest may have been done then or not.
pub fn for_each<I: Send, F: Fn(I) + Sync>(items: impl IntoIterator<Item = I>, body: F) {
    let items: Vec<_> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    let threads = items.len().min(tch::get_num_threads().max(1) as usize) as i64;
    let work = Work { items, next: AtomicUsize::new(0), body, panic: Mutex::new(None) };
    let data = (&raw const work).cast_mut().cast();
    // SAFETY: `run::<I, F>` takes a Work<I, F>, which outlives the call and may be shared between threads.
    unsafe { jepa_parallel_for(0, threads, 1, run::<I, F>, data) };
    if let Some(payload) = work.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(payload);
    }
}

extern "C" fn run<I: Send, F: Fn(I) + Sync>(data: *mut c_void, _: i64, _: i64) {
    // SAFETY: see the call.
    let work = unsafe { &*data.cast_const().cast::<Work<I, F>>() };
    let some = || {
        while let Some(item) = work.items.get(work.next.fetch_add(1, Ordering::Relaxed)) {
            let item = item.lock().unwrap_or_else(PoisonError::into_inner).take();
            (work.body)(item.expect("every item is taken once"));
        }
    };
    // Nothing may unwind through libtorch's threads.
    if let Err(payload) = catch_unwind(AssertUnwindSafe(some)) {
        work.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
    }
}
