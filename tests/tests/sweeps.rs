//! `jepa-host sweep`: real trials, side by side, killed and gone on with.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use jepa_tests::real::{Room, Running, TINY_BACKBONE, TINY_SIMCLR, binary, demo_images, setting};
use serde_json::{Value, json};

/// Steps that no test comes to the end of.
const ENDLESS: u64 = 1_000_000;

/// Writes `sweep.yaml`: tiny runs of `steps` steps, each of them recorded, and `more` keys of the definition.
fn define(room: &Room, steps: u64, more: Value) {
    let images = setting("data.train", &demo_images());
    let fixed = ["checkpoint.every_steps=5", "eval.every_epochs=0", "eval.at_start=false"];
    let steps = format!("trainer.max_steps={steps}");
    let words = ["${env}", "${program}", "--plugin", "simclr", &images, &steps, "${args_no_hyphens}"];
    let command: Vec<&str> = words.into_iter().chain(TINY_BACKBONE).chain(TINY_SIMCLR).chain(fixed).collect();
    let mut definition = json!({
        "program": binary(),
        "method": "grid",
        "metric": { "name": "train/loss", "goal": "minimize" },
        "parameters": { "optimizer.lr": { "values": [0.01, 0.001] }, "seed": { "values": [1, 2] } },
        "command": command,
    });
    definition.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    fs::write(room.file("sweep.yaml"), definition.to_string()).unwrap();
}

fn sweep(more: &[&str]) -> Vec<String> {
    ["sweep", "sweep.yaml"].iter().chain(more).map(|word| (*word).to_owned()).collect()
}

fn board(text: &str) -> Vec<Value> {
    let board: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    board["trials"].as_array().unwrap().clone()
}

/// The leaderboard, asked for beside whatever runs.
fn standing(room: &Room) -> Vec<Value> {
    board(&room.run(sweep(&["--leaderboard", "--format", "json"])).expect(0).stdout)
}

fn records(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("version_0/metrics.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// The steps that `trial` has figures of, in order.
fn steps(room: &Room, trial: &str) -> Vec<u64> {
    let records = records(&room.file("runs/sweep").join(trial));
    let with_loss = records.iter().filter(|record| record.get("train/loss").is_some());
    with_loss.map(|record| record["step"].as_u64().unwrap()).collect()
}

fn until_trained(running: &mut Running, room: &Room, trials: &[&str], least: usize) {
    running.until("trained trials", || trials.iter().all(|trial| steps(room, trial).len() >= least));
}

#[test]
fn every_combination_is_tried_and_the_best_one_comes_first() {
    let room = Room::new();
    define(&room, 6, json!({}));
    let ended = room.run(sweep(&["--parallel", "2", "--format", "json"])).expect(0);
    let trials = board(&ended.stdout);
    assert_eq!(trials.len(), 4);
    let tried: BTreeSet<String> = trials.iter().map(|trial| trial["parameters"].to_string()).collect();
    assert_eq!(tried.len(), 4);
    let mut best = Vec::new();
    for trial in &trials {
        assert_eq!(trial["standing"], "done");
        let run = room.path().join(trial["path"].as_str().unwrap());
        let config = fs::read_to_string(run.join("version_0/config.toml")).unwrap();
        assert!(config.contains(&format!("lr = {} ", trial["parameters"]["optimizer.lr"])), "{config}");
        let losses = records(&run).into_iter().filter_map(|record| record["train/loss"].as_f64());
        let least = losses.reduce(f64::min).unwrap();
        assert_eq!(trial["best"]["value"].as_f64(), Some(least));
        best.push(least);
    }
    assert!(best.is_sorted(), "{best:?}");

    // Run again, it has nothing to do; people get a table.
    let again = room.run(sweep(&[])).expect(0);
    assert!(!again.stderr.contains("begins"), "{}", again.stderr);
    assert!(again.stdout.starts_with("trial ") && again.stdout.lines().count() == 5, "{}", again.stdout);
    // Another definition does not mix with it.
    define(&room, 7, json!({}));
    room.run(sweep(&[]))
        .expect(2)
        .error_says(&["runs/sweep holds the trials of another definition (command)", "--dir"]);
}

#[test]
fn a_killed_sweep_goes_on_where_it_stopped() {
    let room = Room::new();
    define(&room, 60, json!({}));
    let mut running = room.start(sweep(&["--parallel", "2"]));
    until_trained(&mut running, &room, &["trial-0001", "trial-0002"], 8);
    // A second one must not run beside it.
    room.run(sweep(&[])).expect(2).error_says(&["another process runs the sweep in runs/sweep"]);
    running.signal(libc::SIGKILL);
    let _ = running.wait();

    let ended = room.run(sweep(&["--parallel", "2", "--format", "json"])).expect(0);
    let trials = board(&ended.stdout);
    assert_eq!(trials.len(), 4);
    for trial in trials {
        assert_eq!(trial["standing"], "done");
        let name = trial["trial"].as_str().unwrap();
        assert_eq!(steps(&room, name), (1..=60).collect::<Vec<u64>>(), "{name}");
        assert!(!room.file("runs/sweep").join(name).join("version_1").exists(), "{name} went on");
    }
}

#[test]
fn a_signal_leaves_a_checkpoint_of_every_trial() {
    let room = Room::new();
    define(&room, ENDLESS, json!({}));
    let mut running = room.start(sweep(&["--parallel", "2"]));
    until_trained(&mut running, &room, &["trial-0001", "trial-0002"], 3);
    // A service manager tells all processes at once: the trials hear it twice.
    let trials = Command::new("pkill").args(["-TERM", "-P", &running.id().to_string()]).status().unwrap();
    assert!(trials.success());
    running.signal(libc::SIGTERM);
    running.wait().expect(143);
    let trials = standing(&room);
    assert_eq!(trials.len(), 2);
    for trial in trials {
        assert_eq!(trial["standing"], "interrupted");
        let checkpoints = room.path().join(trial["path"].as_str().unwrap()).join("version_0/checkpoints");
        let last = steps(&room, trial["trial"].as_str().unwrap()).pop().unwrap();
        assert!(checkpoints.join(format!("step_{last:08}")).is_dir(), "{last}");
    }
}

#[test]
fn a_trial_that_is_behind_is_stopped_early() {
    let room = Room::new();
    // A figure that says for certain which one is better: the learning rate itself.
    let more = json!({
        "parameters": { "optimizer.lr": { "values": [0.01, 0.0001] } },
        "metric": { "name": "train/lr", "goal": "maximize" },
        "early_terminate": { "type": "hyperband", "min_iter": 3 },
    });
    define(&room, ENDLESS, more);
    let mut running = room.start(sweep(&["--parallel", "2"]));
    let stopped = || {
        fs::read_to_string(room.file("runs/sweep/trial-0002/trial.json"))
            .is_ok_and(|text| text.contains("stopped"))
    };
    running.until("a trial that is stopped", stopped);
    running.signal(libc::SIGTERM);
    running.wait().expect(143);
    let trials = standing(&room);
    let of = |key: &str| trials.iter().map(|trial| trial[key].clone()).collect::<Vec<_>>();
    assert_eq!(of("trial"), ["trial-0001", "trial-0002"]);
    assert_eq!(of("standing"), ["interrupted", "stopped"]);
    assert!(trials[1]["why"].as_str().unwrap().contains("was needed"), "{}", trials[1]);
    let checkpoints = room.file("runs/sweep/trial-0002/version_0/checkpoints");
    assert!(
        checkpoints.read_dir().unwrap().next().is_some(),
        "a trial that is stopped could be gone on with"
    );
}

#[test]
fn a_target_that_is_reached_ends_the_sweep() {
    let room = Room::new();
    define(&room, 3, json!({ "metric": { "name": "train/loss", "target": 1e9 } }));
    room.run(sweep(&[])).expect(0);
    assert_eq!(standing(&room).len(), 1);
}

#[test]
fn trials_that_fail_are_told_and_can_be_tried_again() {
    let room = Room::new();
    define(&room, 3, json!({ "parameters": { "optimiser.lr": { "values": [1, 2, 3, 4, 5] } } }));
    let ended = room.run(sweep(&[])).expect(1);
    ended.error_says(&["3 trials in a row have failed", "optimizer", "output.log", "--retry"]);
    assert_eq!(standing(&room).len(), 3);
    // Without --retry they are left alone.
    let again = room.run(sweep(&["--count", "1"])).expect(1);
    again.error_says(&["4 of 4 trials have failed"]);
    let retried = room.run(sweep(&["--count", "1", "--retry"])).expect(1);
    assert!(retried.stderr.contains("trial-0001 begins"), "{}", retried.stderr);
    // While none has come to be a run, the definition can be mended.
    define(&room, 3, json!({ "parameters": { "optimizer.lr": { "values": [0.1, 0.01] } } }));
    room.run(sweep(&[])).expect(0);
    assert_eq!(standing(&room).len(), 2);
}

#[test]
fn a_metric_that_no_run_records_ends_the_sweep() {
    let room = Room::new();
    define(&room, 3, json!({ "metric": { "name": "train/los" } }));
    room.run(sweep(&[])).expect(2).error_says(&[
        "trial-0001",
        "metric.name = train/los",
        "did you mean train/loss?",
    ]);
    assert_eq!(standing(&room).len(), 1);
}

#[test]
fn a_trial_that_is_missing_is_tried() {
    let room = Room::new();
    define(&room, 3, json!({}));
    room.run(sweep(&[])).expect(0);
    let before = steps(&room, "trial-0002");
    fs::remove_dir_all(room.file("runs/sweep/trial-0002")).unwrap();
    // A directory that has another name by now holds the same sweep.
    fs::rename(room.file("runs/sweep"), room.file("kept")).unwrap();
    let again = room.run(sweep(&["--dir", "kept"])).expect(0);
    assert_eq!(again.stderr.matches(" begins").count(), 1, "{}", again.stderr);
    assert!(!room.file("runs/sweep").exists());
    fs::rename(room.file("kept"), room.file("runs/sweep")).unwrap();
    assert_eq!(steps(&room, "trial-0002"), before);
}

#[test]
fn mistakes_are_refused_before_anything_runs() {
    let room = Room::new();
    room.run(sweep(&[])).expect(2).error_says(&["sweep.yaml: No such file"]);
    let random = json!({ "method": "random", "parameters": { "seed": { "min": 1, "max": 9 } } });
    define(&room, 3, random);
    room.run(sweep(&[])).expect(2).error_says(&["does not end by itself", "run_cap", "--count"]);
    let shown = room.run(sweep(&["--dry-run", "--count", "2"])).expect(0);
    assert_eq!(
        shown.stdout.lines().filter(|line| line.contains("seed=") && line.contains("--resume auto")).count(),
        2
    );
    assert!(!room.file("runs").exists());
    define(
        &room,
        3,
        json!({ "program": "/nowhere/jepa-host", "command": ["${program}", "${args_no_hyphens}"] }),
    );
    room.run(sweep(&["--dir", "else"])).expect(1).error_says(&["cannot start /nowhere/jepa-host"]);
}
