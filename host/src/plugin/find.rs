//! Where plugins come from.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::{Admission, LoadedPlugin, PluginError, open};
use crate::nearest::nearest;

/// The environment variable with further folders, separated by colons.
pub const PATH_VARIABLE: &str = "JEPA_PLUGIN_PATH";

/// Where plugins come from: the folders that are searched, in order, and what of them may be loaded.
#[derive(Clone, Debug)]
pub struct PluginSources {
    folders: Vec<PathBuf>,
    admission: Admission,
}

impl PluginSources {
    /// `plugin_dirs` first, then `$JEPA_PLUGIN_PATH`, and the folder of the executable. Nothing is looked for in the
    /// current folder, where strangers' files may lie.
    pub fn new(plugin_dirs: &[PathBuf], admission: Admission) -> Self {
        let mut folders = plugin_dirs.to_vec();
        if let Some(paths) = env::var_os(PATH_VARIABLE) {
            folders.extend(env::split_paths(&paths).filter(|p| !p.as_os_str().is_empty()));
        }
        if let Ok(executable) = env::current_exe() {
            folders.extend(executable.parent().map(Path::to_owned));
        }
        PluginSources { folders, admission }
    }

    /// The folders themselves.
    pub fn folders(&self) -> &[PathBuf] {
        &self.folders
    }

    /// The rules for loading what is found.
    pub fn admission(&self) -> &Admission {
        &self.admission
    }

    /// Opens every plugin in the folders. Files without a manifest are other people's libraries.
    pub fn open_all(&self) -> Vec<Result<LoadedPlugin, PluginError>> {
        let open = |path: PathBuf| match open(&path, &self.admission) {
            Err(PluginError::NoManifest { .. }) => None,
            opened => Some(opened),
        };
        plugin_files(&self.folders).into_iter().filter_map(open).collect()
    }

    /// The file that `name` means: a path when it has a slash, else a file name (`libcnn_jepa.so`) or a bare name
    /// (`cnn_jepa`, `cnn-jepa`) in one of the folders.
    ///
    /// # Errors
    /// When there is no such file, naming every path that was tried.
    pub fn find(&self, name: &Path) -> Result<PathBuf, PluginError> {
        let tried: Vec<PathBuf> = match name.to_str() {
            Some(text) if !text.contains('/') => {
                let bare = format!("lib{}.so", text.replace('-', "_"));
                let files = if text.ends_with(".so") { vec![text.to_owned()] } else { vec![bare] };
                self.folders.iter().flat_map(|folder| files.iter().map(|file| folder.join(file))).collect()
            }
            _ => vec![name.to_owned()],
        };
        if let Some(found) = tried.iter().find(|path| path.is_file()) {
            return Ok(found.canonicalize().unwrap_or_else(|_| found.clone()));
        }
        let tried = tried.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        let there = plugin_files(&self.folders);
        let bare = |path: &PathBuf| Some(path.file_stem()?.to_str()?.strip_prefix("lib")?.to_owned());
        let there: Vec<String> = there.iter().filter_map(bare).collect();
        let name = name.display().to_string();
        if name.contains('/') {
            return Err(PluginError::NoFile { path: name.into() });
        }
        let wanted = name.strip_suffix(".so").map_or(&*name, |file| file.strip_prefix("lib").unwrap_or(file));
        let nearest = nearest(&wanted.replace('-', "_"), there.iter().map(String::as_str));
        let nearest = nearest.map(|nearest| format!(" (did you mean `{nearest}`?)")).unwrap_or_default();
        Err(PluginError::NotFound { name, nearest, tried, refused: String::new() })
    }
}

/// The shared libraries in `folders`, sorted by name within each.
pub fn plugin_files(folders: &[PathBuf]) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = Vec::new();
    for folder in folders {
        let Ok(entries) = folder.read_dir() else { continue };
        let mut found: Vec<PathBuf> = entries
            .filter_map(|entry| entry.ok()?.path().canonicalize().ok())
            .filter(|path| path.extension() == Some(OsStr::new("so")) && path.is_file())
            .collect();
        found.sort();
        found.retain(|path| !files.contains(path));
        files.append(&mut found);
    }
    files
}
