//! Opening a plugin file whose manifest fits. Nothing is ever unloaded.

use std::ffi::c_void;
use std::fs;
use std::path::{Path, PathBuf};

use jepa_plugin_api::abi::{ManifestFields, Plugin, ROOT_SYMBOL};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use sha2::{Digest as _, Sha256};

use super::{PluginError, read_manifest};
use crate::linker;

/// A plugin in use.
pub struct LoadedPlugin {
    /// Its file.
    pub path: PathBuf,
    /// What its manifest says.
    pub manifest: ManifestFields,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    /// Its functions.
    pub plugin: Plugin,
}

/// Reads, checks, opens and tests the plugin at `path`, for a host that runs on this `libtorch`.
///
/// # Errors
/// One sentence for each reason to refuse it.
pub fn open(path: &Path, libtorch: &str) -> Result<LoadedPlugin, PluginError> {
    let manifest = read_manifest(path, libtorch)?;
    let refuse = |reason: String| PluginError::Open { path: path.to_owned(), reason };
    let unfit =
        |error: anyhow::Error| PluginError::Unfit { path: path.to_owned(), reason: format!("{error:#}") };

    // RTLD_NOW: a missing symbol shows here and not in epoch 30. RTLD_LOCAL: plugins do not see one another.
    // SAFETY: the file declares itself a plugin, and running its initialisers is what the user asked for.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) };
    let library = library.map_err(|error| refuse(linker::words(&error)))?;
    // SAFETY: only the address of the static is taken here.
    let root: *const c_void = match unsafe { library.get::<*const c_void>(ROOT_SYMBOL.as_bytes()) } {
        Ok(symbol) => symbol.into_raw().cast_const(),
        Err(error) => return Err(refuse(linker::words(&error))),
    };
    std::mem::forget(library);
    // SAFETY: the symbol is the root header of a plugin, by its manifest, and the library stays.
    let plugin = unsafe { Plugin::adopt(&manifest.name, root) }.map_err(unfit)?;
    plugin.self_test().map_err(unfit)?;

    let bytes = fs::read(path).map_err(|source| PluginError::Unreadable { path: path.to_owned(), source })?;
    let sha256 = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(LoadedPlugin { path: path.to_owned(), manifest, sha256, plugin })
}
