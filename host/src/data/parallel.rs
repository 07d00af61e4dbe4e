//! Runs a function over many images on all cores, for the tools that walk a whole data set.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Results of `work(0)` … `work(count − 1)` in this order, made by `threads` threads (0: one per core). `progress`
/// is told how many are done, from any thread, after each.
///
/// # Panics
/// When `work` does.
pub(super) fn map<R: Send>(
    count: usize,
    threads: usize,
    progress: &(dyn Fn(usize) + Sync),
    work: impl Fn(usize) -> R + Sync,
) -> Vec<R> {
    /// Items that a thread takes at a time.
    const CHUNK: usize = 16;
    let cores = || thread::available_parallelism().map_or(1, |cores| cores.get());
    let threads = if threads == 0 { cores() } else { threads };
    let next = AtomicUsize::new(0);
    let done = AtomicUsize::new(0);
    let chunks = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..threads.min(count.div_ceil(CHUNK)) {
            scope.spawn(|| {
                loop {
                    let first = next.fetch_add(CHUNK, Ordering::Relaxed);
                    if first >= count {
                        return;
                    }
                    let results: Vec<R> = (first..count.min(first + CHUNK))
                        .map(|index| {
                            let result = work(index);
                            progress(done.fetch_add(1, Ordering::Relaxed) + 1);
                            result
                        })
                        .collect();
                    chunks.lock().unwrap_or_else(PoisonError::into_inner).push((first, results));
                }
            });
        }
    });
    let mut chunks = chunks.into_inner().unwrap_or_else(PoisonError::into_inner);
    chunks.sort_unstable_by_key(|&(first, _)| first);
    chunks.into_iter().flat_map(|(_, results)| results).collect()
}
