//! Evaluation during training: features of both data sets from the frozen encoder, then every probe that is enabled.

use std::collections::BTreeMap;
use std::sync::Arc;

use jepa_plugin_api::ViewSpec;
use jepa_plugin_api::tch::{Device, Tensor};

use super::{EvalError, Features, GoOn, descriptors, extract, knn, linear};
use crate::config::{self, Config};
use crate::data::{DataError, Dataset, Loader, LoaderOptions};

/// Every figure that an [`Evaluation`] can give.
pub const FIGURES: [&str; 13] = [
    "eval/linear_top1",
    "eval/linear_top5",
    "eval/linear_top1_final",
    "eval/linear_top5_final",
    "eval/knn_top1",
    "eval/knn_top5",
    "eval/anisotropy",
    "eval/correlation",
    "eval/rank",
    "eval/rank_ratio",
    "eval/rankme",
    "eval/spread",
    "eval/std",
];

/// What is needed to evaluate an encoder, ready before training starts.
pub struct Evaluation {
    bank: Loader,
    bank_limit: Option<usize>,
    queries: Loader,
    classes: i64,
    seed: u64,
    settings: config::Eval,
}

/// Batches of `eval.batch_size` images of `set`, all of them, as `view` shows them; in the file's order, or in one
/// that the seed gives.
///
/// # Errors
/// A view that makes no sense.
pub fn feature_loader(
    config: &Config,
    view: ViewSpec,
    set: &Arc<Dataset>,
    shuffle: bool,
) -> Result<Loader, DataError> {
    let options = LoaderOptions {
        batch_size: config.eval.batch_size,
        seed: config.seed,
        threads: config.data.threads,
        on_error: config.data.on_error,
        shuffle,
        drop_last: false,
        ..LoaderOptions::new(vec![view], config.data.size as u32)
    };
    Loader::new(Arc::clone(set), options)
}

impl Evaluation {
    /// Probes trained on `train_set` and measured on `val_set`, both seen through `view`.
    ///
    /// # Errors
    /// When a data set has no labels, or labels that do not fit the other's.
    pub fn new(
        config: &Config,
        view: ViewSpec,
        train_set: &Arc<Dataset>,
        val_set: &Arc<Dataset>,
    ) -> Result<Self, DataError> {
        train_set.require_labels("evaluation")?;
        val_set.require_labels("evaluation")?;
        let loader = |set, shuffle| feature_loader(config, view.clone(), set, shuffle);
        Ok(Evaluation {
            // A part of the training set is a random part: files are often sorted by class.
            bank: loader(train_set, config.eval.train_limit.is_some())?,
            bank_limit: config.eval.train_limit,
            queries: loader(val_set, false)?,
            classes: train_set.classes().max(val_set.classes()) as i64,
            seed: config.seed,
            settings: config.eval.clone(),
        })
    }

    /// The [`FIGURES`] of the encoder `encode`, which takes f32 `(B, 3, S, S)` on the CPU and gives `(B, D)`. The
    /// probes compute on `device`, where the features fit there.
    ///
    /// # Errors
    /// Whatever the pipeline, the encoder or a probe reports: none is swallowed. And what `go_on` says.
    pub fn run(
        &self,
        device: Device,
        encode: &mut dyn FnMut(&Tensor) -> anyhow::Result<Tensor>,
        go_on: GoOn<'_>,
    ) -> anyhow::Result<BTreeMap<String, f64>> {
        let mut features = |loader, limit| {
            let mut encode = |images: &Tensor| go_on().and_then(|()| encode(images));
            self.features(loader, limit, &mut encode).map(|features| features.near(device))
        };
        let bank = features(&self.bank, self.bank_limit)?;
        let queries = features(&self.queries, None)?;
        let mut figures = BTreeMap::new();
        let mut note = |name: &str, value: f64| figures.insert(format!("eval/{name}"), value);

        let settings = &self.settings.linear;
        if settings.enabled {
            let options = linear::Options {
                epochs: settings.epochs,
                lr: settings.lr,
                batch_size: settings.batch_size,
                seed: self.seed,
            };
            let probe = linear::probe(&bank, &queries, self.classes, &options, go_on)?;
            note("linear_top1", probe.top1);
            note("linear_top5", probe.top5);
            note("linear_top1_final", probe.top1_final);
            note("linear_top5_final", probe.top5_final);
        }
        if self.settings.knn.enabled {
            let result = knn::evaluate(
                &bank,
                &queries,
                self.classes,
                self.settings.knn.k,
                self.settings.knn.temperature,
                go_on,
            )?;
            note("knn_top1", result.top1);
            note("knn_top5", result.top5);
        }
        let described = descriptors::describe(&queries.x)?;
        note("anisotropy", described.anisotropy);
        note("correlation", described.correlation);
        note("rank", described.rank);
        note("rank_ratio", described.rank_ratio);
        note("rankme", described.rankme);
        note("spread", described.spread);
        note("std", described.std);
        Ok(figures)
    }

    fn features(
        &self,
        loader: &Loader,
        limit: Option<usize>,
        encode: &mut dyn FnMut(&Tensor) -> anyhow::Result<Tensor>,
    ) -> Result<Features, EvalError> {
        let batches = limit.map_or(usize::MAX, |limit| limit.div_ceil(self.settings.batch_size));
        let batches = loader.batches(0, 0).take(batches).map(|batch| {
            let batch = batch?;
            Ok((batch.views.into_iter().next().expect("one view was asked for"), batch.labels))
        });
        let features = extract(batches, encode)?;
        Ok(match limit {
            Some(limit) => features.first(limit as i64),
            None => features,
        })
    }
}
