//! Files that appear whole or not at all: written under another name, and then put in place.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// What is being written or deleted; worthless after a kill.
pub(crate) const TEMPORARY: &str = ".tmp_";

/// Where to write what is to become `path`: beside it, under a name that is nobody else's.
pub(crate) fn temporary_beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{TEMPORARY}{name}"))
}

/// Gives the synced file `temporary` the name `path`, lastingly.
///
/// # Errors
/// When it cannot; `temporary` is removed then.
pub(crate) fn put_in_place(temporary: &Path, path: &Path) -> io::Result<()> {
    fs::rename(temporary, path).inspect_err(|_| {
        let _ = fs::remove_file(temporary);
    })?;
    path.parent().map_or(Ok(()), sync_folder)
}

/// A rename is lasting only when the folder is on the disk too.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    // The folder of a bare file name is the current one.
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    File::open(path)?.sync_all()
}
