//! Validation and evaluation in real runs: what they give, what they keep, and what happens when they fail or are
//! stopped.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use jepa_tests::real::{
    Ended, Room, TINY_BACKBONE, checkpoints, demo_images, fixture, held_out_images, is_of_a_clock, setting,
};
use serde_json::Value;

const RUN: &str = "runs/faulty/version_0";

/// The arguments of a run of the faulty method: 3 epochs of 4 steps, each judged by all that there is.
fn arguments(settings: &[&str]) -> Vec<String> {
    let fixed = [
        "data.size=8",
        "data.threads=1",
        "optimizer.batch_size=2000",
        "optimizer.warmup_epochs=0",
        "trainer.epochs=3",
        "trainer.threads=1",
        "trainer.device=cpu",
        "trainer.log_every_steps=1",
        "eval.every_epochs=1",
        "eval.train_limit=1000",
        "eval.linear.epochs=3",
    ];
    let images = [setting("data.train", &demo_images()), setting("data.val", &held_out_images())];
    let arguments = ["--plugin", "faulty_plugin"].into_iter().chain(TINY_BACKBONE).chain(fixed);
    let arguments = arguments.map(str::to_owned).chain(images);
    arguments.chain(settings.iter().map(|setting| (*setting).to_owned())).collect()
}

fn train(room: &Room, settings: &[&str]) -> Ended {
    room.run(arguments(settings))
}

fn saved(room: &Room) -> Vec<PathBuf> {
    checkpoints(&room.file(RUN).join("checkpoints"))
}

fn names(room: &Room) -> Vec<String> {
    saved(room).iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

/// The lines of `metrics.jsonl` without what a clock measured.
fn metrics(room: &Room) -> Vec<Value> {
    let text = fs::read_to_string(room.file(RUN).join("metrics.jsonl")).unwrap();
    let without_clock = |line: &str| {
        let mut record: Value = serde_json::from_str(line).unwrap();
        let fields = record.as_object_mut().unwrap();
        fields.retain(|name, _| !is_of_a_clock(name));
        record
    };
    text.lines().map(without_clock).collect()
}

/// The lines that judge, of all.
fn judgements(room: &Room) -> Vec<Value> {
    let of_training = |record: &Value| record.get("train/loss").is_some() || record.get("images").is_some();
    metrics(room).into_iter().filter(|record| !of_training(record)).collect()
}

#[test]
fn a_run_is_judged_before_and_after_every_epoch() {
    let room = Room::new();
    let ended = train(&room, &[]).expect(0);
    let judged = judgements(&room);
    let steps: Vec<u64> = judged.iter().map(|record| record["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [0, 4, 8, 12]);
    let figures = [
        "eval/linear_top1",
        "eval/linear_top5",
        "eval/linear_top1_final",
        "eval/linear_top5_final",
        "eval/knn_top1",
        "eval/knn_top5",
        "eval/anisotropy",
        "eval/correlation",
        "eval/rank",
        "eval/rank_ratio",
        "eval/rankme",
        "eval/spread",
        "eval/std",
    ];
    for record in &judged {
        for name in figures {
            assert!(record[name].as_f64().is_some_and(|value| value > 0.0), "{name} in {record}");
        }
        // Raw pixels of clothes: far from chance, which is 0.1.
        assert!(record["eval/knn_top1"].as_f64().unwrap() > 0.6, "{record}");
        assert_eq!(record.get("val/loss").is_some(), record["step"] != 0, "{record}");
    }
    for name in figures {
        assert!(ended.stdout.contains(&format!("{name} ")), "{name} is in the table:\n{}", ended.stdout);
    }
}

#[test]
fn the_best_state_is_kept_whenever_it_comes() {
    let room = Room::new();
    // The loss falls in every epoch, so the last is the best; and it is saved although nothing else asks for it.
    let settings =
        ["checkpoint.best=val/loss", "checkpoint.every_epochs=0", "checkpoint.keep=1", "trainer.epochs=4"];
    let mut running = room.start(arguments(&settings));
    running.until("the best of the first epoch", || names(&room).contains(&"step_00000004".to_owned()));
    running.wait().expect(0);
    let best = fs::read(room.file(RUN).join("checkpoints/best.json")).unwrap();
    let best: Value = serde_json::from_slice(&best).unwrap();
    assert_eq!((best["metric"].as_str(), best["step"].as_u64()), (Some("val/loss"), Some(16)));
    assert_eq!(names(&room), ["step_00000016"]);
}

#[test]
fn a_run_that_is_stopped_while_it_is_judged_goes_on_and_logs_everything_once() {
    // Probes that take their time: a signal meets them rather than a step.
    let slow = ["eval.linear.epochs=400", "eval.every_epochs=2"];
    let whole = Room::new();
    train(&whole, &slow).expect(0);

    let room = Room::new();
    let mut running = room.start(arguments(&slow));
    running.until("the last step before an evaluation", || {
        fs::read_to_string(room.file(RUN).join("metrics.jsonl")).is_ok_and(|text| text.contains("\"step\":8"))
    });
    thread::sleep(Duration::from_millis(150));
    running.signal(libc::SIGTERM);
    let ended = running.wait().expect(143);
    assert!(ended.error().starts_with("interrupted by SIGTERM; continue with --resume"), "{}", ended.stderr);
    assert_eq!(names(&room).last().unwrap(), "step_00000008");
    assert_eq!(judgements(&room).len(), 2, "of step 0, and the validation of step 4");

    let resumed: Vec<&str> = slow.iter().copied().chain(["--resume", "auto"]).collect();
    train(&room, &resumed).expect(0);
    assert_eq!(metrics(&room), metrics(&whole));
    let bytes = |room: &Room| fs::read(saved(room).last().unwrap().join("model.safetensors")).unwrap();
    assert_eq!(bytes(&room), bytes(&whole));
}

#[test]
fn what_fails_in_an_evaluation_has_its_exit_code_and_costs_no_epoch() {
    let corrupt = setting("data.val", &fixture("bad_jpeg.h5"));
    let cases: [(&str, i32, &str, &[&str]); 4] = [
        (
            "method.features=panic",
            6,
            "step_00000004",
            &["plugin `faulty-plugin` panicked", "cannot look at it"],
        ),
        (
            "method.features=map",
            6,
            "step_00000004",
            &["plugin `faulty-plugin` failed", "`encode` must return", "shape [256, 3, 8, 8]"],
        ),
        (&corrupt, 4, "step_00000004", &["bad_jpeg.h5", "is corrupt"]),
        // The weights are no good: only what was saved before counts.
        ("method.features=nan", 5, "step_00000002", &["are not finite", "the encoder has diverged"]),
    ];
    for (setting, code, last, says) in cases {
        let room = Room::new();
        let ended = train(&room, &["eval.at_start=false", "checkpoint.every_steps=2", setting]).expect(code);
        ended.error_says(says);
        assert_eq!(names(&room).last().unwrap(), last, "{setting}:\n{}", ended.stderr);
    }
}

#[test]
fn torch_s_own_random_numbers_are_the_same_at_every_judgement() {
    let room = Room::new();
    let still = ["optimizer.lr=1e-30", "optimizer.weight_decay=0"];
    let noisy = ["method.torch_noise=true", "--plugin", "faulty_probe", "eval.probes.faulty.unseeded=true"];
    train(&room, &[&still[..], &noisy].concat()).expect(0);
    let judged = judgements(&room);
    let all = |name: &str| -> Vec<f64> { judged.iter().filter_map(|record| record[name].as_f64()).collect() };
    for (name, count) in [("val/loss", 3), ("eval/faulty/norm", 4)] {
        let values = all(name);
        assert_eq!(values.len(), count, "{judged:?}");
        assert!(values.iter().all(|value| *value == values[0]), "{name}: {values:?}");
    }
}

#[test]
fn collapsed_features_are_told_or_end_the_run() {
    let warning = "features have collapsed at step 4: eval/spread is ";
    let run = |settings: &[&str], code: i32| {
        let room = Room::new();
        train(&room, settings).expect(code)
    };
    let (collapsed, one) = ("method.features=collapsed", "trainer.epochs=1");
    assert_eq!(run(&[collapsed, one], 0).stderr.matches(warning).count(), 1);
    assert_eq!(run(&[collapsed, one, "eval.collapse=off"], 0).stderr.matches(warning).count(), 0);
    assert_eq!(run(&[one], 0).stderr.matches("collapsed").count(), 0, "healthy features");
    for blind in ["eval.every_epochs=0", "data.val=none"] {
        let says =
            ["eval.collapse (command line)", "nothing would be watched", "data.val", "eval.every_epochs"];
        run(&["eval.collapse=stop", blind], 2).error_says(&says);
    }
    run(&[collapsed, "eval.collapse=stop"], 5).error_says(&[warning, "eval.collapse_below = 0.01"]);
}

#[test]
fn without_a_judgement_at_the_start_there_is_no_before() {
    let room = Room::new();
    let ended = train(&room, &["eval.at_start=false", "trainer.epochs=1"]).expect(0);
    let line = ended.stdout.lines().find(|line| line.starts_with("eval/knn_top1 ")).unwrap();
    assert_eq!(line.split_whitespace().nth(1), Some("-"), "{line}");
}

#[test]
fn bf16_trains_as_fp32_does_up_to_rounding() {
    let losses = |precision: &str| -> Vec<f64> {
        let room = Room::new();
        let precision = format!("trainer.precision={precision}");
        let settings = [
            "data.size=16",
            "data.threads=1",
            "method.mask.min_keep=1",
            "optimizer.batch_size=16",
            "trainer.max_steps=8",
            "trainer.threads=1",
            "trainer.device=cpu",
            "trainer.log_every_steps=1",
            "eval.every_epochs=0",
            &precision,
        ];
        let images = setting("data.train", &demo_images());
        let arguments = ["--plugin", "cnn_jepa", &images].into_iter().chain(TINY_BACKBONE).chain(settings);
        room.run(arguments).expect(0);
        let text = fs::read_to_string(room.file("runs/cnn_jepa/version_0/metrics.jsonl")).unwrap();
        let loss = |line: &str| serde_json::from_str::<Value>(line).unwrap()["train/loss"].as_f64();
        text.lines().filter_map(loss).collect()
    };
    let (fp32, bf16) = (losses("fp32"), losses("bf16"));
    assert_eq!((fp32.len(), bf16.len()), (8, 8));
    assert_ne!(fp32, bf16, "it is not the same arithmetic");
    for (a, b) in fp32.iter().zip(&bf16) {
        assert!((a - b).abs() < 0.05 * a, "{fp32:?} and {bf16:?}");
    }
}
