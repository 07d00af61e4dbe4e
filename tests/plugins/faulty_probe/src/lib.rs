//! Probes that break what a probe promises.

use jepa_plugin_api::tch::{Kind, Tensor};
use jepa_plugin_api::{FrozenFeatures, Probe, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

jepa_plugin_api::export_plugin! { probes: [Faulty, Careless] }

/// The keys under `eval.probes.faulty.`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FaultyOptions {
    /// Add a number that no seed tells.
    pub unseeded: bool,
    /// Scale the features where they are.
    pub in_place: bool,
    /// End the process when the features have no length in common.
    pub abort_on_misfit: bool,
    /// Keep the features.
    pub keep_features: bool,
    /// Take so many seconds.
    pub seconds: u64,
}

/// The mean length of held-out features.
pub struct Faulty(FaultyOptions);

impl Probe for Faulty {
    const NAME: &'static str = "faulty";

    type Options = FaultyOptions;

    fn new(options: FaultyOptions) -> Result<Self> {
        Ok(Faulty(options))
    }

    fn evaluate(&mut self, features: &FrozenFeatures) -> Result<Vec<(String, f64)>> {
        let options = &self.0;
        let (train, held_out) = (&features.train.x, &features.held_out.x);
        if options.abort_on_misfit && train.size()[1] != held_out.size()[1] {
            std::process::abort();
        }
        if options.keep_features {
            std::mem::forget(train.copy());
        }
        std::thread::sleep(std::time::Duration::from_secs(options.seconds));
        let mut norm = f64::try_from(held_out.norm_scalaropt_dim(2, [1], false).mean(Kind::Float))?;
        if options.in_place {
            let _ = held_out.shallow_clone().g_mul_scalar_(2.0);
            norm = 1.0;
        }
        if options.unseeded {
            norm += f64::try_from(Tensor::rand([], (Kind::Double, held_out.device())))?;
        }
        Ok(vec![("norm".to_owned(), norm)])
    }
}

/// Options that lack `deny_unknown_fields`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct CarelessOptions {}

/// The number of held-out features.
pub struct Careless;

impl Probe for Careless {
    const NAME: &'static str = "careless";

    type Options = CarelessOptions;

    fn new(_options: CarelessOptions) -> Result<Self> {
        Ok(Careless)
    }

    fn evaluate(&mut self, features: &FrozenFeatures) -> Result<Vec<(String, f64)>> {
        Ok(vec![("count".to_owned(), features.held_out.x.size()[0] as f64)])
    }
}
