//! The device of a run, libtorch, and what of it tch does not bind.

mod autocast;
mod cuda;
mod graph;
mod libtorch;
mod memory;
mod native;
mod openmp;
mod ranks;

use std::path::PathBuf;

use jepa_plugin_api::tch;
use thiserror::Error;

pub use autocast::autocast_bf16;
pub use graph::Graph;
pub use libtorch::{Libtorch, check_native, libtorch};
pub use memory::{allocated_bytes, keep_freed_memory, peak_resident_bytes};
pub use native::{
    AdamW, Sgd, adamw_step, clip_gradients, copy_all, cpu_capability, ema_update, gradients,
    has_cuda_library, lars_scale, peak_gpu_bytes, pinned, set_gradients, sgd_step, tensor_over, to_device,
    total_norm, zero_gradients,
};
pub use openmp::begin_with_calm_threads;
pub use ranks::{Exchange, ProcessGroup, Store, Traffic};

use crate::config;

/// The device of a run cannot be had.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// A library of ours or of libtorch is not where it should be.
    #[error("cannot open {}: {reason}; {advice}", path.display())]
    Library {
        /// The file.
        path: PathBuf,
        /// The dynamic linker's words.
        reason: String,
        /// What to do.
        advice: &'static str,
    },
    /// CUDA was asked for by name and is not there.
    #[error(
        "trainer.device = \"{asked}\": {reason}; use trainer.device = \"cpu\", or \"auto\" to take what is there"
    )]
    NoCuda {
        /// As configured.
        asked: String,
        /// What is missing.
        reason: String,
    },
    /// libtorch reports an error.
    #[error("libtorch: {0}")]
    Torch(String),
}

/// Finds the device that `asked` means: `auto` takes a CUDA device, or the CPU where there is none. Of several, process
/// `local_rank` of this machine gets one of its own, unless it is asked for by number.
///
/// # Errors
/// When CUDA is asked for by name and is missing; the sentence says what is.
pub fn choose(asked: config::Device, local_rank: usize) -> Result<tch::Device, DeviceError> {
    let index = match asked {
        config::Device::Cpu => return Ok(tch::Device::Cpu),
        config::Device::Auto => None,
        config::Device::Cuda(index) => index,
    };
    let opened = cuda::open();
    // A launcher may show each process one device alone.
    let index = index.unwrap_or_else(|| match &opened {
        Ok(()) => local_rank % (tch::Cuda::device_count().max(1) as usize),
        Err(_) => 0,
    });
    let missing = match opened {
        Ok(()) if (index as i64) < tch::Cuda::device_count() => return Ok(tch::Device::Cuda(index)),
        Ok(()) => format!("libtorch sees {} CUDA devices", tch::Cuda::device_count()),
        Err(reason) => reason,
    };
    if asked == config::Device::Auto {
        tracing::debug!("training on the CPU: {missing}");
        return Ok(tch::Device::Cpu);
    }
    Err(DeviceError::NoCuda { asked: asked.into(), reason: missing })
}

/// Opens libtorch's CUDA half early, where it and a driver are installed. libtorch settles whether it has CUDA in its first
/// backward pass, and plugins try one when they are opened.
pub fn open_cuda_if_there() {
    if cuda::has_driver() {
        // Whoever asks for a GPU hears why there is none.
        let _ = cuda::open();
    }
}

/// The text that a plugin reads as a device: `cpu` or `cuda:<n>`.
pub fn device_text(device: tch::Device) -> String {
    match device {
        tch::Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_owned(),
    }
}
