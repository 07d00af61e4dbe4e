//! Opening a plugin file whose manifest fits. Nothing is ever unloaded.

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::path::Path;

use jepa_plugin_api::abi::{Plugin, ROOT_SYMBOL};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::registry::check_offer;
use super::{Admission, PluginError, PluginFile, PluginRecord};
use crate::device::open_cuda_if_there;
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

    /// What tells it from others.
    pub fn record(&self) -> PluginRecord {
        let offer = self.plugin.offer();
        let only_probes = offer.methods.is_empty() && offer.backbones.is_empty();
        PluginRecord { file: Some(self.file.path.clone()), only_probes, ..self.file.record() }
    }
}

/// Reads, checks, opens and tests the plugin at `path`.
///
/// # Errors
/// One sentence for each reason to refuse it.
pub fn open(path: &Path, admission: &Admission) -> Result<LoadedPlugin, PluginError> {
    PluginFile::read(path, admission)?.open()
}

impl PluginFile {
    /// Opens and tests what was read.
    ///
    /// # Errors
    /// One sentence for each reason to refuse it.
    pub fn open(self) -> Result<LoadedPlugin, PluginError> {
        let path = || self.path.clone();
        let refuse =
            |error: libloading::Error| PluginError::Open { path: path(), reason: linker::words(&error) };
        let unfit = |error: anyhow::Error| PluginError::Unfit { path: path(), reason: format!("{error:#}") };

        self.check_unchanged()?;
        // RTLD_NOW: a missing symbol shows here and not in epoch 30. RTLD_LOCAL: plugins do not see one another.
        // SAFETY: the file declares itself a plugin, and running its initialisers is what the user asked for.
        let library = unsafe { Library::open(Some(&self.path), RTLD_NOW | RTLD_LOCAL) }.map_err(refuse)?;
        // Its initialisers have run: it stays, whatever comes.
        let library = ManuallyDrop::new(library);
        self.check_unchanged()?;
        // SAFETY: only the address of the static is taken here.
        let root = unsafe { library.get::<*const c_void>(ROOT_SYMBOL.as_bytes()) }.map_err(refuse)?;
        // SAFETY: the symbol is the root header of a plugin, by its manifest, and the library stays.
        let plugin = unsafe { Plugin::adopt(&self.manifest, root.into_raw().cast_const()) }.map_err(unfit)?;
        // Its first backward pass is the one that settles whether there is a GPU.
        open_cuda_if_there();
        plugin.self_test().map_err(unfit)?;
        check_offer(plugin.offer()).map_err(|reason| PluginError::BadOffer { path: path(), reason })?;
        Ok(LoadedPlugin { file: self, plugin })
    }
}
