//! Contrastive accuracy: is the other view of the same image the nearest?

use std::sync::Arc;

use jepa_plugin_api::nn::nt_xent;
use jepa_plugin_api::tch::{Device, Kind, Tensor};
use jepa_plugin_api::{Augmentation, Transform, ViewSpec};

use super::GoOn;
use super::evaluation::loader_options;
use crate::config::Config;
use crate::data::{DataError, Dataset, Loader, LoaderOptions};

/// Pairs of views of held-out images.
pub(super) struct Contrastive {
    pairs: Loader,
}

impl Contrastive {
    /// Two SimCLR views of each image of `set`, normalised as `view` is, in batches of `eval.contrastive.images`; a last
    /// batch of fewer would be an easier one, and is left out.
    ///
    /// # Errors
    /// A view that makes no sense.
    pub fn new(config: &Config, view: &ViewSpec, set: &Arc<Dataset>) -> Result<Self, DataError> {
        let normalizes = |transform: &Transform| matches!(transform, Transform::Normalize { .. });
        let pair = ["contrastive_1", "contrastive_2"].map(|name| {
            let mut augmented = Augmentation::SIMCLR.view(name);
            augmented.transforms.retain(|transform| !normalizes(transform));
            augmented.transforms.extend(view.transforms.iter().filter(|t| normalizes(t)).cloned());
            augmented
        });
        let batch_size = config.eval.contrastive.images.min(set.len());
        let options = LoaderOptions { batch_size, drop_last: true, ..loader_options(config, pair.to_vec()) };
        Ok(Contrastive { pairs: Loader::new(Arc::clone(set), options)? })
    }

    /// For how many of the views the other one of their image is the nearest, in [0, 1]; the mean over batches of equal
    /// size.
    ///
    /// # Errors
    /// Those of the pipeline and of `encode`; what `go_on` says, asked for every batch.
    pub fn accuracy(
        &self,
        encode: &mut dyn FnMut(&Tensor) -> anyhow::Result<Tensor>,
        go_on: GoOn<'_>,
    ) -> anyhow::Result<f64> {
        let mut accuracies = Vec::new();
        for batch in self.pairs.batches(0, 0) {
            go_on()?;
            let mut features = Vec::new();
            for view in batch?.finish(Device::Cpu)?.views {
                features.push(encode(&view)?.f_to_kind(Kind::Float)?);
            }
            let (_, accuracy) = nt_xent(&features[0], &features[1], 1.0);
            accuracies.push(f64::try_from(accuracy)?);
        }
        Ok(accuracies.iter().sum::<f64>() / accuracies.len() as f64)
    }
}
