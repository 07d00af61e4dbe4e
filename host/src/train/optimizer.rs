//! AdamW over named parameters, with its state by name so that a checkpoint can hold it.

use jepa_plugin_api::tch::{Kind, Tensor};

use crate::config;
use crate::device::{AdamW, DeviceError, adamw_step, clip_gradients, gradients, total_norm, zero_gradients};

/// The optimizer of a run.
pub struct Optimizer {
    settings: config::Optimizer,
    groups: Vec<Group>,
    params: Vec<Tensor>,
    names: Vec<String>,
}

/// Parameters with one weight decay.
struct Group {
    weight_decay: f64,
    members: Vec<Member>,
}

/// A parameter and its state.
struct Member {
    index: usize,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
}

/// The gradients of a step, measured before they are used.
pub struct Gradients {
    all: Vec<Option<Tensor>>,
    norm: Tensor,
}

impl Gradients {
    /// The L2 norm of all gradients together.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn norm(&self) -> Result<f64, DeviceError> {
        self.norm.f_double_value(&[]).map_err(|error| DeviceError::Torch(error.to_string()))
    }
}

impl Optimizer {
    /// AdamW for `params`. With `exclude_norm_and_bias`, parameters of one dimension are not decayed.
    pub fn new(settings: &config::Optimizer, params: &[(String, Tensor)]) -> Self {
        let decayed = |tensor: &Tensor| !settings.exclude_norm_and_bias || tensor.dim() > 1;
        let mut groups: Vec<Group> = Vec::new();
        for (index, (_, param)) in params.iter().enumerate() {
            let weight_decay = if decayed(param) { settings.weight_decay } else { 0.0 };
            let group = match groups.iter_mut().find(|group| group.weight_decay == weight_decay) {
                Some(group) => group,
                None => groups.push_mut(Group { weight_decay, members: Vec::new() }),
            };
            let zeros = || param.detach().zeros_like();
            let steps = Tensor::zeros([], (Kind::Float, param.device()));
            group.members.push(Member { index, exp_avg: zeros(), exp_avg_sq: zeros(), steps });
        }
        let (names, params) =
            params.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).unzip();
        Optimizer { settings: settings.clone(), groups, params, names }
    }

    /// State by name, as a checkpoint holds it: `exp_avg.<parameter>` and so on.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let named = |member: &Member| {
            let name = &self.names[member.index];
            [("exp_avg", &member.exp_avg), ("exp_avg_sq", &member.exp_avg_sq), ("step", &member.steps)]
                .map(|(kind, tensor)| (format!("{kind}.{name}"), tensor.shallow_clone()))
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

    /// One step with learning rate `lr`, after clipping to `max_norm` if given. Parameters without a gradient stay as
    /// they are. All gradients are dropped afterwards.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn step(&mut self, gradients: &Gradients, lr: f64, max_norm: Option<f64>) -> Result<(), DeviceError> {
        if let Some(max_norm) = max_norm {
            let present: Vec<Tensor> = gradients.all.iter().flatten().map(Tensor::shallow_clone).collect();
            clip_gradients(&present, &gradients.norm, max_norm)?;
        }
        let config::Optimizer { betas, eps, .. } = self.settings;
        for group in &self.groups {
            let (mut params, mut grads) = (Vec::new(), Vec::new());
            let (mut exp_avgs, mut exp_avg_sqs, mut steps) = (Vec::new(), Vec::new(), Vec::new());
            for member in &group.members {
                if let Some(gradient) = &gradients.all[member.index] {
                    params.push(self.params[member.index].shallow_clone());
                    grads.push(gradient.shallow_clone());
                    exp_avgs.push(member.exp_avg.shallow_clone());
                    exp_avg_sqs.push(member.exp_avg_sq.shallow_clone());
                    steps.push(member.steps.shallow_clone());
                }
            }
            if params.is_empty() {
                continue;
            }
            let lists = AdamW {
                params: &params,
                grads: &grads,
                exp_avgs: &exp_avgs,
                exp_avg_sqs: &exp_avg_sqs,
                steps: &steps,
            };
            adamw_step(&lists, lr, betas, group.weight_decay, eps)?;
        }
        zero_gradients(&self.params)
    }
}
