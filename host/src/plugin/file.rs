//! Reading a plugin's manifest from its bytes, before anything of it runs.

use std::fs;
use std::path::Path;

use jepa_plugin_api::abi::{API_MAJOR, BRIDGE, MANIFEST_SYMBOL, ManifestFields};
use object::{Architecture, Object as _, ObjectKind, ObjectSection as _, ObjectSymbol as _};

use super::PluginError;

/// The manifest of the plugin at `path`.
///
/// # Errors
/// When the file is no shared library of this machine, has no manifest, or has one that this host does not take.
pub fn read_manifest(path: &Path, libtorch: &str) -> Result<ManifestFields, PluginError> {
    let path = path.to_owned();
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(source) => return Err(PluginError::Unreadable { path, source }),
    };
    let library = match object::File::parse(bytes.as_slice()) {
        Ok(library) if library.kind() == ObjectKind::Dynamic => library,
        Ok(library) => {
            return Err(PluginError::NotALibrary { path, reason: format!("it is {:?}", library.kind()) });
        }
        Err(error) => return Err(PluginError::NotALibrary { path, reason: error.to_string() }),
    };
    if !is_native(library.architecture()) {
        let reason = format!("it is for {:?}", library.architecture());
        return Err(PluginError::NotALibrary { path, reason });
    }
    let Some(record) = exported_bytes(&library, MANIFEST_SYMBOL) else {
        return Err(PluginError::NoManifest { path });
    };
    let manifest = match ManifestFields::parse(record) {
        Ok(manifest) => manifest,
        Err(error) => return Err(PluginError::BadManifest { path, reason: error.to_string() }),
    };
    if manifest.api_major != API_MAJOR {
        let (major, minor) = (manifest.api_major, manifest.api_minor);
        return Err(PluginError::ApiMajor { path, major, minor });
    }
    if manifest.bridge != BRIDGE {
        return Err(PluginError::Bridge { path, bridge: manifest.bridge });
    }
    match &manifest.libtorch {
        Some(needs) if needs != libtorch => {
            Err(PluginError::Libtorch { path, needs: needs.clone(), has: libtorch.to_owned() })
        }
        _ => Ok(manifest),
    }
}

fn is_native(architecture: Architecture) -> bool {
    match architecture {
        Architecture::X86_64 => cfg!(target_arch = "x86_64"),
        Architecture::Aarch64 => cfg!(target_arch = "aarch64"),
        _ => false,
    }
}

/// The bytes from an exported symbol to the end of its section.
fn exported_bytes<'data>(library: &object::File<'data>, name: &str) -> Option<&'data [u8]> {
    let symbol = library.dynamic_symbols().find(|s| s.name() == Ok(name) && s.is_definition())?;
    let section = library.section_by_index(symbol.section_index()?).ok()?;
    let offset = symbol.address().checked_sub(section.address())?;
    section.data().ok()?.get(usize::try_from(offset).ok()?..)
}
