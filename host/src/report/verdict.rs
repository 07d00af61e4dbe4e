//! What looks wrong with a run and what looks well, in words, each with the figures that say so. Limits are chosen so
//! that a sound run of any method gets no warning.

use super::format::{count, name_of, number, percent, plural, value_of};
use super::run::{SavedRun, Status};

/// How a finding is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tone {
    /// The result is no good, or is not there.
    Wrong,
    /// Worth a look.
    Watch,
    /// As it should be.
    Well,
}

/// One sentence about a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How it is meant.
    pub tone: Tone,
    /// In a few words.
    pub what: String,
    /// The figures, and what can be done.
    pub why: String,
}

/// A share of a run's time that is spent waiting for data and is worth a look.
const WAIT: f64 = 0.10;
/// A gain in accuracy that is no noise.
const GAIN: f64 = 0.01;
/// eval/spread below which features are crowded; 1 is everywhere.
const CROWDED: f64 = 0.05;
/// A share of dimensions that RankMe should reach, and of their square root, which is more where there are few.
const NARROW: f64 = 0.02;
const NARROW_ROOT: f64 = 0.5;

/// Everything that there is to say, what is worst first.
pub fn findings(run: &SavedRun) -> Vec<Finding> {
    let mut all = Vec::new();
    progress(run, &mut all);
    loss(run, &mut all);
    probes(run, &mut all);
    collapse(run, &mut all);
    speed(run, &mut all);
    records(run, &mut all);
    all.sort_by_key(|finding| finding.tone);
    all
}

fn say(all: &mut Vec<Finding>, tone: Tone, what: impl Into<String>, why: impl Into<String>) {
    all.push(Finding { tone, what: what.into(), why: why.into() });
}

fn progress(run: &SavedRun, all: &mut Vec<Finding>) {
    let at = match run.total_steps {
        Some(total) => format!("step {} of {}", count(run.step() as i64), count(total as i64)),
        None => format!("step {}", count(run.step() as i64)),
    };
    let error = run.error.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
    let go_on = match run.is_resumable() {
        true => format!(" --resume {} goes on.", run.path.display()),
        false => " It has no checkpoint to go on from.".to_owned(),
    };
    match run.status {
        Status::Done => {}
        Status::Running => {
            say(all, Tone::Watch, "The run goes on", format!("{at}: figures are those so far."))
        }
        Status::Interrupted => {
            say(all, Tone::Wrong, "The run is unfinished", format!("It stopped at {at}.{go_on}"))
        }
        Status::Stopped => say(
            all,
            Tone::Watch,
            "The sweep stopped the run early",
            format!("It ended at {at}{error}.{go_on}"),
        ),
        Status::Diverged => say(all, Tone::Wrong, "The run diverged", format!("It ended at {at}{error}.")),
        Status::Failed => say(all, Tone::Wrong, "The run failed", format!("It ended at {at}{error}.{go_on}")),
        Status::Damaged => {
            say(all, Tone::Wrong, "Nothing can be read", "There are neither records nor settings.")
        }
    }
}

fn loss(run: &SavedRun, all: &mut Vec<Finding>) {
    let losses: Vec<(u64, f64)> = run.series("train/loss").map(|(r, value)| (r.step, value)).collect();
    if losses.len() < 4 {
        return;
    }
    let (start, end) = ends(&losses);
    if let Some(fall) = fall(run) {
        let change = format!("{} → {}", number(start), number(end));
        if fall < 0.01 {
            let hint = "Try another optimizer.lr, and see that gradients reach every parameter.";
            say(all, Tone::Watch, "The loss does not fall", format!("{change}. {hint}"));
        } else {
            say(all, Tone::Well, "The loss falls", format!("{change} (−{}).", percent(fall)));
        }
    }
    let held_out: Vec<f64> = run.series("val/loss").map(|(_, value)| value).collect();
    if let (Some(&last), Some(least)) = (held_out.last(), held_out.iter().copied().reduce(f64::min)) {
        let rise = (last - least) / least.abs().max(1e-12);
        if held_out.len() >= 3 && rise > 0.05 && end < start {
            let why =
                format!("{} at best, {} now, while the training loss falls.", number(least), number(last));
            say(all, Tone::Watch, "The held-out loss rises again", why);
        }
    }
    let late = &losses[losses.len() / 2..];
    let mut sorted: Vec<f64> = late.iter().map(|(_, value)| *value).collect();
    sorted.sort_by(f64::total_cmp);
    let median = sorted[sorted.len() / 2];
    if let Some((step, peak)) = late.iter().copied().reduce(|a, b| if b.1 > a.1 { b } else { a })
        && median > 0.0
        && peak > 3.0 * median
    {
        let why = format!(
            "{} at step {}, where {} is usual. trainer.clip = 1.0 holds such steps back.",
            number(peak),
            count(step as i64),
            number(median)
        );
        say(all, Tone::Watch, "The loss has a spike", why);
    }
}

/// The means of the first and of the last tenth.
fn ends(values: &[(u64, f64)]) -> (f64, f64) {
    let tenth = (values.len() / 10).max(1);
    let mean = |part: &[(u64, f64)]| part.iter().map(|(_, value)| value).sum::<f64>() / part.len() as f64;
    (mean(&values[..tenth]), mean(&values[values.len() - tenth..]))
}

/// By which share of its size the loss has fallen.
fn fall(run: &SavedRun) -> Option<f64> {
    let losses: Vec<(u64, f64)> = run.series("train/loss").map(|(r, value)| (r.step, value)).collect();
    let (start, end) = (losses.len() >= 4).then(|| ends(&losses))?;
    Some((start - end) / start.abs().max(1e-12))
}

fn probes(run: &SavedRun, all: &mut Vec<Finding>) {
    let probe = ["eval/linear_top1_final", "eval/linear_top1", "eval/knn_top1"];
    let Some(probe) = probe.into_iter().find(|probe| run.last(probe).is_some()) else {
        if run.records.is_empty() {
            return;
        }
        say(all, Tone::Watch, "Nothing judges the features", "Set data.val, and eval.every_epochs above 0.");
        return;
    };
    let name = name_of(probe.trim_end_matches("_final"));
    let mut capital = name.clone();
    if name.starts_with("linear") {
        capital.replace_range(..1, "L");
    }
    let values: Vec<f64> = run.series(probe).map(|(_, value)| value).collect();
    let (first, last) = (values[0], values[values.len() - 1]);
    if values.len() < 2 {
        return;
    }
    let points = |gain: f64| format!("{:.1} points", 100.0 * gain);
    let (from, to) = (value_of(probe, first), value_of(probe, last));
    let from_random = run.series(probe).next().is_some_and(|(record, _)| record.step == 0);
    let start = if from_random { "Random weights have" } else { "It began with" };
    if last < first - GAIN {
        let why = format!("{start} {from}, and now it is {to}: training takes information away.");
        say(all, Tone::Wrong, format!("{capital} has fallen"), why);
    } else if last < first + GAIN {
        let falls = fall(run).is_some_and(|fall| fall > 0.1);
        let (tone, what) = match falls {
            true => (Tone::Wrong, format!("The loss falls, but {name} stays flat")),
            false => (Tone::Watch, format!("{capital} stays flat")),
        };
        let why = format!(
            "{start} {from}, and now it is {to}: the task is solved without features that tell classes."
        );
        say(all, tone, what, why);
    } else {
        say(
            all,
            Tone::Well,
            format!("{capital} rises"),
            format!("{start} {from}, and now it is {to} (+{}).", points(last - first)),
        );
    }
    let before = values[..values.len() - 1].iter().copied().fold(f64::MIN, f64::max);
    if last > before + GAIN && last > first + GAIN && run.status == Status::Done && values.len() >= 3 {
        let why = format!(
            "The last evaluation is the best so far by {}: more epochs may well give more.",
            points(last - before)
        );
        say(all, Tone::Watch, format!("{capital} still rises at the end"), why);
    } else if last < before - 2.0 * GAIN && last > first + GAIN {
        let why = format!(
            "{} at best, {to} now: the best checkpoint is kept, and is the better one.",
            value_of(probe, before)
        );
        say(all, Tone::Watch, format!("{capital} was better before"), why);
    }
    if let (Some(best), Some(end)) = (run.last("eval/linear_top1"), run.last("eval/linear_top1_final"))
        && best > end + GAIN
    {
        let why = format!(
            "Its best epoch has {}, its last {}: the former is chosen on held-out images, so report the latter.",
            percent(best),
            percent(end)
        );
        say(all, Tone::Watch, "The linear probe overfits", why);
    }
}

fn collapse(run: &SavedRun, all: &mut Vec<Finding>) {
    let Some(spread) = run.last("eval/spread") else { return };
    let limit: f64 = run.setting("eval.collapse_below").and_then(|text| text.parse().ok()).unwrap_or(0.01);
    let first = run.series("eval/spread").next().map_or(spread, |(_, value)| value);
    // std × √D is the spread.
    let std = run.last("eval/std").filter(|std| *std > 0.0);
    let dimensions = std.map(|std| (spread / std).powi(2).round());
    let rankme = run.last("eval/rankme");
    let figures = match (rankme, dimensions) {
        (Some(rankme), Some(d)) => {
            format!("Spread {}, RankMe {} of {d} dimensions", number(spread), number(rankme))
        }
        _ => format!("Spread {}", number(spread)),
    };
    if spread < limit {
        let why = format!(
            "{figures}: all images look the same to the encoder. Try a lower optimizer.lr or a slower EMA."
        );
        say(all, Tone::Wrong, "Features have collapsed", why);
    } else if spread < CROWDED {
        say(
            all,
            Tone::Watch,
            "Features are crowded",
            format!("{figures}; the spread began at {}.", number(first)),
        );
    } else if let (Some(rankme), Some(d)) = (rankme, dimensions)
        && rankme < (NARROW * d).max(NARROW_ROOT * d.sqrt())
    {
        say(all, Tone::Watch, "Features fill few dimensions", format!("{figures}."));
    } else {
        say(all, Tone::Well, "Features are spread out", format!("{figures}."));
    }
}

/// The shares of time that steps have waited for data, by log line, once there has been time to fill the pipeline.
pub fn settled_waits(run: &SavedRun) -> Vec<f64> {
    run.series("train/data_wait").map(|(_, value)| value).skip(1).collect()
}

/// Whether training waits for data.
pub fn wait_for_data(run: &SavedRun) -> Option<Finding> {
    let settled = settled_waits(run);
    if settled.is_empty() {
        return None;
    }
    let wait = settled.iter().sum::<f64>() / settled.len() as f64;
    let share = percent(wait);
    let hint = "More data.threads, a packed file (`jepa-host data pack`) or smaller images would help.";
    let (tone, what, why) = match wait > WAIT {
        true => (Tone::Watch, "Training waits for data", format!("{share} of the time. {hint}")),
        false => (Tone::Well, "Data is there in time", format!("Training waits for it {share} of the time.")),
    };
    Some(Finding { tone, what: what.to_owned(), why })
}

fn speed(run: &SavedRun, all: &mut Vec<Finding>) {
    all.extend(wait_for_data(run));
    let speeds: Vec<(u64, f64)> =
        run.series("train/images_per_s").map(|(r, value)| (r.step, value)).collect();
    if speeds.len() >= 12 {
        let third = speeds.len() / 3;
        let median = |part: &[(u64, f64)]| {
            let mut values: Vec<f64> = part.iter().map(|(_, value)| *value).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        let (early, late) = (median(&speeds[..third]), median(&speeds[speeds.len() - third..]));
        if late < 0.7 * early {
            let why = format!("{} images/s at first, {} at the end.", number(early), number(late));
            say(all, Tone::Watch, "Training has slowed down", why);
        }
    }
}

fn records(run: &SavedRun, all: &mut Vec<Finding>) {
    let replaced: f64 = run.series("train/replaced").map(|(_, value)| value).sum();
    if replaced > 0.0 {
        let hint = "console.log names them, and `jepa-host data verify --deep` finds all.";
        say(all, Tone::Watch, "Corrupt images were replaced by others", hint);
    }
    for damage in &run.damage {
        say(all, Tone::Wrong, "A file is damaged", format!("{damage}."));
    }
    if run.records.is_empty() && run.status != Status::Damaged {
        say(all, Tone::Watch, "Nothing is recorded yet", "metrics.jsonl has no records.");
    }
    let resumed = run.sessions.len().saturating_sub(1) as u64;
    if resumed > 0 {
        say(
            all,
            Tone::Well,
            "The run was resumed",
            format!("{}; see its sessions below.", plural(resumed, "time")),
        );
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::track::Record;

    /// A run that is done, with ten records of these metrics, each on a straight way from one value to another.
    fn run(metrics: &[(&str, f64, f64)]) -> SavedRun {
        let record = |at: u64| Record {
            figures: metrics
                .iter()
                .map(|(name, from, to)| ((*name).to_owned(), from + (to - from) * at as f64 / 9.0))
                .collect(),
            ..Record::at(at * 10, at as f64)
        };
        SavedRun {
            path: PathBuf::from("runs/demo/version_0"),
            name: "demo/version_0".to_owned(),
            status: Status::Done,
            error: None,
            checkpoint: None,
            records: (0..10).map(record).collect(),
            damage: Vec::new(),
            settings: Vec::new(),
            sessions: Vec::new(),
            trial: None,
            total_steps: Some(90),
            updated: None,
        }
    }

    fn said(run: &SavedRun, tone: Tone) -> Vec<String> {
        findings(run).into_iter().filter(|finding| finding.tone == tone).map(|finding| finding.what).collect()
    }

    const SOUND: [(&str, f64, f64); 5] = [
        ("train/loss", 4.0, 1.0),
        ("eval/linear_top1_final", 0.3, 0.35),
        ("eval/spread", 0.2, 0.4),
        ("eval/std", 0.02, 0.04),
        ("train/data_wait", 0.01, 0.01),
    ];

    fn sound_but(metric: &str, from: f64, to: f64) -> SavedRun {
        let mut metrics = SOUND.to_vec();
        metrics.retain(|(name, _, _)| *name != metric);
        metrics.push((metric, from, to));
        run(&metrics)
    }

    #[test]
    fn a_sound_run_gets_no_warning() {
        let run = run(&SOUND);
        assert_eq!(said(&run, Tone::Wrong), [] as [&str; 0]);
        assert_eq!(said(&run, Tone::Watch), [] as [&str; 0]);
        assert_eq!(said(&run, Tone::Well).len(), 4);
    }

    #[test]
    fn what_users_complain_of_is_said() {
        let flat = sound_but("eval/linear_top1_final", 0.3, 0.301);
        assert_eq!(said(&flat, Tone::Wrong), ["The loss falls, but linear top-1 stays flat"]);
        let fallen = sound_but("eval/linear_top1_final", 0.3, 0.2);
        assert_eq!(said(&fallen, Tone::Wrong), ["Linear top-1 has fallen"]);
        let rising = sound_but("eval/linear_top1_final", 0.3, 0.6);
        assert_eq!(said(&rising, Tone::Watch), ["Linear top-1 still rises at the end"]);
        assert_eq!(said(&sound_but("train/data_wait", 0.3, 0.3), Tone::Watch), ["Training waits for data"]);
        assert_eq!(said(&sound_but("train/loss", 4.0, 4.1), Tone::Watch), ["The loss does not fall"]);
        assert_eq!(said(&sound_but("eval/spread", 0.2, 0.001), Tone::Wrong), ["Features have collapsed"]);
        let few = |rankme: f64| {
            let mut metrics = SOUND.to_vec();
            // Of 36 dimensions.
            metrics.retain(|(name, _, _)| *name != "eval/std");
            metrics.extend([("eval/std", 0.4 / 6.0, 0.4 / 6.0), ("eval/rankme", rankme, rankme)]);
            said(&run(&metrics), Tone::Watch)
        };
        assert_eq!((few(2.3), few(9.0)), (vec!["Features fill few dimensions".to_owned()], vec![]));
        let killed = SavedRun { status: Status::Interrupted, total_steps: Some(200), ..run(&SOUND) };
        assert_eq!(said(&killed, Tone::Wrong), ["The run is unfinished"]);
    }
}
