//! How a run can end before its last step.

use std::path::PathBuf;

use thiserror::Error;

use crate::device::DeviceError;

/// Why training stopped.
#[derive(Debug, Error)]
pub enum TrainError {
    /// NaN or infinity. Exit code 5.
    #[error(
        "diverged at step {step}: {metric} is {value}; the last good checkpoint is {}. Try a lower optimizer.lr, \
         a longer optimizer.warmup_epochs, trainer.clip = 1.0, or trainer.precision = \"fp32\"",
        checkpoint.as_ref().map_or("not there yet".to_owned(), |path| path.display().to_string())
    )]
    Diverged {
        /// Optimizer steps taken before.
        step: u64,
        /// What is not a number.
        metric: String,
        /// NaN or ±inf.
        value: f64,
        /// What can be resumed from.
        checkpoint: Option<PathBuf>,
    },
    /// All features have become the same. Exit code 5.
    #[error(
        "features have collapsed at step {step}: {metric} is {spread:.2e}, below eval.collapse_below = {limit}. Try a \
         lower optimizer.lr, a slower EMA, or other weights of the loss; eval.collapse = \"warn\" goes on nevertheless"
    )]
    Collapsed {
        /// Optimizer steps taken.
        step: u64,
        /// Whose spread it is.
        metric: String,
        /// What is left of it.
        spread: f64,
        /// Configured.
        limit: f64,
    },
    /// A signal asked for the end. Exit code 128 + signal.
    #[error("interrupted by {}; continue with --resume {}", signal_name(*signal), run.display())]
    Interrupted {
        /// SIGINT, SIGTERM or SIGUSR1.
        signal: i32,
        /// The run directory.
        run: PathBuf,
    },
    /// A signal asked for the end of what is no run. Exit code 128 + signal.
    #[error("interrupted by {}", signal_name(*signal))]
    Stopped {
        /// SIGINT, SIGTERM or SIGUSR1.
        signal: i32,
    },
    /// A plugin declares what cannot be.
    #[error("plugin `{plugin}` declares {what}")]
    Declaration {
        /// The method's plugin.
        plugin: String,
        /// What is wrong.
        what: String,
    },
    /// What a CUDA graph does is not what the plugins do. Exit code 6.
    #[error(
        "trainer.cuda_graphs: of one batch, the replayed loss is {loss} and the computed one {computed}, and the gradients differ by \
         {gradients_off:.1e} of their norm: the method or the backbone does something else in each step. Use trainer.cuda_graphs=false"
    )]
    NotCapturable {
        /// The loss out of the graph.
        loss: f64,
        /// The loss.
        computed: f64,
        /// The norm of the difference of all gradients, of theirs.
        gradients_off: f64,
    },
    /// The data set is smaller than a batch.
    #[error(
        "the training set has {images} images, which is less than one step of optimizer.batch_size {batch_size} × \
         trainer.accumulate {accumulate}; lower optimizer.batch_size"
    )]
    NoStep {
        /// Images in the set.
        images: usize,
        /// Configured.
        batch_size: usize,
        /// Configured.
        accumulate: usize,
    },
    /// libtorch or the device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// libtorch reports an error in the host's own arithmetic.
    #[error("libtorch: {0}")]
    Torch(#[from] jepa_plugin_api::tch::TchError),
}

pub(super) fn signal_name(signal: i32) -> &'static str {
    match signal {
        libc::SIGINT => "SIGINT",
        libc::SIGTERM => "SIGTERM",
        libc::SIGUSR1 => "SIGUSR1",
        _ => "a signal",
    }
}
