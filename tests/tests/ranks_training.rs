//! n ranks with b images each train as one process does with n · b: shown by the real binary with every method.

use std::fs;
use std::path::PathBuf;

use jepa_tests::ranks;
use jepa_tests::real::{Room, checkpoints, demo_images, held_out_images, is_of_a_clock, records, setting};
use safetensors::SafeTensors;
use serde_json::Value;

/// Settings of a run of a few steps of 16 images, every one of them recorded.
const SHORT: [&str; 12] = [
    "run.name=short",
    "data.threads=1",
    "data.size=16",
    "optimizer.batch_size=16",
    "optimizer.warmup_epochs=0",
    "trainer.device=cpu",
    "trainer.threads=1",
    "trainer.log_every_steps=1",
    "eval.every_epochs=0",
    "eval.at_start=false",
    "backbone.width=8",
    "backbone.stem=small",
];

/// Each method, sparse and dense, over batch norms and layer norms.
const METHODS: [(&str, &[&str]); 6] = [
    ("cnn_jepa", &["backbone.name=resnet18", "method.projection=true", "method.mask.min_keep=1"]),
    (
        "cnn_jepa",
        &[
            "backbone.name=convnext_tiny",
            "backbone.depths=[1,1,1]",
            "backbone.layer_scale=1",
            "method.mask.min_keep=1",
        ],
    ),
    ("byol", &["backbone.name=resnet18", "method.hidden=32", "method.output=16"]),
    ("simclr", &["backbone.name=resnet18", "method.hidden=32", "method.output=16"]),
    ("vicreg", &["backbone.name=resnet18", "method.units=32", "method.layers=2"]),
    ("supervised", &["backbone.name=resnet18"]),
];

fn train(size: u32, method: (&str, &[&str]), settings: &[&str]) -> (Room, Vec<Value>) {
    let room = Room::new();
    let images = setting("data.train", &demo_images());
    let plugin = ["--plugin", method.0, &images];
    let arguments: Vec<&str> = [&plugin, &SHORT[..], method.1, settings].concat();
    ranks::run(&room, size, &arguments);
    let records = records(&run(&room));
    (room, records)
}

fn run(room: &Room) -> PathBuf {
    room.file("runs/short/version_0")
}

/// All parameters of the last checkpoint, one after the other.
fn parameters(room: &Room) -> Vec<f64> {
    let folder = run(room).join("checkpoints");
    let bytes = fs::read(checkpoints(&folder).last().unwrap().join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = tensors.names();
    names.retain(|name| !name.contains("running_") && !name.contains("num_batches"));
    names.sort();
    let numbers = names.into_iter().flat_map(|name| {
        let data = tensors.tensor(name).unwrap().data().to_vec();
        data.chunks(4)
            .map(|bytes| f64::from(f32::from_le_bytes(bytes.try_into().unwrap())))
            .collect::<Vec<_>>()
    });
    numbers.collect()
}

/// ‖a − b‖ / ‖b − origin‖.
fn apart(a: &[f64], b: &[f64], origin: &[f64]) -> f64 {
    let norm = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt();
    norm(a, b) / norm(b, origin)
}

fn losses(records: &[Value]) -> Vec<f64> {
    records.iter().filter_map(|record| record["train/loss"].as_f64()).collect()
}

/// With plain SGD, what a step has moved is the gradient.
const GRADIENT: [&str; 4] =
    ["optimizer.algorithm=sgd", "optimizer.momentum=0", "optimizer.weight_decay=0", "trainer.max_steps=1"];

#[test]
fn losses_and_gradients_are_those_of_one_process() {
    for method in METHODS {
        let one = |size: u32, lr: &str| train(size, method, &[&GRADIENT[..], &[lr]].concat());
        let (room, records) = one(1, "optimizer.lr=1e-30");
        let (origin, loss) = (parameters(&room), losses(&records));
        let alone = parameters(&one(1, "optimizer.lr=1").0);
        for size in [2, 4] {
            let (room, records) = one(size, "optimizer.lr=1");
            let what = format!("{} with {} on {size} ranks", method.0, method.1[0]);
            let off = (losses(&records)[0] - loss[0]).abs() / loss[0].abs();
            assert!(off < 1e-5, "{what}: loss {records:?} instead of {loss:?}");
            let off = apart(&parameters(&room), &alone, &origin);
            eprintln!("{what}: {off:.1e}");
            assert!(off < 1e-5, "{what}: gradients are {off:.1e} apart");
        }
    }
}

/// Values of every figure that is no time, by step and name.
fn figures(records: &[Value]) -> Vec<(String, f64)> {
    let of_record = |record: &Value| {
        let step = record["step"].clone();
        let fields = record.as_object().unwrap().clone().into_iter().filter(|(name, _)| !is_of_a_clock(name));
        let numbers = fields.filter_map(|(name, value)| Some((name, value.as_f64()?)));
        numbers.map(move |(name, value)| (format!("{step} {name}"), value)).collect::<Vec<_>>()
    };
    records.iter().flat_map(of_record).collect()
}

#[test]
fn ten_steps_with_validation_and_evaluation_stay_together() {
    let held_out = setting("data.val", &held_out_images());
    let settings = [
        &held_out,
        "trainer.max_steps=10",
        "trainer.accumulate=2",
        "trainer.clip=0.5",
        "optimizer.lr=1e-4",
        "eval.every_epochs=1",
        "eval.at_start=true",
        "eval.train_limit=500",
        "eval.linear.epochs=2",
        "eval.contrastive.enabled=true",
        "eval.contrastive.images=64",
    ];
    for method in METHODS {
        let (_, alone) = train(1, method, &settings);
        let alone = figures(&alone);
        assert!(alone.iter().any(|(name, _)| name == "10 eval/linear_top1"), "{alone:?}");
        assert!(alone.iter().any(|(name, _)| name == "10 val/loss"), "{alone:?}");
        for size in [2, 4] {
            let (_, together) = train(size, method, &settings);
            let together = figures(&together);
            let what = format!("{} with {} on {size} ranks", method.0, method.1[0]);
            let names =
                |figures: &[(String, f64)]| figures.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
            assert_eq!(names(&alone), names(&together), "{what}");
            for ((name, alone), (_, together)) in alone.iter().zip(&together) {
                // An image more or less in 500 may be the nearest, whatever the share.
                let is_share = name.contains("top") || name.contains("accuracy");
                let (tolerance, scale) = if is_share { (0.02, 1.0) } else { (2e-3, alone.abs().max(1e-3)) };
                let off = (alone - together).abs() / scale;
                assert!(off <= tolerance, "{what}: {name} is {together}, and {alone} alone");
            }
        }
    }
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks_and_no_image_is_lost_or_repeated() {
    // The order of images decides the losses, whoever computes them.
    let method = METHODS[5];
    let settings = |steps: &'static str| [steps, "optimizer.lr=1e-4", "checkpoint.every_steps=4"];
    let (_, alone) = train(1, method, &settings("trainer.max_steps=12"));
    let (room, _) = train(2, method, &settings("trainer.max_steps=5"));
    for (size, steps) in [(4, "trainer.max_steps=9"), (1, "trainer.max_steps=12")] {
        let images = setting("data.train", &demo_images());
        let plugin = ["--plugin", method.0, &images, "--resume", "auto"];
        let arguments: Vec<&str> = [&plugin, &SHORT[..], method.1, &settings(steps)].concat();
        if size == 4 {
            for (number, rank) in ranks::start_all(&room, size, &arguments).into_iter().enumerate() {
                let ended = rank.wait().expect(if number == 0 { 2 } else { 1 });
                ended.error_says(&["the number of ranks was 2 and is 4", "--allow-changes"]);
            }
        }
        ranks::run(&room, size, &[&arguments[..], &["--allow-changes"]].concat());
    }
    let (alone, changing) = (losses(&alone), losses(&records(&run(&room))));
    assert_eq!((alone.len(), changing.len()), (12, 12));
    for (step, (alone, changing)) in alone.iter().zip(&changing).enumerate() {
        assert!((alone - changing).abs() < 1e-4, "step {step}: {changing}, and {alone} alone");
    }
}
