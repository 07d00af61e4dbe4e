//! What can be done with a finished run: judge it again, export its backbone, begin another run with it, embed images.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use jepa_host::checkpoint::adapt;
use jepa_tests::fixture::Fixture;
use jepa_tests::real::{Room, TINY_BACKBONE, checkpoints, demo_images, held_out_images, setting};
use safetensors::SafeTensors;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

const RUN: &str = "runs/cnn_jepa/version_0";

/// The arguments of 5 steps of CNN-JEPA, judged before and after.
fn arguments(settings: &[&str]) -> Vec<String> {
    let fixed = [
        "data.size=16",
        "method.mask.min_keep=1",
        "optimizer.batch_size=64",
        "optimizer.warmup_epochs=0",
        "trainer.max_steps=5",
        "trainer.threads=1",
        "trainer.device=cpu",
        "eval.train_limit=1500",
        "eval.linear.epochs=5",
    ];
    let images = [setting("data.train", &demo_images()), setting("data.val", &held_out_images())];
    let arguments = ["--plugin", "cnn_jepa"].into_iter().chain(TINY_BACKBONE).chain(fixed);
    let arguments = arguments.map(str::to_owned).chain(images);
    arguments.chain(settings.iter().map(|setting| (*setting).to_owned())).collect()
}

fn trained() -> Room {
    let room = Room::new();
    room.run(arguments(&[])).expect(0);
    room
}

/// The newest checkpoint's state.
fn state(room: &Room, run: &str) -> Value {
    let newest = checkpoints(&room.file(run).join("checkpoints")).pop().unwrap();
    serde_json::from_slice(&fs::read(newest.join("state.json")).unwrap()).unwrap()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// Names and bytes of a safetensors file.
fn tensors(file: &PathBuf) -> Vec<(String, Vec<u8>)> {
    let bytes = fs::read(file).unwrap();
    let content = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> =
        content.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())).collect();
    tensors.sort();
    tensors
}

#[test]
fn offline_figures_are_the_online_ones_to_the_last_digit() {
    let room = trained();
    let online = &state(&room, RUN)["last_eval"];
    for (protocol, names) in [
        ("linear", &["eval/linear_top1", "eval/linear_top1_final", "eval/linear_top5", "eval/rankme"][..]),
        ("knn", &["eval/knn_top1", "eval/knn_top5", "eval/spread", "eval/correlation"]),
    ] {
        let ended = room.run(["eval", protocol, RUN, "--format", "json"]).expect(0);
        let offline = json(&ended.stdout);
        for &name in names {
            assert!(offline[name].is_f64(), "{name} in {offline}");
            assert_eq!(offline[name], online[name], "{name}");
        }
        assert_eq!(offline.get("eval/knn_top1").is_some(), protocol == "knn", "only what was asked for");
    }
    let text = room.run(["eval", "knn", RUN, "eval.knn.k=5"]).expect(0).stdout;
    assert!(text.contains("step_00000005 of step 5") && text.contains("eval/knn_top1 "), "{text}");

    room.run(["eval", "knn", "runs/nothing"]).expect(2).error_says(&["runs/nothing is no checkpoint"]);
}

#[test]
fn an_interrupted_judgement_does_not_speak_of_training() {
    let room = trained();
    let slow = ["eval.linear.epochs=1000000", "eval.linear.batch_size=1"];
    let mut running = room.start(["-v", "eval", "linear", RUN].into_iter().chain(slow));
    // By then signals have been taken over.
    let told = room.file("err.1");
    running
        .until("the plugins", || fs::read_to_string(&told).is_ok_and(|text| text.contains("plugin loaded")));
    running.signal(libc::SIGINT);
    let ended = running.wait().expect(130);
    assert_eq!(ended.error(), "interrupted by SIGINT");
}

#[test]
fn a_checkpoint_is_judged_by_its_own_settings_wherever_it_is_copied_to() {
    let room = trained();
    let online = state(&room, RUN)["last_eval"].clone();
    room.run(arguments(&["trainer.max_steps=8", "eval.linear.epochs=2", "--resume", "auto"])).expect(0);
    let earlier = checkpoints(&room.file(RUN).join("checkpoints")).remove(0);
    let copied = room.file("copied");
    fs::create_dir(&copied).unwrap();
    for entry in fs::read_dir(&earlier).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copied.join(path.file_name().unwrap())).unwrap();
    }
    for checkpoint in [earlier.to_str().unwrap(), "copied"] {
        let ended = room.run(["eval", "linear", checkpoint, "--format", "json"]).expect(0);
        let offline = json(&ended.stdout);
        for name in ["eval/linear_top1", "eval/linear_top1_final", "eval/rankme"] {
            assert_eq!(offline[name], online[name], "{name} of {checkpoint}");
        }
    }
    room.run(["export", "copied", "copied.safetensors"]).expect(0);
    room.run(["export", earlier.to_str().unwrap(), "earlier.safetensors"]).expect(0);
    assert!(tensors(&room.file("copied.safetensors")) == tensors(&room.file("earlier.safetensors")));
    room.run(arguments(&["init.from=copied", "run.name=from_copy", "trainer.max_steps=1"])).expect(0);
    let ended = room.run(arguments(&["--resume", "copied"])).expect(2);
    ended.error_says(&["copied is no checkpoint", "outside a run"]);
}

#[test]
fn views_of_an_image_are_the_harder_to_find_the_more_there_are() {
    let room = trained();
    let accuracy = |images: &str| {
        let settings = ["eval.contrastive.enabled=true", images];
        let ended = room.run(["eval", "knn", RUN, "--format", "json"].into_iter().chain(settings)).expect(0);
        json(&ended.stdout)["eval/contrastive_accuracy"].as_f64().unwrap()
    };
    let (of_two, of_many) = (accuracy("eval.contrastive.images=2"), accuracy("eval.contrastive.images=512"));
    // Guessing would find a third of them, and one in 1023.
    assert!(0.5 < of_two && of_two < 1.0, "{of_two}");
    assert!(2.0 / 1023.0 < of_many && of_many < of_two, "{of_many}");
    assert_eq!(accuracy("eval.contrastive.images=512"), of_many);
}

#[test]
fn fine_tuning_trains_the_run_s_backbone_with_labels() {
    let room = trained();
    let settings = [
        "trainer.max_steps=20",
        "optimizer.lr=0.01",
        "optimizer.warmup_epochs=0",
        "trainer.log_every_steps=1",
    ];
    let ended = room.run(["eval", "finetune", RUN].into_iter().chain(settings)).expect(0);
    assert!(ended.stdout.contains("val/supervised/top1 "), "{}", ended.stdout);
    let tuned = "runs/cnn_jepa_finetuned/version_0";
    let after = state(&room, tuned);
    assert_eq!(
        (after["method"].as_str(), after["backbone"].as_str()),
        (Some("supervised"), Some("resnet18"))
    );
    let top1 = after["last_eval"]["val/supervised/top1"].as_f64().unwrap();
    assert!(top1 > 0.2, "{top1} of 10 classes");

    // It began with what the run had learnt: as many steps from random weights have another first loss.
    let first_loss = |run: &str| {
        let text = fs::read_to_string(room.file(run).join("metrics.jsonl")).unwrap();
        text.lines().find_map(|line| json(line)["train/loss"].as_f64()).unwrap()
    };
    let again = ["eval", "finetune", RUN, "trainer.max_steps=1", "run.name=again"];
    room.run(again.into_iter().chain(["optimizer.warmup_epochs=0"])).expect(0);
    assert_eq!(first_loss("runs/again/version_0"), first_loss(tuned));
    let random = ["init.from=none", "run.name=random", "trainer.max_steps=1", "optimizer.warmup_epochs=0"];
    room.run(["eval", "finetune", RUN].into_iter().chain(random)).expect(0);
    assert_ne!(first_loss("runs/random/version_0"), first_loss(tuned));

    let other = ["--method", "simclr", "trainer.max_steps=1", "method.hidden=8", "method.output=8"];
    room.run(["eval", "finetune", RUN, "run.name=other"].into_iter().chain(other)).expect(0);
    assert_eq!(state(&room, "runs/other/version_0")["method"], "simclr");

    let ended = room.run(["eval", "finetune", RUN, "data.val=nowhere.h5"]).expect(4);
    ended.error_says(&["data.val: cannot open nowhere.h5"]);
    room.run(["eval", "finetune", "runs/nothing"]).expect(2).error_says(&["runs/nothing is no checkpoint"]);
}

#[test]
fn an_exported_backbone_has_timm_s_names_and_begins_another_run() {
    let room = trained();
    let ended = room.run(["export", RUN, "backbone.safetensors", "--format", "json"]).expect(0);
    assert_eq!(json(&ended.stdout)["backbone"], "resnet18");
    let file = room.file("backbone.safetensors");
    let exported = tensors(&file);

    // Of timm's own resnet18 with the small stem; it has a block for each of ours here.
    let timm = Fixture::read("resnet_small_stem");
    let known: BTreeSet<&str> =
        timm.under("param.").into_iter().chain(timm.under("after.")).map(|(name, _)| name).collect();
    // PyTorch's counters of batches are not in the fixture.
    for (name, _) in exported.iter().filter(|(name, _)| !name.ends_with("num_batches_tracked")) {
        assert!(known.contains(name.as_str()), "{name} is no name of timm's");
    }
    assert!(exported.iter().any(|(name, _)| name == "layer2.0.downsample.1.running_var"));

    room.run(["export", RUN, "backbone.safetensors"]).expect(2).error_says(&["exists", "--force"]);
    fs::write(room.file("backbone.tmp"), "somebody's own").unwrap();
    room.run(["export", RUN, "backbone.safetensors", "--force"]).expect(0);
    assert_eq!(fs::read_to_string(room.file("backbone.tmp")).unwrap(), "somebody's own");

    // From the file and from the run itself, the first judgement is the last of the run that was exported.
    let last = &state(&room, RUN)["last_eval"];
    for (version, from) in [("version_1", "backbone.safetensors"), ("version_2", RUN)] {
        let ended = room.run(arguments(&[&format!("init.from={from}")])).expect(0);
        assert!(
            ended.stderr.contains(&format!("tensors of the backbone come from {from}")),
            "{}",
            ended.stderr
        );
        let first = &state(&room, &format!("runs/cnn_jepa/{version}"))["first_eval"];
        for (name, value) in first.as_object().unwrap() {
            assert_eq!(value, &last[name], "{name} from {from}");
        }
    }
}

/// Writes `tensors` as a safetensors file.
fn write(file: &Path, tensors: Vec<(String, Tensor)>) {
    Tensor::write_safetensors(&tensors, file).unwrap();
}

#[test]
fn a_classifier_is_left_out_unless_it_is_the_backbone_s_own() {
    let room = trained();
    room.run(["export", RUN, "backbone.safetensors"]).expect(0);
    let mut tensors = Tensor::read_safetensors(room.file("backbone.safetensors")).unwrap();
    tensors.push(("fc.weight".to_owned(), Tensor::zeros([10, 8], (Kind::Float, Device::Cpu))));
    write(&room.file("with_fc.safetensors"), tensors);
    let ended = room.run(arguments(&["init.from=with_fc.safetensors"])).expect(0);
    assert!(ended.stderr.contains("left out the classifier, fc.weight"), "{}", ended.stderr);

    let named = |names: &[&str]| -> Vec<(String, Tensor)> {
        names.iter().map(|name| ((*name).to_owned(), Tensor::from(1f32))).collect()
    };
    let weights = named(&["stem.weight", "head.norm.weight", "head.fc.weight"]);
    let kept = adapt(&weights, &named(&["stem.weight", "head.norm.weight"]));
    let kept: Vec<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(kept, ["stem.weight", "head.norm.weight"]);
}

#[test]
fn a_file_without_counters_of_batches_begins_a_run_too() {
    let room = trained();
    room.run(["export", RUN, "backbone.safetensors"]).expect(0);
    let mut tensors = Tensor::read_safetensors(room.file("backbone.safetensors")).unwrap();
    let all = tensors.len();
    tensors.retain(|(name, _)| !name.ends_with("num_batches_tracked"));
    assert!(tensors.len() < all);
    write(&room.file("old.safetensors"), tensors);
    room.run(arguments(&["init.from=old.safetensors", "run.name=old"])).expect(0);
    let last = &state(&room, RUN)["last_eval"];
    assert_eq!(state(&room, "runs/old/version_0")["first_eval"]["eval/knn_top1"], last["eval/knn_top1"]);
}

#[test]
fn what_timm_calls_for_is_what_is_exported() {
    let room = Room::new();
    let exported = |backbone: &str| {
        let (images, name) = (
            setting("data.train", &demo_images()),
            [format!("backbone.name={backbone}"), format!("run.name={backbone}")],
        );
        let fixed = [
            "--plugin",
            "byol",
            "data.size=32",
            "data.upscale=true",
            "optimizer.batch_size=2",
            "trainer.max_steps=1",
        ];
        let fixed =
            fixed.into_iter().chain(["trainer.device=cpu", "method.hidden=8", "method.output=8", &images]);
        room.run(fixed.chain(name.iter().map(String::as_str))).expect(0);
        let (run, file) = (format!("runs/{backbone}"), format!("{backbone}.safetensors"));
        let told = room.run(["export", &run, &file]).expect(0).stdout;
        assert!(told.contains(&format!("timm.create_model(\"{backbone}\", num_classes=0)")), "{told}");
        (fs::read(room.file(&file)).unwrap(), told)
    };
    for (backbone, fixture) in [("resnet18", "timm_resnet_names"), ("convnext_atto", "timm_convnext_names")] {
        let (bytes, told) = exported(backbone);
        let content = SafeTensors::deserialize(&bytes).unwrap();
        let ours: BTreeMap<String, Vec<usize>> =
            content.tensors().into_iter().map(|(name, view)| (name, view.shape().to_vec())).collect();
        let text = fs::read_to_string(jepa_tests::real::fixture(&format!("{fixture}.json"))).unwrap();
        let names = json(&text)["models"][backbone].clone();
        let mut timm: BTreeMap<String, Vec<usize>> =
            serde_json::from_value::<Vec<(String, Vec<usize>)>>(names).unwrap().into_iter().collect();
        // Every batch norm of PyTorch's has a counter, which the fixture leaves out.
        let norms: Vec<String> =
            timm.keys().filter_map(|n| n.strip_suffix("running_var")).map(str::to_owned).collect();
        timm.extend(norms.into_iter().map(|norm| (norm + "num_batches_tracked", Vec::new())));
        assert_eq!(ours, timm, "{backbone}");
        // The fixture's ConvNeXts have been freed of it.
        assert_eq!(
            told.contains("model.head.norm = torch.nn.Identity()"),
            backbone == "convnext_atto",
            "{told}"
        );
    }
}

#[test]
fn weights_of_another_backbone_are_refused_before_anything_begins() {
    let room = trained();
    room.run(["export", RUN, "small.safetensors"]).expect(0);
    let ended = room.run(arguments(&["init.from=small.safetensors", "backbone.width=8"])).expect(2);
    ended.error_says(&[
        "init.from = small.safetensors does not fit backbone.name",
        "conv1.weight is [4, 3, 3, 3]",
    ]);
    let ended = room.run(arguments(&["init.from=small.safetensors", "backbone.depths=[1,1,1]"])).expect(2);
    ended.error_says(&["init.from", "missing: ", "layer3.0.conv1.weight"]);
    assert!(!room.file("runs/cnn_jepa/version_1").exists());

    fs::write(room.file("text.safetensors"), "no tensors").unwrap();
    let ended = room.run(arguments(&["init.from=text.safetensors"])).expect(1);
    ended.error_says(&["init.from", "text.safetensors", "not a whole safetensors file"]);
}

#[test]
fn embedded_images_come_with_their_labels() {
    let room = trained();
    room.run(["embed", RUN, "--out", "features.h5"]).expect(0);
    let file = hdf5::File::open(room.file("features.h5")).unwrap();
    let features = file.dataset("features").unwrap();
    assert_eq!(features.shape(), [2000, 8]);
    let values: Vec<f32> = features.read_raw().unwrap();
    assert!(values.iter().all(|value| value.is_finite()) && values.iter().any(|value| *value != values[0]));
    let indices: Vec<i64> = file.dataset("indices").unwrap().read_raw().unwrap();
    assert_eq!(indices, (0..2000).collect::<Vec<i64>>());
    let labels: Vec<i64> = file.dataset("labels").unwrap().read_raw().unwrap();
    let held_out = hdf5::File::open(held_out_images()).unwrap();
    let truth: Vec<i64> = held_out.dataset("labels").unwrap().read_raw().unwrap();
    assert_eq!(labels, truth);

    room.run(["embed", RUN, "--out", "features.h5"]).expect(2).error_says(&["features.h5", "exists"]);
    let train = demo_images();
    let ended = room.run(["embed", RUN, "--out", "train.h5", "--data", train.to_str().unwrap()]).expect(0);
    assert_eq!(ended.stdout, "train.h5: features (8000, 8)\n");
}
