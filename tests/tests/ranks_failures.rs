//! What becomes of a run when one of its ranks dies, hangs, fails or is told to end.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use jepa_tests::ranks::{Networks, free_port, run, start, start_all, torchrun};
use jepa_tests::real::{
    Room, Running, TINY_BACKBONE, TINY_SIMCLR, binary, checkpoints, demo_images, fixture, held_out_images,
    setting,
};
use serde_json::Value;

const RUN: &str = "runs/simclr/version_0";

/// A run of 60 steps, with a checkpoint after every 5; it takes some seconds.
fn arguments(more: &[&str]) -> Vec<String> {
    let images = setting("data.train", &demo_images());
    let fixed = [
        "--plugin",
        "simclr",
        &images,
        "trainer.threads=1",
        "trainer.max_steps=60",
        "checkpoint.every_steps=5",
        "eval.every_epochs=0",
        "eval.at_start=false",
    ];
    let all = fixed.into_iter().chain(TINY_BACKBONE).chain(TINY_SIMCLR).chain(more.iter().copied());
    all.map(str::to_owned).collect()
}

fn begin(room: &Room, size: u32, arguments: &[String]) -> Vec<Running> {
    start_all(room, size, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

fn folder(room: &Room) -> PathBuf {
    room.file(RUN).join("checkpoints")
}

/// Every file of the last checkpoint.
fn last(room: &Room) -> BTreeMap<PathBuf, Vec<u8>> {
    let checkpoint = checkpoints(&folder(room)).pop().expect("there is a checkpoint");
    assert!(checkpoint.ends_with("step_00000060"), "{}", checkpoint.display());
    let files = fs::read_dir(&checkpoint).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (PathBuf::from(path.file_name().unwrap()), fs::read(&path).unwrap())).collect()
}

fn has_saved(folder: &Path, steps: usize) -> bool {
    let name = format!("step_{steps:08}");
    checkpoints(folder).iter().any(|path| *path.file_name().unwrap().to_string_lossy() >= *name)
}

#[test]
fn a_rank_that_dies_ends_the_others_and_they_go_on_to_the_same_bytes() {
    let undisturbed = Room::new();
    let arguments = arguments(&[]);
    run(&undisturbed, 2, &arguments.iter().map(String::as_str).collect::<Vec<_>>());

    // Whoever dies, whoever keeps the store.
    for (victim, after) in [(1, 20), (0, 35)] {
        let room = Room::new();
        let mut ranks = begin(&room, 2, &arguments);
        let folder = folder(&room);
        ranks[victim].until("a checkpoint", || has_saved(&folder, after));
        let process = ranks[victim].id();
        ranks[victim].signal(libc::SIGKILL);
        let began = Instant::now();
        let mut ended: Vec<_> = ranks.into_iter().map(Running::wait).collect();
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        let other = ended.remove(1 - victim).expect(1);
        let who = format!("rank {victim} (process {process} on ");
        other.error_says(&[&who, "has ended or does not answer"]);
        assert!(!has_saved(&folder, 60));

        let mut again = arguments.clone();
        again.extend(["--resume".to_owned(), "auto".to_owned()]);
        run(&room, 2, &again.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(last(&room) == last(&undisturbed), "rank {victim} died: the last checkpoint differs");
    }
}

#[test]
fn of_three_the_others_name_the_one_that_died_at_once() {
    let room = Room::new();
    let mut ranks = begin(&room, 3, &arguments(&["optimizer.batch_size=18"]));
    let folder = folder(&room);
    ranks[0].until("a checkpoint", || has_saved(&folder, 5));
    let who = format!("rank 1 (process {} on ", ranks[1].id());
    ranks[1].signal(libc::SIGKILL);
    let began = Instant::now();
    let ended: Vec<_> = ranks.into_iter().map(Running::wait).collect();
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    for other in [0, 2] {
        let ended = &ended[other];
        ended.error_says(&[&who, "has ended or does not answer"]);
        assert_eq!(ended.stderr.matches("(process ").count(), 1, "{}", ended.stderr);
    }
}

#[test]
fn a_rank_that_hangs_is_named_when_the_time_is_over() {
    let room = Room::new();
    let mut ranks = begin(&room, 3, &arguments(&["ranks.timeout_s=6", "optimizer.batch_size=18"]));
    let folder = folder(&room);
    ranks[0].until("a checkpoint", || has_saved(&folder, 5));
    ranks[1].signal(libc::SIGSTOP);
    let (began, process) = (Instant::now(), ranks[1].id());
    let mut hanging = ranks.remove(1);
    for other in ranks {
        let ended = other.wait().expect(1);
        ended.error_says(&[&format!("rank 1 (process {process} on "), "has ended or does not answer"]);
        assert!(!ended.stderr.contains("rank 2 (process") && !ended.stderr.contains("rank 0 (process"));
    }
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    hanging.signal(libc::SIGKILL);
}

#[test]
fn a_cut_cable_ends_both_sides_in_time_and_they_go_on_to_the_same_bytes() {
    let Some(networks) = Networks::new() else { return };
    let undisturbed = Room::new();
    let arguments = arguments(&["ranks.timeout_s=6"]);
    let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    for rank in networks.start(&undisturbed, &arguments) {
        rank.wait().expect(0);
    }

    let room = Room::new();
    let mut ranks = networks.start(&room, &arguments);
    let folder = folder(&room);
    ranks[0].until("a checkpoint", || has_saved(&folder, 15));
    networks.cut();
    let began = Instant::now();
    for (rank, other) in ranks.into_iter().zip([1, 0]) {
        rank.wait().expect(1).error_says(&[&format!("rank {other} (process "), "does not answer"]);
    }
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());

    drop(networks);
    let networks = Networks::new().unwrap();
    arguments.extend(["--resume", "auto"]);
    for rank in networks.start(&room, &arguments) {
        rank.wait().expect(0);
    }
    assert!(last(&room) == last(&undisturbed), "the last checkpoint differs");
}

#[test]
fn a_signal_to_one_rank_ends_all_of_them_at_the_same_step() {
    for signal in [libc::SIGTERM, libc::SIGUSR1] {
        let room = Room::new();
        let mut ranks = begin(&room, 2, &arguments(&["--verbose"]));
        let folder = folder(&room);
        ranks[0].until("a checkpoint", || has_saved(&folder, 5));
        ranks[1].signal(signal);
        let ended = ranks.into_iter().map(|rank| rank.wait().expect(128 + signal));
        let steps: Vec<usize> = ended
            .map(|ended| {
                ended.error_says(&["interrupted by SIG", "continue with --resume"]);
                let (_, step) = ended.stderr.split_once("the run ends at step ").expect("it says at which");
                step.split_whitespace().next().unwrap().parse().unwrap()
            })
            .collect();
        assert!(steps[0] == steps[1] && steps[0] < 60, "{steps:?}");
        let newest = checkpoints(&folder).pop().unwrap();
        assert!(newest.ends_with(format!("step_{:08}", steps[0])), "{}: {steps:?}", newest.display());
        let arguments = arguments(&["--resume", "auto"]);
        run(&room, 2, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
        last(&room);
    }
}

#[test]
fn what_one_rank_cannot_do_all_of_them_tell() {
    // Image 3 of the file is corrupt.
    let room = Room::new();
    let images = setting("data.train", &fixture("bad_jpeg.h5"));
    let ranks = begin(&room, 2, &arguments(&[&images, "optimizer.batch_size=4", "data.size=8"]));
    let ended: Vec<_> = ranks.into_iter().map(Running::wait).collect();
    let codes: Vec<Option<i32>> = ended.iter().map(|ended| ended.status.code()).collect();
    // The one that has it in its share of the batch.
    let Some(rank) = codes.iter().position(|code| *code == Some(4)) else { panic!("{codes:?}") };
    assert_eq!(codes[1 - rank], Some(1));
    ended[rank].error_says(&["image 3 is corrupt"]);
    ended[1 - rank].error_says(&[&format!("rank {rank} has failed: "), "image 3 is corrupt"]);
}

#[test]
fn what_fails_before_the_first_step_all_of_them_tell() {
    for command in [&[][..], &["bench", "step"]] {
        let room = Room::new();
        let mut arguments = arguments(&["--trace", "nowhere/trace.json"]);
        arguments.splice(0..0, command.iter().map(|word: &&str| (*word).to_owned()));
        let says = "--trace nowhere/trace.json: ";
        for (rank, code) in begin(&room, 2, &arguments).into_iter().zip([2, 1]) {
            let whose = if code == 2 { "" } else { "rank 0 has failed: " };
            rank.wait().expect(code).error_says(&[&format!("{whose}{says}")]);
        }
    }
}

#[test]
fn steps_that_are_measured_end_together_too() {
    let room = Room::new();
    let mut measuring = arguments(&["--steps", "100000", "trainer.max_steps=100000"]);
    measuring.splice(0..0, ["bench", "step"].map(str::to_owned));
    let mut ranks = begin(&room, 2, &measuring);
    std::thread::sleep(Duration::from_secs(3));
    ranks[1].signal(libc::SIGTERM);
    for rank in ranks {
        rank.wait().expect(128 + libc::SIGTERM).error_says(&["interrupted by SIGTERM"]);
    }
}

#[test]
fn a_run_whose_last_checkpoint_cannot_be_saved_has_failed_on_all_ranks() {
    let room = Room::new();
    let folder = folder(&room);
    let mut ranks = begin(&room, 2, &arguments(&["checkpoint.every_steps=1000"]));
    ranks[0].until("a run", || folder.parent().unwrap().join("metrics.jsonl").exists());
    let _ = fs::remove_dir(&folder);
    fs::write(&folder, "in its place").unwrap();
    let mut ended = ranks.into_iter().map(|rank| rank.wait().expect(1));
    ended.next().unwrap().error_says(&["checkpoints"]);
    ended.next().unwrap().error_says(&["rank 0 has failed: "]);
}

/// Arguments of a run that is judged before its first step.
fn judged(more: &[&str]) -> Vec<String> {
    let held_out = setting("data.val", &held_out_images());
    let fixed = ["eval.every_epochs=1", "eval.at_start=true", "trainer.max_steps=2", "eval.train_limit=500"];
    arguments(&[&[held_out.as_str()], &fixed[..], more].concat())
}

#[test]
fn a_probe_that_takes_longer_than_ranks_wait_loses_nobody() {
    let room = Room::new();
    let slow =
        ["--plugin", "faulty_probe", "eval.probes.faulty.enabled=true", "eval.probes.faulty.seconds=9"];
    let began = Instant::now();
    for rank in begin(&room, 2, &judged(&[&slow[..], &["ranks.timeout_s=5"]].concat())) {
        rank.wait().expect(0);
    }
    assert!(began.elapsed() > Duration::from_secs(18), "judged twice: {:?}", began.elapsed());
}

#[test]
fn a_signal_to_a_rank_that_waits_ends_what_the_first_judges() {
    let room = Room::new();
    let mut ranks = begin(&room, 2, &judged(&["--verbose", "eval.linear.epochs=1000000"]));
    ranks[1].until("a rank that waits", || room.file("runs").exists());
    std::thread::sleep(Duration::from_secs(5));
    ranks[1].signal(libc::SIGTERM);
    let began = Instant::now();
    for rank in ranks {
        let ended = rank.wait().expect(128 + libc::SIGTERM);
        assert!(ended.stderr.contains("the run ends at step 0"), "{}", ended.stderr);
    }
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
}

#[test]
fn ranks_that_measure_different_things_are_told_which() {
    let images = setting("data.train", &demo_images());
    let settings = [
        "data.size=8",
        "data.threads=1",
        "optimizer.batch_size=16",
        "trainer.max_steps=3",
        "trainer.threads=1",
        "trainer.device=cpu",
        "eval.every_epochs=0",
        "eval.at_start=false",
        "method.metrics=1",
        "method.one_more_metric_on_rank=1",
    ];
    let plugin = ["--plugin", "faulty_plugin", &images];
    let arguments: Vec<&str> = plugin.into_iter().chain(TINY_BACKBONE).chain(settings).collect();
    for rank in start_all(&Room::new(), 2, &arguments) {
        rank.wait().expect(2).error_says(&[
            "rank 0 measures train/loss, train/faulty/distance, train/faulty/distance_0, train/replaced",
            "rank 1 measures train/loss, train/faulty/distance, train/faulty/distance_0, train/faulty/distance_1",
        ]);
    }
}

#[test]
fn ranks_that_would_not_do_the_same_are_refused() {
    let refused = |size: u32, of_second: &[&str], says: &[&str]| {
        let (room, port) = (Room::new(), free_port());
        let ranks: Vec<Running> = (0..size)
            .map(|rank| {
                let arguments = arguments(if rank == 1 { of_second } else { &[] });
                start(&room, (rank, size, port), &arguments.iter().map(String::as_str).collect::<Vec<_>>())
            })
            .collect();
        for rank in ranks {
            rank.wait().expect(2).error_says(says);
        }
        assert!(!room.file("runs").exists());
    };
    refused(2, &["optimizer.lr=0.5"], &["rank 1 differs from rank 0: optimizer.lr is 0.5 instead of 0.001"]);
    let others = setting("data.train", &held_out_images());
    refused(2, &[&others], &["rank 1 differs from rank 0: the training data's fingerprint is "]);

    let room = Room::new();
    for rank in begin(&room, 3, &arguments(&[])) {
        rank.wait()
            .expect(2)
            .error_says(&["a batch of 16 images has no 3 equal parts", "optimizer.batch_size"]);
    }
}

/// The process of a rank, as the run's provenance has it.
fn process_of(room: &Room, rank: usize) -> Option<i64> {
    let text = fs::read_to_string(room.file(RUN).join("provenance.json")).ok()?;
    let sessions: Value = serde_json::from_str(&text).ok()?;
    sessions.as_array()?.last()?["ranks"][rank]["process"].as_i64()
}

#[test]
fn torchrun_begins_anew_and_the_run_goes_on_by_itself() {
    let Some(torchrun) = torchrun() else { return };
    let undisturbed = Room::new();
    let arguments = arguments(&[]);
    run(&undisturbed, 2, &arguments.iter().map(String::as_str).collect::<Vec<_>>());

    let room = Room::new();
    let port = format!("--master-port={}", free_port());
    let launch = ["--no-python", "--nproc-per-node=2", "--max-restarts=2", &port].map(str::to_owned);
    let program = binary().display().to_string();
    let all: Vec<String> = launch.into_iter().chain([program]).chain(arguments).collect();
    // Its Python has a libtorch of its own.
    let mut running = room.start_other_in(&[("LD_LIBRARY_PATH", ""), ("PYTHONPATH", "")], &torchrun, &all);
    let folder = folder(&room);
    for (victim, after) in [(1, 15), (0, 35)] {
        running.until("a checkpoint", || has_saved(&folder, after));
        let before = process_of(&room, victim).unwrap();
        let killed = Command::new("kill").args(["-KILL", &before.to_string()]).status().unwrap();
        assert!(killed.success());
        running
            .until("another attempt", || process_of(&room, victim).is_some_and(|process| process != before));
    }
    let ended = running.wait().expect(0);
    assert_eq!(ended.stderr.matches("going on at step ").count(), 2, "{}", ended.stderr);
    assert!(last(&room) == last(&undisturbed), "the last checkpoint differs");
}

#[test]
fn a_script_that_fails_behind_its_runs_trains_none_of_them_anew() {
    let Some(torchrun) = torchrun() else { return };
    let room = Room::new();
    let port = format!("--master-port={}", free_port());
    let script = r#""$@" && "$@" seed=7 && if [ $RANK = 1 ]; then mkdir failed && exit 9; true; fi"#;
    let launch = ["--no-python", "--nproc-per-node=2", "--max-restarts=1", &port, "bash", "-c", script, "-"];
    let program = binary().display().to_string();
    let all: Vec<String> =
        launch.map(str::to_owned).into_iter().chain([program]).chain(arguments(&[])).collect();
    let running = room.start_other_in(&[("LD_LIBRARY_PATH", ""), ("PYTHONPATH", "")], &torchrun, &all);
    let ended = running.wait().expect(0);
    assert_eq!(ended.stderr.matches("going on at step 60 of ").count(), 2, "{}", ended.stderr);
    let runs = fs::read_dir(room.file("runs/simclr")).unwrap().count();
    assert_eq!(runs, 2, "{}", ended.stderr);
}
