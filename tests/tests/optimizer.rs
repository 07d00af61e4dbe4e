//! What the host does after a backward pass equals PyTorch and lightly: AdamW, LARS, SGD, clipping, EMA, schedules.

use std::fs;

use jepa_host::config::{self, Algorithm, LrScale};
use jepa_host::device::{ema_update, gradients, set_gradients};
use jepa_host::train::{Optimizer, Progress, StepSettings, ema_momentum, learning_rate, weight_decay};
use jepa_plugin_api::EmaSchedule;
use jepa_tests::fixture::{Fixture, assert_close, path};
use serde_json::Value;
use tch::Tensor;

const TOLERANCE: f64 = 1e-5;

/// Leaves with these values, and an optimizer over them.
fn leaves(values: &[(&str, Tensor)], settings: &config::Optimizer) -> (Vec<(String, Tensor)>, Optimizer) {
    let leaf = |(name, value): &(&str, Tensor)| ((*name).to_owned(), value.copy().set_requires_grad(true));
    let params: Vec<_> = values.iter().map(leaf).collect();
    let optimizer = Optimizer::new(settings, &params);
    (params, optimizer)
}

/// Makes `gradient` the gradient of `param`.
fn give(param: &Tensor, gradient: &Tensor) {
    (param * gradient).sum(tch::Kind::Float).backward();
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(number).collect()
}

fn settings(config: &Value) -> config::Optimizer {
    config::Optimizer {
        betas: serde_json::from_value(config["betas"].clone()).expect("two numbers"),
        eps: number(&config["eps"]),
        ..config::Optimizer::default()
    }
}

#[test]
fn three_adamw_steps_equal_torch() {
    let fixture = Fixture::read("adamw");
    let config = fixture.json("config");
    let (params, mut optimizer) = leaves(&fixture.under("param."), &settings(&config));
    let rates: Vec<f64> = serde_json::from_value(config["lr"].clone()).expect("rates");
    for (step, lr) in rates.into_iter().enumerate() {
        for (name, param) in &params {
            give(param, &fixture.tensor(&format!("input.step{step}.grad.{name}")));
        }
        let gradients = optimizer.gradients().expect("gradients");
        let weight_decay = config["weight_decay"].as_f64().expect("a number");
        optimizer.step(&gradients, StepSettings { lr, weight_decay, max_norm: None }).expect("a step");
        for (name, param) in &params {
            assert!(!param.grad().defined(), "gradients are dropped after a step");
            assert_close(name, param, &fixture.tensor(&format!("after.step{step}.{name}")), TOLERANCE);
        }
    }
}

/// Takes the steps of each case of a fixture, in which biases and norm layers are in a group without decay, and some
/// parameters have no gradient in some steps.
fn steps_equal(fixture: &str, algorithm: Algorithm) {
    let fixture = Fixture::read(fixture);
    let config = fixture.json("config");
    let rates = numbers(&config["lr"]).into_iter().zip(numbers(&config["weight_decay"]));
    for (case, options) in config["cases"].as_object().expect("cases") {
        let mut settings = serde_json::to_value(config::Optimizer::default()).expect("JSON");
        settings.as_object_mut().expect("a table").extend(options.as_object().expect("a table").clone());
        let mut settings: config::Optimizer = serde_json::from_value(settings).expect("options of ours");
        (settings.algorithm, settings.exclude_norm_and_bias) = (algorithm, true);
        let (params, mut optimizer) = leaves(&fixture.under("param."), &settings);
        for (step, (lr, weight_decay)) in rates.clone().enumerate() {
            for (name, param) in &params {
                let gradient = format!("input.step{step}.grad.{name}");
                if fixture.has(&gradient) {
                    give(param, &fixture.tensor(&gradient));
                }
            }
            let gradients = optimizer.gradients().expect("gradients");
            optimizer.step(&gradients, StepSettings { lr, weight_decay, max_norm: None }).expect("a step");
            for (name, param) in &params {
                let key = format!("after.{case}.step{step}.{name}");
                assert_close(&key, param, &fixture.tensor(&key), TOLERANCE);
            }
        }
    }
}

#[test]
fn four_lars_steps_equal_lightly() {
    steps_equal("lars", Algorithm::Lars);
}

#[test]
fn four_sgd_steps_equal_torch() {
    steps_equal("sgd", Algorithm::Sgd);
}

#[test]
fn rates_and_decays_follow_their_settings() {
    let peak = |lr_scale, batch_size, accumulate| {
        let optimizer = config::Optimizer { lr: 0.1, lr_scale, batch_size, ..config::Optimizer::default() };
        let trainer = config::Trainer { accumulate, ..config::Trainer::default() };
        config::Config { optimizer, trainer, ..config::Config::default() }.peak_lr()
    };
    assert_eq!(peak(LrScale::None, 1024, 4), 0.1);
    assert_eq!(peak(LrScale::Linear, 128, 4), 0.2);
    assert_eq!(peak(LrScale::Sqrt, 1024, 1), 0.2);

    assert_eq!(weight_decay(3, 10, 0.05, None), 0.05, "no end, no change");
}

#[test]
fn clipping_equals_torch() {
    let fixture = Fixture::read("clip_grad_norm");
    let max_norm = fixture.json("config")["max_norm"].as_f64().expect("a number");
    for case in ["above", "below"] {
        let inputs = fixture.under(&format!("input.{case}."));
        let (params, optimizer) = leaves(&inputs, &config::Optimizer::default());
        for (param, (_, gradient)) in params.iter().zip(&inputs) {
            give(&param.1, gradient);
        }
        let norm = optimizer.gradients().expect("gradients").norm().double_value(&[]);
        let expected = fixture.tensor(&format!("output.{case}.total_norm")).double_value(&[]);
        assert!((norm - expected).abs() <= TOLERANCE * expected, "{case}: {norm} is not {expected}");

        let gradients: Vec<Tensor> = params.iter().map(|(_, param)| param.grad()).collect();
        let total = jepa_host::device::total_norm(&gradients).expect("a norm");
        jepa_host::device::clip_gradients(&gradients, &total, max_norm).expect("clipped");
        for ((name, _), gradient) in params.iter().zip(&gradients) {
            assert_close(name, gradient, &fixture.tensor(&format!("output.{case}.{name}")), TOLERANCE);
        }
    }
}

#[test]
fn the_cnn_jepa_update_equals_torch() {
    for name in ["cnn_jepa_step", "cnn_jepa_step_plain"] {
        let fixture = Fixture::read(name);
        let config = fixture.json("config");
        let gradients = fixture.under("grad.");
        let trained: Vec<(&str, Tensor)> =
            gradients.iter().map(|(name, _)| (*name, fixture.tensor(&format!("param.{name}")))).collect();
        let (params, mut optimizer) = leaves(&trained, &settings(&config["optimizer"]));
        for ((_, param), (_, gradient)) in params.iter().zip(&gradients) {
            give(param, gradient);
        }
        let lr = config["optimizer"]["lr"].as_f64().expect("a number");
        let all = optimizer.gradients().expect("gradients");
        let weight_decay = config["optimizer"]["weight_decay"].as_f64().expect("a number");
        optimizer.step(&all, StepSettings { lr, weight_decay, max_norm: None }).expect("a step");
        for (name, param) in &params {
            assert_close(name, param, &fixture.tensor(&format!("after.{name}")), TOLERANCE);
        }

        let pairs = [("context.", "target."), ("projection.", "target_projection.")];
        for (name, online) in &params {
            let follower =
                pairs.iter().find_map(|(from, to)| Some(format!("{to}{}", name.strip_prefix(from)?)));
            let Some(follower) = follower else { continue };
            let target = fixture.tensor(&format!("param.{follower}"));
            let momentum = config["ema_momentum"].as_f64().expect("a number");
            ema_update(&[target.shallow_clone()], &[online.detach()], momentum).expect("an update");
            assert_close(&follower, &target, &fixture.tensor(&format!("after.{follower}")), TOLERANCE);
        }
    }
}

#[test]
fn schedules_equal_lightly() {
    let text = fs::read_to_string(path("schedules.json")).expect("the fixture");
    let schedules: Value = serde_json::from_str(&text).expect("JSON");
    let near = |what: &str, ours: f64, theirs: &Value| {
        assert!((ours - number(theirs)).abs() < 1e-12, "{what}: {ours} is not {theirs}");
    };

    let ema = &schedules["ema_momentum"];
    let schedule = EmaSchedule { from: number(&ema["start"]), to: number(&ema["end"]) };
    let values = ema["values"].as_array().expect("values");
    for (epoch, theirs) in values.iter().enumerate() {
        near("momentum", ema_momentum(schedule, epoch as u64, values.len() as u64), theirs);
    }
    near("momentum of a run of one epoch", ema_momentum(schedule, 0, 1), &ema["one_epoch"]);

    let rate = &schedules["learning_rate"];
    let progress = Progress {
        total_steps: rate["steps"].as_u64().expect("a number"),
        warmup_steps: rate["warm_up_steps"].as_u64().expect("a number"),
    };
    for (step, theirs) in rate["values"].as_array().expect("values").iter().enumerate() {
        let ours = learning_rate(progress, step as u64, number(&rate["base"]), number(&rate["end_factor"]));
        near("learning rate", ours, theirs);
    }

    let decay = &schedules["weight_decay"];
    let (start, end) = (number(&decay["start"]), number(&decay["end"]));
    let values = decay["values"].as_array().expect("values");
    for (step, theirs) in values.iter().enumerate() {
        near("weight decay", weight_decay(step as u64, values.len() as u64, start, Some(end)), theirs);
    }
}

#[test]
fn gradients_that_are_handed_over_are_the_parameters_own() {
    let params =
        [2i64, 3].map(|n| Tensor::ones([n], (tch::Kind::Float, tch::Device::Cpu)).set_requires_grad(true));
    let first = Tensor::from_slice(&[5f32, 6.0]);
    set_gradients(&params, &[Some(first.shallow_clone()), None]).expect("handed over");
    let own = gradients(&params).expect("gradients");
    assert_eq!(own[0].as_ref().map(Tensor::data_ptr), Some(first.data_ptr()), "no copy");
    assert!(own[1].is_none());
    set_gradients(&params, &[None, None]).expect("handed over");
    assert!(params.iter().all(|param| !param.grad().defined()));
    let too_large =
        set_gradients(&params, &[Some(Tensor::ones([3], (tch::Kind::Float, tch::Device::Cpu))), None]);
    assert!(too_large.unwrap_err().to_string().contains("grads[0] has sizes [3]"));
}
