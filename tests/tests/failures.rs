//! A plugin that fails in mid-run: what the real binary says, how it ends, and what it leaves behind.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use jepa_tests::real::{Ended, Room, TINY_BACKBONE, checkpoints, demo_images, setting};

const DIVERGED: i32 = 5;
const PLUGIN_FAILED: i32 = 6;

/// The arguments of a run of the faulty method: 12 steps with a checkpoint after every 5, in `runs/faulty`.
fn arguments(settings: &[&str]) -> Vec<String> {
    let fixed = [
        "data.size=8",
        "data.threads=1",
        "optimizer.batch_size=16",
        "optimizer.warmup_epochs=0",
        "trainer.max_steps=12",
        "trainer.threads=1",
        "trainer.device=cpu",
        "trainer.log_every_steps=1",
        "checkpoint.every_steps=5",
        "eval.every_epochs=0",
        "eval.at_start=false",
    ];
    let images = setting("data.train", &demo_images());
    let arguments = ["--plugin", "faulty_plugin", &images].into_iter().chain(TINY_BACKBONE).chain(fixed);
    arguments.chain(settings.iter().copied()).map(str::to_owned).collect()
}

fn train(room: &Room, settings: &[&str]) -> Ended {
    room.run(arguments(settings))
}

fn folder(room: &Room) -> PathBuf {
    room.file("runs/faulty/version_0/checkpoints")
}

fn names(checkpoints: &[PathBuf]) -> Vec<String> {
    checkpoints.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

/// Every file in `checkpoint`, by name.
fn bytes(checkpoint: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(checkpoint).unwrap().map(|entry| entry.unwrap().path());
    files
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap()))
        .collect()
}

fn tensors(checkpoint: &Path) -> [Vec<u8>; 2] {
    ["model.safetensors", "optimizer.safetensors"].map(|name| fs::read(checkpoint.join(name)).unwrap())
}

#[test]
fn a_panic_leaves_a_usable_checkpoint() {
    let whole = Room::new();
    train(&whole, &[]).expect(0);

    let room = Room::new();
    let ended = train(&room, &["method.panic_at_step=7"]).expect(PLUGIN_FAILED);
    ended.error_says(&[
        "plugin `faulty-plugin` panicked",
        "the method gives up at step 7",
        "tests/plugins/faulty/src/lib.rs:",
    ]);
    assert!(!ended.stderr.contains("backtrace"), "a plugin's panic is told in one line:\n{}", ended.stderr);
    assert_eq!(names(&checkpoints(&folder(&room))), ["step_00000005", "step_00000007"]);

    // The plugin has changed its ways, which the host wants to be told.
    let ended = train(&room, &["--resume", "auto"]).expect(2);
    ended.error_says(&["method.panic_at_step was 7 and is ", "--allow-changes"]);
    let ended = train(&room, &["--resume", "auto", "--allow-changes"]).expect(0);
    assert!(ended.stderr.contains("going on at step 7"), "{}", ended.stderr);

    // The seven steps count once: the end is that of a run without a panic, in weights, EMA targets and buffers.
    let (last, expected) = (folder(&room).join("step_00000012"), folder(&whole).join("step_00000012"));
    assert_eq!(tensors(&last), tensors(&expected));
    assert_eq!(checkpoints(&room.file("runs/faulty/version_1/checkpoints")).len(), 0, "no fresh start");
}

#[test]
fn a_panic_between_accumulated_batches_counts_nothing_twice() {
    let accumulate = "trainer.accumulate=3";
    let whole = Room::new();
    train(&whole, &[accumulate]).expect(0);

    let room = Room::new();
    train(&room, &[accumulate, "method.panic_at_pass=22"]).expect(PLUGIN_FAILED);
    assert_eq!(names(&checkpoints(&folder(&room))), ["step_00000005", "step_00000007"]);
    let ended = train(&room, &[accumulate, "--resume", "auto", "--allow-changes"]).expect(0);
    assert!(ended.stderr.contains("going on at step 7"), "{}", ended.stderr);
    assert_eq!(tensors(&folder(&room).join("step_00000012")), tensors(&folder(&whole).join("step_00000012")));
    let losses = |room: &Room| -> Vec<f64> {
        let text = fs::read_to_string(room.file("runs/faulty/version_0/metrics.jsonl")).unwrap();
        let record = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap();
        text.lines().filter_map(|line| record(line)["train/loss"].as_f64()).collect()
    };
    assert_eq!(losses(&room), losses(&whole));
}

#[test]
fn a_loss_that_is_none_is_told_with_the_plugin() {
    for (option, says) in [
        ("method.vector_loss_at_step=7", "must return a scalar loss, and returned Float of shape [2]"),
        ("method.detached_loss_at_step=7", "no gradient flows from the loss"),
    ] {
        let room = Room::new();
        train(&room, &[option]).expect(PLUGIN_FAILED).error_says(&["plugin `faulty-plugin` failed", says]);
        assert_eq!(names(&checkpoints(&folder(&room))), ["step_00000005", "step_00000007"], "{option}");
    }
}

#[test]
fn a_panic_in_tch_is_told_in_libtorch_s_first_line() {
    let room = Room::new();
    let ended = train(&room, &["method.misfit_at_step=7"]).expect(PLUGIN_FAILED);
    ended.error_says(&[
        "plugin `faulty-plugin` panicked: libtorch: The size of tensor a (2) must match",
        "(at ",
    ]);
    assert!(!ended.stderr.contains("frame #"), "{}", ended.stderr);
}

#[test]
fn an_error_that_panics_when_it_is_told_is_a_panic() {
    let room = Room::new();
    let ended = train(&room, &["method.unspeakable_error_at_step=7"]).expect(PLUGIN_FAILED);
    ended
        .error_says(&["plugin `faulty-plugin` panicked: words fail it (at tests/plugins/faulty/src/lib.rs:"]);
    assert_eq!(names(&checkpoints(&folder(&room))), ["step_00000005", "step_00000007"]);
}

#[test]
fn panics_that_no_call_reports_are_logged() {
    let room = Room::new();
    let ended = train(&room, &["method.panic_in_thread_at_step=7"]).expect(0);
    let words = "thread helper panicked: the helper gives up (at tests/plugins/faulty/src/lib.rs:";
    assert!(ended.stderr.contains(words), "{}", ended.stderr);

    let room = Room::new();
    let ended = train(&room, &["method.panic_in_drop=true"]).expect(0);
    let words = "plugin `faulty-plugin` panicked while it was let go of: the method cannot let go (at ";
    assert!(ended.stderr.contains(words), "{}", ended.stderr);
}

#[test]
fn a_panic_leaves_libtorch_as_it_was() {
    // This check goes on to train another object in the same thread.
    let option = "method.panic_under_no_grad_on_misfit=true";
    Room::new().run(["plugin", "check", "faulty_plugin", "--only", "panics", option]).expect(0);
}

#[test]
fn an_error_is_told_with_its_causes() {
    let room = Room::new();
    let ended = train(&room, &["method.error_at_step=7"]).expect(PLUGIN_FAILED);
    ended.error_says(&["plugin `faulty-plugin` failed: step 7 went wrong: there is nothing left to learn"]);
    assert_eq!(names(&checkpoints(&folder(&room))), ["step_00000005", "step_00000007"]);
}

#[test]
fn a_disk_without_room_costs_a_checkpoint_and_not_the_run() {
    // The limit is on the size of a file: the model's is too large, and the others are not.
    let (limits, ballast) = ("trap '' XFSZ; ulimit -f 64", "method.ballast=10000");
    let room = Room::new();
    let ended = room.run_behind(limits, arguments(&[ballast])).expect(1);
    let warning = |step: u64| format!("no checkpoint at step {step}: ");
    for text in [&warning(5), &warning(10), "training goes on"] {
        assert!(ended.stderr.contains(text), "{text}:\n{}", ended.stderr);
    }
    ended.error_says(&["step_00000012", "File too large"]);
    let metrics = fs::read_to_string(room.file("runs/faulty/version_0/metrics.jsonl")).unwrap();
    assert_eq!(metrics.matches("train/loss").count(), 12, "all steps were taken:\n{metrics}");
    assert_eq!(checkpoints(&folder(&room)), [] as [PathBuf; 0], "nothing half-written is left");

    // With room again there is nothing to go on from: the same command begins anew.
    train(&room, &[ballast, "--resume", "auto"]).expect(0);
    let anew = checkpoints(&room.file("runs/faulty/version_1/checkpoints"));
    assert_eq!(names(&anew), ["step_00000010", "step_00000012"]);
}

#[test]
fn what_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint() {
    let whole = Room::new();
    train(&whole, &["trainer.max_steps=5"]).expect(0);
    let good = tensors(&folder(&whole).join("step_00000005"));
    for (option, metric) in [
        ("method.nan_at_step=7", "train/loss is NaN"),
        ("method.infinite_metric_at_step=7", "train/faulty/distance is inf"),
        ("method.nan_gradient_at_step=7", "train/grad_norm is NaN"),
    ] {
        let room = Room::new();
        let ended = train(&room, &[option]).expect(DIVERGED);
        ended.error_says(&["diverged at step 7", metric, "runs/faulty/version_0/checkpoints/step_00000005"]);
        assert_eq!(names(&checkpoints(&folder(&room))), ["step_00000005"], "{option}");
        assert_eq!(tensors(&folder(&room).join("step_00000005")), good, "{option} left what was good");

        // And it can be gone on from, once its cause is gone.
        let ended = train(&room, &["--resume", "auto", "--allow-changes"]).expect(0);
        assert!(ended.stderr.contains("going on at step 5"), "{}", ended.stderr);
    }
}

#[test]
fn not_finite_before_the_first_checkpoint_says_that_there_is_none() {
    let room = Room::new();
    let ended = train(&room, &["method.nan_at_step=2"]).expect(DIVERGED);
    ended.error_says(&["diverged at step 2: train/loss is NaN", "not there yet"]);
    assert_eq!(checkpoints(&folder(&room)), [] as [PathBuf; 0]);
}

#[test]
fn a_method_that_cannot_be_built_begins_no_run() {
    let room = Room::new();
    let ended = train(&room, &["method.panic_in_new=true"]).expect(PLUGIN_FAILED);
    ended.error_says(&[
        "plugin `faulty-plugin` panicked",
        "the method cannot be built",
        "faulty/src/lib.rs:",
    ]);
    let ended = train(&room, &["method.ema_of_nothing=true"]).expect(PLUGIN_FAILED);
    ended.error_says(&["plugin `faulty-plugin` declares", "`nowhere`", "`nothing`"]);
    assert!(!room.file("runs").exists(), "nothing was begun");
}

#[test]
fn a_parameter_without_gradient_is_named_and_kept() {
    let room = Room::new();
    let ended = train(&room, &["method.idle_parameter=true"]).expect(0);
    assert_eq!(ended.stderr.matches("no gradient reaches idle").count(), 1, "{}", ended.stderr);

    // What is not trained is not decayed either, and is in the checkpoint as it was.
    let checkpoint = bytes(&folder(&room).join("step_00000012"));
    let model = safetensors::SafeTensors::deserialize(&checkpoint["model.safetensors"]).unwrap();
    assert_eq!(model.tensor("idle").unwrap().data(), [0; 8]);
    assert_ne!(model.tensor("online.colour").unwrap().data(), [0; 12]);
}

#[test]
fn what_a_plugin_logs_is_seen() {
    let room = Room::new();
    let built = "faulty_plugin: the faulty method is built batch_size=16";
    let (warned, asked) = ("faulty_plugin: one step is behind us", "only for those who ask");
    let line = |stderr: &str, text: &str| stderr.lines().find(|line| line.contains(text)).map(str::to_owned);

    let usual = train(&room, &[]).expect(0).stderr;
    assert!(line(&usual, built).unwrap().contains("INFO"), "{usual}");
    assert!(line(&usual, warned).unwrap().contains("WARN"), "{usual}");
    assert_eq!(line(&usual, asked), None);

    let quiet = train(&room, &["--quiet"]).expect(0).stderr;
    assert_eq!(line(&quiet, built), None);
    assert!(line(&quiet, warned).is_some(), "{quiet}");

    let verbose = train(&room, &["--verbose"]).expect(0).stderr;
    assert!(line(&verbose, asked).unwrap().contains("DEBUG"), "{verbose}");
}

#[test]
fn settings_are_printed_with_their_source() {
    let room = Room::new();
    fs::write(room.file("a.toml"), "[optimizer]\nlr = 0.25\n").unwrap();
    let printed =
        train(&room, &["--print-config", "--config", "a.toml", "method.nan_at_step=3"]).expect(0).stdout;
    let source = |key: &str, value: &str| {
        let start = format!("{key} = {value} ");
        let line = printed.lines().find(|line| line.starts_with(&start));
        let line = line.unwrap_or_else(|| panic!("no `{start}` in\n{printed}"));
        line.split_once("# from ").unwrap().1.to_owned()
    };
    assert!(source("lr", "0.25").contains("a.toml"), "{printed}");
    assert_eq!(source("nan_at_step", "3"), "command line");
    assert_eq!(source("panic_in_new", "false"), "default of faulty-plugin");
    assert_eq!(source("max_steps", "12"), "command line");
    assert_eq!(source("keep", "2"), "default");
    let cnn_jepa = ["--plugin", "cnn_jepa", "--print-config", "method.ema.from=0.5"];
    let printed = room.run(cnn_jepa.into_iter().chain(TINY_BACKBONE)).expect(0).stdout;
    for line in [
        "[method.ema]\nfrom = 0.5  # from command line\nto = 1.0    # from default of cnn-jepa",
        "strategy = \"mixed\" ",
    ] {
        assert!(printed.contains(line), "{line}:\n{printed}");
    }
    assert!(!room.file("runs").exists(), "nothing was begun");
}
