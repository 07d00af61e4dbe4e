//! What tracking costs: the demo's steps without any tracker, and with W&B (offline), TensorBoard, example images and
//! histograms, in runs that take turns.

use std::path::Path;
use std::process::{Command, Stdio};

use jepa_tests::real::{binary, records};
use jepa_tests::wandb::core;

/// Pairs of runs.
const ROUNDS: usize = 8;
/// Optimizer steps of a run, less than an epoch.
const STEPS: &str = "trainer.max_steps=60";

const NONE: [&str; 1] = ["track.examples=false"];
const ALL: [&str; 3] = ["track.wandb.mode=offline", "track.tensorboard=true", "track.histograms=true"];

fn main() {
    let (mut without, mut with, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        // Whichever comes first has no advantage over the rounds.
        let (mut plain, mut tracked) = (Vec::new(), Vec::new());
        for turn in [round % 2, (round + 1) % 2] {
            match turn {
                0 => plain = step_times(&NONE),
                _ => tracked = step_times(&ALL),
            }
        }
        ratios.push(median(&tracked) / median(&plain));
        without.extend(plain);
        with.extend(tracked);
    }
    ratios.sort_by(f64::total_cmp);
    let share = |ratio: f64| 100.0 * (ratio - 1.0);
    println!("| a step of the demo | no tracker | all of them | difference (quartiles over the rounds) |");
    println!("| --- | --- | --- | --- |");
    println!(
        "| CNN-JEPA, batch 128, 32 px | {:.1} ms | {:.1} ms | {:+.2} % ({:+.2} to {:+.2}) |",
        1e3 * median(&without),
        1e3 * median(&with),
        share(median(&ratios)),
        share(ratios[ROUNDS / 4]),
        share(ratios[3 * ROUNDS / 4]),
    );
}

/// Seconds of a step by the wall clock, for each log line of a run but the first.
fn step_times(track: &[&str]) -> Vec<f64> {
    let room = tempfile::tempdir().expect("a temporary folder");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let fixed = ["--plugin", "cnn_jepa", "--config", "configs/demo.toml", STEPS];
    let unevaluated = ["eval.at_start=false", "eval.every_epochs=0"];
    let status = Command::new(binary())
        .args(fixed.iter().chain(&unevaluated).chain(track))
        .arg(format!("run.dir={}", room.path().display()))
        .current_dir(root)
        .env("JEPA_WANDB_CORE", core())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("jepa-host starts");
    assert!(status.success(), "{status}");
    let lines = records(&room.path().join("demo/version_0"));
    let lines = lines.iter().filter(|line| line.get("train/loss").is_some());
    let of = |line: &serde_json::Value, key: &str| line[key].as_f64().expect("a log line has it");
    let lines: Vec<(f64, f64)> = lines.map(|line| (of(line, "step"), of(line, "time"))).collect();
    lines.windows(2).map(|pair| (pair[1].1 - pair[0].1) / (pair[1].0 - pair[0].0)).collect()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
