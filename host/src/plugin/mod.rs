//! Plugins: find the file, read its manifest, open it, and keep what it offers.
//!
//! The order matters for safety: [`find`] chooses a file, [`file`] reads the manifest from its bytes and refuses what
//! does not fit, [`admission`] refuses what others may have written, and only then [`open`] maps it, which is when code
//! of the plugin runs for the first time.

mod admission;
mod error;
mod file;
mod find;
mod open;
mod registry;
pub mod scaffold;

pub use admission::{Admission, Lock, LockError, LockedPlugins};
pub use error::PluginError;
pub use file::{PluginFile, PluginRecord};
pub use find::{PluginSources, plugin_files};
pub use open::{LoadedPlugin, open};
pub use registry::{Kind, Registry};
