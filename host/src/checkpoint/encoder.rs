//! The learned backbone alone, under the names that timm gives its tensors: for export, and to begin a run with.

use std::path::Path;

use super::error::CheckpointError;
use super::resume::find_checkpoint;
use super::store::load_model;
use super::tensors::{NamedTensors, read_tensors};

/// First parts of the names of classifiers in timm and torchvision, which a backbone does not have.
const CLASSIFIERS: [&str; 3] = ["fc.", "head.", "classifier."];

/// The tensors of a model that lie under `encoder`, without that part of their names.
pub fn encoder_of(model: NamedTensors, encoder: &str) -> NamedTensors {
    let prefix = format!("{encoder}.");
    let inside = |(name, tensor): (String, _)| Some((name.strip_prefix(&prefix)?.to_owned(), tensor));
    model.into_iter().filter_map(inside).collect()
}

/// A backbone's tensors from a run, a checkpoint of ours, or a safetensors file of timm's, torchvision's or
/// `jepa-host export`. A file's classifier is left out.
///
/// # Errors
/// When there is none, or it is damaged.
pub fn read_encoder(path: &Path) -> Result<NamedTensors, CheckpointError> {
    if path.is_file() {
        let (classifier, backbone): (NamedTensors, NamedTensors) = read_tensors(path)?
            .into_iter()
            .partition(|(name, _)| CLASSIFIERS.iter().any(|prefix| name.starts_with(prefix)));
        if !classifier.is_empty() {
            let names: Vec<&str> = classifier.iter().map(|(name, _)| name.as_str()).collect();
            tracing::info!("{}: left out its classifier, {}", path.display(), names.join(", "));
        }
        return Ok(backbone);
    }
    let (state, model) = load_model(&find_checkpoint(path)?)?;
    Ok(encoder_of(model, &state.encoder))
}
