//! EMA pairs: which tensor follows which, and the update.

use jepa_plugin_api::params::{Entry, Kind};
use jepa_plugin_api::tch::{Tensor, no_grad};
use jepa_plugin_api::{EmaPair, EmaSchedule};

use super::schedule::ema_momentum;
use crate::device::{DeviceError, ema_update};

/// One declared pair, resolved to tensors.
pub(super) struct Ema {
    schedule: EmaSchedule,
    online: Vec<Tensor>,
    target: Vec<Tensor>,
}

impl Ema {
    /// Resolves `pair` among `entries`, makes the target equal to the online side, buffers too, and stops gradients
    /// to it.
    ///
    /// # Errors
    /// In words, when the two subtrees do not match.
    pub fn adopt(pair: &EmaPair, entries: &[Entry]) -> Result<Self, String> {
        let under = |prefix: &str| -> Vec<(String, &Entry)> {
            let prefix = format!("{prefix}.");
            let suffix = |e: &Entry| e.name.strip_prefix(&prefix).map(str::to_owned);
            entries.iter().filter_map(|entry| Some((suffix(entry)?, entry))).collect()
        };
        let (online, target) = (under(&pair.online), under(&pair.target));
        let describe = |side: &[(String, &Entry)]| -> Vec<(String, Kind, Vec<i64>)> {
            side.iter().map(|(name, entry)| (name.clone(), entry.kind, entry.tensor.size())).collect()
        };
        if online.is_empty() || describe(&online) != describe(&target) {
            return Err(format!(
                "an EMA pair `{}` → `{}` whose {} and {} tensors do not match by name, kind and shape",
                pair.online,
                pair.target,
                online.len(),
                target.len()
            ));
        }
        let EmaSchedule { from, to } = pair.schedule;
        if ![from, to].iter().all(|momentum| (0.0..=1.0).contains(momentum)) {
            return Err(format!("an EMA pair with momentum from {from} to {to}, not in [0, 1]"));
        }
        let mut ema = Ema { schedule: pair.schedule, online: Vec::new(), target: Vec::new() };
        no_grad(|| {
            for ((_, online), (_, target)) in online.into_iter().zip(target) {
                let (source, mut copy) = (online.tensor.shallow_clone(), target.tensor.shallow_clone());
                copy.copy_(&source);
                if target.kind == Kind::Parameter {
                    let _ = copy.set_requires_grad(false);
                    ema.online.push(source);
                    ema.target.push(copy);
                }
            }
        });
        Ok(ema)
    }

    /// target ← m · target + (1 − m) · online, with the momentum m of `epoch`.
    pub fn update(&self, epoch: u64, epochs: u64) -> Result<(), DeviceError> {
        ema_update(&self.target, &self.online, self.momentum(epoch, epochs))
    }

    /// The momentum of `epoch`.
    pub fn momentum(&self, epoch: u64, epochs: u64) -> f64 {
        ema_momentum(self.schedule, epoch, epochs)
    }
}
