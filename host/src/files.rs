//! Files that appear whole or not at all, written under another name and then put in place; and files that are locked.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

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

/// Opens the file `path`, making it when it is not there, and locks it: until the file is dropped, or this process dies.
/// `None` while another process has it.
///
/// # Errors
/// When it cannot be opened.
pub(crate) fn hold(path: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
    match try_lock(&file) {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        // Some network file systems have no locks: go on without.
        Err(TryLockError::Error(error)) => {
            tracing::warn!(
                "{}: cannot be locked ({error}); let no second process write there",
                path.display()
            );
        }
    }
    Ok(Some(file))
}

/// Takes a lock that a writer would keep: who only asks whether a file is locked, has it for an instant.
fn try_lock(file: &File) -> Result<(), TryLockError> {
    for _ in 0..10 {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => sleep(Duration::from_millis(20)),
            done => return done,
        }
    }
    file.try_lock()
}
