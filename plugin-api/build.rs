//! Makes the import library that plugins, host and tests link in place of libtorch.
//!
//! It defines the C names that torch-sys declares (`bridge/torch_0_24.symbols`, listed by `bridge/list_symbols.sh`)
//! and those that the bridge adds (`bridge/jepa.symbols`), and has the soname of the real bridge, so that whatever is linked against it needs `libjepa_torch_0_24.so` at
//! run time and nothing of libtorch. No code lies behind the names: this file is never loaded.
//!
//! Its own file name differs from that soname on purpose. Cargo puts this folder on the library path of `cargo
//! test` and `cargo run`, where the soname must lead to the real bridge. A link of that name leads there; it may
//! dangle until `make setup` has built the bridge.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const STUB: &str = "jepa_torch_stub";
const SONAME: &str = "libjepa_torch_0_24.so";
const SYMBOLS: [&str; 2] = ["bridge/torch_0_24.symbols", "bridge/jepa.symbols"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for list in SYMBOLS {
        println!("cargo::rerun-if-changed={list}");
    }
    println!("cargo::rerun-if-env-changed=JEPA_DEPS_LIB");
    println!("cargo::rerun-if-env-changed=CC");

    println!("cargo::rustc-env=JEPA_RUSTC_VERSION={}", rustc_version());

    if let Err(reason) = build() {
        println!("cargo::error={reason}");
    }
}

fn build() -> Result<(), String> {
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return Err("jepa-host and its plugins are built for Linux only".to_owned());
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);

    link_stub(&out)?;
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=dylib={STUB}");
    println!("cargo::metadata=stub_dir={}", out.display());

    if let Some(deps) = deps_lib() {
        point_to_bridge(&out, &deps)?;
        println!("cargo::metadata=deps_lib={}", deps.display());
    }
    Ok(())
}

/// The compiler, for the manifest of every plugin: `rustc 1.95.0 (hash date)`. Distributions say more, and the manifest
/// has room for 63 bytes.
fn rustc_version() -> String {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).arg("--version").output().ok();
    let text = output.and_then(|output| String::from_utf8(output.stdout).ok());
    text.map_or_else(
        || "unknown".to_owned(),
        |text| text.trim().chars().filter(char::is_ascii).take(63).collect(),
    )
}

/// Writes `lib{STUB}.so`: every symbol, one address, no code.
fn link_stub(out: &Path) -> Result<(), String> {
    let mut assembly = String::from(".text\n");
    for list in SYMBOLS {
        let names = fs::read_to_string(list).map_err(|error| format!("cannot read {list}: {error}"))?;
        for name in names.lines() {
            assembly.push_str(&format!(".globl {name}\n.type {name}, %function\n{name}:\n"));
        }
    }
    assembly.push_str(".section .note.GNU-stack, \"\", %progbits\n");

    let source = out.join("stub.s");
    fs::write(&source, assembly).map_err(|error| format!("cannot write {}: {error}", source.display()))?;

    let compiler = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let output = Command::new(&compiler)
        .args(["-shared", "-nostdlib"])
        .arg(format!("-Wl,-soname,{SONAME}"))
        .arg("-o")
        .arg(out.join(format!("lib{STUB}.so")))
        .arg(&source)
        .output()
        .map_err(|error| {
            format!(
                "cannot run the C compiler {} ({error}); rustc needs it for linking, so install one or set CC",
                compiler.display()
            )
        })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!(
            "{} failed to link the torch import library: {}",
            compiler.display(),
            said.replace('\n', "; ")
        ));
    }
    Ok(())
}

/// Where `make setup` puts the real bridge: `JEPA_DEPS_LIB`, or the nearest `.deps/lib` upwards.
fn deps_lib() -> Option<PathBuf> {
    if let Some(named) = env::var_os("JEPA_DEPS_LIB") {
        return Some(PathBuf::from(named));
    }
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR")?);
    here.ancestors().map(|folder| folder.join(".deps/lib")).find(|folder| folder.is_dir())
}

fn point_to_bridge(out: &Path, deps: &Path) -> Result<(), String> {
    let link = out.join(SONAME);
    let bridge = deps.join(SONAME);
    if fs::symlink_metadata(&link).is_ok() {
        fs::remove_file(&link).map_err(|error| format!("cannot replace {}: {error}", link.display()))?;
    }
    std::os::unix::fs::symlink(&bridge, &link)
        .map_err(|error| format!("cannot link {} to the bridge: {error}", link.display()))
}
