//! Training as the fixtures have it: AdamW on all that is trained, and then the EMA of parameters.

use jepa_host::config;
use jepa_host::device::ema_update;
use jepa_host::train::{Optimizer, StepSettings};
use jepa_plugin_api::Method;
use jepa_plugin_api::params::Kind;
use jepa_plugin_api::testing::LinkedMethod;
use serde_json::Value;
use tch::Tensor;

/// The losses of three steps with the `optimizer` and the `ema_momentum` of a fixture's `config`; `loss` gives that of
/// each.
pub fn three_steps<M: Method>(
    built: &mut LinkedMethod<M>,
    config: &Value,
    mut loss: impl FnMut(&mut M) -> Tensor,
) -> Tensor {
    let number = |value: &Value| value.as_f64().expect("a number");
    let settings = config::Optimizer {
        lr: number(&config["optimizer"]["lr"]),
        weight_decay: number(&config["optimizer"]["weight_decay"]),
        eps: number(&config["optimizer"]["eps"]),
        ..config::Optimizer::default()
    };
    let parameters: Vec<(String, Tensor)> = built
        .entries
        .iter()
        .filter(|entry| entry.kind == Kind::Parameter)
        .map(|entry| (entry.name.clone(), entry.tensor.shallow_clone()))
        .collect();
    let under = |side: &str, name: &str| name.starts_with(&format!("{side}."));
    let side = |side: &str| {
        let inside = parameters.iter().filter(|(name, _)| under(side, name));
        inside.map(|(_, tensor)| tensor.shallow_clone()).collect::<Vec<Tensor>>()
    };
    let (mut online, mut targets) = (Vec::new(), Vec::new());
    for pair in &built.ema {
        online.extend(side(&pair.online));
        targets.extend(side(&pair.target));
    }
    let follows = |name: &str| built.ema.iter().any(|pair| under(&pair.target, name));
    let trained = parameters.iter().filter(|(name, _)| !follows(name));
    let trained: Vec<_> = trained.map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
    let mut optimizer = Optimizer::new(&settings, &trained);

    let losses = [0, 1, 2].map(|_| {
        let loss = loss(&mut built.method);
        loss.backward();
        let gradients = optimizer.gradients().expect("gradients");
        let step = StepSettings { lr: settings.lr, weight_decay: settings.weight_decay, max_norm: None };
        optimizer.step(&gradients, step).expect("an update");
        ema_update(&targets, &online, number(&config["ema_momentum"])).expect("an update");
        loss.detach()
    });
    Tensor::stack(&losses, 0)
}
