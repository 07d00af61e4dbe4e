//! Which libtorch this process runs on.

use std::ffi::CStr;
use std::fs;
use std::path::{Path, PathBuf};

use libloading::os::unix::Library;

use super::native;

/// The libtorch in use.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Libtorch {
    /// Its version, as the bridge was compiled against.
    pub version: String,
    /// The folder that holds libtorch_cpu.so.
    pub folder: Option<PathBuf>,
    /// The bridge library.
    pub bridge: Option<PathBuf>,
}

/// Describes the libtorch that the dynamic linker has given to this process.
pub fn libtorch() -> Libtorch {
    let cpu = mapped("libtorch_cpu.so");
    Libtorch {
        version: bridge_version().unwrap_or_else(|| "unknown".to_owned()),
        folder: cpu.as_deref().and_then(Path::parent).map(Path::to_owned),
        bridge: mapped(&format!("lib{}.so", jepa_plugin_api::abi::BRIDGE)),
    }
}

/// The file behind a library of this process.
pub(super) fn mapped(name: &str) -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let path = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
    path.map(Path::new).find(|path| path.file_name().is_some_and(|file| file == name)).map(Path::to_owned)
}

fn bridge_version() -> Option<String> {
    type Version = unsafe extern "C" fn() -> *const std::ffi::c_char;
    let this = Library::this();
    // SAFETY: the bridge exports this function with this signature, and returns a static string.
    unsafe {
        let version = this.get::<Version>(b"jepa_bridge_libtorch_version").ok()?;
        Some(CStr::from_ptr(version()).to_string_lossy().into_owned())
    }
}

/// Opens libjepa_native beside the bridge, so that a missing one is reported before a run starts.
///
/// # Errors
/// When it is missing or does not fit.
pub fn check_native() -> Result<(), super::DeviceError> {
    native::library().map(|_| ())
}
