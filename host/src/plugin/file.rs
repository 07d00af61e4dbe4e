//! Reading a plugin file, before anything of it runs.

use std::fs::{self, File, Metadata};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use jepa_plugin_api::abi::{API_MAJOR, BRIDGE, MANIFEST_SYMBOL, ManifestFields};
use object::elf::{DT_NEEDED, Dyn64};
use object::read::elf::Dyn as _;
use object::{Architecture, Endianness, Object as _, ObjectKind, ObjectSection as _, ObjectSymbol as _};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{Admission, PluginError};
use crate::device::libtorch;
use crate::hex::hex;

/// Tells one plugin file from another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginRecord {
    /// The plugin's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    /// Where the file was. Known of plugins in use only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Whether it offers probes and nothing else, so that no weights depend on it. Known of plugins in use only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub only_probes: bool,
}

/// A plugin file that this host may open, and of which nothing has run.
#[derive(Clone, Debug)]
pub struct PluginFile {
    /// Where it is.
    pub path: PathBuf,
    /// What its manifest says.
    pub manifest: ManifestFields,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    identity: Identity,
}

/// What cannot stay the same when a file is replaced, or written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Identity {
    fn of(file: &Metadata) -> Self {
        Identity {
            device: file.dev(),
            inode: file.ino(),
            size: file.size(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        }
    }
}

impl PluginFile {
    /// Reads the plugin at `path`.
    ///
    /// # Errors
    /// When the file is no shared library of this machine, has no manifest, has one that this host does not take, or
    /// is not let in.
    pub fn read(path: &Path, admission: &Admission) -> Result<PluginFile, PluginError> {
        let unreadable = |source| PluginError::Unreadable { path: path.to_owned(), source };
        let mut file = File::open(path).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(unreadable)?;
        let manifest = read_manifest(path.to_owned(), &bytes)?;
        admission.check_owner(path, &metadata)?;
        let sha256 = hex(&Sha256::digest(bytes));
        let identity = Identity::of(&metadata);
        let file = PluginFile { path: path.to_owned(), manifest, sha256, identity };
        admission.check_lock(&file)?;
        Ok(file)
    }

    /// Whether there is still the file that was read at its path. The dynamic linker opens it once more: by its path,
    /// since libraries beside a plugin are found by that.
    ///
    /// # Errors
    /// When it was replaced or written to meanwhile.
    pub(super) fn check_unchanged(&self) -> Result<(), PluginError> {
        match fs::metadata(&self.path) {
            Ok(now) if Identity::of(&now) == self.identity => Ok(()),
            _ => Err(PluginError::Changed { path: self.path.clone() }),
        }
    }

    /// What tells it from others.
    pub fn record(&self) -> PluginRecord {
        let ManifestFields { name, version, .. } = self.manifest.clone();
        PluginRecord { name, version, sha256: self.sha256.clone(), file: None, only_probes: false }
    }
}

fn read_manifest(path: PathBuf, bytes: &[u8]) -> Result<ManifestFields, PluginError> {
    let library = match object::File::parse(bytes) {
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
    if manifest.unknown_needs() != 0 {
        return Err(PluginError::Feature { path, bits: manifest.unknown_needs() });
    }
    match (&manifest.libtorch, libtorch().version) {
        (Some(needs), has) if *needs != has => {
            return Err(PluginError::Libtorch { path, needs: needs.clone(), has });
        }
        (Some(_), _) => {}
        (None, _) => {
            let of_libtorch = |name: &String| ["libtorch", "libc10"].iter().any(|l| name.starts_with(l));
            if let Some(library) = needed(&library, bytes).into_iter().find(of_libtorch) {
                return Err(PluginError::UndeclaredLibtorch { path, library });
            }
        }
    }
    Ok(manifest)
}

/// The libraries that the file names as needed.
fn needed(library: &object::File<'_>, bytes: &[u8]) -> Vec<String> {
    let object::File::Elf64(elf) = library else { return Vec::new() };
    let (endian, sections) = (elf.endian(), elf.elf_section_table());
    let Ok(Some((entries, strings))) = sections.dynamic(endian, bytes) else { return Vec::new() };
    let Ok(strings) = sections.strings(endian, bytes, strings) else { return Vec::new() };
    let entries = entries.iter().filter(|entry| entry.tag(endian) == DT_NEEDED);
    let name =
        |entry: &Dyn64<Endianness>| Some(String::from_utf8_lossy(entry.string(endian, strings).ok()?).into());
    entries.filter_map(name).collect()
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
