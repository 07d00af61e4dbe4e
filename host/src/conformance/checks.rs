//! The checks. Each builds what it needs anew, as a plugin's objects need not survive a failure.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use anyhow::{bail, ensure};
use jepa_plugin_api::abi::{Failure, FailureKind};
use jepa_plugin_api::tch::{Device, Kind, Tensor};
use serde_json::json;

use super::process::Held;
use super::trainee::{Trainee, half_mask};
use super::{Subject, Verdict};
use crate::checkpoint::{NamedTensors, read_tensors, restore, write_tensors};

/// Steps of the checks that compare two trainings.
const STEPS: u64 = 4;
/// Steps that must have reached every parameter.
const GRADIENT_STEPS: u64 = 3;
/// Steps in bf16.
const BF16_STEPS: u64 = 20;
/// Memory is measured in windows of so many steps, after one of them as a warm-up: the most where a window then takes no
/// more than so many seconds, the least in any case where all of them take no more than half a minute.
const LEAK_WINDOW: std::ops::RangeInclusive<u64> = 25..=60;
const LEAK_WINDOW_SECONDS: std::ops::RangeInclusive<f64> = 3.0..=8.0;
/// Memory that a step or an evaluation may keep on average: less than any image of a batch, more than caches that still
/// grow.
const LEAK_PER_TURN: u64 = 8 << 10;
/// Times that a subject is built and dropped.
const BUILDS: u64 = 4;
/// A call that does nothing else is timed so many times.
const CROSSINGS: u32 = 10_000;
/// What the boundary may cost in a step, in seconds. A step of the smallest sensible model takes 2 ms, of which this is
/// one per cent.
const COST_SECONDS: f64 = 20e-6;

/// The host checks options against the schema first, but a schema may say less than the plugin's types: these go past
/// it.
pub fn options(subject: &dyn Subject, _: &Path) -> anyhow::Result<Verdict> {
    subject.build(0)?;
    for (what, options) in
        [("an unknown option", json!({ "no_such_option": 1 })), ("options that are a number", json!(7))]
    {
        let Err(error) = subject.build_with(&options) else {
            return failed(format!(
                "{what} ({options}) was taken without a word: put #[serde(default, deny_unknown_fields)] on the options"
            ));
        };
        match error.downcast_ref::<Failure>() {
            Some(failure) if failure.kind == FailureKind::Options && !failure.message.is_empty() => {}
            _ => {
                return failed(format!(
                    "{what} ({options}) ended in something else than a refusal: {error:#}"
                ));
            }
        }
    }
    passed("unknown names and wrong types")
}

pub fn gradients(subject: &dyn Subject, _: &Path) -> anyhow::Result<Verdict> {
    let mut trainee = Trainee::new(subject, 0)?;
    let mut missing: Option<BTreeSet<String>> = None;
    for step in 0..GRADIENT_STEPS {
        let told = trainee.step(step, false)?;
        ensure!(told.norm.is_finite(), "the gradient norm of step {step} is {}", told.norm);
        let without: BTreeSet<String> = told.without_gradient.into_iter().collect();
        missing = Some(missing.map_or(without.clone(), |before| &before & &without));
    }
    let missing: Vec<String> = missing.unwrap_or_default().into_iter().collect();
    if missing.is_empty() {
        return passed(format!("{} parameters", trainee.trained()));
    }
    failed(format!("none reaches {}: use it in the loss, or register it as a buffer", missing.join(", ")))
}

pub fn seed(subject: &dyn Subject, _: &Path) -> anyhow::Result<Verdict> {
    let train = || -> anyhow::Result<(Vec<f64>, Trainee)> {
        let mut trainee = Trainee::new(subject, 0)?;
        let losses = losses(&mut trainee, 0..STEPS)?;
        Ok((losses, trainee))
    };
    let ((first, one), (second, other)) = (train()?, train()?);
    if first != second {
        return failed(format!(
            "two trainings of seed 0 have the losses {first:?} and {second:?}: draw every number from libtorch's \
             generator or from Rng::keyed"
        ));
    }
    match different(&one, &other)? {
        Some(name) => {
            failed(format!("two trainings of seed 0 have the same losses, and end with other `{name}`"))
        }
        None => passed(format!("{STEPS} steps, bit for bit")),
    }
}

pub fn state(subject: &dyn Subject, scratch: &Path) -> anyhow::Result<Verdict> {
    let mut whole = Trainee::new(subject, 0)?;
    losses(&mut whole, 0..STEPS)?;
    let files = [scratch.join("model.safetensors"), scratch.join("optimizer.safetensors")];
    for (file, tensors) in files.iter().zip(whole.tensors()?) {
        write_tensors(file, &tensors)?;
    }
    let expected = losses(&mut whole, STEPS..2 * STEPS)?;

    // Weights of another seed: what is not saved shows.
    let mut resumed = Trainee::new(subject, 1)?;
    for (file, tensors) in files.iter().zip(resumed.tensors()?) {
        restore(&tensors, &read_tensors(file)?)?;
    }
    let found = losses(&mut resumed, STEPS..2 * STEPS)?;
    if found != expected {
        return failed(format!(
            "after {STEPS} steps, save and load, the losses are {found:?} and not {expected:?}: keep what a step needs \
             of the one before it in a buffer"
        ));
    }
    match different(&whole, &resumed)? {
        Some(name) => failed(format!("after save and load, training ends with another `{name}`")),
        None => passed(format!("{STEPS} steps before and after, bit for bit")),
    }
}

pub fn bf16(subject: &dyn Subject, _: &Path) -> anyhow::Result<Verdict> {
    let mut trainee = Trainee::new(subject, 0)?;
    for step in 0..BF16_STEPS {
        let told = trainee.step(step, true)?;
        if !told.loss.is_finite() || !told.norm.is_finite() {
            return failed(format!(
                "in step {step} under autocast the loss is {} and the gradient norm {}: take f32 for the loss \
                 (to_kind(Kind::Float))",
                told.loss, told.norm
            ));
        }
    }
    passed(format!("{BF16_STEPS} steps"))
}

pub fn features(subject: &dyn Subject, _: &Path) -> anyhow::Result<Verdict> {
    let mut trainee = Trainee::new(subject, 0)?;
    trainee.step(0, false)?;
    let before = copies(&trainee)?;
    let images = first_view(&trainee, 6)?;
    let all = trainee.features(&images)?;
    ensure!(all.dim() == 2, "features are (B, D), and not {:?}", all.size());
    if !f64::try_from(all.sum(Kind::Double))?.is_finite() {
        return failed("some are not finite".to_owned());
    }
    if !trainee.features(&images)?.equal(&all) {
        return failed(
            "the same images have other features the second time: encode in evaluation mode".to_owned(),
        );
    }
    let some = trainee.features(&images.narrow(0, 0, 2))?;
    let apart = f64::try_from((some - all.narrow(0, 0, 2)).abs().max())?;
    let size = f64::try_from(all.abs().max())?.max(1e-6);
    if apart > 1e-3 * size {
        return failed(format!(
            "an image's features depend on the others in its batch (by {apart:.2e} of {size:.2e}): encode with running \
             statistics"
        ));
    }
    for ((name, before), (_, after)) in before.iter().zip(trainee.tensors()?.iter().flatten()) {
        if !before.equal(after) {
            return failed(format!("`encode` has changed `{name}`"));
        }
    }
    passed(format!("{} per image", all.size()[1]))
}

/// Of a backbone with a sparse mode: hidden cells are exactly zero, and hiding nothing is the dense mode.
pub fn sparse(subject: &dyn Subject, _: &Path) -> anyhow::Result<Verdict> {
    let mut trainee = Trainee::new(subject, 0)?;
    trainee.step(0, false)?;
    let images = first_view(&trainee, 2)?;
    let (dense, downsample) = match trainee.map(&images)? {
        Some(found) => found,
        None => return passed("no sparse mode to check"),
    };
    let cells = images.size()[2] / downsample;
    ensure!(
        dense.size()[2..] == [cells, cells],
        "its map is {:?}, and at a downsample of {downsample} it must be {cells} × {cells}",
        dense.size()
    );
    let mask = half_mask(&dense);
    let half = trainee.sparse_map(&images, &mask)?;
    let leaked =
        f64::try_from(half.masked_select(&mask.logical_not().expand_as(&half)).abs().sum(Kind::Double))?;
    if leaked != 0.0 {
        return failed("cells that the mask hides are not zero in the map".to_owned());
    }
    let hidden = Tensor::f_upsample_nearest2d(
        &mask.to_kind(Kind::Float),
        [cells * downsample, cells * downsample].as_slice(),
        None,
        None,
    )?;
    let noise = &images + (1.0 - hidden) * 3.0;
    if !trainee.sparse_map(&noise, &mask)?.equal(&half) {
        return failed("pixels that the mask hides change the map".to_owned());
    }
    let full = trainee.sparse_map(&images, &mask.ones_like())?;
    let apart = f64::try_from((&full - &dense).abs().max())?;
    let size = f64::try_from(dense.abs().max())?.max(1e-6);
    if apart > 1e-4 * size {
        return failed(format!(
            "with a mask that hides nothing, the map is not the dense one (off by {apart:.2e})"
        ));
    }
    passed(format!("{cells} × {cells} cells"))
}

pub fn panics(subject: &dyn Subject, _: &Path) -> anyhow::Result<Verdict> {
    let count = subject.config().optimizer.batch_size;
    let mut refused = 0;
    for misfit in 0..4 {
        // A panic leaves an object that is of no use any more: build another.
        let mut trainee = Trainee::new(subject, 0)?;
        let mut batch = trainee.images().batch(0, count, true);
        match misfit {
            0 => batch.views.clear(),
            1 => batch.views.iter_mut().for_each(|view| *view = view.narrow(1, 0, 1)),
            2 => batch.views.iter_mut().for_each(|view| *view = view.narrow(0, 0, 0)),
            _ => batch.views.iter_mut().for_each(|view| *view = view.to_kind(Kind::Int64)),
        }
        if let Err(error) = trainee.offer(batch) {
            refused += 1;
            ensure!(!error.to_string().is_empty(), "an error without a message");
        }
    }
    let mut trainee = Trainee::new(subject, 0)?;
    trainee.step(0, false)?;
    passed(format!("{refused} of 4 misfits refused, and it trains on"))
}

pub fn leaks(subject: &dyn Subject, _: &Path) -> anyhow::Result<Verdict> {
    let mut trainee = Trainee::new(subject, 0)?;
    let verdict = kept("step", |step| trainee.step(step, false).map(drop))?;
    let Verdict::Passed(steps) = verdict else { return Ok(verdict) };

    let size: u64 =
        trainee.tensors()?[0].iter().map(|(_, t)| (t.numel() * t.kind().elt_size_in_bytes()) as u64).sum();
    let build = || -> anyhow::Result<Held> {
        for seed in 0..BUILDS {
            subject.build(seed)?;
        }
        Held::now()
    };
    let (before, after) = (build()?, build()?);
    let grown = after.memory.saturating_sub(before.memory);
    if grown > (BUILDS * size / 2).max(4 << 20) {
        return failed(format!("{BUILDS} times built and dropped keep {} MiB of memory", grown >> 20));
    }
    if after.threads > before.threads || after.files > before.files {
        return failed("building and dropping it keeps threads or files".to_owned());
    }
    passed(format!("{steps}, {} builds", 2 * BUILDS))
}

/// Whether any of these turns, each of which is called a `what`, keeps memory, threads or open files.
pub fn kept(what: &str, mut turn: impl FnMut(u64) -> anyhow::Result<()>) -> anyhow::Result<Verdict> {
    let begun = Instant::now();
    (0..5).try_for_each(&mut turn)?;
    let within = |seconds: f64| (seconds * 5.0 / begun.elapsed().as_secs_f64()) as u64;
    let (quick, slow) = (within(*LEAK_WINDOW_SECONDS.start()), within(*LEAK_WINDOW_SECONDS.end()));
    let length = quick.clamp(*LEAK_WINDOW.start(), *LEAK_WINDOW.end()).min(slow.max(5));
    // The least memory in a window: batches and graphs come and go.
    let mut window = |index: u64| -> anyhow::Result<Held> {
        let mut held = Held { memory: u64::MAX, ..Held::now()? };
        for index in index * length..(index + 1) * length {
            turn(index)?;
            let now = Held::now()?;
            held = Held { memory: held.memory.min(now.memory), ..now };
        }
        Ok(held)
    };
    window(0)?;
    let [first, middle, last] = [window(1)?, window(2)?, window(3)?];
    let between = |from: u64, to: u64| to.saturating_sub(from) / length;
    let kept = between(first.memory, middle.memory).min(between(middle.memory, last.memory));
    let turns = 2 * length;
    if last.threads > first.threads {
        return failed(format!("threads grow from {} to {} in {turns} {what}s", first.threads, last.threads));
    }
    if last.files > first.files {
        return failed(format!("open files grow from {} to {} in {turns} {what}s", first.files, last.files));
    }
    // Threads and files take memory too, so that it is asked for last.
    if kept > LEAK_PER_TURN {
        return failed(format!("every {what} keeps {} KiB of memory", kept >> 10));
    }
    passed(format!("{} {what}s", 4 * length))
}

/// A tensor's way in and out is timed by itself, and counted for each tensor that a step sends.
pub fn cost(subject: &dyn Subject, _: &Path) -> anyhow::Result<Verdict> {
    let mut trainee = Trainee::new(subject, 0)?;
    let (mut step, mut crossings) = (f64::INFINITY, 0);
    for index in 0..10 {
        let begun = Instant::now();
        crossings = trainee.step(index, false)?.crossings;
        step = step.min(begun.elapsed().as_secs_f64());
    }
    let x = Tensor::from_slice(&[1f32]);
    let in_plugin = || subject.cross(&x);
    let in_host = || Ok((&x * 2).f_sum(Kind::Float)?);
    let [in_plugin, in_host] = least_seconds([&in_plugin, &in_host])?;
    let boundary = (in_plugin - in_host).max(0.0) * crossings as f64;
    let told =
        format!("about {:.1} µs of a step of {:.1} ms, for {crossings} tensors", boundary * 1e6, step * 1e3);
    if boundary > COST_SECONDS {
        return failed(format!("{told}, and {:.0} µs are allowed: return fewer metrics", COST_SECONDS * 1e6));
    }
    passed(told)
}

/// The least seconds that each of these calls takes, on the mean over a run of 100; runs take turns, so that what slows
/// one slows the other.
fn least_seconds<const N: usize>(
    calls: [&dyn Fn() -> anyhow::Result<Tensor>; N],
) -> anyhow::Result<[f64; N]> {
    let mut least = [f64::INFINITY; N];
    for _ in 0..CROSSINGS / 100 {
        for (call, least) in calls.iter().zip(&mut least) {
            let begun = Instant::now();
            for _ in 0..100 {
                drop(call()?);
            }
            *least = least.min(begun.elapsed().as_secs_f64() / 100.0);
        }
    }
    Ok(least)
}

fn losses(trainee: &mut Trainee, steps: std::ops::Range<u64>) -> anyhow::Result<Vec<f64>> {
    steps.map(|step| Ok(trainee.step(step, false)?.loss)).collect()
}

/// The first tensor in which two trainees differ.
fn different(one: &Trainee, other: &Trainee) -> anyhow::Result<Option<String>> {
    let (one, other) = (one.tensors()?, other.tensors()?);
    let pairs = one.iter().flatten().zip(other.iter().flatten());
    Ok(pairs.into_iter().find(|((_, a), (_, b))| !a.equal(b)).map(|((name, _), _)| name.clone()))
}

fn copies(trainee: &Trainee) -> anyhow::Result<NamedTensors> {
    Ok(trainee.tensors()?.iter().flatten().map(|(name, tensor)| (name.clone(), tensor.copy())).collect())
}

/// The first view of `count` images, f32 `(B, 3, S, S)`.
fn first_view(trainee: &Trainee, count: usize) -> anyhow::Result<Tensor> {
    match trainee.images().batch(0, count, false).views.into_iter().next() {
        Some(view) => Ok(view.to_device(Device::Cpu)),
        None => bail!("no view is declared"),
    }
}

pub fn passed(detail: impl Into<String>) -> anyhow::Result<Verdict> {
    Ok(Verdict::Passed(detail.into()))
}

pub fn failed(detail: String) -> anyhow::Result<Verdict> {
    Ok(Verdict::Failed(detail))
}
