//! The tensors that a plugin owns, by name: what the host trains, copies, saves and restores.

use std::cell::RefCell;
use std::rc::Rc;

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

/// Whether a tensor is trained or merely kept.
///
/// ```
/// use jepa_plugin_api::params::Kind;
/// use jepa_plugin_api::{Params, tch};
/// let params = Params::new(tch::Device::Cpu);
/// params.buffer("seen", tch::Tensor::from(0i64));
/// assert_eq!(params.entries()[0].kind, Kind::Buffer);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Trained by the optimizer.
    Parameter,
    /// Saved and restored, not trained: running statistics, say.
    Buffer,
}

/// One named tensor.
///
/// ```
/// use jepa_plugin_api::{Params, nn::Linear, tch::Device};
/// let params = Params::new(Device::Cpu);
/// Linear::new(&params.sub("head"), 8, 2, true);
/// let names: Vec<String> = params.entries().into_iter().map(|entry| entry.name).collect();
/// assert_eq!(names, ["head.weight", "head.bias"]);
/// ```
#[derive(Debug)]
pub struct Entry {
    /// Full name, dots between the parts: `context.layer1.0.conv1.weight`.
    pub name: String,
    /// Trained or kept.
    pub kind: Kind,
    /// The tensor itself; a shallow clone shares storage and gradient with the plugin's own.
    pub tensor: Tensor,
}

impl Entry {
    /// Another entry of the same tensor.
    pub(crate) fn share(&self) -> Entry {
        Entry { name: self.name.clone(), kind: self.kind, tensor: self.tensor.shallow_clone() }
    }
}

/// A place in the tree of names under which a plugin registers its tensors.
///
/// Register everything that training changes, or it will be missing from checkpoints. Backbones use timm's names.
///
/// ```
/// use jepa_plugin_api::{Params, tch};
/// let params = Params::new(tch::Device::Cpu);
/// let on = (tch::Kind::Float, params.device());
/// let head = params.sub("head");
/// let weight = head.parameter("weight", tch::Tensor::zeros([10, 64], on));
/// let seen = head.buffer("seen", tch::Tensor::zeros([1], on));
/// assert!(weight.requires_grad() && !seen.requires_grad());
/// ```
#[derive(Clone)]
pub struct Params {
    prefix: String,
    device: Device,
    entries: Rc<RefCell<Vec<Entry>>>,
}

impl Params {
    /// An empty tree for tensors on `device`.
    pub fn new(device: Device) -> Self {
        Params { prefix: String::new(), device, entries: Rc::default() }
    }

    /// The device that tensors belong on.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The place `name` below this one.
    pub fn sub(&self, name: impl AsRef<str>) -> Params {
        Params { prefix: self.full_name(name.as_ref()), ..self.clone() }
    }

    /// Registers a trained tensor with its initial value, and returns it as a leaf that requires gradients.
    ///
    /// # Panics
    /// When the name is taken.
    pub fn parameter(&self, name: &str, initial: Tensor) -> Tensor {
        let leaf = initial.to_device(self.device).detach().set_requires_grad(true);
        self.register(name, Kind::Parameter, leaf)
    }

    /// Registers a tensor that is saved with the run but not trained, and returns it.
    ///
    /// # Panics
    /// When the name is taken.
    pub fn buffer(&self, name: &str, initial: Tensor) -> Tensor {
        self.register(name, Kind::Buffer, initial.to_device(self.device).detach())
    }

    /// All tensors registered so far anywhere in the tree, in order.
    pub fn entries(&self) -> Vec<Entry> {
        self.entries.borrow().iter().map(Entry::share).collect()
    }

    /// Takes over tensors that somebody else made and uses (a backbone, a TorchScript module) under this place's name:
    /// these very tensors, so that whoever made them sees what training does to them.
    ///
    /// # Panics
    /// When a name is taken.
    pub fn adopt(&self, entries: Vec<Entry>) {
        for Entry { name, kind, tensor } in entries {
            let _ = self.register(&name, kind, tensor);
        }
    }

    fn full_name(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }

    fn register(&self, name: &str, kind: Kind, tensor: Tensor) -> Tensor {
        let name = self.full_name(name);
        let mut entries = self.entries.borrow_mut();
        assert!(entries.iter().all(|e| e.name != name), "two tensors are named `{name}`");
        entries.push(Entry { name, kind, tensor: tensor.shallow_clone() });
        tensor
    }
}
