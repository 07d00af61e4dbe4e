//! AdamW, LARS and SGD over named parameters, with their state by name so that a checkpoint can hold it.

use jepa_plugin_api::tch::{Kind, Tensor};

use crate::config::{self, Algorithm};
use crate::device::{
    AdamW, DeviceError, Sgd, adamw_step, clip_gradients, gradients, lars_scale, sgd_step, total_norm,
    zero_gradients,
};

/// The optimizer of a run.
pub struct Optimizer {
    settings: config::Optimizer,
    groups: [Group; 2],
    params: Vec<Tensor>,
    names: Vec<String>,
}

/// Parameters that are decayed, or that are not.
struct Group {
    decayed: bool,
    members: Vec<Member>,
}

/// A parameter and its state.
struct Member {
    index: usize,
    state: State,
}

/// What an update rule remembers of a parameter.
enum State {
    AdamW {
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        steps: Tensor,
    },
    /// Of LARS and SGD.
    Momentum(Tensor),
}

/// What changes from step to step.
#[derive(Clone, Copy, Debug)]
pub struct StepSettings {
    /// Learning rate.
    pub lr: f64,
    /// Weight decay, of parameters that are decayed.
    pub weight_decay: f64,
    /// The norm that gradients are clipped to.
    pub max_norm: Option<f64>,
}

/// The gradients of a step, measured before they are used.
pub struct Gradients {
    all: Vec<Option<Tensor>>,
    norm: Tensor,
}

impl Gradients {
    /// The L2 norm of all gradients together, a scalar on their device.
    pub fn norm(&self) -> &Tensor {
        &self.norm
    }
}

impl Optimizer {
    /// An optimizer of `params`, by the configured algorithm. With `exclude_norm_and_bias`, parameters of one dimension
    /// and those called `bias` are not decayed (and not scaled by LARS).
    pub fn new(settings: &config::Optimizer, params: &[(String, Tensor)]) -> Self {
        let norm_or_bias =
            |name: &str, tensor: &Tensor| tensor.dim() <= 1 || name.rsplit('.').next() == Some("bias");
        let mut groups = [true, false].map(|decayed| Group { decayed, members: Vec::new() });
        for (index, (name, param)) in params.iter().enumerate() {
            let zeros = || param.detach().zeros_like();
            let state = match settings.algorithm {
                Algorithm::AdamW => State::AdamW {
                    exp_avg: zeros(),
                    exp_avg_sq: zeros(),
                    steps: Tensor::zeros([], (Kind::Float, param.device())),
                },
                Algorithm::Lars | Algorithm::Sgd => State::Momentum(zeros()),
            };
            let excluded = settings.exclude_norm_and_bias && norm_or_bias(name, param);
            groups[usize::from(excluded)].members.push(Member { index, state });
        }
        let (names, params) =
            params.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).unzip();
        Optimizer { settings: settings.clone(), groups, params, names }
    }

    /// State by name, as a checkpoint holds it: `exp_avg.<parameter>`, `momentum.<parameter>` and so on.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let named = |member: &Member| {
            let state = match &member.state {
                State::AdamW { exp_avg, exp_avg_sq, steps } => {
                    vec![("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("step", steps)]
                }
                State::Momentum(momentum) => vec![("momentum", momentum)],
            };
            let name = &self.names[member.index];
            let entry = |(kind, tensor): (&str, &Tensor)| (format!("{kind}.{name}"), tensor.shallow_clone());
            state.into_iter().map(entry).collect::<Vec<_>>()
        };
        self.groups.iter().flat_map(|group| group.members.iter().flat_map(named)).collect()
    }

    /// The gradients as they are now, and their norm.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn gradients(&self) -> Result<Gradients, DeviceError> {
        let all = gradients(&self.params)?;
        let present: Vec<Tensor> = all.iter().flatten().map(Tensor::shallow_clone).collect();
        let norm = total_norm(&present)?;
        Ok(Gradients { all, norm })
    }

    /// Names of parameters that got no gradient.
    pub fn without_gradient<'a>(&'a self, gradients: &'a Gradients) -> impl Iterator<Item = &'a str> {
        let pairs = self.names.iter().zip(&gradients.all);
        pairs.filter(|(_, gradient)| gradient.is_none()).map(|(name, _)| name.as_str())
    }

    /// Each parameter as `weights/<name>`, and its gradient, if it has one, as `gradients/<name>`.
    pub fn weights_and_gradients<'a>(
        &'a self,
        gradients: &'a Gradients,
    ) -> impl Iterator<Item = (String, Tensor)> + 'a {
        let params = self.names.iter().zip(self.params.iter().zip(&gradients.all));
        params.flat_map(|(name, (param, gradient))| {
            let weights = (format!("weights/{name}"), param.detach());
            let gradient =
                gradient.as_ref().map(|gradient| (format!("gradients/{name}"), gradient.shallow_clone()));
            std::iter::once(weights).chain(gradient)
        })
    }

    /// One step, after clipping if that is asked for. Parameters without a gradient stay as they are. All gradients are
    /// dropped afterwards.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn step(&mut self, gradients: &Gradients, settings: StepSettings) -> Result<(), DeviceError> {
        if let Some(max_norm) = settings.max_norm {
            let present: Vec<Tensor> = gradients.all.iter().flatten().map(Tensor::shallow_clone).collect();
            clip_gradients(&present, &gradients.norm, max_norm)?;
        }
        for group in &self.groups {
            let settings = StepSettings {
                weight_decay: if group.decayed { settings.weight_decay } else { 0.0 },
                ..settings
            };
            match self.settings.algorithm {
                Algorithm::AdamW => self.step_adamw(group, gradients, settings)?,
                Algorithm::Lars | Algorithm::Sgd => self.step_momentum(group, gradients, settings)?,
            }
        }
        zero_gradients(&self.params)
    }

    fn step_adamw(
        &self,
        group: &Group,
        gradients: &Gradients,
        StepSettings { lr, weight_decay, .. }: StepSettings,
    ) -> Result<(), DeviceError> {
        let (mut params, mut grads) = (Vec::new(), Vec::new());
        let (mut exp_avgs, mut exp_avg_sqs, mut all_steps) = (Vec::new(), Vec::new(), Vec::new());
        for member in &group.members {
            if let (Some(gradient), State::AdamW { exp_avg, exp_avg_sq, steps }) =
                (&gradients.all[member.index], &member.state)
            {
                params.push(self.params[member.index].shallow_clone());
                grads.push(gradient.shallow_clone());
                exp_avgs.push(exp_avg.shallow_clone());
                exp_avg_sqs.push(exp_avg_sq.shallow_clone());
                all_steps.push(steps.shallow_clone());
            }
        }
        if params.is_empty() {
            return Ok(());
        }
        let lists = AdamW {
            params: &params,
            grads: &grads,
            exp_avgs: &exp_avgs,
            exp_avg_sqs: &exp_avg_sqs,
            steps: &all_steps,
        };
        adamw_step(&lists, lr, self.settings.betas, weight_decay, self.settings.eps)
    }

    /// SGD with momentum, and LARS, which scales what decays to the size of its tensor first. Where nothing decays,
    /// LARS is SGD.
    fn step_momentum(
        &self,
        group: &Group,
        gradients: &Gradients,
        StepSettings { lr, mut weight_decay, .. }: StepSettings,
    ) -> Result<(), DeviceError> {
        let config::Optimizer { algorithm, momentum, nesterov, trust_coefficient, eps, .. } = self.settings;
        let (mut params, mut grads, mut momentum_buffers) = (Vec::new(), Vec::new(), Vec::new());
        for member in &group.members {
            if let (Some(gradient), State::Momentum(buffer)) = (&gradients.all[member.index], &member.state) {
                params.push(self.params[member.index].shallow_clone());
                grads.push(gradient.shallow_clone());
                momentum_buffers.push(buffer.shallow_clone());
            }
        }
        if algorithm == Algorithm::Lars && weight_decay > 0.0 {
            lars_scale(&params, &grads, weight_decay, trust_coefficient, eps)?;
            // The gradients have it now.
            weight_decay = 0.0;
        }
        let lists = Sgd { params: &params, grads: &grads, momentum_buffers: &momentum_buffers };
        sgd_step(&lists, lr, momentum, weight_decay, nesterov)
    }
}
