//! The method of a run with its tensors sorted: what is trained, what follows, what is saved.

use jepa_plugin_api::abi::MethodHandle;
use jepa_plugin_api::params::Kind;
use jepa_plugin_api::tch::Tensor;

use super::TrainError;
use super::ema::Ema;
use crate::device::DeviceError;

/// A built method, adopted by the host.
pub struct Model {
    /// The method itself.
    pub method: MethodHandle,
    trained: Vec<(String, Tensor)>,
    ema: Vec<Ema>,
}

impl Model {
    /// Takes over the tensors of `method`, of the plugin called `plugin`: resolves its EMA pairs, and leaves to the
    /// optimizer what follows nothing.
    ///
    /// # Errors
    /// When the method declares pairs that do not match, or nothing to train.
    pub fn adopt(method: MethodHandle, plugin: &str) -> Result<Self, TrainError> {
        let declared = |what: String| TrainError::Declaration { plugin: plugin.to_owned(), what };
        let mut ema = Vec::new();
        for pair in method.ema() {
            ema.push(Ema::adopt(pair, method.entries()).map_err(declared)?);
        }
        let follows =
            |name: &str| method.ema().iter().any(|pair| name.starts_with(&format!("{}.", pair.target)));
        let trained: Vec<_> = method
            .entries()
            .iter()
            .filter(|entry| entry.kind == Kind::Parameter && !follows(&entry.name))
            .map(|entry| (entry.name.clone(), entry.tensor.shallow_clone()))
            .collect();
        if trained.is_empty() {
            return Err(declared("no parameter to train".to_owned()));
        }
        Ok(Model { method, trained, ema })
    }

    /// The parameters that the optimizer trains.
    pub fn trained(&self) -> &[(String, Tensor)] {
        &self.trained
    }

    /// Every tensor, as a checkpoint holds it.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        self.method.entries().iter().map(|entry| (entry.name.clone(), entry.tensor.shallow_clone())).collect()
    }

    /// Moves every EMA target towards its online side, and returns the momentum, when there is one.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn update_ema(&self, epoch: u64, epochs: u64) -> Result<Option<f64>, DeviceError> {
        let mut momentum = None;
        for ema in &self.ema {
            momentum = Some(ema.update(epoch, epochs)?);
        }
        Ok(momentum)
    }
}
