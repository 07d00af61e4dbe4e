//! What the host does after a backward pass equals PyTorch: AdamW, clipping, EMA, and the schedules of lightly.

use std::fs;

use jepa_host::config::{self, Algorithm, LrScale};
use jepa_host::device::ema_update;
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

fn settings(config: &Value) -> config::Optimizer {
    config::Optimizer {
        weight_decay: config["weight_decay"].as_f64().expect("a number"),
        betas: serde_json::from_value(config["betas"].clone()).expect("two numbers"),
        eps: config["eps"].as_f64().expect("a number"),
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

#[test]
fn four_steps_of_sgd_and_lars_equal_torch_and_lightly() {
    let fixture = Fixture::read("momentum");
    let config = fixture.json("config");
    let rates: Vec<f64> = serde_json::from_value(config["lr"].clone()).expect("rates");
    for (name, options) in config["optimizers"].as_object().expect("optimizers") {
        let number = |key: &str| options[key].as_f64();
        let settings = config::Optimizer {
            algorithm: if name.starts_with("lars") { Algorithm::Lars } else { Algorithm::Sgd },
            momentum: number("momentum").expect("a momentum"),
            nesterov: options["nesterov"].as_bool().unwrap_or(false),
            trust_coefficient: number("trust_coefficient").unwrap_or(1e-3),
            exclude_norm_and_bias: true,
            ..config::Optimizer::default()
        };
        let (params, mut optimizer) = leaves(&fixture.under("param."), &settings);
        for (step, &lr) in rates.iter().enumerate() {
            for (param, tensor) in &params {
                give(tensor, &fixture.tensor(&format!("input.step{step}.grad.{param}")));
            }
            let gradients = optimizer.gradients().expect("gradients");
            let weight_decay = number("weight_decay").expect("a number");
            optimizer.step(&gradients, StepSettings { lr, weight_decay, max_norm: None }).expect("a step");
            for (param, tensor) in &params {
                let theirs = fixture.tensor(&format!("after.{name}.step{step}.{param}"));
                assert_close(&format!("{name} {param}"), tensor, &theirs, TOLERANCE);
            }
        }
        let state = optimizer.tensors();
        assert_eq!(state.len(), params.len());
        assert!(state.iter().all(|(name, _)| name.starts_with("momentum.")));
    }
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

    assert_eq!(weight_decay(3, 10, 0.05, None), 0.05);
    for (step, expected) in [(0, 0.05), (5, 0.275), (10, 0.5)] {
        let decay = weight_decay(step, 11, 0.05, Some(0.5));
        assert!((decay - expected).abs() < 1e-12, "step {step}: {decay}");
    }
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
        let norm = optimizer.gradients().and_then(|gradients| gradients.norm()).expect("a norm");
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
    let number = |value: &Value| value.as_f64().expect("a number");
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
}
