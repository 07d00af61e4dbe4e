//! Contrastive accuracy: is the other view of the same image the nearest?

use std::sync::Arc;

use jepa_plugin_api::nn::nt_xent;
use jepa_plugin_api::tch::{Device, Kind, Tensor};
use jepa_plugin_api::{Augmentation, Transform, ViewSpec};

use super::GoOn;
use super::evaluation::loader_options;
use crate::config::Config;
use crate::data::{DataError, Dataset, Loader, LoaderOptions, Share};
use crate::dist::{Comm, Reduce};

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
    pub fn new(
        config: &Config,
        view: &ViewSpec,
        set: &Arc<Dataset>,
        share: Share,
    ) -> Result<Self, DataError> {
        let normalizes = |transform: &Transform| matches!(transform, Transform::Normalize { .. });
        let pair = ["contrastive_1", "contrastive_2"].map(|name| {
            let mut augmented = Augmentation::SIMCLR.view(name);
            augmented.transforms.retain(|transform| !normalizes(transform));
            augmented.transforms.extend(view.transforms.iter().filter(|t| normalizes(t)).cloned());
            augmented
        });
        let batch_size = config.eval.contrastive.images.min(set.len());
        let options =
            LoaderOptions { batch_size, drop_last: true, ..loader_options(config, pair.to_vec(), share) };
        Ok(Contrastive { pairs: Loader::new(Arc::clone(set), options)? })
    }

    /// For how many of the views the other one of their image is the nearest, in [0, 1]; the mean over batches of equal
    /// size.
    ///
    /// # Errors
    /// Those of the pipeline and of `encode`; what `go_on` says, asked in every round; [`DistError`](crate::dist::DistError).
    pub fn accuracy(
        &self,
        encode: &mut dyn FnMut(&Tensor) -> anyhow::Result<Tensor>,
        go_on: GoOn<'_>,
        comm: Option<&Comm>,
    ) -> anyhow::Result<f64> {
        let (mut sum, mut batches) = (0.0, 0.0);
        for round in self.pairs.rounds(0) {
            go_on()?;
            let Some((_, batch)) = round else { continue };
            let mut features = Vec::new();
            for view in batch?.finish(Device::Cpu)?.views {
                features.push(encode(&view)?.f_to_kind(Kind::Float)?);
            }
            let (_, accuracy) = nt_xent(&features[0], &features[1], 1.0);
            sum += f64::try_from(accuracy)?;
            batches += 1.0;
        }
        let mut all = Tensor::from_slice(&[sum, batches]);
        if let Some(comm) = comm {
            comm.all_reduce(&mut all, Reduce::Sum)?;
        }
        Ok(all.double_value(&[0]) / all.double_value(&[1]))
    }
}
