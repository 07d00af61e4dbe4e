//! Opening a plugin file whose manifest fits. Nothing is ever unloaded.

use std::ffi::c_void;
use std::path::Path;

use jepa_plugin_api::abi::{Plugin, ROOT_SYMBOL};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::{Admission, PluginError, PluginFile};
use crate::linker;

/// A plugin in use.
pub struct LoadedPlugin {
    /// Its file.
    pub file: PluginFile,
    /// Its functions.
    pub plugin: Plugin,
}

impl LoadedPlugin {
    /// Its name, as its manifest has it.
    pub fn name(&self) -> &str {
        &self.file.manifest.name
    }
}

/// Reads, checks, opens and tests the plugin at `path`.
///
/// # Errors
/// One sentence for each reason to refuse it.
pub fn open(path: &Path, admission: &Admission) -> Result<LoadedPlugin, PluginError> {
    let file = PluginFile::read(path, admission)?;
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
    let plugin = unsafe { Plugin::adopt(&file.manifest, root) }.map_err(unfit)?;
    plugin.self_test().map_err(unfit)?;
    Ok(LoadedPlugin { file, plugin })
}
