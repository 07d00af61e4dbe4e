//! The learned backbone alone, under the names that timm gives its tensors: for export, and to begin a run with.

use std::path::Path;

use tch::Tensor;

use super::error::CheckpointError;
use super::resume::find_checkpoint;
use super::store::load_model;
use super::tensors::{NamedTensors, read_tensors};

/// First parts of the names of classifiers in timm and torchvision.
const CLASSIFIERS: [&str; 3] = ["fc.", "head.", "classifier."];

/// Last part of the name of a batch norm's counter of batches, which nothing computes with.
const COUNTER: &str = ".num_batches_tracked";

/// The tensors of a model that lie under `encoder`, without that part of their names.
pub fn encoder_of(model: NamedTensors, encoder: &str) -> NamedTensors {
    let prefix = format!("{encoder}.");
    let inside = |(name, tensor): (String, _)| Some((name.strip_prefix(&prefix)?.to_owned(), tensor));
    model.into_iter().filter_map(inside).collect()
}

/// A backbone's tensors from a run, a checkpoint of ours, or a safetensors file of timm's, torchvision's or
/// `jepa-host export`.
///
/// # Errors
/// When there is none, or it is damaged.
pub fn read_encoder(path: &Path) -> Result<NamedTensors, CheckpointError> {
    if path.is_file() {
        return read_tensors(path);
    }
    let (state, model) = load_model(&find_checkpoint(path)?)?;
    Ok(encoder_of(model, &state.encoder))
}

/// What `backbone` takes of `weights`: without a classifier that it does not have, and with batch norm's counters at 0
/// where an old file of torchvision's lacks them.
pub fn adapt(weights: &[(String, Tensor)], backbone: &[(String, Tensor)]) -> NamedTensors {
    let has = |wanted: &str| backbone.iter().any(|(name, _)| name == wanted);
    let left_out = |name: &str| CLASSIFIERS.iter().any(|prefix| name.starts_with(prefix)) && !has(name);
    let names: Vec<&str> =
        weights.iter().map(|(name, _)| name.as_str()).filter(|name| left_out(name)).collect();
    if !names.is_empty() {
        tracing::info!("left out the classifier, {}", names.join(", "));
    }
    let kept = weights.iter().filter(|(name, _)| !left_out(name));
    let kept = kept.map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
    let given = |wanted: &str| weights.iter().any(|(name, _)| name == wanted);
    let counters = backbone.iter().filter(|(name, _)| name.ends_with(COUNTER) && !given(name));
    kept.chain(counters.map(|(name, tensor)| (name.clone(), tensor.zeros_like()))).collect()
}
