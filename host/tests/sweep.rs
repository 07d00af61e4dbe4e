//! Sweeps against W&B's own package `sweeps`, and what a person meets who writes one wrong.

use std::path::Path;

use jepa_host::sweep::{Definition, Hyperband, Method, Search};
use serde_json::{Value, json};

fn fixture() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/sweeps.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn parse(text: &str) -> Result<Definition, String> {
    Definition::parse(text, "test")
}

/// A definition with these parameters; JSON is YAML.
fn with_parameters(method: &str, parameters: &Value) -> Definition {
    let definition = json!({ "method": method, "parameters": parameters, "command": ["${args_no_hyphens}"] });
    parse(&definition.to_string()).unwrap()
}

fn agree(ours: &Value, theirs: &Value) -> bool {
    match (ours.as_f64(), theirs.as_f64()) {
        // The inverse of a beta distribution is searched for, here and there.
        (Some(ours), Some(theirs)) => (ours - theirs).abs() <= 1e-9 * theirs.abs().max(1.0),
        _ => ours == theirs,
    }
}

#[test]
fn draws_are_those_of_wandb() {
    let fixture = fixture();
    let points: Vec<f64> = serde_json::from_value(fixture["points"].clone()).unwrap();
    for parameter in fixture["parameters"].as_array().unwrap() {
        let definition = with_parameters("random", &json!({ "p": parameter["entry"] }));
        for (point, theirs) in points.iter().zip(parameter["quantiles"].as_array().unwrap()) {
            let ours = definition.parameters["p"].quantile(*point);
            assert!(agree(&ours, theirs), "{} at {point}: {ours}, not {theirs}", parameter["entry"]);
            assert_eq!(ours.is_i64(), theirs.is_i64(), "{}", parameter["entry"]);
        }
    }
}

#[test]
fn a_grid_is_that_of_wandb() {
    let fixture = &fixture()["grid"];
    let search = Search::new(&with_parameters("grid", &fixture["parameters"]), 0).unwrap();
    let theirs = fixture["trials"].as_array().unwrap();
    assert_eq!(search.len(), Some(theirs.len() as u64));
    for (number, theirs) in theirs.iter().enumerate() {
        assert_eq!(&json!(search.trial(number as u64).unwrap()), theirs);
    }
    assert_eq!(search.trial(theirs.len() as u64), None);
}

#[test]
fn the_runs_that_are_stopped_are_those_of_wandb() {
    for case in fixture()["hyperband"].as_array().unwrap() {
        let hyperband: Hyperband = serde_json::from_value(case["early_terminate"].clone()).unwrap();
        let sign = if case["goal"] == "maximize" { -1.0 } else { 1.0 };
        let histories: Vec<Vec<f64>> = serde_json::from_value(case["histories"].clone()).unwrap();
        let costs: Vec<Vec<f64>> =
            histories.iter().map(|history| history.iter().map(|value| sign * value).collect()).collect();
        let stopped: Vec<bool> = hyperband.judge(&costs).iter().map(Option::is_some).collect();
        assert_eq!(json!(stopped), case["stopped"], "{case}");
    }
}

#[test]
fn random_trials_depend_on_their_number_and_the_seed_alone() {
    let parameters = json!({ "lr": { "min": 0.0, "max": 1.0 }, "size": { "min": 1, "max": 100 } });
    let definition = with_parameters("random", &parameters);
    let (search, other) = (Search::new(&definition, 0).unwrap(), Search::new(&definition, 1).unwrap());
    assert_eq!(search.trial(3), Search::new(&definition, 0).unwrap().trial(3));
    assert_ne!(search.trial(3), search.trial(4));
    assert_ne!(search.trial(3), other.trial(3));
    // Uniform over many trials.
    let mean = (0..4000).map(|n| search.trial(n).unwrap()["lr"].as_f64().unwrap()).sum::<f64>() / 4000.0;
    assert!((mean - 0.5).abs() < 0.02, "{mean}");
}

#[test]
fn the_example_is_a_sweep() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/sweep.yaml");
    let definition = Definition::read(&path).unwrap();
    assert_eq!(definition.method, Method::Random);
    assert!(definition.early_terminate.is_some());
}

#[test]
fn a_grid_of_endlessly_many_trials_is_refused_and_equal_values_are_one() {
    let axis = json!({ "min": 1, "max": 16 });
    let axes: serde_json::Map<String, Value> = (0..16).map(|i| (format!("a{i}"), axis.clone())).collect();
    let definition = json!({ "method": "grid", "parameters": axes, "command": ["${args_no_hyphens}"] });
    assert!(parse(&definition.to_string()).unwrap_err().contains("too many combinations"));
    let repeated = with_parameters("grid", &json!({ "a": { "values": [1, 1, 1.0, 2] } }));
    assert_eq!(Search::new(&repeated, 0).unwrap().len(), Some(2));
    let close = json!({ "type": "hyperband", "min_iter": 1, "eta": 1.0000000001 });
    assert!(serde_json::from_value::<Hyperband>(close).is_ok());
}

#[test]
fn nested_parameters_are_joined_by_dots() {
    let parameters = json!({ "optimizer": { "parameters": { "lr": { "value": 0.1 } } } });
    let definition = with_parameters("grid", &parameters);
    assert_eq!(definition.parameters.keys().collect::<Vec<_>>(), ["optimizer.lr"]);
}

#[test]
fn what_cannot_be_run_is_refused_with_advice() {
    let command = "command: ['${program}', '${args_no_hyphens}']\n";
    let one = "parameters: {a: {values: [1, 2]}}\n";
    let cases = [
        (format!("method: bayes\n{one}{command}"), "bayes is not offered here: use random"),
        (format!("method: gird\n{one}{command}"), "method: gird is unknown: use grid or random"),
        (format!("method: grid\n{one}"), "command is missing"),
        (format!("method: grid\n{one}command: ['${{program}}', '${{args}}']\n"), "use ${args_no_hyphens}"),
        (format!("method: grid\n{one}command: ['${{program}}']\n"), "the parameters would reach nobody"),
        (format!("method: grid\n{command}"), "missing field `parameters`"),
        (format!("method: grid\nparameters: {{}}\n{command}"), "there is nothing to try"),
        (
            format!("method: grid\nparameters: {{a: {{min: 0.0, max: 1.0}}}}\n{command}"),
            "parameters.a has no list of values",
        ),
        (
            format!("method: random\nparameters: {{a: {{min: 2.0, max: 1.0}}}}\n{command}"),
            "parameters.a: min is greater",
        ),
        (
            format!(
                "method: random\nparameters: {{a: {{distribution: unifrom, min: 0, max: 1}}}}\n{command}"
            ),
            "unknown variant `unifrom`: did you mean uniform?",
        ),
        (
            format!("method: random\nparameters: {{a: {{values: [1], probabilities: [0.5]}}}}\n{command}"),
            "add up to 1",
        ),
        (
            format!(
                "method: random\nparameters: {{a: {{distribution: log_uniform_values, min: 0, max: 1}}}}\n{command}"
            ),
            "min must be greater than 0",
        ),
        (format!("method: grid\nparameters: {{a: 3}}\n{command}"), "parameters.a must hold keys"),
        (
            format!("method: grid\n{one}{command}early_terminate: {{type: hyperband, min_iter: 3}}\n"),
            "early_terminate needs metric",
        ),
        (
            format!(
                "method: grid\n{one}{command}metric: {{name: m}}\nearly_terminate: {{type: hyperband}}\n"
            ),
            "needs min_iter, or max_iter and s",
        ),
        (format!("method: grid\n{one}{command}run_cap: 0\n"), "run_cap"),
        (
            format!(
                "method: random\nparameters: {{a: {{min: -9223372036854775808, max: 9223372036854775807}}}}\n{command}"
            ),
            "four thousand million",
        ),
        (format!("method: grid\nparameters: {{a: {{min: 0, max: 4000000}}}}\n{command}"), "too many of them"),
        (
            format!(
                "method: random\nparameters: {{a: {{distribution: log_uniform, min: 0, max: 5000}}}}\n{command}"
            ),
            "_values",
        ),
        (
            format!(
                "method: grid\nparameters: {{a: {{parameters: {{b: {{value: 1}}}}, value: 2}}}}\n{command}"
            ),
            "unknown field `parameters`",
        ),
        (
            format!(
                "method: grid\nparameters: {{a.b: {{value: 1}}, a: {{parameters: {{b: {{value: 1}}}}}}}}\n{command}"
            ),
            "parameters.a.b is there twice",
        ),
        (
            format!("method: grid\n{one}{command}run_caps: 3\n"),
            "line 4 column 1, `run_caps: 3`: unknown field `run_caps`: did you mean run_cap?",
        ),
        (format!("method: grid\n{one}{command}metric: [\n"), "line"),
    ];
    for (text, expected) in cases {
        let why = parse(&text).expect_err(&text);
        assert!(why.contains(expected), "{text}\n{why}");
        assert!(!why.contains('\n') && !why.contains("error:"), "it is said once: {why}");
    }
}

#[test]
fn rounded_values_have_no_more_places_than_their_step() {
    let parameters = json!({ "p": { "distribution": "q_uniform", "min": 0.1, "max": 0.55, "q": 0.1 } });
    let distribution = &with_parameters("grid", &parameters).parameters["p"];
    assert_eq!(json!(distribution.grid().unwrap()).to_string(), "[0.1,0.2,0.3,0.4,0.5]");
    let drawn: Vec<String> =
        (1..100).map(|p| distribution.quantile(f64::from(p) / 100.0).to_string()).collect();
    assert!(drawn.iter().all(|value| value.len() == 3), "{drawn:?}");
}

#[test]
fn what_was_probably_meant_otherwise_is_said() {
    let doubts = |parameter: Value, metric: Value| {
        let definition = json!({
            "method": "random", "parameters": { "p": parameter }, "metric": metric, "command": ["${args_no_hyphens}"],
        });
        parse(&definition.to_string()).unwrap().doubts().join("; ")
    };
    let log = |min: f64, max: f64| json!({ "distribution": "log_uniform", "min": min, "max": max });
    let loss = || json!({ "name": "train/loss" });
    assert!(
        doubts(log(1e-4, 0.1), loss()).contains("parameters.p: min and max of log_uniform are exponents")
    );
    assert!(doubts(log(1e-4, 0.1), loss()).contains("use log_uniform_values"));
    for sound in [log(-9.2, -2.3), log(0.0, 5.0), log(3.0, 6.0)] {
        assert_eq!(doubts(sound, loss()), "");
    }
    let one = || json!({ "value": 1 });
    assert!(doubts(one(), json!({ "name": "eval/knn_top1" })).contains("did you mean goal: maximize?"));
    assert!(doubts(one(), json!({ "name": "val/loss", "goal": "maximize" })).contains("goal: minimize?"));
    assert_eq!(doubts(one(), json!({ "name": "eval/knn_top1", "goal": "maximize" })), "");
    assert_eq!(doubts(one(), json!({ "name": "train/data_wait" })), "");
}
