//! The C allocator, which libtorch, the host and plugins share: what it keeps, and what it has given out.

/// Lets the allocator keep what is freed, for its next use. Of itself it asks the system for every tensor above some MB, and
/// gives it back; each time the system clears its pages, which takes a tenth of a training step. To be called once, before
/// threads begin.
pub fn keep_freed_memory() {
    // As long as an allocation is below the first, it comes from what is kept; the second is the most that is.
    for (what, bytes) in [(libc::M_MMAP_THRESHOLD, 1 << 30), (libc::M_TRIM_THRESHOLD, i32::MAX)] {
        // SAFETY: it takes numbers, and no other thread allocates yet.
        if unsafe { libc::mallopt(what, bytes) } == 0 {
            tracing::debug!("the C library's allocator does not take parameter {what}");
        }
    }
}

/// Bytes that this process holds from the C allocator, which libtorch, the host and plugins share: without what was
/// given back and waits for its next use, which resident memory counts too.
pub fn allocated_bytes() -> u64 {
    // SAFETY: it takes nothing, locks each arena in turn, and returns numbers.
    let info = unsafe { libc::mallinfo2() };
    (info.uordblks + info.hblkhd) as u64
}

/// The most memory that this process has had in RAM at any moment so far, in bytes.
pub fn peak_resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}
