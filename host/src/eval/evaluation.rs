//! The evaluation of an encoder, in training and later: features of both data sets, then every probe that is enabled.

use std::collections::BTreeMap;
use std::sync::Arc;

use jepa_plugin_api::tch::{Device, Tensor};
use jepa_plugin_api::{Interpolation, Transform, ViewSpec};

use super::contrastive::Contrastive;
use super::features::extract_together;
use super::{EvalError, Features, GoOn, PluginProbe, descriptors, knn, linear};
use crate::config::{self, Config};
use crate::data::{DataError, Dataset, Loader, LoaderOptions, Share};
use crate::dist::Comm;

/// Every figure of the host's own that an [`Evaluation`] can give.
pub const FIGURES: [&str; 14] = [
    "eval/linear_top1",
    "eval/linear_top5",
    "eval/linear_top1_final",
    "eval/linear_top5_final",
    "eval/knn_top1",
    "eval/knn_top5",
    "eval/contrastive_accuracy",
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
    contrastive: Option<Contrastive>,
    classes: i64,
    seed: u64,
    settings: config::Eval,
    plugin_probes: Vec<PluginProbe>,
}

/// What an encoder makes of the images: all that probes need.
pub struct Seen {
    bank: Features,
    queries: Features,
    contrastive_accuracy: Option<f64>,
}

/// What the probes see: a centre crop, normalised as the method's own views are.
pub fn evaluation_view(config: &Config, views: &[ViewSpec]) -> ViewSpec {
    let crop =
        ViewSpec::new("evaluation").resize_center_crop(config.eval.crop_ratio, Interpolation::Bilinear);
    let transforms = views.iter().flat_map(|view| &view.transforms);
    match transforms.into_iter().find(|transform| matches!(transform, Transform::Normalize { .. })) {
        Some(normalize) => crop.then(normalize.clone()),
        None => crop,
    }
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
    let options = LoaderOptions { shuffle, ..loader_options(config, vec![view], Share::Whole) };
    Loader::new(Arc::clone(set), options)
}

pub(super) fn loader_options(config: &Config, views: Vec<ViewSpec>, share: Share) -> LoaderOptions {
    LoaderOptions {
        share,
        batch_size: config.eval.batch_size,
        seed: config.seed,
        threads: config.data.threads,
        on_error: config.data.on_error,
        decode: config.data.decode,
        shuffle: false,
        drop_last: false,
        ..LoaderOptions::new(views, config.data.size as u32)
    }
}

impl Evaluation {
    /// The host's own probes and those of plugins, trained on `train_set` and measured on `val_set`, both seen through
    /// `view`. Of the batches of both, this process encodes its `share`.
    ///
    /// # Errors
    /// When a data set has no labels, or labels that do not fit the other's.
    pub fn new(
        config: &Config,
        view: ViewSpec,
        train_set: &Arc<Dataset>,
        val_set: &Arc<Dataset>,
        plugin_probes: Vec<PluginProbe>,
        share: Share,
    ) -> Result<Self, DataError> {
        let needed_by = "evaluation (which eval.every_epochs=0 turns off)";
        train_set.require_labels(needed_by)?;
        val_set.require_labels(needed_by)?;
        let enabled = config.eval.contrastive.enabled;
        let contrastive = enabled.then(|| Contrastive::new(config, &view, val_set, share)).transpose()?;
        let loader = |set, shuffle| {
            let options = LoaderOptions { shuffle, ..loader_options(config, vec![view.clone()], share) };
            Loader::new(Arc::clone(set), options)
        };
        Ok(Evaluation {
            // A part of the training set is a random part: files are often sorted by class.
            bank: loader(train_set, config.eval.train_limit.is_some())?,
            bank_limit: config.eval.train_limit,
            queries: loader(val_set, false)?,
            contrastive,
            classes: train_set.classes().max(val_set.classes()) as i64,
            seed: config.seed,
            settings: config.eval.clone(),
            plugin_probes,
        })
    }

    /// The [`FIGURES`] and those of plugins' probes, of the encoder `encode`, which takes f32 `(B, 3, S, S)` on the CPU and gives
    /// `(B, D)`. The probes compute on `device`, where the features fit there.
    ///
    /// # Errors
    /// Whatever the pipeline, the encoder or a probe reports: none is swallowed. And what `go_on` says.
    pub fn run(
        &self,
        device: Device,
        encode: &mut dyn FnMut(&Tensor) -> anyhow::Result<Tensor>,
        go_on: GoOn<'_>,
    ) -> anyhow::Result<BTreeMap<String, f64>> {
        let seen = self.look(device, encode, go_on, None)?;
        self.judge(&seen.expect("alone, one has all"), go_on)
    }

    /// The first half of [`run`](Self::run): all images as the encoder sees them. Ranks of `comm` do it together, asking
    /// `go_on` in each round; the first of them gets it.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn look(
        &self,
        device: Device,
        encode: &mut dyn FnMut(&Tensor) -> anyhow::Result<Tensor>,
        go_on: GoOn<'_>,
        comm: Option<&Comm>,
    ) -> anyhow::Result<Option<Seen>> {
        let bank = self.features(&self.bank, self.bank_limit, encode, go_on, comm)?;
        let queries = self.features(&self.queries, None, encode, go_on, comm)?;
        let contrastive = self.contrastive.as_ref();
        let contrastive_accuracy =
            contrastive.map(|probe| probe.accuracy(encode, go_on, comm)).transpose()?;
        let (Some(bank), Some(queries)) = (bank, queries) else { return Ok(None) };
        let (bank, queries) = bank.near(queries, device)?;
        Ok(Some(Seen { bank, queries, contrastive_accuracy }))
    }

    /// The second half: every probe that is enabled.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn judge(&self, seen: &Seen, go_on: GoOn<'_>) -> anyhow::Result<BTreeMap<String, f64>> {
        let Seen { bank, queries, contrastive_accuracy } = seen;
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
            let probe = linear::probe(bank, queries, self.classes, &options, go_on)?;
            note("linear_top1", probe.top1);
            note("linear_top5", probe.top5);
            note("linear_top1_final", probe.top1_final);
            note("linear_top5_final", probe.top5_final);
        }
        if self.settings.knn.enabled {
            let result = knn::evaluate(
                bank,
                queries,
                self.classes,
                self.settings.knn.k,
                self.settings.knn.temperature,
                go_on,
            )?;
            note("knn_top1", result.top1);
            note("knn_top5", result.top5);
        }
        if let Some(accuracy) = contrastive_accuracy {
            note("contrastive_accuracy", *accuracy);
        }
        for probe in &self.plugin_probes {
            go_on()?;
            let figures = probe.judge(bank, queries, self.classes, self.seed)?;
            for (name, value) in figures {
                note(&name, value);
            }
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
        go_on: GoOn<'_>,
        comm: Option<&Comm>,
    ) -> Result<Option<Features>, EvalError> {
        let in_a_round = self.settings.batch_size * comm.map_or(1, |comm| comm.size() as usize);
        let rounds = limit.map_or(usize::MAX, |limit| limit.div_ceil(in_a_round));
        let rounds = loader.rounds(0).take(rounds).map(|round| {
            go_on()?;
            let Some((_, batch)) = round else { return Ok(None) };
            let batch = batch?.finish(Device::Cpu)?;
            Ok(Some((batch.views.into_iter().next().expect("one view was asked for"), batch.labels)))
        });
        let features = extract_together(rounds, encode, comm)?;
        Ok(features.map(|features| match limit {
            Some(limit) => features.first(limit as i64),
            None => features,
        }))
    }
}
