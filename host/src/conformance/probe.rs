//! The checks of probes, on synthetic features.

use std::path::Path;

use anyhow::ensure;
use jepa_plugin_api::abi::ProbeHandle;
use jepa_plugin_api::tch::{self, Kind, Tensor};
use jepa_plugin_api::{FrozenFeatures, LabelledFeatures, Rng};

use super::checks::{failed, kept, passed};
use super::{Built, CLASSES, Subject, Verdict};

/// Key of the numbers that features are drawn from.
const FEATURES: u64 = 0x6665_6174_7572_6573;
/// Features to learn from, as many to measure on, and their length.
const COUNT: i64 = 256;
const LENGTH: i64 = 32;

/// Evaluated twice, equal features have equal metrics, also when libtorch's generator has moved on; and nobody finds them
/// changed.
pub fn metrics(subject: &dyn Subject, _: &Path) -> anyhow::Result<Verdict> {
    let features = features(0);
    let evaluate = |torch_seed: i64| -> anyhow::Result<_> {
        let mut probe = probe(subject)?;
        tch::manual_seed(torch_seed);
        Ok(probe.evaluate(shared(&features))?)
    };
    let (first, second) = (evaluate(0)?, evaluate(1)?);
    if first.is_empty() {
        return failed("it gives no metric".to_owned());
    }
    let mut names: Vec<_> = first.iter().map(|(name, _)| name).collect();
    names.sort();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return failed(format!("two metrics are named `{}`", pair[0]));
    }
    if first != second {
        return failed(format!(
            "equal features have the metrics {first:?} and {second:?}: draw every number from Rng::keyed"
        ));
    }
    let pristine = self::features(0);
    if !features.train.x.equal(&pristine.train.x) || !features.held_out.x.equal(&pristine.held_out.x) {
        return failed(
            "`evaluate` changes the features, which other probes get too: work on a copy".to_owned(),
        );
    }
    passed(first.iter().map(|(name, value)| format!("{name} {value:.3}")).collect::<Vec<_>>().join(", "))
}

pub fn panics(subject: &dyn Subject, _: &Path) -> anyhow::Result<Verdict> {
    let mut refused = 0;
    for misfit in 0..4 {
        let mut features = features(0);
        match misfit {
            0 => features.train.x = features.train.x.narrow(0, 0, 0),
            1 => features.held_out.x = features.held_out.x.narrow(1, 0, LENGTH / 2),
            2 => features.train.y = &features.train.y + CLASSES as i64,
            _ => features.held_out.x = features.held_out.x.to_kind(Kind::Int64),
        }
        if let Err(failure) = probe(subject)?.evaluate(features) {
            refused += 1;
            ensure!(!failure.message.is_empty(), "an error without a message");
        }
    }
    probe(subject)?.evaluate(features(0))?;
    passed(format!("{refused} of 4 misfits refused, and it goes on"))
}

pub fn leaks(subject: &dyn Subject, _: &Path) -> anyhow::Result<Verdict> {
    kept("evaluation", |turn| {
        probe(subject)?.evaluate(features(turn))?;
        Ok(())
    })
}

fn probe(subject: &dyn Subject) -> anyhow::Result<ProbeHandle> {
    match subject.build(0)? {
        Built::Probe(probe) => Ok(probe),
        Built::Method(_) | Built::Backbone(_) => anyhow::bail!("it is no probe"),
    }
}

/// Features of classes that lie apart, drawn by the key `turn`.
fn features(turn: u64) -> FrozenFeatures {
    let set = |key: u64| {
        let mut rng = Rng::keyed(0, turn, key, FEATURES);
        let y: Vec<i64> = (0..COUNT).map(|i| i % CLASSES as i64).collect();
        let mut value =
            |class: i64, at: i64| rng.unit() as f32 + if at % CLASSES as i64 == class { 0.5 } else { 0.0 };
        let x: Vec<f32> = y
            .iter()
            .flat_map(|&class| (0..LENGTH).map(move |at| (class, at)))
            .map(|(c, at)| value(c, at))
            .collect();
        LabelledFeatures { x: Tensor::from_slice(&x).reshape([COUNT, LENGTH]), y: Tensor::from_slice(&y) }
    };
    FrozenFeatures { train: set(0), held_out: set(1), classes: CLASSES as i64, seed: 0 }
}

/// The same tensors for another call, as a run shares them between its probes.
fn shared(features: &FrozenFeatures) -> FrozenFeatures {
    let set =
        |set: &LabelledFeatures| LabelledFeatures { x: set.x.shallow_clone(), y: set.y.shallow_clone() };
    FrozenFeatures { train: set(&features.train), held_out: set(&features.held_out), ..*features }
}
