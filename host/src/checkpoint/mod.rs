//! The run directory and the states saved in it.
//!
//! A run lives in `<run.dir>/<run.name>/version_<n>/`. A checkpoint is a folder of it, `checkpoints/step_<8 digits>/`,
//! with `model.safetensors`, `optimizer.safetensors` and `state.json`. It appears whole or not at all: it is written
//! under another name, synced to the disk, and renamed. What a run saves and when is the training loop's business.

mod changes;
mod encoder;
mod error;
mod resume;
mod run_dir;
mod state;
mod store;
mod tensors;

pub use encoder::{adapt, encoder_of, read_encoder};
pub use error::CheckpointError;
pub use resume::{Resume, find_checkpoint, resolve_resume};
pub(crate) use run_dir::is_run;
pub use run_dir::{RunDir, find_run};
pub use state::{Best, FORMAT, State};
pub use store::{Checkpoint, latest, list, load, load_model, load_state, replace_file};
pub use tensors::{NamedTensors, read_tensors, restore, write_tensors};
