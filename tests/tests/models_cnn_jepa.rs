//! A step of CNN-JEPA equals PyTorch's: features, loss, gradients and running statistics, with given masks.

use std::sync::{Mutex, PoisonError};

use cnn_jepa::{CnnJepa, Masks};
use jepa_plugin_api::nn::{l2_normalize, masked_mean, smooth_l1};
use jepa_plugin_api::testing::{self, LinkedMethod};
use jepa_plugin_api::{Backbone, Method, RunFacts};
use jepa_tests::fixture::{Fixture, assert_close};
use jepa_tests::training::three_steps;
use serde_json::{Value, json};
use sparse_convnext::ConvNeXt;
use sparse_resnet::ResNet;
use tch::{Kind, Tensor};

const TOLERANCE: f64 = 1e-5;

fn build(method: Value, backbone: Value, facts: RunFacts) -> LinkedMethod<CnnJepa> {
    let resnet = |params: &_| ResNet::new("resnet18", serde_json::from_value(backbone.clone())?, params);
    testing::method(method, facts, resnet).expect("a method")
}

fn equals_fixture(name: &str) {
    let fixture = Fixture::read(name);
    let config = fixture.json("config");
    let backbone = &config["backbone"];
    let options = json!({ "predictor": config["predictor"], "projection": config["projection"] });
    let backbone =
        json!({ "stem": backbone["stem"], "width": backbone["width"], "depths": backbone["depths"] });
    let built = seeded(0, || build(options, backbone, testing::facts()));
    for (name, value) in fixture.under("param.") {
        testing::set_tensor(&built.entries, name, &value).expect("the fixture's name and shape");
    }
    let counters = built.entries.iter().filter(|entry| entry.name.ends_with("num_batches_tracked")).count();
    assert_eq!(built.entries.len() - counters, fixture.under("param.").len());
    let images = fixture.tensor("input.x");
    let masks =
        Masks { context: fixture.mask("input.context_mask"), target: fixture.mask("input.target_mask") };

    // Once for the features, and from the same state for the loss: running statistics move in training.
    let output = built.method.forward(&images, &masks.context, true).expect("features");
    assert_close("context", &output.context, &fixture.tensor("output.context_map"), TOLERANCE);
    assert_close("prediction", &output.prediction, &fixture.tensor("output.prediction"), TOLERANCE);
    assert_close("target", &output.target, &fixture.tensor("output.target_map"), TOLERANCE);
    for (name, value) in fixture.under("param.") {
        testing::set_tensor(&built.entries, name, &value).expect("the fixture's name and shape");
    }
    let step = built.method.step_with(&images, &masks, true).expect("a step");
    assert_close("loss", &step.loss, &fixture.tensor("output.loss"), TOLERANCE);
    step.loss.backward();

    let zero: Vec<String> = serde_json::from_value(fixture.json("zero_gradient")).expect("names");
    for (name, gradient) in fixture.under("grad.") {
        let ours = built.tensor(name).expect("a parameter").grad();
        if zero.iter().any(|zero| zero == name) {
            assert!(f64::try_from(ours.abs().max()).expect("a number") < 1e-6, "{name}");
        } else {
            assert_close(&format!("gradient of {name}"), &ours, &gradient, TOLERANCE);
        }
    }
    for (name, after) in fixture.under("after.").into_iter().filter(|(name, _)| name.contains("running_")) {
        assert_close(name, built.tensor(name).expect("a buffer"), &after, TOLERANCE);
    }
    for target in built.entries.iter().filter(|entry| entry.name.starts_with("target")) {
        assert!(!target.tensor.grad().defined(), "{} has a gradient", target.name);
    }
    let pairs: Vec<_> = built.ema.iter().map(|pair| (pair.online.as_str(), pair.target.as_str())).collect();
    let with_projection = config["projection"].as_bool().expect("a switch");
    let expected = [("context", "target"), ("projection", "target_projection")];
    assert_eq!(pairs, expected[..1 + usize::from(with_projection)]);
}

#[test]
fn a_step_with_separable_convolutions_equals_pytorch() {
    equals_fixture("cnn_jepa_step");
}

#[test]
fn a_step_with_plain_convolutions_and_projection_equals_pytorch() {
    equals_fixture("cnn_jepa_step_plain");
}

/// The losses of three steps with AdamW and EMA, and every tensor afterwards.
fn training_equals_fixture(name: &str) {
    let fixture = Fixture::read(name);
    let config = fixture.json("config");
    let options = json!({ "predictor": config["predictor"], "projection": config["projection"] });
    let backbone = &config["backbone"];
    let (stem, width, depths) = (&backbone["stem"], &backbone["width"], &backbone["depths"]);
    let network = json!({ "stem": stem, "width": width, "depths": depths });
    let architecture = backbone["arch"].as_str().expect("a name");
    let built = if architecture.starts_with("convnext") {
        seeded(0, || {
            let options = options.clone();
            testing::method(options, testing::facts(), |params| {
                ConvNeXt::new(architecture, serde_json::from_value(network.clone())?, params)
            })
        })
    } else {
        seeded(0, || Ok(build(options.clone(), network.clone(), testing::facts())))
    };
    let mut built: LinkedMethod<CnnJepa> = built.expect("a method");
    for (name, value) in fixture.under("param.") {
        testing::set_tensor(&built.entries, name, &value).expect("the fixture's name and shape");
    }
    let images = fixture.tensor("input.x");
    let masks =
        Masks { context: fixture.mask("input.context_mask"), target: fixture.mask("input.target_mask") };
    let losses = three_steps(&mut built, &config, |method| {
        method.step_with(&images, &masks, true).expect("a step").loss
    });
    assert_close("losses", &losses, &fixture.tensor("output.losses"), TOLERANCE);
    let after = fixture.under("after.");
    assert!(after.len() > 40);
    for (name, value) in after {
        assert_close(name, built.tensor(name).expect("a tensor"), &value, TOLERANCE);
    }
}

#[test]
fn three_steps_of_training_equal_pytorch() {
    training_equals_fixture("cnn_jepa_training");
}

#[test]
fn three_steps_of_training_on_a_convnext_equal_pytorch() {
    training_equals_fixture("cnn_jepa_convnext_training");
}

#[test]
fn the_loss_equals_pytorch_also_where_it_is_linear_or_empty() {
    let fixture = Fixture::read("jepa_loss");
    for case in ["some", "none"] {
        let prediction = fixture.tensor("input.prediction").copy().set_requires_grad(true);
        let unit = l2_normalize(&prediction, 1);
        let target = l2_normalize(&fixture.tensor("input.target"), 1);
        let per_cell = smooth_l1(&unit, &target, 1.0).sum_dim_intlist([1].as_slice(), true, Kind::Float);
        let loss = masked_mean(&per_cell, &fixture.mask(&format!("input.mask.{case}")));
        loss.backward();
        assert_close(case, &loss, &fixture.tensor(&format!("output.loss.{case}")), TOLERANCE);
        let expected = fixture.tensor(&format!("grad.prediction.{case}"));
        assert_close(case, &prediction.grad(), &expected, TOLERANCE);
    }
}

/// What `draw` makes of libtorch's generator, which all threads share: nothing here draws from it elsewhere.
fn seeded<T>(seed: i64, draw: impl FnOnce() -> T) -> T {
    static GENERATOR: Mutex<()> = Mutex::new(());
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(seed);
    draw()
}

/// The demo's network at a smaller width.
fn small() -> LinkedMethod<CnnJepa> {
    let backbone = json!({ "stem": "small", "width": 8, "depths": [1, 1, 1] });
    seeded(3, || build(json!({}), backbone, testing::facts()))
}

fn images(count: i64) -> Tensor {
    seeded(4, || Tensor::randn([count, 3, 32, 32], (Kind::Float, tch::Device::Cpu)))
}

#[test]
fn steps_give_loss_and_figures_and_validation_changes_nothing() {
    let mut built = small();
    let training = testing::batch(vec![images(4)]);
    let step = built.method.step(&training).expect("a step");
    let loss = f64::try_from(&step.loss).expect("a number");
    assert!(loss > 0.0 && loss < 4.0, "unit vectors are not {loss} apart");
    let names: Vec<_> = step.metrics.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["context_share", "target_share", "prediction_spread", "spread"]);
    for (name, value) in &step.metrics {
        let value = f64::try_from(value).expect("a number");
        assert!(value > 0.0 && value < 1.5, "{name} is {value}");
    }

    let before: Vec<Tensor> = built.entries.iter().map(|entry| entry.tensor.copy()).collect();
    let validation = jepa_plugin_api::Batch { train: false, ..testing::batch(vec![images(4)]) };
    built.method.step(&validation).expect("a step");
    let features = built.method.encode(&images(5)).expect("features");
    assert_eq!(features.size(), [5, 32]);
    assert!(!features.requires_grad());
    for (entry, before) in built.entries.iter().zip(&before) {
        assert!(entry.tensor.equal(before), "validation changed {}", entry.name);
    }
}

#[test]
fn features_come_from_the_target_encoder() {
    let mut built = small();
    let before = built.method.encode(&images(2)).expect("features");
    for (name, matters) in [("context.conv1.weight", false), ("target.conv1.weight", true)] {
        let other = built.tensor(name).expect("a weight") * 2 + 1;
        testing::set_tensor(&built.entries, name, &other).expect("the same shape");
        let changed = !before.equal(&built.method.encode(&images(2)).expect("features"));
        assert_eq!(changed, matters, "{name}");
    }
}

#[test]
fn the_same_seed_makes_the_same_network() {
    let (a, b) = (small(), small());
    for (a, b) in a.entries.iter().zip(&b.entries) {
        assert!(a.name == b.name && a.tensor.equal(&b.tensor), "{}", a.name);
    }
    let token = a.tensor("mask_token").expect("the token");
    assert_eq!(token.size(), [1, 32, 1, 1]);
    assert!(f64::try_from(token.abs().max()).expect("a number") <= 0.02);
}

#[test]
fn bad_options_are_refused_by_name() {
    let refused = |options: Value, image_size: i64| -> String {
        let resnet =
            |params: &_| ResNet::new("resnet18", serde_json::from_value(json!({ "width": 4 }))?, params);
        let facts = RunFacts { image_size, ..testing::facts() };
        let built = seeded(0, || testing::method::<CnnJepa, _>(options, facts, resnet));
        let error = built.err().expect("an error");
        format!("{error:#}")
    };
    assert!(refused(json!({ "maks": {} }), 224).contains("maks"));
    assert!(refused(json!({ "predictor": { "kernel": 4 } }), 224).contains("method.predictor.kernel"));
    assert!(refused(json!({ "predictor": { "depth": 0 } }), 224).contains("method.predictor.depth"));
    assert!(refused(json!({ "crop_scale": [0.0, 1.0] }), 224).contains("method.crop_scale"));
    assert!(refused(json!({}), 32).contains("data.size"), "one cell has no room for context and targets");
    assert!(refused(json!({}), 100).contains("multiple of 32"));
}
