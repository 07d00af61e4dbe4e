//! Steps of BYOL, SimCLR, VICReg and supervised learning equal those of lightly's heads and losses on timm's ResNet.

use std::path::PathBuf;

use byol::Byol;
use jepa_host::device::autocast_bf16;
use jepa_plugin_api::nn::{covariance_loss, negative_cosine, nt_xent, spread, variance_loss};
use jepa_plugin_api::testing::{self, LinkedMethod};
use jepa_plugin_api::{Backbone, Batch, Method, RunFacts};
use jepa_tests::fixture::{Fixture, assert_close};
use jepa_tests::real::{Room, TINY_BACKBONE, demo_images, fixture, held_out_images, setting};
use jepa_tests::training::three_steps;
use serde_json::{Value, json};
use simclr::SimClr;
use sparse_resnet::ResNet;
use supervised::Supervised;
use tch::{Device, Kind, Reduction, Tensor};
use vicreg::VicReg;

const OUTPUT: f64 = 1e-5;
/// Of a backbone's batch norms, over few values, f32 leaves less than that: 9.9e-6 was measured for
/// backbone.layer2.0.bn1.weight of SimCLR, and PyTorch's own f32 may be off its f64 as far as this (`TOLERANCE` in the
/// generator). Everything else is held to 1e-5.
const BATCH_NORM_GRADIENT: f64 = 2e-5;

fn facts() -> RunFacts {
    RunFacts { batch_size: 10, classes: 7, image_size: 16, ..testing::facts() }
}

fn build<M: Method>(options: Value, facts: RunFacts) -> jepa_plugin_api::Result<LinkedMethod<M>> {
    let backbone = json!({ "stem": "small", "width": 4, "depths": [1, 1, 1] });
    testing::method(options, facts, |params| {
        ResNet::new("resnet18", serde_json::from_value(backbone.clone())?, params)
    })
}

/// A method as the fixture has it, with its weights and its batch.
fn at_fixture<M: Method>(fixture: &Fixture, views: &[&str]) -> (LinkedMethod<M>, Batch) {
    let built = build::<M>(fixture.json("config")["options"].clone(), facts()).expect("a method");
    for (name, value) in fixture.under("param.") {
        testing::set_tensor(&built.entries, name, &value).expect("the fixture's name and shape");
    }
    let views: Vec<Tensor> = views.iter().map(|name| fixture.tensor(&format!("input.{name}"))).collect();
    let batch = Batch { labels: fixture.tensor("input.labels"), ..testing::batch(views) };
    (built, batch)
}

/// The loss, its gradients and the running statistics of one step, and the figures that the fixture has too.
fn step_equals_lightly<M: Method>(views: &[&str], metrics: &[&str]) {
    let fixture = Fixture::read(&format!("{}_step", M::NAME));
    let (mut built, batch) = at_fixture::<M>(&fixture, views);
    let counters = built.entries.iter().filter(|entry| entry.name.ends_with("num_batches_tracked")).count();
    assert_eq!(built.entries.len() - counters, fixture.under("param.").len());

    let step = built.method.step(&batch).expect("a step");
    assert_close("loss", &step.loss, &fixture.tensor("output.loss"), OUTPUT);
    for name in metrics {
        let (_, value) = step.metrics.iter().find(|(metric, _)| metric == name).expect("a metric");
        assert_close(name, value, &fixture.tensor(&format!("output.{name}")), OUTPUT);
    }
    step.loss.backward();
    let zero: Vec<String> = serde_json::from_value(fixture.json("zero_gradient")).expect("names");
    let gradients = fixture.under("grad.");
    assert!(gradients.len() > 20);
    for (name, gradient) in gradients {
        let ours = built.tensor(name).expect("a parameter").grad();
        if zero.iter().any(|zero| zero == name) {
            assert!(f64::try_from(ours.abs().max()).expect("a number") < 1e-5, "{name}");
        } else {
            let of_batch_norm = name.starts_with("backbone.") && name.contains("bn");
            let tolerance = if of_batch_norm { BATCH_NORM_GRADIENT } else { OUTPUT };
            assert_close(&format!("gradient of {name}"), &ours, &gradient, tolerance);
        }
    }
    for (name, after) in fixture.under("after.") {
        assert_close(name, built.tensor(name).expect("a buffer"), &after, OUTPUT);
    }
    for target in built.entries.iter().filter(|entry| entry.name.starts_with("target")) {
        assert!(!target.tensor.grad().defined(), "{} has a gradient", target.name);
    }
    assert!(built.entries.iter().any(|entry| entry.name.starts_with(&format!("{}.", M::ENCODER))));
}

/// The losses of three steps with AdamW and EMA, and every tensor afterwards.
fn training_equals_lightly<M: Method>(views: &[&str]) {
    let fixture = Fixture::read(&format!("{}_training", M::NAME));
    let (mut built, batch) = at_fixture::<M>(&fixture, views);
    let losses =
        three_steps(&mut built, &fixture.json("config"), |method| method.step(&batch).expect("a step").loss);
    assert_close("losses", &losses, &fixture.tensor("output.losses"), OUTPUT);
    let after = fixture.under("after.");
    assert!(after.len() > 40);
    for (name, value) in after {
        assert_close(name, built.tensor(name).expect("a tensor"), &value, OUTPUT);
    }
}

#[test]
fn three_steps_of_training_equal_lightly() {
    training_equals_lightly::<Byol>(&["a", "b"]);
    training_equals_lightly::<SimClr>(&["a", "b"]);
    training_equals_lightly::<VicReg>(&["a", "b"]);
    training_equals_lightly::<Supervised>(&["a"]);
}

#[test]
fn a_step_of_byol_equals_lightly() {
    step_equals_lightly::<Byol>(&["a", "b"], &[]);
}

#[test]
fn a_step_of_simclr_equals_lightly() {
    step_equals_lightly::<SimClr>(&["a", "b"], &[]);
}

#[test]
fn a_step_of_vicreg_equals_lightly() {
    step_equals_lightly::<VicReg>(&["a", "b"], &[]);
}

#[test]
fn a_step_of_supervised_learning_equals_pytorch() {
    step_equals_lightly::<Supervised>(&["a"], &["top1", "top5"]);
}

#[test]
fn losses_equal_lightly_s() {
    let fixture = Fixture::read("losses");
    type Loss = fn(&Tensor, &Tensor) -> Tensor;
    let vicreg: Loss = |a, b| {
        a.mse_loss(b, Reduction::Mean) * 25.0
            + (variance_loss(a) + variance_loss(b)) * 12.5
            + covariance_loss(a)
            + covariance_loss(b)
    };
    let losses: [(&str, Loss); 3] =
        [("negative_cosine", negative_cosine), ("nt_xent", |a, b| nt_xent(a, b, 0.1).0), ("vicreg", vicreg)];
    for (name, loss) in losses {
        let [a, b] = ["input.a", "input.b"].map(|name| fixture.tensor(name).copy().set_requires_grad(true));
        let value = loss(&a, &b);
        assert_close(name, &value, &fixture.tensor(&format!("output.{name}")), OUTPUT);
        let in_bf16 = autocast_bf16(true, Device::Cpu, || loss(&a, &b)).expect("autocast");
        assert_close(name, &in_bf16, &value, 1e-6);
        value.backward();
        for (side, tensor) in [("a", &a), ("b", &b)] {
            assert_close(name, &tensor.grad(), &fixture.tensor(&format!("grad.{name}.{side}")), OUTPUT);
        }
    }
}

#[test]
fn figures_tell_a_healthy_run_from_a_collapsed_one() {
    let number = |tensor: Tensor| f64::try_from(tensor).expect("a number");
    let x = Fixture::read("losses").tensor("input.a");
    assert!(number(spread(&x)) > 0.7);
    assert!(number(spread(&(&x * 1e-4 + 1.0))) < 1e-3, "all features are nearly the same");

    assert_eq!(number(nt_xent(&x, &(&x * 2.0), 0.1).1), 1.0, "the other view is the nearest");
    let shuffled = x.roll([1], [0]);
    assert!(number(nt_xent(&x, &shuffled, 0.1).1) < 0.3, "it is some other image's");
    assert!((number(variance_loss(&(&x * 0.0))) - 0.99).abs() < 1e-6);
}

#[test]
fn in_bf16_losses_stay_in_f32_and_near_those_of_fp32() {
    fn check<M: Method>(views: &[&str], tolerance: f64) {
        let fixture = Fixture::read(&format!("{}_step", M::NAME));
        let (mut built, batch) = at_fixture::<M>(&fixture, views);
        let step = autocast_bf16(true, Device::Cpu, || built.method.step(&batch));
        let step = step.expect("autocast").expect("a step");
        assert_eq!(step.loss.kind(), Kind::Float);
        assert_close(M::NAME, &step.loss, &fixture.tensor("output.loss"), tolerance);
        step.loss.backward();
        let weight = built.tensor("backbone.conv1.weight").expect("a weight").grad();
        assert!(bool::try_from(weight.isfinite().all()).expect("a truth") && weight.kind() == Kind::Float);
    }
    check::<Byol>(&["a", "b"], 0.05);
    check::<SimClr>(&["a", "b"], 0.05);
    check::<VicReg>(&["a", "b"], 0.05);
    check::<Supervised>(&["a"], 0.05);
}

#[test]
fn a_last_validation_batch_of_one_image_has_a_finite_loss() {
    fn check<M: Method>(views: &[&str]) {
        let fixture = Fixture::read(&format!("{}_step", M::NAME));
        let (mut built, batch) = at_fixture::<M>(&fixture, views);
        let views = batch.views.iter().map(|view| view.narrow(0, 3, 1)).collect();
        let labels = batch.labels.narrow(0, 3, 1);
        let one = Batch { labels, train: false, ..testing::batch(views) };
        let step = built.method.step(&one).expect("a step");
        for (name, value) in [("loss".to_owned(), step.loss)].into_iter().chain(step.metrics) {
            assert!(f64::try_from(value).expect("a number").is_finite(), "{} {name}", M::NAME);
        }
    }
    check::<Byol>(&["a", "b"]);
    check::<SimClr>(&["a", "b"]);
    check::<VicReg>(&["a", "b"]);
    check::<Supervised>(&["a"]);
}

#[test]
fn what_cannot_be_learned_from_is_refused_with_the_key_to_change() {
    let refusal = |error: Option<jepa_plugin_api::Error>| error.expect("a refusal").to_string();
    let one = RunFacts { batch_size: 1, ..facts() };
    for message in [
        refusal(build::<SimClr>(json!({}), one.clone()).err()),
        refusal(build::<Byol>(json!({}), one.clone()).err()),
        refusal(build::<VicReg>(json!({}), one).err()),
    ] {
        assert!(message.contains("raise optimizer.batch_size"), "{message}");
    }
    let backwards = json!({ "crop_scale": [1.0, 0.2] });
    for (key, error) in [
        ("augment", build::<SimClr>(json!({ "augment": backwards }), facts()).err()),
        ("augment_2", build::<Byol>(json!({ "augment_2": backwards }), facts()).err()),
        ("augment", build::<VicReg>(json!({ "augment": backwards }), facts()).err()),
        ("augment", build::<Supervised>(json!({ "augment": backwards }), facts()).err()),
    ] {
        let message = refusal(error);
        assert!(message.contains(&format!("method.{key}.crop_scale is [1, 0.2]")), "{message}");
    }
    let one = RunFacts { classes: 1, ..facts() };
    let message = refusal(build::<Supervised>(json!({}), one).err());
    assert!(message.contains("the same label"), "{message}");
}

#[test]
fn every_method_trains_in_the_real_binary_with_its_own_views() {
    let methods: [(&str, &[&str], &str); 4] = [
        ("byol", &["method.hidden=16", "method.output=8"], "feature_spread"),
        ("simclr", &["method.hidden=16", "method.output=8"], "contrastive_accuracy"),
        ("vicreg", &["method.units=16", "method.layers=2"], "covariance"),
        ("supervised", &[], "top1"),
    ];
    for (method, options, figure) in methods {
        let room = Room::new();
        let fixed = [
            "data.size=16",
            "optimizer.batch_size=32",
            "optimizer.warmup_epochs=0",
            "trainer.max_steps=10",
            "trainer.device=cpu",
            "trainer.log_every_steps=10",
            "eval.train_limit=500",
            "eval.linear.epochs=2",
        ];
        let images = [setting("data.train", &demo_images()), setting("data.val", &held_out_images())];
        let arguments = ["--plugin", method].into_iter().chain(TINY_BACKBONE).chain(fixed);
        let arguments = arguments.chain(options.iter().copied()).map(str::to_owned).chain(images);
        room.run(arguments).expect(0);
        let metrics = std::fs::read_to_string(room.file(format!("runs/{method}/version_0/metrics.jsonl")));
        let metrics = metrics.expect("metrics");
        for name in [format!("\"train/{method}/{figure}\":"), format!("\"val/{method}/{figure}\":")] {
            assert!(metrics.contains(&name), "{name} in\n{metrics}");
        }
    }
}

#[test]
fn a_method_that_collapses_stops_and_a_healthy_one_goes_on() {
    let train = |method: &str, settings: &[&str], code: i32| {
        let room = Room::new();
        let fixed = [
            "data.size=16",
            "optimizer.batch_size=128",
            "optimizer.lr=0.01",
            "optimizer.warmup_epochs=0",
            "trainer.epochs=3",
            "trainer.threads=1",
            "trainer.device=cpu",
            "eval.collapse=stop",
            "eval.every_epochs=1",
            "eval.train_limit=10",
            "eval.linear.enabled=false",
            "eval.knn.enabled=false",
        ];
        let images = [setting("data.train", &demo_images()), setting("data.val", &held_out_images())];
        let arguments = ["--plugin", method].into_iter().chain(TINY_BACKBONE).chain(fixed);
        let arguments = arguments.chain(settings.iter().copied()).map(str::to_owned).chain(images);
        room.run(arguments).expect(code)
    };
    // Without its variance term VICReg draws everything together: its embeddings become one, whatever the batch norms
    // of a backbone do to keep features apart.
    let heads = ["method.units=32", "method.layers=2"];
    let alone = ["method.variance=0", "method.covariance=0"];
    let ended = train("vicreg", &[&heads[..], &alone].concat(), 5);
    ended.error_says(&[
        "features have collapsed at step ",
        "val/vicreg/spread is ",
        "eval.collapse_below = 0.01",
    ]);
    train("vicreg", &heads, 0);
    train("byol", &["method.hidden=32", "method.output=16", "trainer.epochs=1"], 0);
    train("simclr", &["method.hidden=32", "method.output=16", "trainer.epochs=1"], 0);
    train("cnn_jepa", &["method.mask.min_keep=1", "trainer.epochs=1"], 0);
}

#[test]
fn labels_that_cannot_be_learned_begin_no_run() {
    let room = Room::new();
    let packed = |name: &str, edit: &dyn Fn(&hdf5::File, &mut Vec<i64>)| {
        let path = room.file(name);
        std::fs::copy(held_out_images(), &path).expect("a copy");
        let file = hdf5::File::open_rw(&path).expect("HDF5");
        let mut labels: Vec<i64> = file.dataset("labels").expect("labels").read_raw().expect("integers");
        edit(&file, &mut labels);
        file.dataset("labels").expect("labels").write_raw(&labels).expect("written");
        path
    };
    let whole = held_out_images();
    let stray = packed("stray.h5", &|_, labels| labels[7] = 1_000_000);
    let partly = packed("partly.h5", &|_, labels| labels[3] = -1);
    let nine = packed("nine.h5", &|file, labels| {
        file.unlink("class_names").expect("names");
        labels.iter_mut().for_each(|label| *label = (*label).min(8));
    });
    let none = fixture("bad_no_labels.h5");
    let cases: [(&PathBuf, &PathBuf, &[&str]); 6] = [
        (&none, &whole, &["data.train: ", "bad_no_labels.h5 has no labels, and supervised needs one"]),
        (&partly, &whole, &["data.train: ", "partly.h5 has no label for image 3, and supervised needs one"]),
        (&whole, &none, &["data.val: ", "bad_no_labels.h5 has no labels, and supervised needs one"]),
        (&whole, &partly, &["data.val: ", "no label for image 3"]),
        (&nine, &whole, &["data.val: ", "has label 9, and the 9 classes of data.train are 0 to 8"]),
        (
            &stray,
            &whole,
            &["data.train: ", "image 7 has label 1000000, and the 10 classes of its class_names"],
        ),
    ];
    for (train, val, says) in cases {
        let fixed = ["optimizer.batch_size=2", "eval.every_epochs=0", "data.size=8"];
        let images = [setting("data.train", train), setting("data.val", val)];
        let arguments = ["--plugin", "supervised"].into_iter().chain(TINY_BACKBONE).chain(fixed);
        room.run(arguments.map(str::to_owned).chain(images)).expect(4).error_says(says);
        assert!(!room.file("runs").exists(), "{says:?}");
    }
}
