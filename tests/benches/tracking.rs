//! What tracking costs: the demo's steps without any tracker, and with W&B (offline), TensorBoard, example images and
//! histograms.
//!
//! Runs that take turns tell the difference by the wall clock, as far as a machine's noise lets it be seen. What the
//! trackers' threads and wandb-core compute for a step is counted by the kernel, and is a bound whatever the noise.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use jepa_tests::real::binary;
use jepa_tests::wandb::core;
use serde_json::Value;

/// Pairs of runs that take turns.
const ROUNDS: usize = 6;
/// Optimizer steps of each of those.
const SHORT: u64 = 60;
/// Between these steps computing time is counted: trackers have begun, and the run has not ended.
const COUNTED: [u64; 2] = [20, 180];
/// Steps of that run. The demo has a log line every 10 steps.
const STEPS: u64 = 185;

const NONE: [&str; 1] = ["track.examples=false"];
const ALL: [&str; 3] = ["track.wandb.mode=offline", "track.tensorboard=true", "track.histograms=true"];

fn main() {
    let (mut without, mut with, mut differences) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        // Whichever comes first has no advantage over the rounds.
        let (mut plain, mut tracked) = (Vec::new(), Vec::new());
        for turn in [round % 2, (round + 1) % 2] {
            match turn {
                0 => plain = step_times(&NONE),
                _ => tracked = step_times(&ALL),
            }
        }
        differences.push(100.0 * (median(&tracked) / median(&plain) - 1.0));
        without.extend(plain);
        with.extend(tracked);
    }
    differences.sort_by(f64::total_cmp);
    let (step, tracked_step) = (1e3 * median(&without), 1e3 * median(&with));
    println!("| a step of the demo | |");
    println!("| --- | --- |");
    println!("| without a tracker, by the wall clock | {step:.1} ms |");
    println!("| with all of them | {tracked_step:.1} ms |");
    println!(
        "| difference, median of {ROUNDS} pairs of runs (quartiles) | {:+.1} % ({:+.1} to {:+.1}) |",
        median(&differences),
        differences[ROUNDS / 4],
        differences[3 * ROUNDS / 4],
    );
    let Cost { log, histograms, trackers } = cost();
    println!("| on the training thread: the log line, example images, the bar | {:.2} ms |", 1e3 * log);
    println!("| computing time of the trackers' threads and of wandb-core | {:.2} ms |", 1e3 * trackers);
    println!(
        "| histograms of weights and gradients, once for each evaluation | {:.1} ms |",
        1e3 * histograms
    );
    println!(
        "| log line and computing time as a share of the step | **{:.2} %** |",
        100.0 * 1e3 * (log + trackers) / step
    );
}

/// Seconds for a step.
struct Cost {
    log: f64,
    /// For a step that has them.
    histograms: f64,
    trackers: f64,
}

fn cost() -> Cost {
    let room = tempfile::tempdir().expect("a temporary folder");
    let mut run = start(room.path(), STEPS, &ALL);
    let lines = || log_lines(room.path());
    let step = || lines().last().map_or(0, |line| line["step"].as_u64().expect("a step"));
    let counted = COUNTED.map(|wanted| {
        while step() < wanted {
            assert!(run.try_wait().expect("a child can be asked").is_none(), "it ended before step {wanted}");
            thread::sleep(Duration::from_millis(5));
        }
        (step(), computing_time(run.id()))
    });
    assert!(run.wait().expect("a child can be waited for").success());
    let [(first, before), (last, after)] = counted;
    let mut logs: Vec<f64> = lines().iter().map(|line| number(line, "time/log")).collect();
    // Histograms belong to the last step, and the last line is the mean of the steps behind the last but one.
    let last_line = logs.pop().expect("a run has log lines");
    let log = logs.iter().sum::<f64>() / logs.len() as f64;
    Cost {
        log,
        histograms: (last_line - log) * (STEPS % 10) as f64,
        trackers: (after - before) / (last - first) as f64,
    }
}

/// Seconds that the trackers' threads of `process`, and wandb-core under it, have computed.
fn computing_time(process: u32) -> f64 {
    let tasks = |process: &str| fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let name = |path: &Path| fs::read_to_string(path.join("comm")).unwrap_or_default();
    let seconds = |path: &Path| {
        let nanoseconds = fs::read_to_string(path.join("schedstat")).unwrap_or_default();
        nanoseconds.split(' ').next().and_then(|first| first.parse::<f64>().ok()).unwrap_or(0.0) * 1e-9
    };
    let mut sum = 0.0;
    for task in tasks(&process.to_string()).map(|entry| entry.path()) {
        if name(&task).starts_with("tracker ") {
            sum += seconds(&task);
        }
        // A child belongs to the thread that started it.
        let children = fs::read_to_string(task.join("children")).unwrap_or_default();
        sum += children.split_whitespace().flat_map(tasks).map(|entry| seconds(&entry.path())).sum::<f64>();
    }
    assert!(sum > 0.0, "the kernel counts the time of threads");
    sum
}

/// Seconds of a step by the wall clock, for each log line of a run but the first.
fn step_times(track: &[&str]) -> Vec<f64> {
    let room = tempfile::tempdir().expect("a temporary folder");
    assert!(start(room.path(), SHORT, track).wait().expect("a child can be waited for").success());
    let lines = log_lines(room.path());
    let times = lines.windows(2).map(|pair| {
        let difference = |key| number(&pair[1], key) - number(&pair[0], key);
        difference("time") / difference("step")
    });
    times.collect()
}

fn start(runs: &Path, steps: u64, track: &[&str]) -> Child {
    let fixed = ["--plugin", "cnn_jepa", "--config", "configs/demo.toml"];
    let unevaluated = ["data.val=None", "eval.at_start=false", "eval.every_epochs=0"];
    Command::new(binary())
        .args(fixed.iter().chain(&unevaluated).chain(track))
        .args([format!("trainer.max_steps={steps}"), format!("run.dir={}", runs.display())])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .env("JEPA_WANDB_CORE", core())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("jepa-host starts")
}

fn log_lines(runs: &Path) -> Vec<Value> {
    // There may be no file yet, and a line may be half written.
    let text = fs::read_to_string(runs.join("demo/version_0/metrics.jsonl")).unwrap_or_default();
    let lines = text.lines().filter_map(|line| serde_json::from_str(line).ok());
    lines.filter(|line: &Value| line.get("train/loss").is_some()).collect()
}

fn number(line: &Value, key: &str) -> f64 {
    line[key].as_f64().unwrap_or_else(|| panic!("a log line has {key}: {line}"))
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
