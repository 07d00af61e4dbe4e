//! A TorchScript file as a backbone: computes what PyTorch computes, and is trained, saved and restored like any other.

use std::path::{Path, PathBuf};

use jepa_plugin_api::params::{Entry, Kind as EntryKind};
use jepa_plugin_api::{
    Backbone, BackboneHandle, Batch, Host, Method, NormKind, Params, Result, Step, ViewSpec, testing,
};
use jepa_tests::fixture::{self, Fixture, assert_close};
use jepa_tests::real::{Room, demo_images, setting};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use torchscript_backbone::TorchScript;

const TOLERANCE: f64 = 1e-5;

fn options(file: &Path, more: Value) -> Value {
    let mut options = json!({ "file": file, "image_size": 16 });
    options.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    options
}

fn try_build(file: &Path, more: Value) -> Result<(TorchScript, Vec<Entry>)> {
    let params = Params::new(Device::Cpu);
    let options = serde_json::from_value(options(file, more)).expect("options");
    Ok((TorchScript::new("torchscript", options, &params)?, params.entries()))
}

fn build(name: &str) -> (TorchScript, Vec<Entry>) {
    try_build(&fixture::path(name), json!({})).expect("a backbone")
}

fn names(entries: &[Entry], kind: EntryKind) -> Vec<&str> {
    entries.iter().filter(|entry| entry.kind == kind).map(|entry| entry.name.as_str()).collect()
}

#[test]
fn its_tensors_have_the_names_of_the_script() {
    let (model, entries) = build("torchscript_net.pt");
    assert_eq!(
        names(&entries, EntryKind::Parameter),
        ["body.0.weight", "body.1.weight", "body.1.bias", "out.weight", "out.bias"]
    );
    // What is saved, not trained: a parameter without a gradient, then buffers at every depth.
    assert_eq!(
        names(&entries, EntryKind::Buffer),
        ["scale", "offset", "body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"]
    );
    let info = model.info();
    assert_eq!((info.channels, info.downsample, info.norm, info.sparse), (6, 4, NormKind::Batch, false));
}

#[test]
fn it_computes_what_pytorch_computes() {
    let fixture = Fixture::read("torchscript_net");
    let (model, entries) = build("torchscript_net.pt");
    let images = fixture.tensor("input.x").set_requires_grad(true);
    let evaluate = || tch::no_grad(|| model.forward(&images, None, false)).expect("a map");
    let theirs = fixture.tensor("output.eval.feature_map");

    // The file has other weights. Whoever restores a checkpoint sets them so, buffers as well.
    assert!(fixture::relative_error(&evaluate(), &theirs) > 0.1);
    for (name, value) in fixture.under("param.") {
        testing::set_tensor(&entries, name, &value).expect("the script's name and shape");
    }
    assert_close("evaluation", &evaluate(), &theirs, TOLERANCE);

    let map = model.forward(&images, None, true).expect("a map");
    assert_close("training", &map, &fixture.tensor("output.train.feature_map"), TOLERANCE);
    (&map * fixture.tensor("input.loss_weights")).mean(Kind::Float).backward();
    assert_close("gradient of the images", &images.grad(), &fixture.tensor("grad.input.x"), TOLERANCE);
    for name in names(&entries, EntryKind::Parameter) {
        let gradient = testing::tensor(&entries, name).expect("a parameter").grad();
        assert_close(name, &gradient, &fixture.tensor(&format!("grad.{name}")), TOLERANCE);
    }
    let after = fixture.under("after.");
    assert_eq!(after.len(), 3, "the fixture has what is to be compared");
    for (name, after) in after {
        assert_close(name, testing::tensor(&entries, name).expect("a buffer"), &after, TOLERANCE);
    }
    let counted = testing::tensor(&entries, "body.1.num_batches_tracked").expect("a counter");
    assert_eq!(i64::try_from(counted).expect("a count"), 1);
}

#[test]
fn passes_repeat_to_the_last_bit() {
    // libtorch's profiling executor would compute gradients from the second pass on in another way than in the first.
    let run = |passes: usize| {
        let given = json!({ "channels": 8, "downsample": 1 });
        let (model, entries) = try_build(&fixture::path("torchscript_gated.pt"), given).expect("a backbone");
        let images = Fixture::read("torchscript_net").tensor("input.x");
        for _ in 0..passes {
            for entry in &entries {
                entry.tensor.shallow_clone().zero_grad();
            }
            let map = model.forward(&images, None, true).expect("a map");
            map.square().mean(Kind::Float).backward();
        }
        ["conv.weight", "norm.weight", "mix.weight"]
            .map(|name| testing::tensor(&entries, name).expect(name).grad())
    };
    assert_eq!(run(1), run(5));
}

#[test]
fn a_vector_is_a_map_of_one_cell() {
    let (model, _) = build("torchscript_pooled.pt");
    let info = model.info();
    assert_eq!((info.channels, info.downsample, info.norm), (5, 16, NormKind::Layer));
    let images = Tensor::ones([3, 3, 16, 16], (Kind::Float, Device::Cpu));
    assert_eq!(model.forward(&images, None, true).expect("a map").size(), [3, 5, 1, 1]);
}

/// A dense method: features are to have the same mean everywhere.
struct Even(BackboneHandle);

impl Method for Even {
    const NAME: &'static str = "even";
    const ENCODER: &'static str = "online";
    type Options = ();

    fn new((): (), host: &mut Host) -> Result<Self> {
        let online = host.backbone("online")?;
        host.backbone("other")?;
        Ok(Even(online))
    }

    fn views(&self) -> Vec<ViewSpec> {
        vec![ViewSpec::new("image")]
    }

    fn step(&mut self, batch: &Batch) -> Result<Step> {
        Ok(Step::new((self.0.pooled(&batch.views[0], batch.train)? - 1.0).square().mean(Kind::Float)))
    }

    fn encode(&mut self, images: &Tensor) -> Result<Tensor> {
        self.0.pooled(images, false)
    }
}

#[test]
fn a_method_trains_it() {
    let file = fixture::path("torchscript_net.pt");
    let backbone = |params: &Params| {
        let options = serde_json::from_value(options(&file, json!({}))).expect("options");
        TorchScript::new("torchscript", options, params)
    };
    let mut built = testing::method::<Even, _>(json!(null), testing::facts(), backbone).expect("a method");
    let images = Fixture::read("torchscript_net").tensor("input.x");
    let mut losses = Vec::new();
    for _ in 0..30 {
        let loss = built.method.step(&testing::batch(vec![images.shallow_clone()])).expect("a step").loss;
        loss.backward();
        losses.push(f64::try_from(loss).expect("a number"));
        for entry in &built.entries {
            let mut parameter = entry.tensor.shallow_clone();
            if entry.kind == EntryKind::Parameter && parameter.grad().defined() {
                tch::no_grad(|| parameter -= parameter.grad() * 0.5);
                parameter.zero_grad();
            }
        }
    }
    assert!(losses[29] < 0.1 * losses[0], "{losses:?}");

    // Each backbone of a method has tensors of its own.
    let counted = |side: &str| {
        let counter = built.tensor(&format!("{side}.body.1.num_batches_tracked")).expect("a counter");
        i64::try_from(counter).expect("a count")
    };
    assert_eq!((counted("online"), counted("other")), (30, 0));
    assert!(!built.tensor("other.out.weight").expect("a weight").grad().defined());
}

/// What the backbone says of a file that it refuses.
fn refusal(file: PathBuf, more: Value) -> String {
    try_build(&file, more).err().expect("an error").to_string()
}

#[test]
fn errors_say_what_is_wrong_with_the_file() {
    let room = Room::new();
    let not_a_script = ["it is not a TorchScript file", "torch.jit.script"];
    let text = room.file("text.pt");
    std::fs::write(&text, "weights, I promise").expect("a file");
    let half = room.file("half.pt");
    let bytes = std::fs::read(fixture::path("torchscript_net.pt")).expect("a file");
    std::fs::write(&half, &bytes[..bytes.len() / 2]).expect("a file");

    for (file, says) in [
        (room.file("missing.pt"), ["missing.pt", "it cannot be read"]),
        (text, not_a_script),
        (half, not_a_script),
        (fixture::path("state_dict.pt"), not_a_script),
        (fixture::path("torchscript_no_map.pt"), ["it makes [2] of images [2, 3, 16, 16]", "[2, C]"]),
        (fixture::path("torchscript_frozen.pt"), ["no parameter to train", "torch.jit.freeze"]),
        (fixture::path("torchscript_interface.pt"), ["its part layer is behind", "buffers are out of reach"]),
    ] {
        let error = refusal(file, json!({}));
        assert!(error.starts_with("backbone.file `"), "{error}");
        assert!(says.iter().all(|part| error.contains(part)), "{error}");
        assert!(!error.contains('\n'), "one line:\n{error}");
    }

    assert!(refusal(PathBuf::new(), json!({})).contains("backbone.file is not set"));
    let net = || fixture::path("torchscript_net.pt");
    // 1 px is left of 1 px, and a kernel of 2 px does not fit.
    let error = refusal(net(), json!({ "image_size": 1 }));
    assert!(error.contains("it fails on images of 1 px, see backbone.image_size"), "{error}");
    assert!(error.contains("Kernel size"), "the cause, of all that libtorch says: {error}");
    assert!(refusal(net(), json!({ "image_size": 17 })).contains("see backbone.image_size"));
    assert!(refusal(net(), json!({ "channels": 6 })).contains("set both, or none"));
}

#[test]
fn what_was_given_is_held_against_what_comes() {
    let given = json!({ "channels": 6, "downsample": 4, "image_size": 0 });
    let (model, _) = try_build(&fixture::path("torchscript_net.pt"), given).expect("a backbone");
    let images = Tensor::zeros([2, 3, 24, 24], (Kind::Float, Device::Cpu));
    assert_eq!(model.forward(&images, None, false).expect("a map").size(), [2, 6, 6, 6]);

    let given = json!({ "channels": 6, "downsample": 8 });
    let (model, _) = try_build(&fixture::path("torchscript_net.pt"), given).expect("a backbone");
    let error = model.forward(&images, None, false).expect_err("an error").to_string();
    assert!(error.contains("[2, 6, 6, 6]") && error.contains("backbone.downsample is 8"), "{error}");
    let mask = Tensor::ones([2, 1, 3, 3], (Kind::Bool, Device::Cpu));
    let error = model.forward(&images, Some(&mask), false).expect_err("an error").to_string();
    assert!(error.contains("no sparse mode"), "{error}");
}

#[test]
fn the_binary_shows_it_and_cnn_jepa_refuses_it() {
    let room = Room::new();
    let info = room.run(["plugin", "info", "torchscript_backbone"]).expect(0).stdout;
    for part in ["torchscript", "file", "image_size", "224", "torch.jit.script(model).save(path)"] {
        assert!(info.contains(part), "{part}:\n{info}");
    }

    let train = |file: &str| {
        let (images, file) = (setting("data.train", &demo_images()), format!("backbone.file={file}"));
        let fixed =
            ["--plugin", "cnn_jepa", "backbone.name=torchscript", "trainer.device=cpu", "data.size=16"];
        room.run(fixed.into_iter().chain([images.as_str(), file.as_str(), "backbone.image_size=16"]))
            .expect(2)
    };
    // A relative path starts where the process does.
    std::fs::copy(fixture::path("torchscript_net.pt"), room.file("net.pt")).expect("a copy");
    train("net.pt").error_says(&["`cnn-jepa`", "needs a backbone with a sparse mode", "backbone.name"]);
    train("gone.pt").error_says(&["`torchscript-backbone`", "backbone.file `gone.pt`", "it cannot be read"]);
    assert!(!room.file("runs").exists(), "a refused set-up begins no run");
}

/// The last checkpoint of runs of BYOL on a script, one after the other in one folder, each up to so many steps.
fn trained(steps: &[u32], more: &[&str]) -> [Vec<u8>; 2] {
    let room = Room::new();
    std::fs::copy(fixture::path("torchscript_gated.pt"), room.file("gated.pt")).expect("a copy");
    let images = setting("data.train", &demo_images());
    let fixed = [
        "--plugin",
        "byol",
        "--resume",
        "auto",
        "backbone.name=torchscript",
        "backbone.file=gated.pt",
        "method.hidden=16",
        "method.output=8",
        "data.size=16",
        "data.threads=1",
        "optimizer.batch_size=8",
        "optimizer.warmup_epochs=0.0",
        "trainer.threads=1",
        "trainer.device=cpu",
        "eval.every_epochs=0",
        "eval.at_start=false",
    ];
    for &steps in steps {
        let steps = format!("trainer.max_steps={steps}");
        room.run(fixed.into_iter().chain([images.as_str(), &steps]).chain(more.iter().copied())).expect(0);
    }
    let last = steps.last().expect("a run");
    let folder = room.file(format!("runs/byol/version_0/checkpoints/step_{last:08}"));
    ["model.safetensors", "optimizer.safetensors"]
        .map(|name| std::fs::read(folder.join(name)).expect("a checkpoint"))
}

#[test]
fn a_resumed_run_ends_with_the_same_bytes() {
    let whole = trained(&[8], &[]);
    assert!(trained(&[5, 8], &[]) == whole, "parameters, running statistics and optimizer are restored");
    assert!(trained(&[8], &["seed=7"]) != whole, "the comparison sees a difference where there is one");
    trained(&[3], &["trainer.precision=bf16"]);
}
