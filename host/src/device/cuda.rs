//! Bringing libtorch's CUDA half into the process. Nothing here needs CUDA to build.

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY, RTLD_NOW};

use super::libtorch::libtorch;
use super::native;
use crate::linker;

/// Opens libtorch_cuda.so from the folder of the libtorch in use. Must come before the first call that asks libtorch
/// for CUDA, because libtorch settles the answer then.
///
/// # Errors
/// What is missing, in words.
pub(super) fn open() -> Result<(), String> {
    if !native::cuda_loaded() {
        let folder = libtorch().folder.ok_or("libtorch_cpu.so is not in this process")?;
        let file = folder.join("libtorch_cuda.so");
        if !file.exists() {
            return Err(format!(
                "{} does not exist: this libtorch is built for CPUs; `make setup CUDA=1` fetches the other one",
                file.display()
            ));
        }
        // SAFETY: the initialisers of libtorch's own library register its CUDA kernels; that is what is wanted.
        let library = unsafe { Library::open(Some(&file), RTLD_NOW | RTLD_GLOBAL) };
        std::mem::forget(library.map_err(|error| {
            let words = linker::words(&error);
            format!("libtorch_cuda.so cannot be opened: {words}; `make setup CUDA=1` fetches what it needs")
        })?);
    }
    if native::has_cuda() { Ok(()) } else { Err("there is no CUDA device, or no driver for it".to_owned()) }
}

/// Whether this machine has NVIDIA's driver. That costs nothing beside opening libtorch_cuda.so, which takes a second.
pub(super) fn has_driver() -> bool {
    // SAFETY: the driver's library does nothing before its cuInit is called, and libtorch would open it as well.
    let library = unsafe { Library::open(Some("libcuda.so.1"), RTLD_LAZY) };
    library.map(std::mem::forget).is_ok()
}
