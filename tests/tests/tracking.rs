//! Runs seen by others: the real wandb-core and W&B's own reader, a stand-in for W&B's server, TensorBoard's reader.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use jepa_tests::real::{Room, TINY_BACKBONE, TINY_SIMCLR, demo_images, python, records, setting};
use jepa_tests::wandb::{KEY, Server, assert_history, core, of_kind, sessions};
use serde_json::{Value, json};

const RUN: &str = "runs/simclr/version_0";

/// The arguments of a run of `steps` steps, each of which is a record.
fn arguments(steps: u64, more: &[&str]) -> Vec<String> {
    let fixed =
        ["trainer.threads=1", "checkpoint.every_steps=5", "eval.every_epochs=0", "eval.at_start=false"];
    let images = setting("data.train", &demo_images());
    let arguments =
        ["--plugin", "simclr", &images].into_iter().chain(TINY_BACKBONE).chain(TINY_SIMCLR).chain(fixed);
    let arguments = arguments.map(str::to_owned).chain([format!("trainer.max_steps={steps}")]);
    arguments.chain(more.iter().map(|argument| (*argument).to_owned())).collect()
}

fn wandb_core() -> String {
    core().display().to_string()
}

#[test]
fn a_step_s_time_is_told_by_part() {
    let room = Room::new();
    let ended = room.run(arguments(12, &["trainer.accumulate=2"])).expect(0);
    let training = records(&room.file(RUN)).into_iter().filter(|record| record.get("train/loss").is_some());
    let mut nearest = 0.0f64;
    for record in training {
        let part = |name: &str| record[format!("time/{name}")].as_f64().unwrap();
        let parts = ["wait", "copy", "forward", "backward", "optimizer", "ema", "log"].map(part);
        let step = 32.0 / record["train/images_per_s"].as_f64().unwrap();
        assert!(parts.iter().all(|seconds| *seconds >= 0.0) && part("forward") > 0.0, "{record}");
        assert!(parts.iter().sum::<f64>() <= step, "{record}");
        assert!((part("wait") / step - record["train/data_wait"].as_f64().unwrap()).abs() < 0.01, "{record}");
        nearest = nearest.max(parts.iter().sum::<f64>() / step);
    }
    assert!(nearest > 0.9, "{nearest} of the time is told");
    assert!(!ended.stderr.contains("time/"), "{}", ended.stderr);
}

#[test]
fn csv_has_every_figure() {
    let room = Room::new();
    room.run(arguments(4, &[])).expect(0);
    let csv = room.run(["track", "csv", RUN]).expect(0).stdout;
    let mut rows = csv.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let head = rows.next().unwrap();
    let mut records = records(&room.file(RUN));
    records.retain(|record| record.get("train/loss").is_some());
    assert_eq!((rows.clone().count(), records.len()), (4, 4));
    for (row, record) in rows.zip(&records) {
        assert_eq!(row.len(), head.len());
        for (name, cell) in head.iter().zip(row) {
            assert_eq!(cell.parse::<f64>().ok(), record[*name].as_f64(), "{name}");
        }
        assert!(record.as_object().unwrap().keys().all(|name| head.contains(&name.as_str())), "{record}");
    }
}

#[test]
fn wandb_has_every_record_offline() {
    let room = Room::new();
    let wandb = [
        "track.wandb.mode=offline",
        "track.wandb.project=cells",
        "track.wandb.tags=[\"a\",\"b\"]",
        "track.wandb.checkpoints=true",
        "track.wandb.export=true",
        "track.histograms=true",
    ];
    let environment = [("JEPA_WANDB_CORE", wandb_core()), ("WANDB_RUN_GROUP", "sizes".to_owned())];
    let environment: Vec<_> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let ended = room.start_in(&environment, arguments(12, &wandb)).wait().expect(0);

    let [session] = sessions(&room.file(RUN)).try_into().expect("one session");
    let synced = |text: &str| text.contains("wandb sync ") && text.contains("/wandb/offline-run-*-");
    assert!(synced(&ended.stderr), "{}", ended.stderr);
    let offline = ["track", "replay", RUN, "--to", "wandb", "track.wandb.mode=offline"];
    let replayed = room.start_in(&environment, offline).wait().expect(0).stdout;
    let count = records(&room.file(RUN)).len();
    assert!(replayed.starts_with(&format!("0 records of {RUN} sent to ")), "{replayed}");
    assert!(replayed.contains(&format!(", which had {count} already")) && synced(&replayed), "{replayed}");
    let [run] = of_kind(&session, "run")[..] else { panic!("one run: {session:#?}") };
    assert_eq!(run["project"], "cells");
    assert_eq!(run["run_group"], "sizes");
    assert_eq!(run["tags"], json!(["a", "b"]));
    assert_eq!(run["display_name"], "simclr/version_0");
    assert_eq!(run["config"]["update"]["optimizer"]["batch_size"], 16);
    assert_eq!(run["config"]["update"]["method"]["hidden"], 16);
    assert!(run["config"]["update"]["provenance"]["plugins"].is_array());
    let metrics = of_kind(&session, "metric");
    assert!(metrics.iter().any(|metric| metric["glob_name"] == "*" && metric["step_metric"] == "step"));

    let history: Vec<Value> =
        of_kind(&session, "history").into_iter().map(|row| row["item"].clone()).collect();
    assert_history(&history, &room.file(RUN));
    let mut summary = BTreeMap::new();
    for update in of_kind(&session, "summary") {
        summary.extend(update["update"].as_object().unwrap().clone());
    }
    let losses = records(&room.file(RUN)).into_iter().filter_map(|record| record["train/loss"].as_f64());
    assert_eq!(summary["best/train/loss"].as_f64(), losses.reduce(f64::min));
    let media = room.file(RUN).join("wandb").read_dir().unwrap().map(|entry| entry.unwrap().path());
    let media: Vec<_> =
        media.filter_map(|session| session.join("files/media/images").read_dir().ok()).flatten().collect();
    assert_eq!(media.len(), 2, "an image of each view");
    let output: Vec<_> = of_kind(&session, "output_raw");
    assert!(output.iter().any(|line| line["line"].as_str().unwrap().contains("step 12")));
    let files = |artifact: &Value| {
        let contents = artifact["manifest"]["contents"].as_array().unwrap().iter();
        contents.map(|file| file["path"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let [checkpoint, backbone] = of_kind(&session, "artifact")[..] else { panic!("two artifacts") };
    assert_eq!(files(checkpoint), ["model.safetensors", "optimizer.safetensors", "state.json"]);
    assert_eq!(files(backbone), ["resnet18.safetensors"]);
    let export = ["export", RUN, "exported.safetensors"];
    room.run(export).expect(0);
    let logged = fs::read(room.file(RUN).join("wandb/export/resnet18.safetensors")).unwrap();
    assert!(logged == fs::read(room.file("exported.safetensors")).unwrap(), "as `export` writes it");
    assert_eq!(
        records(&room.file(RUN)).iter().filter(|record| record.get("histograms").is_some()).count(),
        1
    );
    assert_eq!(of_kind(&session, "exit")[0]["exit_code"].as_i64().unwrap_or(0), 0);
}

#[test]
fn a_killed_and_resumed_run_is_one_run_with_each_step_once() {
    let room = Room::new();
    let core = wandb_core();
    let environment = [("JEPA_WANDB_CORE", core.as_str())];
    let offline = ["track.wandb.mode=offline"];
    let mut run = room.start_in(&environment, arguments(400, &offline));
    let many = || {
        fs::read_to_string(room.file(RUN).join("metrics.jsonl")).is_ok_and(|text| text.lines().count() > 40)
    };
    run.until("40 records", many);
    run.signal(libc::SIGKILL);
    drop(run);
    let resumed = ["track.wandb.mode=offline", "trainer.max_steps=70", "--resume", "auto"];
    room.start_in(&environment, arguments(70, &resumed)).wait().expect(0);

    let sessions = sessions(&room.file(RUN));
    let runs: Vec<_> = sessions.iter().map(|session| of_kind(session, "run")[0]).collect();
    assert_eq!(runs.len(), 2);
    assert_eq!(runs[0]["run_id"], runs[1]["run_id"]);
    assert_eq!(runs[1]["resume"], true, "{:#}", runs[1]);
    let history: Vec<Value> = sessions
        .iter()
        .flat_map(|session| of_kind(session, "history"))
        .map(|row| row["item"].clone())
        .collect();
    let steps: Vec<_> = history.iter().map(|row| row["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (0..=70).collect::<Vec<_>>());
    assert_eq!(of_kind(&sessions[1], "exit").len(), 1);
}

#[test]
fn a_run_reaches_the_server_through_errors_and_a_resume() {
    let (room, server) = (Room::new(), Server::new());
    server.told().refuse_with = vec![500, 429];
    let core = wandb_core();
    let environment =
        [("JEPA_WANDB_CORE", core.as_str()), ("WANDB_BASE_URL", &server.url), ("WANDB_API_KEY", KEY)];
    let online = ["track.wandb.mode=online", "track.wandb.project=cells"];
    room.start_in(&environment, arguments(10, &online)).wait().expect(0);
    assert_eq!(server.told().refused, 2);
    assert_eq!(server.told().exit_code, Some(0));
    assert_history(&server.told().history, &room.file(RUN));
    assert_eq!(server.told().config["optimizer"]["value"]["batch_size"], 16);
    assert!(server.told().keys.iter().all(|key| key.starts_with("Basic ")));

    // What was lost on the way is sent by hand; then the run goes on where the server is.
    server.told().history.truncate(6);
    server.told().summary["_step"] = json!(5);
    room.start_in(&environment, ["track", "replay", "runs/simclr", "--to", "wandb"].map(str::to_owned))
        .wait()
        .expect(0);
    assert_history(&server.told().history, &room.file(RUN));
    let resumed = ["track.wandb.mode=online", "trainer.max_steps=15", "--resume", "auto"];
    room.start_in(&environment, arguments(15, &resumed)).wait().expect(0);
    assert_history(&server.told().history, &room.file(RUN));
    assert_eq!(server.told().history.len(), 16);

    // Who says never does not go on with what is there.
    let before = server.told().history.len();
    let never = ["track", "replay", RUN, "--to", "wandb", "track.wandb.resume=never"];
    let refused = room.start_in(&environment, never).wait().expect(1);
    refused.error_says(&["W&B refuses the run"]);
    assert_eq!(server.told().history.len(), before);

    // The key is nowhere on the disk.
    let search = Command::new("grep").args(["-rl", KEY]).arg(room.path()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&search.stdout), "");
}

#[test]
fn a_run_without_records_leaves_nothing_in_trackers() {
    let room = Room::new();
    room.run(arguments(1, &[])).expect(0);
    fs::write(room.file(RUN).join("metrics.jsonl"), "").unwrap();
    for to in ["wandb", "tensorboard"] {
        let arguments = ["track", "replay", RUN, "--to", to, "track.wandb.mode=offline"];
        room.run(arguments).expect(2).error_says(&[RUN, "has no records"]);
    }
    assert!(!room.file(RUN).join("wandb").exists());
}

#[test]
fn a_tracker_that_fails_costs_the_run_nothing() {
    let room = Room::new();
    // The server is not there.
    let core = wandb_core();
    let environment = [
        ("JEPA_WANDB_CORE", core.as_str()),
        ("WANDB_BASE_URL", "http://127.0.0.1:9"),
        ("WANDB_API_KEY", KEY),
    ];
    let mut run = room.start_in(&environment, arguments(100_000, &["track.wandb.mode=online"]));
    let trained = || {
        fs::read_to_string(room.file(RUN).join("metrics.jsonl")).is_ok_and(|text| text.lines().count() > 20)
    };
    run.until("20 records", trained);
    let asked = Instant::now();
    run.signal(libc::SIGTERM);
    let ended = run.wait().expect(143);
    assert!(asked.elapsed() < Duration::from_secs(25), "an agent kills after 30 s");
    assert!(ended.stderr.contains("track replay runs/simclr/version_0 --to wandb"), "{}", ended.stderr);

    // wandb-core is not there.
    let room = Room::new();
    let environment = [("JEPA_WANDB_CORE", "/nowhere/wandb-core")];
    let ended = room.start_in(&environment, arguments(2, &["track.wandb.mode=offline"])).wait().expect(0);
    let warnings: Vec<_> = ended.stderr.lines().filter(|line| line.contains("W&B")).collect();
    assert_eq!(warnings.len(), 1, "{}", ended.stderr);
    assert!(warnings[0].contains("W&B is off: JEPA_WANDB_CORE names /nowhere/wandb-core"), "{}", warnings[0]);

    // There is no key.
    let room = Room::new();
    let home = room.path().display().to_string();
    let environment = [("JEPA_WANDB_CORE", core.as_str()), ("HOME", home.as_str())];
    let ended = room.start_in(&environment, arguments(2, &["track.wandb.mode=online"])).wait().expect(0);
    assert!(ended.stderr.contains("set WANDB_API_KEY"), "{}", ended.stderr);
}

#[test]
fn a_killed_engine_is_started_again() {
    let room = Room::new();
    let core = wandb_core();
    let environment = [("JEPA_WANDB_CORE", core.as_str())];
    let mut run = room.start_in(&environment, arguments(100_000, &["track.wandb.mode=offline"]));
    let lines =
        || fs::read_to_string(room.file(RUN).join("metrics.jsonl")).map_or(0, |text| text.lines().count());
    run.until("20 records", || lines() > 20);
    let child =
        Command::new("pkill").args(["-KILL", "-P", &run.id().to_string(), "wandb-core"]).status().unwrap();
    assert!(child.success());
    let sessions_begun = || {
        let folders = room.file(RUN).join("wandb").read_dir().unwrap().map(|entry| entry.unwrap().path());
        folders.filter(|folder| folder.join("files").is_dir()).count()
    };
    run.until("another session", || sessions_begun() == 2);
    run.signal(libc::SIGTERM);
    let ended = run.wait().expect(143);
    assert!(!ended.stderr.contains("track replay"), "{}", ended.stderr);
    let history: Vec<Value> = sessions(&room.file(RUN))
        .iter()
        .flat_map(|session| of_kind(session, "history"))
        .map(|row| row["item"].clone())
        .collect();
    assert_history(&history, &room.file(RUN));
}

#[test]
#[ignore = "needs TensorBoard: `make test` fetches it and runs this too"]
fn tensorboard_reads_the_event_files() {
    let room = Room::new();
    let board = ["track.tensorboard=true", "track.histograms=true"];
    room.run(arguments(10, &board)).expect(0);
    room.run(arguments(15, &[&board[..], &["--resume", "auto"]].concat())).expect(0);
    let code = "
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={'scalars': 0, 'images': 0})
events.Reload()
tags = events.Tags()
scalars = {tag: [(e.step, e.value, e.wall_time) for e in events.Scalars(tag)] for tag in tags['scalars']}
def numbers(e):
    value = e.histogram_value
    return e.step, value.min, value.max, value.num, value.sum, value.sum_squares, value.bucket_limit, value.bucket
histograms = {tag: [numbers(e) for e in events.Histograms(tag)] for tag in tags['histograms']}
print(json.dumps({'scalars': scalars, 'images': tags['images'], 'histograms': histograms}))
";
    let (python, packages) = python();
    let output = Command::new(python)
        .args(["-c", code])
        .arg(room.file(RUN))
        .env("PYTHONPATH", packages)
        .output()
        .expect("python runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(read["images"], json!(["examples/first", "examples/second"]));
    let records = records(&room.file(RUN));
    let last = records.iter().rev().find_map(|record| record.get("histograms")).unwrap();
    for (name, written) in last.as_object().unwrap() {
        // Step, least, greatest, number, sum, sum of squares, edges, counts.
        let read = read["histograms"][name].as_array().unwrap().last().unwrap();
        assert_eq!(read[0], 14, "{name}");
        assert_eq!((&read[1], &read[2]), (&written["min"], &written["max"]), "{name}");
        assert_eq!((&read[4], &read[5]), (&written["sum"], &written["sum_of_squares"]), "{name}");
        let counts = |counts: &Value| {
            counts.as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(
            counts(&read[7]).iter().filter(|n| **n > 0.0).count(),
            counts(&written["counts"]).iter().filter(|n| **n > 0.0).count()
        );
        assert_eq!(
            counts(&read[7]).iter().sum::<f64>(),
            counts(&written["counts"]).iter().sum::<f64>(),
            "{name}"
        );
    }
    assert!(last.as_object().unwrap().keys().any(|name| name.starts_with("gradients/")));
    for (tag, points) in read["scalars"].as_object().unwrap() {
        let points = points.as_array().unwrap();
        let records: Vec<_> = records.iter().filter(|record| record.get(tag).is_some()).collect();
        assert_eq!(points.len(), records.len(), "{tag}");
        for (point, record) in points.iter().zip(&records) {
            assert_eq!(point[0], record["step"], "{tag}");
            let (read, written) = (point[1].as_f64().unwrap(), record[tag].as_f64().unwrap());
            assert!((read - written).abs() <= 1e-6 * written.abs(), "{tag}");
            assert_eq!(point[2], record["time"], "{tag}");
        }
    }
    assert_eq!(read["scalars"]["train/loss"].as_array().map(Vec::len), Some(15));
}
