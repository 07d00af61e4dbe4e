//! What the allocator has given out.

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
