//! Steps of BYOL, SimCLR, VICReg and supervised learning equal those of lightly's heads and losses on timm's ResNet.

use byol::Byol;
use jepa_plugin_api::nn::{covariance_loss, negative_cosine, nt_xent, spread, variance_loss};
use jepa_plugin_api::testing::{self, LinkedMethod};
use jepa_plugin_api::{Backbone, Batch, Method, RunFacts};
use jepa_tests::fixture::{Fixture, assert_close};
use jepa_tests::real::{Room, TINY_BACKBONE, demo_images, fixture, held_out_images, setting};
use serde_json::{Value, json};
use simclr::SimClr;
use sparse_resnet::ResNet;
use supervised::Supervised;
use tch::{Kind, Reduction, Tensor};
use vicreg::VicReg;

const OUTPUT: f64 = 1e-5;
const GRADIENT: f64 = 1e-4;

fn facts() -> RunFacts {
    RunFacts { batch_size: 10, classes: 7, image_size: 16, ..testing::facts() }
}

fn build<M: Method>(options: Value, facts: RunFacts) -> jepa_plugin_api::Result<LinkedMethod<M>> {
    let backbone = json!({ "stem": "small", "width": 4, "depths": [1, 1, 1] });
    testing::method(options, facts, |params| {
        ResNet::new("resnet18", serde_json::from_value(backbone.clone())?, params)
    })
}

/// The loss, its gradients and the running statistics of one step, and the figures that the fixture has too.
fn step_equals_lightly<M: Method>(views: &[&str], metrics: &[&str]) {
    let fixture = Fixture::read(&format!("{}_step", M::NAME));
    let mut built = build::<M>(fixture.json("config")["options"].clone(), facts()).expect("a method");
    for (name, value) in fixture.under("param.") {
        testing::set_tensor(&built.entries, name, &value).expect("the fixture's name and shape");
    }
    let counters = built.entries.iter().filter(|entry| entry.name.ends_with("num_batches_tracked")).count();
    assert_eq!(built.entries.len() - counters, fixture.under("param.").len());

    let views: Vec<Tensor> = views.iter().map(|name| fixture.tensor(&format!("input.{name}"))).collect();
    let batch = Batch { labels: fixture.tensor("input.labels"), ..testing::batch(views) };
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
            assert_close(&format!("gradient of {name}"), &ours, &gradient, GRADIENT);
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
    for facts in [RunFacts { classes: 0, ..facts() }, RunFacts { unlabelled: 3, ..facts() }] {
        let message = refusal(build::<Supervised>(json!({}), facts).err());
        assert!(message.contains("a label for every image of data.train"), "{message}");
    }
    let mut built = build::<Supervised>(json!({}), facts()).expect("a method");
    let images = Tensor::zeros([2, 3, 16, 16], (Kind::Float, tch::Device::Cpu));
    let batch = Batch { labels: Tensor::from_slice(&[1i64, 7]), ..testing::batch(vec![images]) };
    let message = refusal(built.method.step(&batch).err());
    assert!(message.contains("labels from 1 to 7 do not fit the 7 classes"), "{message}");
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
fn supervised_learning_without_labels_begins_no_run() {
    let room = Room::new();
    let images = setting("data.train", &fixture("bad_no_labels.h5"));
    let arguments = ["--plugin", "supervised", "optimizer.batch_size=2", &images];
    let ended = room.run(arguments.into_iter().chain(TINY_BACKBONE)).expect(2);
    ended.error_says(&["plugin `supervised` refused its settings", "a label for every image of data.train"]);
    assert!(!room.file("runs").exists());
}
