//! Runs a function over many images on all cores, for the tools that walk a whole data set.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

/// Results of `work(0)` … `work(count − 1)` in this order, made by `threads` threads (0: one per core). `progress`
/// is told how many are done, from any thread, after each.
///
/// # Errors
/// The first of `work`, after which no thread begins another.
///
/// # Panics
/// When `work` does.
pub(super) fn try_map<R: Send, E: Send>(
    count: usize,
    threads: usize,
    progress: &(dyn Fn(usize) + Sync),
    work: impl Fn(usize) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    /// Items that a thread takes at a time.
    const CHUNK: usize = 16;
    let cores = || thread::available_parallelism().map_or(1, |cores| cores.get());
    let threads = if threads == 0 { cores() } else { threads };
    let (next, done, failed) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
    let chunks = Mutex::new(Vec::new());
    let one = |index| {
        let result = work(index);
        failed.fetch_or(result.is_err(), Ordering::Relaxed);
        progress(done.fetch_add(1, Ordering::Relaxed) + 1);
        result
    };
    thread::scope(|scope| {
        for _ in 0..threads.min(count.div_ceil(CHUNK)) {
            scope.spawn(|| {
                loop {
                    let first = next.fetch_add(CHUNK, Ordering::Relaxed);
                    if first >= count || failed.load(Ordering::Relaxed) {
                        return;
                    }
                    let results: Result<Vec<R>, E> = (first..count.min(first + CHUNK)).map(one).collect();
                    chunks.lock().unwrap_or_else(PoisonError::into_inner).push((first, results));
                }
            });
        }
    });
    let mut chunks = chunks.into_inner().unwrap_or_else(PoisonError::into_inner);
    chunks.sort_unstable_by_key(|(first, _)| *first);
    let mut all = Vec::with_capacity(count);
    for (_, results) in chunks {
        all.extend(results?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_and_an_error_ends_it() {
        let square = |index| Ok::<usize, usize>(index * index);
        assert_eq!(try_map(100, 3, &|_| {}, square).unwrap()[99], 99 * 99);
        let begun = AtomicUsize::new(0);
        let fails = |index| {
            begun.fetch_add(1, Ordering::Relaxed);
            if index >= 40 { Err(index) } else { Ok(index) }
        };
        assert_eq!(try_map(100_000, 2, &|_| {}, fails), Err(40));
        assert!(begun.into_inner() < 1000);
    }
}
