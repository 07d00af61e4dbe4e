//! Which plugin files may be loaded. A plugin runs with all rights of its user, so a file that others may write, or that
//! a lock does not list, is refused before anything of it runs.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{PluginError, PluginFile, PluginRecord};

/// The rules for loading plugin files.
#[derive(Clone, Debug, Default)]
pub struct Admission {
    /// Takes files that everyone may write, or that belong to other users.
    pub allow_untrusted: bool,
    /// The only files that are taken.
    pub lock: Option<Lock>,
}

/// The content of a `plugins.lock`: plugin files, told by their hashes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedPlugins {
    /// The files, in the order of their names.
    #[serde(rename = "plugin", default)]
    pub plugins: Vec<PluginRecord>,
}

/// A `plugins.lock`, and where it was read.
#[derive(Clone, Debug)]
pub struct Lock {
    path: PathBuf,
    locked: LockedPlugins,
}

/// A `plugins.lock` that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}; write it with `jepa-host plugin lock`", path.display())]
pub struct LockError {
    path: PathBuf,
    reason: String,
}

impl Lock {
    /// Reads the lock at `path`.
    ///
    /// # Errors
    /// When it cannot be read or is no lock.
    pub fn read(path: &Path) -> Result<Lock, LockError> {
        let unusable = |reason: String| LockError { path: path.to_owned(), reason };
        let text = fs::read_to_string(path).map_err(|error| unusable(format!("cannot be read: {error}")))?;
        let locked = toml::from_str(&text).map_err(|error: toml::de::Error| {
            let start = error.span().map_or(0, |span| span.start);
            let line = text[..start].lines().count().max(1);
            unusable(format!("is no plugin lock: {} (line {line})", error.message()))
        })?;
        Ok(Lock { path: path.to_owned(), locked })
    }

    /// The file that it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn check(&self, file: &PluginFile) -> Result<(), PluginError> {
        let (name, version) = (&file.manifest.name, &file.manifest.version);
        let of_this_name = || self.locked.plugins.iter().filter(|locked| locked.name == *name);
        if of_this_name().any(|locked| locked.sha256 == file.sha256) {
            return Ok(());
        }
        let reason = match of_this_name().next() {
            None => format!("does not list plugin `{name}`"),
            Some(locked) => format!(
                "pins {name} {} with SHA-256 {}, and this is {version} with {}",
                locked.version, locked.sha256, file.sha256
            ),
        };
        Err(PluginError::Locked { path: file.path.clone(), lock: self.path.clone(), reason })
    }
}

impl LockedPlugins {
    /// A lock of these files.
    ///
    /// # Errors
    /// When two of them are other plugins of the same name, of which a run could load only one.
    pub fn of(files: &[PluginFile]) -> Result<LockedPlugins, PluginError> {
        let mut plugins: BTreeMap<&str, &PluginFile> = BTreeMap::new();
        for file in files {
            let name = file.manifest.name.as_str();
            match plugins.insert(name, file) {
                Some(other) if other.sha256 != file.sha256 => {
                    let (first, second) = (other.path.clone(), file.path.clone());
                    return Err(PluginError::SameName { name: name.to_owned(), first, second });
                }
                _ => {}
            }
        }
        Ok(LockedPlugins { plugins: plugins.into_values().map(PluginFile::record).collect() })
    }

    /// The text of the file.
    pub fn to_text(&self) -> String {
        let tables = toml::to_string(self).expect("three texts become TOML");
        format!(
            "# The plugin files that `jepa-host --plugin-lock` loads. Written by `jepa-host plugin lock`.\n\n{tables}"
        )
    }
}

impl Admission {
    /// Whether the file at `path`, opened as `file`, belongs to this user or root, in a folder that does too, and neither
    /// can be written by every user. Folders further up and groups are not looked at.
    pub(super) fn check_owner(&self, path: &Path, file: &Metadata) -> Result<(), PluginError> {
        if self.allow_untrusted {
            return Ok(());
        }
        let unreadable = |source| PluginError::Unreadable { path: path.to_owned(), source };
        let refuse = |reason: String| Err(PluginError::Untrusted { path: path.to_owned(), reason });
        // The folder of this process in /proc belongs to the user that it runs as.
        let us = fs::metadata("/proc/self").map_err(unreadable)?.uid();
        if file.uid() != us && file.uid() != 0 {
            return refuse(format!("belongs to user {}, and neither to you nor to root", file.uid()));
        }
        if file.mode() & 0o002 != 0 {
            return refuse(format!("can be written by every user (mode {:o})", file.mode() & 0o7777));
        }
        let folder = path.canonicalize().map_err(unreadable)?;
        let folder = folder.parent().unwrap_or(Path::new("/"));
        let folder = fs::metadata(folder).map_err(unreadable)?;
        if folder.uid() != us && folder.uid() != 0 {
            return refuse(format!("lies in a folder of user {}, who may replace it", folder.uid()));
        }
        let mode = folder.mode();
        if mode & 0o1002 == 0o002 {
            return refuse(format!(
                "lies in a folder where every user may replace it (mode {:o})",
                mode & 0o7777
            ));
        }
        Ok(())
    }

    /// Whether the lock, if there is one, lists `file`.
    pub(super) fn check_lock(&self, file: &PluginFile) -> Result<(), PluginError> {
        self.lock.as_ref().map_or(Ok(()), |lock| lock.check(file))
    }
}
