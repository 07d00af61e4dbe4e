//! What the author of a plugin does: a new crate from `plugin new`, and the example in `examples/simsiam`, each built
//! outside the workspace, tested by its own test, and trained by the real binary.

use std::fs;
use std::process::Command;

use jepa_tests::author::{build_and_test, build_with_a_c_linker_only, few_steps, quick, workspace};
use jepa_tests::real::{Room, checkpoints};

#[test]
fn a_new_method_builds_tests_and_trains() {
    let room = Room::new();
    let said = room.run(["plugin", "new", "my-method"]).expect(0).stdout;
    assert!(
        said.contains("cd my-method") && said.contains("--plugin target/release/libmy_method.so"),
        "{said}"
    );
    let file = build_and_test(&room.file("my-method")).join("libmy_method.so");
    let file = file.to_str().unwrap();

    let info = room.run(["plugin", "info", file]).expect(0).stdout;
    assert!(info.contains("method my_method") && info.contains("method.hidden = 256"), "{info}");
    let train = ["--plugin", file, "--config", "my-method/train.toml"].map(str::to_owned);
    let ended = room.run(train.into_iter().chain(quick())).expect(0);
    assert!(ended.stdout.contains("val/my_method/contrastive_accuracy"), "{}", ended.stdout);
    assert!(ended.stdout.contains("eval/linear_top1"), "{}", ended.stdout);
    room.run(["plugin", "check", file, "trainer.threads=1"]).expect(0);
}

#[test]
fn a_new_plugin_needs_neither_libtorch_nor_a_c_plus_plus_compiler() {
    // Of the checkout there is plugin-api, and what it takes from the workspace. Nothing of it has been set up.
    let room = Room::new();
    let api = room.file("checkout/plugin-api");
    fs::create_dir(room.file("checkout")).unwrap();
    let copied = Command::new("cp").arg("-r").arg(workspace().join("plugin-api")).arg(&api).status().unwrap();
    assert!(copied.success());
    let manifest = fs::read_to_string(workspace().join("Cargo.toml")).unwrap();
    let members = |line: &&str| !line.starts_with("members") && !line.starts_with("default-members");
    let manifest: Vec<&str> = manifest.lines().filter(members).collect();
    let manifest = manifest.join("\n").replace("[workspace]", "[workspace]\nmembers = [\"plugin-api\"]");
    fs::write(room.file("checkout/Cargo.toml"), manifest).unwrap();
    room.run(["plugin", "new", "plugin", "--api", api.to_str().unwrap()]).expect(0);

    let programs = room.file("programs");
    fs::create_dir(&programs).unwrap();
    let file = build_with_a_c_linker_only(&room.file("plugin"), &programs).join("libplugin.so");
    room.run(["plugin", "check", file.to_str().unwrap(), "--only", "gradients", "trainer.threads=1"])
        .expect(0);
}

#[test]
fn a_new_backbone_builds_tests_and_trains_under_another_author_s_method() {
    let room = Room::new();
    room.run(["plugin", "new", "tiny_net", "--kind", "backbone", "--path", "elsewhere"]).expect(0);
    let file = build_and_test(&room.file("elsewhere")).join("libtiny_net.so");
    let file = file.to_str().unwrap();

    let arguments = ["--plugin", "simclr", "--plugin", file, "--config", "elsewhere/train.toml"];
    let ended = room.run(arguments.map(str::to_owned).into_iter().chain(quick())).expect(0);
    assert!(ended.stdout.contains("eval/knn_top1"), "{}", ended.stdout);
    room.run(["plugin", "check", file, "trainer.threads=1"]).expect(0);
    let arguments = ["--plugin", "cnn_jepa", "--plugin", file, "backbone.name=tiny_net"];
    let ended = room.run(arguments.map(str::to_owned).into_iter().chain(few_steps())).expect(2);
    ended.error_says(&["needs a backbone with a sparse mode", "backbone.name"]);
}

#[test]
fn a_new_probe_evaluates_in_training_and_by_itself() {
    let room = Room::new();
    room.run(["plugin", "new", "near-mean", "--kind", "probe"]).expect(0);
    let file = build_and_test(&room.file("near-mean")).join("libnear_mean.so");
    let file = file.to_str().unwrap();

    let plugins = ["--plugin", "simclr", "--plugin", file, "--config", "near-mean/train.toml"];
    let train = |more: &[&str]| {
        let more = [&plugins[..], more].concat().into_iter().map(str::to_owned);
        room.run(more.chain(quick()))
    };
    train(&["eval.probes.near_mean.cosin=true"])
        .expect(2)
        .error_says(&["cosin", "eval.probes.near_mean.cosine"]);
    train(&["eval.probes.far_mean.cosine=true"])
        .expect(3)
        .error_says(&["probe `far_mean`", "did you mean `near_mean`"]);
    let best = "checkpoint.best=eval/near_mean/top1";
    let table = train(&["eval.probes.near_mean.cosine=false", best]).expect(0).stdout;
    let figure = |text: &str| -> f64 {
        let line = text.lines().find(|line| line.starts_with("eval/near_mean/top1"));
        line.unwrap_or_else(|| panic!("{text}")).split_whitespace().last().unwrap().parse().unwrap()
    };
    assert!((0.2..1.0).contains(&figure(&table)), "better than chance: {table}");
    let checkpoints = checkpoints(&room.file("runs/near_mean/version_0/checkpoints"));
    let state = fs::read_to_string(checkpoints.last().unwrap().join("state.json")).unwrap();
    assert!(state.contains("\"metric\": \"eval/near_mean/top1\""), "{state}");

    room.run(["plugin", "check", file]).expect(0);

    // Once more from the checkpoint, and once without.
    let again = room
        .run(["eval", "probe", "near_mean", "runs/near_mean", "--plugin", "simclr", "--plugin", file])
        .expect(0);
    assert_eq!(figure(&again.stdout), figure(&table));
    assert!(!again.stdout.contains("eval/linear_top1"), "{}", again.stdout);
    let without = train(&["eval.probes.near_mean.enabled=false"]).expect(0).stdout;
    assert!(!without.contains("near_mean/top1"), "{without}");
}

#[test]
fn the_example_is_short_and_trains() {
    let folder = workspace().join("examples/simsiam");
    let source = fs::read_to_string(folder.join("src/lib.rs")).unwrap();
    let code = source.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//"));
    assert!(code.count() <= 60, "the example shows that a plugin is short");

    let file = build_and_test(&folder).join("libsimsiam.so");
    let room = Room::new();
    let backbone =
        ["backbone.name=resnet18", "backbone.stem=small", "backbone.width=4", "backbone.depths=[1,1]"];
    let options =
        ["method.units=32", "method.bottleneck=8", "optimizer.warmup_epochs=0", "optimizer.lr=0.01"];
    let plugin = ["--plugin", file.to_str().unwrap()];
    let arguments = plugin.into_iter().chain(backbone).chain(options).map(str::to_owned);
    let ended = room.run(arguments.chain(few_steps())).expect(0);
    assert!(ended.stdout.contains("val/simsiam/spread"), "{}", ended.stdout);

    let metrics = fs::read_to_string(room.file("runs/simsiam/version_0/metrics.jsonl")).unwrap();
    let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["train/loss"].as_f64();
    let losses: Vec<f64> = metrics.lines().filter_map(loss).collect();
    assert!(losses.len() == 8 && losses[7] < losses[0], "{losses:?}");
    room.run(["plugin", "check", file.to_str().unwrap(), "trainer.threads=1"]).expect(0);
}

#[test]
fn a_new_crate_replaces_nothing_and_has_a_name_that_cargo_takes() {
    let room = Room::new();
    for name in ["My-Method", "2nd", "a b", "../up", ""] {
        room.run(["plugin", "new", name]).expect(2).error_says(&[&format!("`{name}` cannot name a plugin")]);
    }
    for (name, kind, clash) in [
        ("fn", "method", "fn"),
        ("type", "backbone", "type"),
        ("serde", "method", "serde"),
        ("step", "method", "Step"),
        ("backbone", "backbone", "Backbone"),
        ("conv", "backbone", "ConvOptions"),
        ("probe", "probe", "Probe"),
        ("option", "probe", "Option"),
    ] {
        let ended = room.run(["plugin", "new", name, "--kind", kind]).expect(2);
        ended.error_says(&[
            &format!("`{name}` cannot name this plugin"),
            &format!("`{clash}`"),
            &format!("my-{name}"),
        ]);
        assert!(!room.file(name).exists(), "{name}");
    }
    // A word of another kind's source, or of a comment, names nothing here.
    for (name, kind) in [("step", "probe"), ("features", "method"), ("plugin", "backbone")] {
        let folder = format!("{name}-{kind}");
        room.run(["plugin", "new", name, "--kind", kind, "--path", &folder]).expect(0);
    }
    fs::create_dir(room.file("taken")).unwrap();
    room.run(["plugin", "new", "taken"]).expect(2).error_says(&["taken exists already"]);
    let ended = room.run(["plugin", "new", "lost", "--api", "."]).expect(2);
    ended.error_says(&["not the source of jepa-plugin-api", "--api"]);
    assert!(!room.file("lost").exists());
}
