//! Opens a method's plugin and a backbone's as a host of API 1.0 does, trains a few steps, and prints the losses.
//!
//! Arguments: METHOD-FILE METHOD OPTIONS BACKBONE-FILE BACKBONE OPTIONS

mod train;

use std::ffi::c_void;
use std::path::Path;

use jepa_plugin_api::abi::{API_MAJOR, MANIFEST_SYMBOL, ManifestFields, Plugin, ROOT_SYMBOL};
use jepa_plugin_api::{Result, ensure};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [method_file, method, method_options, backbone_file, backbone, backbone_options] = arguments.as_slice() else {
        panic!("six arguments");
    };
    let (methods, backbones) = (open(method_file.as_ref())?, open(backbone_file.as_ref())?);
    let losses = train::losses(
        (&methods, method, &serde_json::from_str(method_options)?),
        (&backbones, backbone, &serde_json::from_str(backbone_options)?),
    )?;
    println!("{}", serde_json::to_string(&losses)?);
    Ok(())
}

fn open(path: &Path) -> Result<Plugin> {
    // SAFETY: the tests give plugins only; the library is never closed, and its two symbols are what they are named.
    unsafe {
        let library = Library::open(Some(path), RTLD_NOW | RTLD_LOCAL)?;
        let manifest = library.get::<*const u8>(MANIFEST_SYMBOL.as_bytes())?.into_raw().cast::<u8>();
        let manifest = ManifestFields::parse(std::slice::from_raw_parts(manifest, 248))?;
        ensure!(manifest.api_major == API_MAJOR, "API {}.{}", manifest.api_major, manifest.api_minor);
        let root = library.get::<*const c_void>(ROOT_SYMBOL.as_bytes())?.into_raw().cast_const();
        std::mem::forget(library);
        let plugin = Plugin::adopt(&manifest.name, root)?;
        plugin.self_test()?;
        Ok(plugin)
    }
}
