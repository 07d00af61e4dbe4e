//! Why a plugin is refused: one sentence each, with the file, what it has, and what is needed.

use std::path::PathBuf;

use jepa_plugin_api::abi::{API_MAJOR, API_MINOR, BRIDGE};
use thiserror::Error;

/// A plugin, or something on offer, that cannot be used. Exit code 3.
#[derive(Debug, Error)]
pub enum PluginError {
    /// No file at a path.
    #[error("no plugin {}: there is no such file; a name without a slash is looked for in the plugin folders", path.display())]
    NoFile {
        /// The path.
        path: PathBuf,
    },
    /// No file of that name in any place.
    #[error(
        "no plugin `{name}`{nearest}: looked for {tried}; give its path, or name its folder with --plugin-dir{refused}"
    )]
    NotFound {
        /// As the user wrote it.
        name: String,
        /// ` (did you mean …?)`, or nothing.
        nearest: String,
        /// The paths that were tried.
        tried: String,
        /// The plugins that were refused meanwhile, by [`PluginError::tail`].
        refused: String,
    },
    /// The file cannot be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not an ELF shared library of this machine.
    #[error("{}: is not a shared library for this machine ({reason})", path.display())]
    NotALibrary {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A library without a manifest.
    #[error(
        "{}: is a library but not a jepa-host plugin: it exports no manifest; build it with jepa-plugin-api and \
         `export_plugin!`",
        path.display()
    )]
    NoManifest {
        /// The file.
        path: PathBuf,
    },
    /// A manifest that does not make sense.
    #[error("{}: {reason}; build it again", path.display())]
    BadManifest {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Built for another major version of the boundary.
    #[error(
        "{}: was built for plugin API {major}.{minor}, this host has {API_MAJOR}.{API_MINOR}; build it with \
         jepa-plugin-api {API_MAJOR}.x",
        path.display()
    )]
    ApiMajor {
        /// The file.
        path: PathBuf,
        /// The plugin's major version.
        major: u16,
        /// The plugin's minor version.
        minor: u16,
    },
    /// Calls a torch bridge that this host does not ship.
    #[error(
        "{}: needs the torch bridge `{bridge}`, this host has `{BRIDGE}`; build it with this host's jepa-plugin-api, or \
         use a jepa-host that has that bridge",
        path.display()
    )]
    Bridge {
        /// The file.
        path: PathBuf,
        /// The bridge that it names.
        bridge: String,
    },
    /// Brings C++ of its own over another libtorch.
    #[error("{}: brings C++ for libtorch {needs}, this host runs on {has}; build it for {has}", path.display())]
    Libtorch {
        /// The file.
        path: PathBuf,
        /// The version that it names.
        needs: String,
        /// The version in use.
        has: String,
    },
    /// Links libtorch and does not say which.
    #[error(
        "{}: links {library}, and its manifest names no version of libtorch; name the one that it was compiled against \
         in `export_plugin! {{ libtorch: \"…\", … }}`, or leave the C++ out",
        path.display()
    )]
    UndeclaredLibtorch {
        /// The file.
        path: PathBuf,
        /// What it links.
        library: String,
    },
    /// Needs what later hosts have.
    #[error("{}: needs features that this host does not know ({bits:#x}); update jepa-host", path.display())]
    Feature {
        /// The file.
        path: PathBuf,
        /// Their bits in the manifest.
        bits: u64,
    },
    /// Somebody else may have written the file.
    #[error(
        "{}: {reason}; mend that, or add --allow-untrusted-plugins if you trust whoever may have written it",
        path.display()
    )]
    Untrusted {
        /// The file.
        path: PathBuf,
        /// Who may have written it.
        reason: String,
    },
    /// What is opened would not be what was checked.
    #[error("{}: has changed while it was being loaded; try again when nobody writes to it", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The lock does not have the file.
    #[error("{}: {} {reason}; load the plugin that it pins, or write it anew with `jepa-host plugin lock`", path.display(), lock.display())]
    Locked {
        /// The file.
        path: PathBuf,
        /// The lock.
        lock: PathBuf,
        /// What the lock has instead.
        reason: String,
    },
    /// The dynamic linker refuses the file: a missing symbol or a missing library.
    #[error(
        "{}: cannot be opened: {reason}; install what is missing, or build it on this machine",
        path.display()
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// The linker's words.
        reason: String,
    },
    /// Its types do not fit, or its self-test fails.
    #[error("{}: does not fit this host: {reason}", path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// What it offers has names that cannot be used.
    #[error("{}: {reason}; rename it in the plugin's source", path.display())]
    BadOffer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Two files, one name.
    #[error("two plugins are named `{name}`: {} and {}; name one of them", first.display(), second.display())]
    SameName {
        /// The common name.
        name: String,
        /// The file that was loaded first.
        first: PathBuf,
        /// The other one.
        second: PathBuf,
    },
    /// Two plugins offer one method, backbone or probe.
    #[error("{what} `{name}` is offered by two plugins: {} and {}; load one of them", first.display(), second.display())]
    SameOffer {
        /// `method`, `backbone` or `probe`.
        what: &'static str,
        /// The name.
        name: String,
        /// The file that was loaded first.
        first: PathBuf,
        /// The other one.
        second: PathBuf,
    },
    /// No loaded plugin has it.
    #[error("no plugin offers the {what} `{name}`{nearest}; {known}{refused}")]
    Unknown {
        /// `method`, `backbone` or `probe`.
        what: &'static str,
        /// As the user wrote it.
        name: String,
        /// ` (did you mean …?)`, or nothing.
        nearest: String,
        /// What there is.
        known: String,
        /// The plugins that were refused meanwhile, by [`PluginError::tail`].
        refused: String,
    },
}

impl PluginError {
    /// Whether the file is no plugin at all, so that nobody misses it in a folder.
    pub fn is_no_plugin(&self) -> bool {
        matches!(self, PluginError::NoManifest { .. } | PluginError::NotALibrary { .. })
    }

    /// Refusals, for the end of a sentence: what somebody looks for may be in one of these files.
    pub fn tail(refused: &[PluginError]) -> String {
        refused.iter().map(|error| format!("; refused: {error}")).collect()
    }
}
