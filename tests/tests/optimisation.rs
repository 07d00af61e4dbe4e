//! How a run with the real binary learns: what accumulated batches, the learning rate and weight decay come to.

use std::fs;

use jepa_host::checkpoint::read_tensors;
use jepa_tests::fixture::{assert_close, relative_error};
use jepa_tests::real::{Ended, Room, TINY_BACKBONE, checkpoints, demo_images, setting};
use serde_json::Value;
use tch::Tensor;

/// Runs 6 steps of the faulty method, whose loss has the gradient of a mean over images.
fn train(room: &Room, settings: &[&str]) -> Ended {
    let fixed = [
        "data.size=8",
        "data.threads=1",
        "optimizer.algorithm=sgd",
        "optimizer.lr=0.1",
        "optimizer.warmup_epochs=0",
        "trainer.max_steps=6",
        "trainer.threads=1",
        "trainer.device=cpu",
        "trainer.log_every_steps=1",
        "eval.every_epochs=0",
        "eval.at_start=false",
    ];
    let images = setting("data.train", &demo_images());
    let arguments = ["--plugin", "faulty_plugin", &images].into_iter().chain(TINY_BACKBONE).chain(fixed);
    room.run(arguments.chain(settings.iter().copied())).expect(0)
}

/// The only parameter, after the last step.
fn colour(room: &Room) -> Tensor {
    let newest = checkpoints(&room.file("runs/faulty/version_0/checkpoints")).pop().unwrap();
    let tensors = read_tensors(&newest.join("model.safetensors")).unwrap();
    tensors.into_iter().find(|(name, _)| name == "online.colour").unwrap().1
}

/// The figure `name` of each step.
fn logged(room: &Room, name: &str) -> Vec<f64> {
    let lines = fs::read_to_string(room.file("runs/faulty/version_0/metrics.jsonl")).unwrap();
    let record = |line: &str| serde_json::from_str::<Value>(line).unwrap();
    lines.lines().filter_map(|line| record(line)[name].as_f64()).collect()
}

#[test]
fn accumulated_batches_are_one_large_batch_to_a_mean_loss() {
    let (one, four, other) = (Room::new(), Room::new(), Room::new());
    train(&one, &["optimizer.batch_size=32"]);
    train(&four, &["optimizer.batch_size=8", "trainer.accumulate=4"]);
    assert_close("the colour", &colour(&four), &colour(&one), 1e-6);
    let norms = |room| Tensor::from_slice(&logged(room, "train/grad_norm"));
    assert_close("the gradients' norms", &norms(&four), &norms(&one), 1e-5);

    // The comparison sees it when other images, or fewer, make up a step.
    train(&other, &["optimizer.batch_size=8"]);
    assert!(relative_error(&colour(&other), &colour(&one)) > 1e-3);
}

#[test]
fn the_logged_rates_are_those_that_were_asked_for() {
    let room = Room::new();
    // 8,000 images: 125 steps of 4 × 16 images.
    let ended = train(
        &room,
        &[
            "trainer.epochs=1",
            "optimizer.batch_size=16",
            "trainer.accumulate=4",
            "optimizer.lr=0.4",
            "optimizer.lr_scale=linear",
            "optimizer.weight_decay=0.04",
            "optimizer.weight_decay_end=0.4",
            "optimizer.betas=[0.5, 0.5]",
        ],
    );
    let cosine = |step: f64, from: f64, to: f64| {
        to + (from - to) * (1.0 + (std::f64::consts::PI * step / 124.0).cos()) / 2.0
    };
    for (name, from, to) in [("train/lr", 0.1, 1e-4), ("train/weight_decay", 0.04, 0.4)] {
        let values = logged(&room, name);
        assert_eq!(values.len(), 6, "{name}");
        for (step, value) in values.into_iter().enumerate() {
            let expected = cosine(step as f64, from, to);
            assert!((value - expected).abs() < 1e-9, "{name} of step {step} is {value}, not {expected}");
        }
    }
    for says in [
        "the peak learning rate is 0.1: optimizer.lr is 0.4 for 256 images, and a step has 64",
        "optimizer.betas has no effect: optimizer.algorithm is \"sgd\"",
    ] {
        assert!(ended.stderr.contains(says), "not said: {says}\n{}", ended.stderr);
    }
    let config = fs::read_to_string(room.file("runs/faulty/version_0/config.toml")).unwrap();
    assert!(config.contains("\nlr = 0.4 "), "the configuration keeps what was set:\n{config}");
}
