//! Plugins: find the file, read its manifest, open it, and keep what it offers.
//!
//! The order matters for safety: [`find`] chooses a file, [`file`] reads the manifest from its bytes and refuses what
//! does not fit, and only then [`open`] maps it, which is when code of the plugin runs for the first time.

mod error;
mod file;
mod find;
mod open;
mod registry;
pub mod scaffold;

pub use error::PluginError;
pub use file::read_manifest;
pub use find::{SearchPath, plugin_files};
pub use open::{LoadedPlugin, open};
pub use registry::Registry;
