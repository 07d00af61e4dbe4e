//! Plugins and hosts of other API minors and other compilers, compiled from source that is kept, with what is built
//! today: old plugins on this host, today's plugins on an old host, and plugins of another rustc.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use jepa_host::plugin::{Admission, open};
use jepa_plugin_api::Result;
use jepa_plugin_api::abi::{API_MAJOR, API_MINOR, Failure, FailureKind};
use jepa_tests::author::{cargo, few_steps, workspace};
use jepa_tests::real::{Room, not_tried, plugin};
use serde_json::{Value, json};

#[path = "../compat/host-1.0/src/train.rs"]
mod train;

/// The API versions before today's.
fn earlier() -> impl Iterator<Item = String> {
    (0..API_MINOR).map(|minor| format!("{API_MAJOR}.{minor}"))
}

/// A crate in `tests/compat`, compiled against the API crate of `version`; gives the folder of what it makes.
fn old(name: &str, version: &str) -> PathBuf {
    let (kept, name) = (workspace().join("tests/compat"), format!("{name}-{version}"));
    let place = workspace().join("target/compat");
    fs::create_dir_all(&place).unwrap();
    let api = format!("jepa-plugin-api-{version}.0");
    let patch = format!("patch.crates-io.jepa-plugin-api.path='{}'", place.join(&api).display());
    // With the files' own times, so that nothing is compiled twice.
    cargo(|| {
        shell(&place, &format!("tar -xzf '{0}/{api}.crate' && cp -pr '{0}/{name}' .", kept.display()));
        (place.join(&name), vec!["--config".to_owned(), patch.clone()], format!("old-{version}"))
    })
    .join("release")
}

/// The plugin that was kept with `version`.
fn old_plugin(version: &str) -> PathBuf {
    old("plugin", version).join(format!("libplugin_of_{}.so", version.replace('.', "_")))
}

fn shell(folder: &Path, line: &str) {
    let status = Command::new("sh").args(["-ec", line]).current_dir(folder).status().unwrap();
    assert!(status.success(), "{line}");
}

/// What this host makes of the plugins, in this process.
fn losses_here(method: (&Path, &str, Value), backbone: (&Path, &str, Value)) -> Result<Vec<f64>> {
    let open = |path: &Path| open(path, &Admission::default()).unwrap().plugin;
    let (methods, backbones) = (open(method.0), open(backbone.0));
    train::losses((&methods, method.1, &method.2), (&backbones, backbone.1, &backbone.2))
}

/// What a host of an earlier version makes of them, or what it says.
fn losses_there(
    version: &str,
    method: (&Path, &str, Value),
    backbone: (&Path, &str, Value),
) -> Result<Vec<f64>, String> {
    let host = old("host", version).join(format!("host-of-{}", version.replace('.', "-")));
    let mut command = Command::new(host);
    command.arg(method.0).args([method.1, &method.2.to_string()]);
    command.arg(backbone.0).args([backbone.1, &backbone.2.to_string()]);
    let output = command.env("LD_LIBRARY_PATH", workspace().join(".deps/lib")).output().unwrap();
    if output.status.success() {
        return Ok(serde_json::from_slice(&output.stdout).unwrap());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn every_earlier_version_is_kept() {
    let folder = workspace().join("tests/compat");
    for version in earlier() {
        for file in [
            format!("jepa-plugin-api-{version}.0.crate"),
            format!("plugin-{version}/src/lib.rs"),
            format!("host-{version}/src/main.rs"),
        ] {
            assert!(
                folder.join(&file).is_file(),
                "tests/compat/{file} is missing: its README says what to keep"
            );
        }
    }
}

#[test]
fn an_old_plugin_trains_on_this_host() {
    for version in earlier() {
        let file = old_plugin(&version);
        let file = file.to_str().unwrap();
        let room = Room::new();
        let info = room.run(["plugin", "info", file, "--format", "json"]).expect(0).stdout;
        let info: Value = serde_json::from_str(&info).unwrap();
        let manifest = &info["manifest"];
        assert_eq!(format!("{}.{}", manifest["api_major"], manifest["api_minor"]), version);
        if version == "1.0" {
            assert_eq!(info["probes"], json!([]), "what it does not know of has a default");
        }

        let train = |plugins: &[&str], settings: &[&str]| {
            let plugins = plugins.iter().flat_map(|plugin| ["--plugin", plugin]);
            let arguments = plugins.chain(settings.iter().copied()).map(str::to_owned);
            room.run(arguments.chain(few_steps()))
        };
        let own = ["backbone.name=elder_net"];
        let ended = train(&[file], &own).expect(0);
        assert!(
            ended.stdout.contains("val/elder/spread") && ended.stdout.contains("eval/knn_top1"),
            "{}",
            ended.stdout
        );
        let words = format!("a method of API {version} is built");
        assert!(ended.stderr.contains(&words), "its log lines come through: {}", ended.stderr);
        let settings = [own[0], "trainer.max_steps=10", "--resume", "auto"];
        assert!(train(&[file], &settings).expect(0).stderr.contains("going on at step 8"));

        // A method of then with a backbone of today, and the other way round.
        let new =
            ["backbone.name=resnet18", "backbone.stem=small", "backbone.width=4", "backbone.depths=[1,1]"];
        train(&[file], &new).expect(0);
        train(&["simclr", file], &["method.name=simclr", "method.hidden=16", "method.output=8", own[0]])
            .expect(0);

        train(&[file], &[own[0], "method.hiden=3"]).expect(2).error_says(&["did you mean method.hidden?"]);
        let name = format!("plugin-of-{}", version.replace('.', "-"));
        train(&[file], &[own[0], "method.panic_at=2"]).expect(6).error_says(&[&name, "as asked"]);
    }
}

#[test]
fn an_old_source_compiles_against_this_api() {
    for version in earlier() {
        let (place, name) = (workspace().join("target/compat/today"), format!("plugin-{version}"));
        fs::create_dir_all(&place).unwrap();
        let target = cargo(|| {
            let kept = workspace().join("tests/compat").join(&name);
            shell(&place, &format!("rm -rf '{name}' && cp -pr '{}' .", kept.display()));
            let manifest = place.join(&name).join("Cargo.toml");
            let text = fs::read_to_string(&manifest).unwrap();
            let then = format!("jepa-plugin-api = \"={version}.0\"");
            let today =
                format!("jepa-plugin-api = {{ path = '{}' }}", workspace().join("plugin-api").display());
            assert!(text.contains(&then), "{text}");
            fs::write(&manifest, text.replace(&then, &today)).unwrap();
            (place.join(&name), vec![], "authors".to_owned())
        });
        let file = target.join(format!("release/libplugin_of_{}.so", version.replace('.', "_")));
        let file = file.to_str().unwrap();
        let info = Room::new().run(["plugin", "info", file]).expect(0).stdout;
        assert!(info.contains(&format!("API      {API_MAJOR}.{API_MINOR}\n")), "{info}");
        Room::new()
            .run(["plugin", "check", file, "--only", "gradients", "backbone.name=elder_net"])
            .expect(0);
    }
}

#[test]
fn old_and_new_hosts_and_plugins_give_the_same_losses() {
    for version in earlier() {
        let elder = old_plugin(&version);
        let small = || json!({ "stem": "small", "width": 4, "depths": [1, 1] });
        let convnext = || json!({ "stem": "small", "width": 4, "depths": [1, 1, 1, 1] });
        let jepa = || json!({ "mask": { "min_keep": 1, "strategy": "random" } });
        let [of_jepa, of_simclr, of_resnet, of_convnext] =
            ["cnn_jepa", "simclr", "sparse_resnet", "sparse_convnext"].map(plugin);
        let heads = json!({ "hidden": 16, "output": 8 });
        for (method, backbone) in [
            ((&*elder, "elder", json!({})), (&*elder, "elder_net", json!({}))),
            ((&*elder, "elder", json!({})), (&*of_resnet, "resnet18", small())),
            ((&*elder, "elder", json!({})), (&*of_convnext, "convnext_atto", convnext())),
            ((&*of_simclr, "simclr", heads), (&*elder, "elder_net", json!({}))),
            ((&*of_jepa, "cnn_jepa", jepa()), (&*of_resnet, "resnet18", small())),
            // A backbone with layer norm, which the predictor follows.
            ((&*of_jepa, "cnn_jepa", jepa()), (&*of_convnext, "convnext_atto", convnext())),
        ] {
            let names = (&version, method.1, backbone.1);
            let here = losses_here(method.clone(), backbone.clone()).unwrap();
            let there = losses_there(&version, method, backbone).unwrap();
            assert!(here.len() == 3 && here.iter().all(|loss| loss.is_finite()), "{names:?}: {here:?}");
            assert_eq!(here, there, "{names:?}");
            assert!(here[0] != here[2], "it trains: {names:?}: {here:?}");
        }

        // An error keeps its kind on the way, in both directions.
        let refused = json!({ "hidden": "many" });
        let elder_net = || (&*elder, "elder_net", json!({}));
        let here = losses_here((&elder, "elder", refused.clone()), elder_net()).unwrap_err();
        assert_eq!(here.downcast_ref::<Failure>().map(|failure| failure.kind), Some(FailureKind::Options));
        let there = losses_there(&version, (&of_simclr, "simclr", refused), elder_net()).unwrap_err();
        assert!(there.contains("plugin `simclr` refused its settings: invalid type"), "{there}");
    }
}

/// A compiler that is not the workspace's: `$JEPA_OTHER_RUSTC`, or the distribution's.
fn other_rustc() -> Option<(PathBuf, String)> {
    let named = env::var_os("JEPA_OTHER_RUSTC").map(PathBuf::from);
    let path = named.unwrap_or_else(|| "/usr/bin/rustc".into());
    let version = |rustc: &Path| {
        let output = Command::new(rustc).arg("--version").output().ok()?;
        Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
    };
    let other = version(&path)?;
    (version("rustc".as_ref())? != other).then_some((path, other))
}

#[test]
fn a_plugin_of_another_rustc_trains() {
    let Some((rustc, version)) = other_rustc() else {
        not_tried("there is no other compiler: Debian's package rustc-web has one, or set JEPA_OTHER_RUSTC");
        return;
    };
    let room = Room::new();
    room.run(["plugin", "new", "foreign"]).expect(0);
    let target = cargo(|| {
        let compiler = format!("build.rustc='{}'", rustc.display());
        (room.file("foreign"), vec!["--config".to_owned(), compiler], "other-rustc".to_owned())
    });
    let file = target.join("release/libforeign.so");
    let file = file.to_str().unwrap();
    let info = room.run(["plugin", "info", file]).expect(0).stdout;
    assert!(info.contains(&format!("compiler {version:.63}\n")), "{info}");
    let arguments = ["--plugin", file, "--config", "foreign/train.toml"].map(str::to_owned);
    let ended = room.run(arguments.into_iter().chain(few_steps())).expect(0);
    assert!(ended.stdout.contains("val/foreign/contrastive_accuracy"), "{}", ended.stdout);
    room.run(["plugin", "check", file, "--only", "panics"]).expect(0);
}
