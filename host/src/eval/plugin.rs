//! Probes that plugins bring.

use jepa_plugin_api::abi::Plugin;
use jepa_plugin_api::{FrozenFeatures, LabelledFeatures, Rng, tch};
use serde_json::Value;

use super::Features;

/// Key of the number that libtorch's own generator starts from in each judgement.
const TORCH_RANDOMNESS: u64 = 0x7072_6f62_6500_0000;

/// A plugin's probe with its options. It is built anew for each evaluation, so that none depends on an earlier one.
pub struct PluginProbe {
    name: String,
    options: Value,
    plugin: Plugin,
}

impl PluginProbe {
    /// The probe `name` of `plugin`.
    ///
    /// # Errors
    /// When it does not take these options.
    pub fn new(name: &str, options: Value, plugin: Plugin) -> anyhow::Result<Self> {
        plugin.build_probe(name, &options)?;
        Ok(PluginProbe { name: name.to_owned(), options, plugin })
    }

    /// Its figures, as `<probe>/<figure>`: learned from the features in `bank`, measured on those in `queries`.
    ///
    /// # Errors
    /// The plugin's failure, also when a figure is not a finite number.
    pub fn judge(
        &self,
        bank: &Features,
        queries: &Features,
        classes: i64,
        seed: u64,
    ) -> anyhow::Result<Vec<(String, f64)>> {
        let set = |features: &Features| LabelledFeatures {
            x: features.x.shallow_clone(),
            y: features.y.shallow_clone(),
        };
        let features = FrozenFeatures { train: set(bank), held_out: set(queries), classes, seed };
        tch::manual_seed(Rng::keyed(seed, 0, 0, TORCH_RANDOMNESS).bits() as i64);
        let figures = self.plugin.build_probe(&self.name, &self.options)?.evaluate(features)?;
        Ok(figures.into_iter().map(|(name, value)| (format!("{}/{name}", self.name), value)).collect())
    }
}
