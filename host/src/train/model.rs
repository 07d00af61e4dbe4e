//! The method of a run with its tensors sorted: what is trained, what follows, what is saved.

use jepa_plugin_api::abi::MethodHandle;
use jepa_plugin_api::params::{Entry, Kind};
use jepa_plugin_api::tch::{Device, Kind as TensorKind, TchError, Tensor, no_grad};

use super::TrainError;
use super::ema::Ema;
use crate::device::{DeviceError, copy_all};

/// A built method, adopted by the host.
pub struct Model {
    /// The method itself.
    pub method: MethodHandle,
    trained: Vec<(String, Tensor)>,
    ema: Vec<Ema>,
    buffers: Vec<Buffers>,
}

/// The buffers of one dtype, and their values before the step under way.
struct Buffers {
    now: Vec<Tensor>,
    before: Vec<Tensor>,
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
        let mut buffers: Vec<Buffers> = Vec::new();
        for Entry { tensor, .. } in method.entries().iter().filter(|entry| entry.kind == Kind::Buffer) {
            let alike = |list: &&mut Buffers| list.now[0].kind() == tensor.kind();
            match buffers.iter_mut().find(alike) {
                Some(list) => {
                    list.now.push(tensor.shallow_clone());
                    list.before.push(tensor.copy());
                }
                None => {
                    buffers.push(Buffers { now: vec![tensor.shallow_clone()], before: vec![tensor.copy()] })
                }
            }
        }
        Ok(Model { method, trained, ema, buffers })
    }

    /// The parameters that the optimizer trains.
    pub fn trained(&self) -> &[(String, Tensor)] {
        &self.trained
    }

    /// Every tensor, as a checkpoint holds it.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        self.method.entries().iter().map(|entry| (entry.name.clone(), entry.tensor.shallow_clone())).collect()
    }

    /// A number that differs for models that differ in a bit, as good as always: the sum of all bits, taken as integers.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn checksum(&self) -> Result<i64, TchError> {
        let mut sum = 0i64;
        for entry in self.method.entries() {
            let tensor = entry.tensor.detach();
            let bits = match tensor.kind() {
                TensorKind::Float => tensor.f_view_dtype(TensorKind::Int)?,
                TensorKind::Double => tensor.f_view_dtype(TensorKind::Int64)?,
                TensorKind::Half | TensorKind::BFloat16 => tensor.f_view_dtype(TensorKind::Int16)?,
                _ => tensor,
            };
            sum = sum.wrapping_mul(31).wrapping_add(bits.f_sum(TensorKind::Int64)?.f_int64_value(&[])?);
        }
        Ok(sum)
    }

    /// Features (B, D) on `device` of images f32 `(B, 3, S, S)`, wherever these are.
    ///
    /// # Errors
    /// The method's failure.
    pub fn encode(&mut self, images: &Tensor, device: Device) -> anyhow::Result<Tensor> {
        Ok(no_grad(|| self.method.encode(&images.to_device(device)))?)
    }

    /// Moves every EMA target towards its online side.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn update_ema(&self, epoch: u64, epochs: u64) -> Result<(), DeviceError> {
        self.ema.iter().try_for_each(|ema| ema.update(epoch, epochs))
    }

    /// The momentum of EMA targets in `epoch` (of the last pair, should they differ), when there are any.
    pub fn ema_momentum(&self, epoch: u64, epochs: u64) -> Option<f64> {
        self.ema.last().map(|ema| ema.momentum(epoch, epochs))
    }

    /// Keeps the values that buffers have before a step: running statistics, and whatever else a method updates in
    /// its forward pass.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn remember_buffers(&mut self) -> Result<(), DeviceError> {
        self.buffers.iter().try_for_each(|list| copy_all(&list.before, &list.now))
    }

    /// Gives buffers the values that they had before a step that failed.
    ///
    /// # Errors
    /// Whatever libtorch reports, on a device that failed for one.
    pub fn restore_buffers(&mut self) -> Result<(), DeviceError> {
        self.buffers.iter().try_for_each(|list| copy_all(&list.now, &list.before))
    }
}
