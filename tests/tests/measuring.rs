//! `jepa-host bench step`, and the timeline that `--trace` writes.

use std::collections::BTreeSet;
use std::fs;

use jepa_tests::real::{Room, TINY_BACKBONE, TINY_SIMCLR, demo_images, records, setting};
use serde_json::Value;

/// The smallest run, with `more` before its settings.
fn arguments(more: &[&str]) -> Vec<String> {
    let images = setting("data.train", &demo_images());
    let more = more.iter().chain(["--plugin", "simclr", "trainer.threads=1"].iter());
    let settings = more.chain(TINY_BACKBONE.iter()).chain(TINY_SIMCLR.iter());
    settings.map(|argument| (*argument).to_owned()).chain([images]).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn the_parts_of_a_step_add_up() {
    let room = Room::new();
    for data in [&["trainer.accumulate=2"][..], &["--same-batch"]] {
        let measured = ["bench", "step", "--steps", "8", "--warmup", "2", "--format", "json"];
        let ended = room.run(arguments(&[&measured[..], data].concat())).expect(0);
        let report: Value = serde_json::from_str(&ended.stdout).unwrap();
        let parts = report["parts"].as_array().unwrap();
        let names: Vec<&str> = parts.iter().map(|row| row["part"].as_str().unwrap()).collect();
        assert_eq!(
            names,
            ["wait", "copy", "forward", "backward", "exchange", "optimizer", "ema", "sync", "log"]
        );
        let step = number(&report["step"]["median_s"]);
        let sum: f64 = parts.iter().map(|row| number(&row["median_s"])).sum();
        assert!((0.5..1.5).contains(&(sum / step)), "{report}");
        let images = if data == ["--same-batch"] { 16.0 } else { 32.0 };
        assert!((number(&report["images_per_s"]) - images / step).abs() < 1e-6 * images / step, "{report}");
        assert_eq!(report["steps"], 8);
        let loaded: f64 =
            report["loader"].as_array().unwrap().iter().map(|row| number(&row["seconds_per_step"])).sum();
        assert_eq!(loaded > 0.0, data != ["--same-batch"], "{report}");
        assert!(number(&report["peak_resident_bytes"]) > 1e7);
    }
    let left = fs::read_dir(room.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.filter(|name| name == "runs").count(), 0, "nothing of it is kept");
}

#[test]
fn a_file_s_pipeline_is_timed_and_judged() {
    let room = Room::new();
    let arguments = |more: &[&str]| {
        let images = demo_images().to_string_lossy().into_owned();
        let more = more.iter().copied().chain(["--plugin", "simclr", "--seconds", "1"]);
        let settings =
            more.chain(TINY_BACKBONE).chain(TINY_SIMCLR).chain(["data.threads=2"]).map(str::to_owned);
        ["data".to_owned(), "bench".to_owned(), images].into_iter().chain(settings).collect::<Vec<_>>()
    };
    let ended = room.run(arguments(&["--format", "json"])).expect(0);
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((&report["images"], &report["views"]), (&Value::from(8000), &Value::from(2)));
    let rows = report["threads"].as_array().unwrap();
    assert_eq!(rows.iter().map(|row| number(&row["threads"])).collect::<Vec<_>>(), [1.0, 2.0]);
    // A thread's milliseconds for an image, and images per second, are the same thing.
    let one = &rows[0];
    let ms: f64 = ["read_ms", "decode_ms", "augment_ms"].iter().map(|part| number(&one[part])).sum();
    let busy = ms / 1e3 * number(&one["images_per_s"]);
    assert!((0.2..1.1).contains(&busy), "{report}");
    assert!(number(&report["step_images_per_s"]) > 0.0, "{report}");
    assert!(report["verdict"].as_str().unwrap().contains("bottleneck"), "{report}");

    let ended = room.run(arguments(&["--steps", "0"])).expect(0);
    assert!(ended.stdout.contains("decode") && !ended.stdout.contains("bottleneck"), "{}", ended.stdout);
}

#[test]
fn it_reads_as_a_table_and_says_what_is_wrong() {
    let room = Room::new();
    let ended = room.run(arguments(&["bench", "step", "--steps", "2", "--warmup", "0"])).expect(0);
    for words in ["forward", "images/s", "beside the step", "peak memory"] {
        assert!(ended.stdout.contains(words), "{words}: {}", ended.stdout);
    }
    room.run(arguments(&["bench", "step", "--steps", "0"])).expect(2);
    let ended = room.run(arguments(&["bench", "step", "trainer.acumulate=2"])).expect(2);
    assert!(ended.stderr.contains("trainer.accumulate"), "{}", ended.stderr);
    let ended = room.run(arguments(&["bench", "step", "--trace", "/nowhere/trace.json"])).expect(2);
    assert!(ended.stderr.contains("/nowhere/trace.json"), "{}", ended.stderr);
}

#[test]
fn a_run_can_write_a_timeline() {
    let room = Room::new();
    let with = ["--trace", "trace.json", "trainer.max_steps=6", "eval.every_epochs=0", "eval.at_start=false"];
    room.run(arguments(&with)).expect(0);
    let events: Vec<Value> = serde_json::from_slice(&fs::read(room.file("trace.json")).unwrap()).unwrap();
    let of_step =
        |name: &str| events.iter().filter(|event| event["name"] == name && event["ph"] == "X").count();
    assert_eq!((of_step("forward"), of_step("backward"), of_step("optimizer")), (6, 6, 6));
    let steps: Vec<&Value> = events.iter().filter(|event| event["name"] == "step").collect();
    assert_eq!(
        steps.iter().map(|step| number(&step["args"]["step"])).collect::<Vec<_>>(),
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    );
    let ends = |span: &Value| (number(&span["ts"]), number(&span["ts"]) + number(&span["dur"]));
    for (step, forward) in steps.iter().zip(events.iter().filter(|event| event["name"] == "forward")) {
        let (step, forward) = (ends(step), ends(forward));
        assert!(
            step.0 <= forward.0 && forward.1 <= step.1,
            "a step is around its parts: {step:?}, {forward:?}"
        );
    }
    assert!(of_step("decode") >= 6 * 16, "every image of the six steps");
    let named = events.iter().filter(|event| event["name"] == "thread_name");
    let threads: BTreeSet<&str> = named.map(|event| event["args"]["name"].as_str().unwrap()).collect();
    assert_eq!(threads, BTreeSet::from(["data-0", "main"]));

    // The threads work ahead, so there are steps during which they have nothing to do.
    let records = records(&room.file("runs/simclr/version_0"));
    for part in ["time/read", "time/decode", "time/augment"] {
        let seconds: f64 = records.iter().filter_map(|record| record.get(part)).map(number).sum();
        assert!(seconds > 0.0, "{part}: {records:?}");
    }
}
