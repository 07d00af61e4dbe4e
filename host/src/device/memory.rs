//! What the allocator has given out.

/// Bytes that this process holds from the C allocator, which libtorch, the host and plugins share: without what was
/// given back and waits for its next use, which resident memory counts too.
pub fn allocated_bytes() -> u64 {
    // SAFETY: it takes nothing, locks each arena in turn, and returns numbers.
    let info = unsafe { libc::mallinfo2() };
    (info.uordblks + info.hblkhd) as u64
}
