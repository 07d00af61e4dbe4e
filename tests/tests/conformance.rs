//! `jepa-host plugin check`: bundled plugins pass it, and each check is failed by a plugin that breaks its promise only.

use std::fs;

use faulty_plugin::Faulty;
use jepa_tests::boundary::{Case, compare};
use jepa_tests::real::{Room, plugin};
use serde_json::{Value, json};

const REFUSED: i32 = 3;

/// Checks of a method or a backbone, and of a probe.
const ALL: usize = 11;
const OF_A_PROBE: usize = 5;

/// Runs `all` checks, and gives the names of those that failed, with their words.
#[track_caller]
fn failed(all: usize, code: i32, arguments: &[&str]) -> Vec<(String, String)> {
    let arguments = ["plugin", "check", "--format", "json"].iter().chain(arguments);
    let ended = Room::new().run(arguments.chain(&["trainer.threads=1"])).expect(code);
    let report: Value = serde_json::from_str(&ended.stdout).expect("a report");
    let checks = report["checks"].as_array().expect("checks");
    let failed = checks.iter().filter(|check| check["verdict"] == "failed");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let failed: Vec<_> = failed.map(|check| (text(&check["check"]), text(&check["detail"]))).collect();
    assert_eq!(report["passed"], failed.is_empty(), "{report:#}");
    assert!(checks.len() == all || failed[0].0 == "loads", "{report:#}");
    failed
}

/// The only check that failed is `check`, and says `says`.
#[track_caller]
fn fails_just(check: &str, says: &str, arguments: &[&str]) {
    let all = if arguments[0] == "faulty_probe" { OF_A_PROBE } else { ALL };
    let failed = failed(all, REFUSED, arguments);
    let [(name, words)] = failed.as_slice() else { panic!("{check} alone has to fail, and not {failed:?}") };
    assert_eq!(name, check, "{words}");
    assert!(words.contains(says), "{words}");
}

#[test]
fn a_healthy_method_passes() {
    assert_eq!(failed(ALL, 0, &["faulty_plugin"]), []);
    let small =
        ["backbone.name=resnet18", "backbone.stem=small", "backbone.width=4", "backbone.depths=[1,1]"];
    let predictor = ["cnn_jepa", "method.mask.sampling=uniform"];
    assert_eq!(failed(ALL, 0, &[&predictor[..], &small[..]].concat()), []);
}

#[test]
fn healthy_backbones_pass() {
    let small = ["backbone.stem=small", "backbone.width=4", "backbone.depths=[1,1]", "data.size=32"];
    assert_eq!(failed(ALL, 0, &[&["sparse_resnet"][..], &small[..]].concat()), []);
}

#[test]
fn each_promise_is_broken_by_itself() {
    let faulty = |option: &'static str| ["faulty_plugin", option];
    fails_just("gradients", "none reaches idle", &faulty("method.idle_parameter=true"));
    fails_just("seed", "draw every number", &faulty("method.unseeded=true"));
    fails_just("state", "keep what a step needs", &faulty("method.hidden_state=true"));
    fails_just("bf16", "under autocast the loss is NaN", &faulty("method.fragile_in_bf16=true"));
    fails_just("features", "not finite", &faulty("method.features=nan"));
    fails_just("panics", "ended the process by signal 6", &faulty("method.abort_on_misfit=true"));
    fails_just("leaks", "every step keeps", &faulty("method.keep_batches=true"));
    fails_just("leaks", "threads grow", &faulty("method.keep_threads=true"));
    fails_just("cost", "return fewer metrics", &faulty("method.metrics=3000"));
    fails_just("options", "deny_unknown_fields", &["careless_plugin", "method.name=careless"]);
    fails_just("sparse", "are not zero", &["careless_plugin", "backbone.name=leaky"]);
}

#[test]
fn what_is_checked_and_what_is_not_is_told() {
    let report = |arguments: &[&str]| -> (Vec<String>, Vec<String>) {
        let arguments = ["plugin", "check", "--format", "json", "--only", "options"].iter().chain(arguments);
        let report: Value = serde_json::from_str(&Room::new().run(arguments).stdout).expect("a report");
        let texts = |list: &Value, key: Option<&str>| -> Vec<String> {
            let text =
                |value: &Value| key.map_or(value, |key| &value[key]).as_str().expect("text").to_owned();
            list.as_array().expect("a list").iter().map(text).collect()
        };
        (texts(&report["checks"], Some("subject")), texts(&report["unchecked"], None))
    };
    let both = ["method careless", "backbone leaky"].map(str::to_owned).to_vec();
    assert_eq!(report(&["careless_plugin"]), (both, vec![]));
    let [method, backbone] = ["method careless", "backbone leaky"].map(|what| vec![what.to_owned()]);
    assert_eq!(report(&["careless_plugin", "method.name=careless"]), (method, backbone));

    let (checked, unchecked) = report(&["sparse_resnet"]);
    assert_eq!(checked, ["backbone resnet18"], "one for all that take the same options");
    assert!(unchecked.contains(&"backbone resnet50".to_owned()), "{unchecked:?}");
    let (checked, unchecked) = report(&["sparse_resnet", "backbone.name=resnet34"]);
    assert_eq!(checked, ["backbone resnet34"]);
    assert!(unchecked.contains(&"backbone resnet18".to_owned()), "{unchecked:?}");
    let table = Room::new().run(["plugin", "check", "sparse_resnet", "--only", "options"]).expect(0).stdout;
    assert!(table.contains("\nnot checked: backbone resnet34, "), "{table}");
}

#[test]
fn a_probe_has_checks_of_its_own() {
    let faulty = ["faulty_probe", "eval.probes.faulty.enabled=true"];
    assert_eq!(failed(OF_A_PROBE, 0, &faulty), []);
    let faulty = |option: &str| -> Vec<String> {
        faulty.iter().map(|&a| a.to_owned()).chain([format!("eval.probes.faulty.{option}=true")]).collect()
    };
    let fails_just = |check: &str, says: &str, arguments: &[String]| {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        fails_just(check, says, &arguments);
    };
    fails_just("metrics", "draw every number", &faulty("unseeded"));
    fails_just("metrics", "work on a copy", &faulty("in_place"));
    fails_just("panics", "ended the process by signal 6", &faulty("abort_on_misfit"));
    fails_just("leaks", "every evaluation keeps", &faulty("keep_features"));
    let careless = ["faulty_probe".to_owned(), "eval.probes.careless.enabled=true".to_owned()];
    fails_just("options", "deny_unknown_fields", &careless);
}

#[test]
fn a_file_that_does_not_load_is_told_by_the_first_check() {
    let room = Room::new();
    let file = room.file("libnone.so");
    fs::write(&file, "no library").unwrap();
    fails_just("loads", "is not", &[file.to_str().unwrap()]);
}

#[test]
fn people_get_a_table_and_typos_an_answer() {
    let room = Room::new();
    let library = plugin("faulty_plugin");
    let ended = room.run(["plugin", "check", library.to_str().unwrap(), "--only", "seed"]).expect(0);
    assert!(ended.stdout.contains("pass  seed"), "{}", ended.stdout);
    room.run(["plugin", "check", "faulty_plugin", "--only", "sed"]).expect(2).error_says(&["`sed`", "seed"]);
    room.run(["plugin", "check", "faulty_plugin", "method.ballst=1"]).expect(2).error_says(&["ballast"]);
}

#[test]
fn a_step_that_does_nothing_costs_little_more_through_the_boundary() {
    tch::set_num_threads(1);
    let nothing = Case {
        plugin: "faulty_plugin",
        method: "faulty",
        options: json!({}),
        backbone: json!({ "stem": "small", "width": 4, "depths": [1] }),
        views: 1,
        size: 16,
        batch: 8,
    };
    let [_, middle, _] = compare::<Faulty>(&nothing, 500).difference;
    // 20 µs are allowed; on a machine that does other things as well, ten times that shows a change of kind.
    assert!(middle < 200.0, "{middle} µs");
}
