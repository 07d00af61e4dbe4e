//! What this process holds, as the allocator and the kernel count it.

use std::fs;

use anyhow::Context as _;

use crate::device::allocated_bytes;

/// Memory, threads and open files of this process.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// Memory from the allocator, in bytes.
    pub memory: u64,
    /// Threads.
    pub threads: u64,
    /// Open files.
    pub files: u64,
}

impl Held {
    /// What is held now.
    pub fn now() -> anyhow::Result<Held> {
        let status = fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
        let field = |name: &str| -> anyhow::Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number =
                line.and_then(|line| line.split_whitespace().next()).with_context(|| name.to_owned())?;
            Ok(number.parse()?)
        };
        let files = fs::read_dir("/proc/self/fd").context("/proc/self/fd")?.count() as u64;
        Ok(Held { memory: allocated_bytes(), threads: field("Threads:")?, files })
    }
}
