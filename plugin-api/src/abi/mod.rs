//! The boundary between host and plugins: the only place that knows abi_stable.
//!
//! What crosses, and who owns it:
//! - [`Manifest`]: a static of plain bytes, read from the file before anything of it runs;
//! - `module`: the table of functions behind it, checked type by type by abi_stable;
//! - tensors, as owned pointers to libtorch's own objects, so that gradients flow across (`tensor`);
//! - errors, as code + message + chain + plugin name ([`Failure`]);
//! - everything else as JSON text, which grows by keys and never by layout.
//!
//! Plugin authors see none of this: [`export_plugin!`](crate::export_plugin) writes the plugin's side, and the
//! handles [`Plugin`], [`MethodHandle`], [`BackboneHandle`] and [`ProbeHandle`] are the host's.

mod exports;
mod failure;
mod grad_mode;
mod handles;
#[cfg(test)]
mod layout;
mod log;
mod manifest;
mod module;
mod tensor;

pub use exports::{BackboneEntry, Exports, MethodEntry, ProbeEntry, RootHeader, root_header};
pub use failure::{Failure, FailureKind};
pub(crate) use grad_mode::records_graph;
pub use handles::{BackboneHandle, MethodHandle, Plugin, ProbeHandle};
pub use manifest::{Manifest, ManifestError, ManifestFields};
pub use module::{BackboneOffer, MethodOffer, Offer, ProbeOffer};

/// Major version of the boundary, which is that of this crate: another one is refused.
///
/// History
/// - 1.0: methods and backbones.
/// - 1.1: probes; example images; methods say whether they need labels, and whether their steps can be captured; failures of
///   the kind `Unfit`; bits of features that a host must know; functions with their own gradient and work on libtorch's threads, which the bridge has.
pub const API_MAJOR: u16 = number(env!("CARGO_PKG_VERSION_MAJOR"));

/// Minor version: grows when something is appended, with a default for plugins that do not have it.
pub const API_MINOR: u16 = number(env!("CARGO_PKG_VERSION_MINOR"));

const fn number(text: &str) -> u16 {
    match u16::from_str_radix(text, 10) {
        Ok(number) => number,
        Err(_) => panic!("cargo's version numbers are numbers"),
    }
}

/// The torch bridge that this crate's tch calls: `lib` + this + `.so` is its soname.
pub const BRIDGE: &str = "jepa_torch_0_24";

/// Name of the exported [`Manifest`].
pub const MANIFEST_SYMBOL: &str = "JEPA_PLUGIN_MANIFEST";

/// Name of the exported [`RootHeader`].
pub const ROOT_SYMBOL: &str = "JEPA_PLUGIN_ROOT";
