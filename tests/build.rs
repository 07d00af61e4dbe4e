//! Lets one test program contain two plugins.
//!
//! Every plugin defines the same two symbols, by which the host knows it in its own file. A program that links two of
//! them as ordinary libraries reads neither, so it does not matter which definition the linker keeps.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-tests=-Wl,--allow-multiple-definition");
    println!("cargo::rustc-link-arg-benches=-Wl,--allow-multiple-definition");
}
