//! `jepa-host sweep`: real trials, side by side, killed and gone on with.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

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
    assert!(again.stderr.contains("all 4 trials have ended before"), "{}", again.stderr);
    // One page tells of all trials, and of what they try.
    let told = room.run(["report", "runs/sweep", "--features", "0"]).expect(0);
    assert_eq!(told.stdout, "runs/sweep/report.html\n");
    let page = fs::read_to_string(room.file("runs/sweep/report.html")).unwrap();
    for part in ["<h1>Sweep sweep: 4 trials</h1>", ">optimizer.lr</th>", ">seed</th>", "trial-0004/version_0"]
    {
        assert!(page.contains(part), "{part}");
    }
    // Another definition does not mix with it.
    define(&room, 7, json!({}));
    room.run(sweep(&[]))
        .expect(2)
        .error_says(&["runs/sweep holds the trials of another definition (command)", "--dir"]);
}

#[test]
fn trials_that_run_at_a_time_share_the_cores_unless_somebody_says_how() {
    let cores = thread::available_parallelism().unwrap().get();
    let loaders = |room: &Room| {
        let config = fs::read_to_string(room.file("runs/sweep/trial-0001/version_0/config.toml")).unwrap();
        let (_, data) = config.split_once("[data]").unwrap();
        let line = data.lines().find(|line| line.starts_with("threads = ")).unwrap();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let room = Room::new();
    define(&room, 2, json!({}));
    room.run(sweep(&["--parallel", "2", "--count", "1"])).expect(0);
    assert!(loaders(&room).contains("threads = 1 # from command line"), "{}", loaders(&room));

    let room = Room::new();
    define(&room, 2, json!({}));
    let definition = fs::read_to_string(room.file("sweep.yaml")).unwrap();
    fs::write(room.file("sweep.yaml"), definition.replace("\"data.threads=1\",", "")).unwrap();
    room.run(sweep(&["--parallel", "2", "--count", "1"])).expect(0);
    let share = format!("threads = {} # from environment JEPA_DATA__THREADS", (cores / 2).max(1));
    assert!(loaders(&room).contains(&share), "{}", loaders(&room));
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
    let listed = room.run(["ls", "runs/sweep"]).expect(0).stdout;
    let line =
        |trial: &str| listed.lines().find(|line| line.starts_with(trial)).unwrap_or_default().to_owned();
    assert!(line("trial-0001").contains("interrupted"), "{listed}");
    assert!(line("trial-0002").contains("stopped early") && listed.contains("was needed"), "{listed}");
    room.run(["report", "runs/sweep", "--features", "0"]).expect(0);
    let page = fs::read_to_string(room.file("runs/sweep/report.html")).unwrap();
    assert!(page.contains("The sweep stopped the run early"));
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
    let none = room.run(sweep(&["--count", "0"])).expect(0);
    assert!(none.stderr.contains("--count 0: no trial begins"), "{}", none.stderr);
    let ended = room.run(sweep(&[])).expect(0);
    assert!(ended.stderr.contains("the target is reached, 1.00e9 of train/loss"), "{}", ended.stderr);
    assert_eq!(standing(&room).len(), 1);
}

#[test]
fn trials_that_fail_are_told_and_can_be_tried_again() {
    let room = Room::new();
    let files: Vec<String> = (1..=5).map(|number| format!("gone{number}.h5")).collect();
    define(&room, 3, json!({ "parameters": { "data.val": { "values": files } } }));
    let ended = room.run(sweep(&[])).expect(1);
    ended.error_says(&["3 trials in a row have failed", "gone3.h5", "output.log", "--retry"]);
    assert_eq!(standing(&room).len(), 3);
    // A trial that has not come to be a run was not interrupted.
    let trial = room.file("runs/sweep/trial-0003/trial.json");
    let text = fs::read_to_string(&trial).unwrap();
    let mut failed: Value = serde_json::from_str(&text).unwrap();
    failed["end"] = Value::Null;
    fs::write(&trial, failed.to_string()).unwrap();
    assert!(standing(&room).iter().any(|trial| trial["standing"] == "not_started"));
    fs::write(&trial, text).unwrap();
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
fn failed_trials_count_among_those_that_there_may_be() {
    let room = Room::new();
    let more = json!({ "parameters": { "data.val": { "values": ["gone1.h5", "gone2.h5", "gone3.h5"] } }, "run_cap": 2 });
    define(&room, 3, more);
    room.run(sweep(&[])).expect(1).error_says(&["2 of 2 trials have failed"]);
    let again = room.run(sweep(&[])).expect(1);
    assert!(!again.stderr.contains("begins"), "{}", again.stderr);
    again.error_says(&["2 of 2 trials have failed"]);
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
    define(&room, 3, json!({}));
    room.run(sweep(&["--leaderboard"])).expect(2).error_says(&["runs/sweep holds no sweep", "--dir"]);
    fs::create_dir_all(room.file("other/demo")).unwrap();
    room.run(sweep(&["--leaderboard", "--dir=other"])).expect(2).error_says(&["other holds no sweep"]);
    room.run(sweep(&["--dir", "other"])).expect(2).error_says(&["other holds demo, and no sweep", "--dir"]);
    room.run(sweep(&["--gpus", "0,first"])).expect(2).error_says(&["--gpus", "\"first\" is no CUDA device"]);
    let blind = room.start_in(&[("CUDA_VISIBLE_DEVICES", "-1")], sweep(&["--gpus", "0"]));
    blind.wait().expect(2).error_says(&["--gpus"]);
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
    for more in [["--dir", "else"], ["--dry-run", "--count=1"]] {
        room.run(sweep(&more)).expect(2).error_says(&["trial-0001", "cannot start /nowhere/jepa-host"]);
    }
    define(&room, 3, json!({ "parameters": { "optimiser.lr": { "values": [1, 2] } } }));
    for more in [["--dir", "else"], ["--dry-run", "--count=1"]] {
        let ended = room.run(sweep(&more)).expect(2);
        ended.error_says(&["trial-0001 cannot begin", "optimiser.lr", "optimizer.lr"]);
        assert!(!ended.stderr.contains("begins"), "{}", ended.stderr);
    }
    assert!(!room.file("else/trial-0001").exists());
    // Relative paths are those of the folder in which a sweep is started.
    let command = ["${program}", "--plugin", "simclr", "--config", "a.toml", "${args_no_hyphens}"];
    define(&room, 3, json!({ "command": command }));
    let folder = room.path().canonicalize().unwrap();
    let ended = room.run(sweep(&["--dry-run"])).expect(2);
    ended.error_says(&["a.toml", "asked in", folder.to_str().unwrap()]);
}
