//! The C allocator, which libtorch, the host and plugins share: what it keeps, and what it has given out.

const TUNABLES: &str = "GLIBC_TUNABLES";

/// Lets the allocator keep what is freed, for its next use. Of itself it asks the system for every tensor above some MB, and
/// gives it back; each time the system clears its pages, which takes a tenth of a training step. Does nothing where the environment
/// decides it. To be called once, before threads begin.
pub fn keep_freed_memory() {
    let by_user =
        |name: &str| std::env::var(name).is_ok_and(|value| name != TUNABLES || value.contains("malloc"));
    if ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", TUNABLES].into_iter().any(by_user) {
        return;
    }
    // SAFETY: it takes numbers, and no other thread allocates yet.
    let set = |what: i32, bytes: i32| unsafe { libc::mallopt(what, bytes) } != 0;
    // What is smaller than the first comes from what is kept: older libraries take no more than 32 MiB. The second is the
    // most that is kept; alone it would do harm, as the first would no longer adapt.
    if set(libc::M_MMAP_THRESHOLD, 1 << 30) || set(libc::M_MMAP_THRESHOLD, 32 << 20) {
        set(libc::M_TRIM_THRESHOLD, i32::MAX);
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
