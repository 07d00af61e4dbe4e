//! Finds runs below a directory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::checkpoint::is_run;

/// A name of a run may have so many parts.
const DEPTH: usize = 4;

/// The directory of every version of every run in `root`, by name; `root` may itself be a run, or one version.
///
/// # Errors
/// When `root` cannot be read. What cannot be read below it is left out.
pub fn find_runs(root: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    if is_version(root) {
        found.push(root.to_owned());
    } else {
        search(root, DEPTH, &mut found)?;
    }
    found.sort();
    Ok(found)
}

fn search(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        // A link could lead in circles.
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if is_version(&path) {
            found.push(path);
        } else if depth > 1 {
            let _ = search(&path, depth - 1, found);
        }
    }
    Ok(())
}

fn is_version(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let number = name.strip_prefix("version_").is_some_and(|number| number.parse::<u64>().is_ok());
    number || is_run(path) && path.join("config.toml").exists()
}
