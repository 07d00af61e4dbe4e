//! Our ConvNeXts compute what timm's compute, and in sparse mode what a masked dense emulation in PyTorch computes.

use std::sync::{Mutex, MutexGuard, PoisonError};

use jepa_plugin_api::params::Entry;
use jepa_plugin_api::{Backbone, NormKind, Params, testing};
use jepa_tests::fixture::{self, Fixture, assert_close, relative_error};
use jepa_tests::real::{Room, demo_images, setting};
use serde_json::{Value, json};
use sparse_convnext::ConvNeXt;
use tch::{Device, Kind, Tensor};

const TOLERANCE: f64 = 1e-5;

/// Held by whoever draws from torch's generator, which all threads share.
static GENERATOR: Mutex<()> = Mutex::new(());

fn generator() -> MutexGuard<'static, ()> {
    GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
}

fn build(name: &str, options: Value) -> (ConvNeXt, Vec<Entry>) {
    let params = Params::new(Device::Cpu);
    let options = serde_json::from_value(options).expect("options");
    let _alone = generator();
    let model = ConvNeXt::new(name, options, &params).expect("a ConvNeXt");
    (model, params.entries())
}

/// The ConvNeXt of a fixture, with its weights.
fn build_like(fixture: &Fixture) -> (ConvNeXt, Vec<Entry>) {
    let config = fixture.json("config");
    let options: Value = ["stem", "width", "depths", "drop_path"]
        .iter()
        .map(|key| ((*key).to_owned(), config[*key].clone()))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let (model, entries) = build(config["arch"].as_str().expect("a name"), options);
    for (name, value) in fixture.under("param.") {
        testing::set_tensor(&entries, name, &value).expect("timm's name and shape");
    }
    assert_eq!(entries.len(), fixture.under("param.").len());
    assert_eq!(model.info().downsample, config["downsample_ratio"].as_i64().expect("r"));
    assert_eq!(model.info().norm, NormKind::Layer);
    (model, entries)
}

/// A forward pass in training mode, whose stochastic depth draws what timm's drew for the fixture.
fn training_pass(model: &ConvNeXt, fixture: &Fixture, images: &Tensor, mask: Option<&Tensor>) -> Tensor {
    let _alone = generator();
    tch::manual_seed(fixture.json("config")["draws"].as_i64().expect("a seed"));
    model.forward(images, mask, true).expect("a map")
}

/// Evaluation pass; training pass with gradients.
fn equals_fixture(name: &str, masked: bool) {
    let fixture = Fixture::read(name);
    let (model, entries) = build_like(&fixture);
    let mask = masked.then(|| fixture.mask("input.mask"));
    let images = fixture.tensor("input.x").set_requires_grad(true);

    let evaluated = tch::no_grad(|| model.forward(&images, mask.as_ref(), false)).expect("a map");
    assert_close("evaluation", &evaluated, &fixture.tensor("output.eval.feature_map"), TOLERANCE);

    let map = training_pass(&model, &fixture, &images, mask.as_ref());
    assert_close("training", &map, &fixture.tensor("output.train.feature_map"), TOLERANCE);
    assert_eq!(map.size()[1], model.info().channels);
    (&map * fixture.tensor("input.loss_weights")).mean(Kind::Float).backward();

    assert_close("gradient of the images", &images.grad(), &fixture.tensor("grad.input.x"), TOLERANCE);
    let gradients: Vec<_> =
        fixture.under("grad.").into_iter().filter(|(name, _)| *name != "input.x").collect();
    assert_eq!(gradients.len(), entries.len(), "the fixture has what is to be compared");
    for (name, gradient) in gradients {
        let tensor = testing::tensor(&entries, name).expect("a parameter");
        assert_close(&format!("gradient of {name}"), &tensor.grad(), &gradient, TOLERANCE);
    }

    if let Some(mask) = mask {
        let hidden = mask.logical_not();
        for map in [&evaluated, &map] {
            assert_eq!(f64::try_from((map * &hidden).abs().max()).expect("a number"), 0.0);
        }
        let hidden_pixels =
            hidden.to_kind(Kind::Float).upsample_nearest2d([images.size()[2], images.size()[3]], None, None);
        assert_eq!(f64::try_from((images.grad() * hidden_pixels).abs().max()).expect("a number"), 0.0);
    }
}

#[test]
fn four_stages_equal_timm() {
    equals_fixture("convnext_conv_mlp", false);
}

#[test]
fn linear_layers_equal_timm() {
    equals_fixture("convnext_linear_mlp", false);
}

#[test]
fn the_small_stem_equals_timm_blocks() {
    equals_fixture("convnext_small_stem", false);
}

#[test]
fn stochastic_depth_equals_timm() {
    equals_fixture("convnext_drop_path", false);
}

#[test]
fn four_sparse_stages_equal_the_masked_emulation() {
    equals_fixture("sparse_convnext_conv_mlp", true);
}

#[test]
fn sparse_linear_layers_equal_the_masked_emulation() {
    equals_fixture("sparse_convnext_linear_mlp", true);
}

#[test]
fn a_sparse_small_stem_equals_the_masked_emulation() {
    equals_fixture("sparse_convnext_small_stem", true);
}

#[test]
fn sparse_stochastic_depth_equals_the_masked_emulation() {
    equals_fixture("sparse_convnext_drop_path", true);
}

#[test]
fn showing_everything_equals_dense() {
    let fixture = Fixture::read("convnext_drop_path");
    let images = fixture.tensor("input.x");
    let run = |mask: Option<&Tensor>| {
        let (model, entries) = build_like(&fixture);
        let map = training_pass(&model, &fixture, &images, mask);
        (&map * fixture.tensor("input.loss_weights")).mean(Kind::Float).backward();
        let gradient = testing::tensor(&entries, "stem.0.weight").expect("a weight").grad();
        (map, gradient)
    };
    let everything = Tensor::ones([4, 1, 4, 4], (Kind::Bool, Device::Cpu));
    let ((dense, dense_gradient), (sparse, sparse_gradient)) = (run(None), run(Some(&everything)));
    assert_close("the map", &sparse, &dense, TOLERANCE);
    assert_close("the gradient of the stem", &sparse_gradient, &dense_gradient, TOLERANCE);
}

#[test]
fn what_is_hidden_is_not_seen() {
    let fixture = Fixture::read("sparse_convnext_linear_mlp");
    let mask = fixture.mask("input.mask");
    let pixels = mask.to_kind(Kind::Float).upsample_nearest2d([48, 48], None, None).to_kind(Kind::Bool);
    let images = fixture.tensor("input.x");
    let disturbed = images.where_self(&pixels, &Tensor::full_like(&images, f64::NAN));
    let run = |images: &Tensor| build_like(&fixture).0.forward(images, Some(&mask), true).expect("a map");
    assert!(run(&images).equal(&run(&disturbed)));
}

#[test]
fn names_shapes_and_order_are_timms() {
    let text = std::fs::read_to_string(fixture::path("timm_convnext_names.json")).expect("the names");
    let names: Value = serde_json::from_str(&text).expect("JSON");
    let models = names["models"].as_object().expect("models");
    assert_eq!(models.len(), ConvNeXt::NAMES.len());
    for (architecture, theirs) in models {
        let (_, entries) = build(architecture, json!({}));
        let ours: Vec<Value> = entries.iter().map(|entry| json!([entry.name, entry.tensor.size()])).collect();
        assert_eq!(theirs, &Value::Array(ours), "{architecture}");
    }
}

#[test]
fn values_begin_as_timms() {
    let (_, entries) = build("convnext_atto", json!({}));
    let tensor = |name: &str| testing::tensor(&entries, name).expect(name);
    let number = |x: Tensor| f64::try_from(x).expect("a number");
    for weight in ["stages.1.downsample.1.weight", "stages.2.blocks.0.mlp.fc1.weight"] {
        assert!((number(tensor(weight).std(true)) - 0.02).abs() < 5e-4, "{weight}");
    }
    let (_, linear) = build("convnext_tiny", json!({ "depths": [1] }));
    let weight = testing::tensor(&linear, "stages.0.blocks.0.mlp.fc2.weight").expect("a weight");
    assert!((number(weight.std(true)) - 0.02).abs() < 5e-4);
    for bias in ["stem.0.bias", "stages.2.blocks.0.mlp.fc1.bias", "stages.2.blocks.0.norm.bias"] {
        assert_eq!(number(tensor(bias).abs().max()), 0.0, "{bias}");
    }
    let gamma = tensor("stages.3.blocks.1.gamma");
    assert!(relative_error(gamma, &Tensor::full_like(gamma, 1e-6)) < 1e-6);
}

#[test]
fn errors_say_what_to_change() {
    let error = |name: &str, options: Value| -> String {
        let options = serde_json::from_value(options).expect("options");
        ConvNeXt::new(name, options, &Params::new(Device::Cpu)).err().expect("an error").to_string()
    };
    assert!(error("convnext_atto", json!({ "depths": [] })).contains("backbone.depths"));
    assert!(error("convnext_atto", json!({ "depths": [1, 0] })).contains("backbone.depths"));
    assert!(error("convnext_atto", json!({ "width": 0 })).contains("backbone.width"));
    assert!(error("convnext_atto", json!({ "drop_path": 1.0 })).contains("backbone.drop_path"));
    assert!(error("convnext_atto_ols", json!({})).contains("convnext_femto"));

    let (model, _) = build("convnext_atto", json!({ "width": 4 }));
    let images = Tensor::zeros([2, 3, 40, 40], (Kind::Float, Device::Cpu));
    let mask = Tensor::ones([2, 1, 1, 1], (Kind::Bool, Device::Cpu));
    let error = model.forward(&images, Some(&mask), true).expect_err("an error").to_string();
    assert!(error.contains("set data.size to a multiple of 32"), "{error}");
    assert_eq!(model.forward(&images, None, true).expect("a map").size(), [2, 32, 1, 1]);
}

/// What the real binary makes of 60 steps of CNN-JEPA on a small ConvNeXt: the names it saved, and its metrics.
fn pretrained(more: &[&str]) -> (Vec<String>, Vec<Value>) {
    let room = Room::new();
    let images = setting("data.train", &demo_images());
    let fixed = [
        "--plugin",
        "cnn_jepa",
        "backbone.name=convnext_atto",
        "backbone.stem=small",
        "backbone.width=8",
        "backbone.depths=[1,1]",
        "backbone.drop_path=0.2",
        "data.size=16",
        "data.threads=1",
        "method.mask.min_keep=1",
        "optimizer.batch_size=16",
        "optimizer.lr=0.005",
        "optimizer.warmup_epochs=0.0",
        "trainer.max_steps=60",
        "trainer.threads=1",
        "trainer.device=cpu",
        "trainer.log_every_steps=1",
        "eval.every_epochs=0",
        "eval.at_start=false",
    ];
    let arguments = fixed.into_iter().chain([images.as_str()]).chain(more.iter().copied());
    room.run(arguments).expect(0);
    let run = room.file("runs/cnn_jepa/version_0");
    let model = std::fs::read(run.join("checkpoints/step_00000060/model.safetensors")).expect("a checkpoint");
    let (_, header) = safetensors::SafeTensors::read_metadata(&model).expect("a safetensors file");
    let names = header.tensors().into_keys().collect();
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
    (names, text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect())
}

#[test]
fn cnn_jepa_trains_on_it() {
    for precision in ["trainer.precision=fp32", "trainer.precision=bf16"] {
        let (names, metrics) = pretrained(&[precision]);
        for side in ["context", "target"] {
            assert!(names.contains(&format!("{side}.stages.1.blocks.0.mlp.fc2.weight")));
        }
        // The predictor normalises as its backbone does.
        assert!(names.iter().all(|name| !name.contains("running_mean")), "{names:?}");
        let losses: Vec<f64> = metrics.iter().filter_map(|record| record["train/loss"].as_f64()).collect();
        assert_eq!(losses.len(), 60);
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        assert!(mean(&losses[50..]) < 0.9 * mean(&losses[..10]), "the loss falls: {losses:?}");
    }
}
