//! {{Type}}: say here what it measures and where it is published.

use jepa_plugin_api::nn::l2_normalize;
use jepa_plugin_api::tch::{Kind, Tensor};
use jepa_plugin_api::{FrozenFeatures, LabelledFeatures, Probe, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

jepa_plugin_api::export_plugin! { probes: [{{Type}}] }

/// The keys under `eval.probes.{{name}}.`. These comments and the defaults are what `jepa-host plugin info {{name}}`
/// prints.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct {{Type}}Options {
    /// Whether features are compared by their directions only.
    pub cosine: bool,
}

impl Default for {{Type}}Options {
    fn default() -> Self {
        {{Type}}Options { cosine: true }
    }
}

/// Gives each held-out image the class whose mean training feature is the nearest.
pub struct {{Type}} {
    options: {{Type}}Options,
}

impl Probe for {{Type}} {
    const NAME: &'static str = "{{name}}";

    type Options = {{Type}}Options;

    fn new(options: {{Type}}Options) -> Result<Self> {
        Ok({{Type}} { options })
    }

    /// Metrics for the log and the final table: here `eval/{{name}}/top1`, in [0, 1].
    fn evaluate(&mut self, features: &FrozenFeatures) -> Result<Vec<(String, f64)>> {
        let scaled = |set: &LabelledFeatures| match self.options.cosine {
            true => l2_normalize(&set.x, -1),
            false => set.x.shallow_clone(),
        };
        let (train, held_out) = (scaled(&features.train), scaled(&features.held_out));
        // A row for each class, with ones at its images.
        let members = features.train.y.one_hot(features.classes).to_kind(Kind::Float).transpose(0, 1);
        let counts = members.sum_dim_intlist([1i64].as_slice(), true, Kind::Float).clamp_min(1.0);
        let means = members.matmul(&train) / counts;
        let nearest = Tensor::cdist(&held_out, &means, 2.0, None).argmin(1, false);
        let right = nearest.eq_tensor(&features.held_out.y).to_kind(Kind::Float).mean(Kind::Float);
        Ok(vec![("top1".to_owned(), f64::try_from(right)?)])
    }
}
