//! Exact resume, shown by the real binary: however and wherever a run is stopped, it ends with the same bytes as one
//! that nobody stopped.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use jepa_tests::real::{
    Ended, Room, Running, TINY_BACKBONE, checkpoints, demo_images, fixture, held_out_images, is_of_a_clock,
    records, setting,
};
use serde_json::Value;

const RUN: &str = "runs/cnn_jepa/version_0";
const LAST: &str = "step_00000090";

/// The arguments of a run of 90 steps in one epoch of 500, with a checkpoint after every 5.
fn arguments() -> Vec<String> {
    let fixed = [
        "data.size=16",
        "data.threads=1",
        "method.mask.min_keep=1",
        "optimizer.batch_size=16",
        "optimizer.warmup_epochs=0.05",
        "trainer.max_steps=90",
        "trainer.threads=1",
        "trainer.device=cpu",
        "trainer.log_every_steps=3",
        "checkpoint.every_steps=5",
        "eval.every_epochs=0",
        "eval.at_start=false",
    ];
    let images = setting("data.train", &demo_images());
    let arguments = ["--plugin", "cnn_jepa", &images].into_iter().chain(TINY_BACKBONE).chain(fixed);
    arguments.map(str::to_owned).collect()
}

fn with(mut arguments: Vec<String>, more: &[&str]) -> Vec<String> {
    arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
    arguments
}

fn folder(room: &Room) -> PathBuf {
    room.file(RUN).join("checkpoints")
}

/// Every file of every checkpoint, by its path below the folder of checkpoints.
fn saved(room: &Room) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for checkpoint in checkpoints(&folder(room)) {
        for entry in fs::read_dir(&checkpoint).unwrap() {
            let path = entry.unwrap().path();
            files.insert(path.strip_prefix(folder(room)).unwrap().to_owned(), fs::read(&path).unwrap());
        }
    }
    files
}

/// Makes sure that two rooms hold the same checkpoints, to the byte.
#[track_caller]
fn assert_same_checkpoints(a: &Room, b: &Room) {
    let (a, b) = (saved(a), saved(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    assert!(a.len() >= 3, "there are checkpoints to compare");
    let differing: Vec<_> =
        a.iter().filter(|(name, bytes)| b[*name] != **bytes).map(|(name, _)| name).collect();
    assert!(differing.is_empty(), "these files differ: {differing:?}");
}

/// Makes sure that the last checkpoints of two runs hold the same tensors, to the byte.
#[track_caller]
fn assert_same_tensors(a: &Room, b: &Room) {
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let read = |room: &Room| fs::read(folder(room).join(LAST).join(name)).unwrap();
        assert!(read(a) == read(b), "{name} differs");
    }
}

/// The lines of `metrics.jsonl` without what a clock measured.
fn metrics(room: &Room) -> Vec<Value> {
    let text = fs::read_to_string(room.file(RUN).join("metrics.jsonl")).unwrap();
    let without_clock = |line: &str| {
        let mut record: Value = serde_json::from_str(line).unwrap();
        let fields = record.as_object_mut().unwrap();
        assert!(
            fields.contains_key("train/images_per_s") || fields.contains_key("images"),
            "speed is logged"
        );
        fields.retain(|name, _| !is_of_a_clock(name));
        record
    };
    text.lines().map(without_clock).collect()
}

/// The newest checkpoint's step; 0 without one.
fn newest(folder: &Path) -> u64 {
    let step = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix("step_")?.parse().ok();
    checkpoints(folder).last().and_then(step).unwrap_or(0)
}

/// Lets the run get to a checkpoint at or after `step`, and a while further.
fn let_run_past(running: &mut Running, room: &Room, step: u64, further: Duration) {
    let folder = folder(room);
    running.until(&format!("a checkpoint at step {step}"), || newest(&folder) >= step);
    thread::sleep(further);
}

/// Where a resumed run says that it went on.
#[track_caller]
fn went_on_at(stderr: &str) -> u64 {
    let rest =
        stderr.split("going on at step ").nth(1).unwrap_or_else(|| panic!("it did not go on:\n{stderr}"));
    rest.split(' ').next().unwrap().parse().unwrap()
}

/// An uninterrupted run.
fn whole(arguments: Vec<String>) -> Room {
    let room = Room::new();
    room.run(arguments).expect(0);
    room
}

/// A run that is killed once and once more while it is resumed, and then runs to its end.
fn killed_twice(arguments: &[String], first: u64, second: u64) -> Room {
    let room = Room::new();
    let mut running = room.start(arguments);
    let_run_past(&mut running, &room, first, Duration::from_millis(23));
    kill(running);

    let resume = with(arguments.to_vec(), &["--resume", "auto"]);
    let mut running = room.start(&resume);
    let_run_past(&mut running, &room, second, Duration::from_millis(41));
    assert!(went_on_at(&running.stderr()) >= first);
    kill(running);

    let ended = room.run(&resume).expect(0);
    assert!(went_on_at(&ended.stderr) >= second);
    assert!(!room.file("runs/cnn_jepa/version_1").exists(), "nothing was begun afresh");
    room
}

fn kill(mut running: Running) {
    running.signal(libc::SIGKILL);
    let ended = running.wait();
    let signal = std::os::unix::process::ExitStatusExt::signal(&ended.status);
    assert_eq!(signal, Some(libc::SIGKILL), "it was killed in mid-run:\n{}", ended.stderr);
}

#[test]
fn killed_runs_end_with_the_same_bytes() {
    let expected = whole(arguments());
    let killed = killed_twice(&arguments(), 10, 30);
    assert_same_checkpoints(&killed, &expected);
    // Each logged step is there once, with the same figures.
    assert_eq!(metrics(&killed), metrics(&expected));
    let steps: Vec<u64> = metrics(&killed).iter().map(|record| record["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (0..=30).map(|n| 3 * n).collect::<Vec<_>>());
}

#[test]
fn lars_and_sgd_are_resumed_to_the_byte() {
    for algorithm in ["optimizer.algorithm=lars", "optimizer.algorithm=sgd"] {
        let more =
            [algorithm, "optimizer.lr=0.1", "optimizer.weight_decay_end=0.1", "optimizer.nesterov=true"];
        let arguments = with(arguments(), &more);
        assert_same_checkpoints(&killed_twice(&arguments, 15, 40), &whole(arguments));
    }
}

#[test]
fn another_algorithm_begins_with_a_state_of_its_own() {
    let room = short();
    let ended = resume(&room, &["optimizer.algorithm=lars"]).expect(2);
    ended.error_says(&["optimizer.algorithm was \"adamw\" and is \"lars\"", "--allow-changes"]);

    let ended = resume(&room, &["optimizer.algorithm=lars", "--allow-changes"]).expect(0);
    let says = "the optimizer's state begins at zero: what \"adamw\" has saved means nothing to \"lars\"";
    assert!(ended.stderr.contains(says), "{}", ended.stderr);
    assert_eq!((went_on_at(&ended.stderr), newest(&folder(&room))), (10, 12));
}

#[test]
fn the_number_of_loader_threads_changes_nothing() {
    let one = whole(arguments());
    let four = with(arguments(), &["data.threads=4"]);
    let killed = killed_twice(&four, 5, 20);
    assert_same_checkpoints(&killed, &whole(four));
    assert_same_tensors(&killed, &one);

    // The comparison sees a difference where there is one.
    let other = whole(with(arguments(), &["seed=43"]));
    let model = |room: &Room| fs::read(folder(room).join(LAST).join("model.safetensors")).unwrap();
    assert!(model(&one) != model(&other), "another seed gives other weights");
}

#[test]
fn kills_around_the_ends_of_epochs_change_nothing() {
    // 6 images one by one and two batches to a step: 3 steps in an epoch, which end between the checkpoints by steps.
    let images = setting("data.train", &fixture("reference_layout.h5"));
    let more = [
        &images,
        "optimizer.batch_size=1",
        "trainer.accumulate=2",
        "trainer.epochs=30",
        "optimizer.warmup_epochs=4",
        "checkpoint.every_epochs=2",
        "data.threads=2",
    ];
    let arguments = with(arguments(), &more);
    let expected = whole(arguments.clone());
    let killed = killed_twice(&arguments, 12, 40);
    assert_same_checkpoints(&killed, &expected);
    assert_eq!(metrics(&killed), metrics(&expected));
}

/// Stops a run by `signal`, makes sure of its exit code and checkpoint, and goes on with `resume`.
fn interrupted(signal: i32, name: &str, resume: &[String]) -> Room {
    let room = Room::new();
    let mut running = room.start(arguments());
    let_run_past(&mut running, &room, 15, Duration::from_millis(17));
    running.signal(signal);
    let ended = running.wait().expect(128 + signal);
    ended.error_says(&["interrupted by", name, "continue with --resume", RUN]);

    let stopped_at = newest(&folder(&room));
    assert!((15..90).contains(&stopped_at), "it stopped in mid-run, at step {stopped_at}");
    let ended = room.run(resume).expect(0);
    assert_eq!(went_on_at(&ended.stderr), stopped_at);
    room
}

#[test]
fn signals_stop_a_run_where_it_can_go_on() {
    let expected = whole(arguments());
    let resumed = interrupted(libc::SIGTERM, "SIGTERM", &with(arguments(), &["--resume", "auto"]));
    assert_same_checkpoints(&resumed, &expected);
    assert_eq!(metrics(&resumed), metrics(&expected));

    // A run that is named brings its own settings.
    let resume = ["--plugin", "cnn_jepa", "--resume", RUN].map(str::to_owned);
    let resumed = interrupted(libc::SIGINT, "SIGINT", &resume);
    assert_same_checkpoints(&resumed, &expected);
    assert_eq!(metrics(&resumed), metrics(&expected));
}

/// A run of 10 steps, to be gone on from.
/// What training ends with is not lost when a signal comes while it is judged.
#[test]
fn a_run_that_is_stopped_in_its_last_evaluation_does_it_again() {
    let val = setting("data.val", &held_out_images());
    let more = [&val, "trainer.max_steps=6", "eval.every_epochs=1", "eval.linear.epochs=200", "eval.knn.k=5"];
    let arguments = with(arguments(), &more);
    let undisturbed = Room::new();
    undisturbed.run(&arguments).expect(0);

    let room = Room::new();
    let mut running = room.start(&arguments);
    let file = room.file(RUN).join("metrics.jsonl");
    running
        .until("the last step", || fs::read_to_string(&file).is_ok_and(|text| text.contains("\"step\":6,")));
    running.signal(libc::SIGTERM);
    running.wait().expect(143);
    let judged = |room: &Room| {
        let mut records = records(&room.file(RUN));
        records.retain(|record| record.get("eval/knn_top1").is_some());
        records.iter_mut().for_each(|record| drop(record.as_object_mut().unwrap().remove("time")));
        records
    };
    assert_eq!(judged(&room).len(), 0, "it was stopped in the evaluation");
    let resume = with(arguments, &["--resume", "auto"]);
    room.run(&resume).expect(0);
    assert_eq!(judged(&room), judged(&undisturbed));
    assert_eq!(judged(&room).len(), 1);
    // It is done, and does nothing twice.
    room.run(&resume).expect(0);
    assert_eq!(judged(&room).len(), 1);
}

fn short() -> Room {
    whole(with(arguments(), &["trainer.max_steps=10"]))
}

fn resume(room: &Room, more: &[&str]) -> Ended {
    room.run(with(with(arguments(), &["--resume", "auto", "trainer.max_steps=12"]), more))
}

#[test]
fn changed_settings_are_refused_by_name() {
    let room = short();
    let before = saved(&room);
    for (change, says) in [
        ("optimizer.lr=0.5", ["optimizer.lr was 0.001 and is 0.5", "--allow-changes"]),
        ("method.predictor.depth=2", ["method.predictor.depth was", "--allow-changes"]),
        ("seed=7", ["seed was 42 and is 7", "--allow-changes"]),
        ("trainer.threads=2", ["threads", "--allow-changes"]),
    ] {
        resume(&room, &[change]).expect(2).error_says(&says);
    }
    assert!(saved(&room) == before, "nothing was touched");

    let ended = resume(&room, &["optimizer.lr=0.5", "--allow-changes"]).expect(0);
    assert_eq!(went_on_at(&ended.stderr), 10);
    assert!(ended.stderr.contains("going on although optimizer.lr was 0.001 and is 0.5"), "{}", ended.stderr);
}

#[test]
fn steps_keep_their_number_of_images() {
    let room = short();
    let ended = resume(&room, &["optimizer.batch_size=32", "--allow-changes"]).expect(2);
    ended.error_says(&["a step had 16 × 1 images", "would have 32 × 1", "keep the product"]);
    let fewer = setting("data.train", &held_out_images());
    let ended = resume(&room, &[&fewer, "--allow-changes"]).expect(2);
    ended.error_says(&["an epoch had 500 steps, and would have 125", "begin a new run"]);
    let ended = resume(&room, &["optimizer.batch_size=8", "trainer.accumulate=2", "trainer.max_steps=12"]);
    ended.expect(2).error_says(&["optimizer.batch_size was 16 and is 8", "--allow-changes"]);
    let more = ["optimizer.batch_size=8", "trainer.accumulate=2", "trainer.max_steps=12", "--allow-changes"];
    let ended = resume(&room, &more).expect(0);
    assert_eq!(newest(&folder(&room)), 12, "{}", ended.stderr);
}

#[test]
fn a_damaged_record_of_sessions_stops_nobody() {
    let room = short();
    let record = room.file(RUN).join("provenance.json");
    fs::write(&record, "[{").unwrap();
    let ended = resume(&room, &[]).expect(0);
    assert!(
        ended.stderr.contains("is damaged") && ended.stderr.contains("provenance.damaged.json"),
        "{}",
        ended.stderr
    );
    let sessions: Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    assert_eq!(sessions.as_array().unwrap().len(), 1);
}

#[test]
fn a_damaged_checkpoint_is_an_error_and_no_fresh_start() {
    let room = short();
    let newest = folder(&room).join("step_00000010");
    for name in ["model.safetensors", "optimizer.safetensors", "state.json"] {
        let file = newest.join(name);
        let bytes = fs::read(&file).unwrap();
        fs::write(&file, &bytes[..bytes.len() * 2 / 3]).unwrap();
        let ended = resume(&room, &[]).expect(1);
        // The file, why, and what else there is.
        ended.error_says(&[&format!("step_00000010/{name}"), "cannot be used", "--resume", "step_00000005"]);
        fs::write(&file, &bytes).unwrap();
    }
    assert_eq!(checkpoints(&folder(&room)).len(), 2, "no other checkpoint was made");
    assert!(!room.file("runs/cnn_jepa/version_1").exists(), "nothing was begun afresh");

    let ended = resume(&room, &[]).expect(0);
    assert_eq!(went_on_at(&ended.stderr), 10, "whole again, it is gone on from");
}

#[test]
fn auto_begins_a_run_where_there_is_none_and_a_path_does_not() {
    let room = Room::new();
    let ended = room.run(with(arguments(), &["--resume", "runs/cnn_jepa", "trainer.max_steps=6"])).expect(2);
    ended.error_says(&["runs/cnn_jepa is no checkpoint", "does not exist"]);
    assert!(!room.file("runs").exists());

    let ended = resume(&room, &[]).expect(0);
    assert!(!ended.stderr.contains("going on"), "{}", ended.stderr);
    assert_eq!(newest(&folder(&room)), 12);
}
