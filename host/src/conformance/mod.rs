//! What `jepa-host plugin check` asks of a plugin: each [`Check`] is one promise that the host relies on, tried on
//! synthetic images or features. A check knows methods, backbones, probes and tensors; it does not know plugin files.

mod checks;
mod images;
mod probe;
mod process;
mod trainee;

pub use images::CLASSES;

use std::path::Path;

use jepa_plugin_api::abi::{BackboneHandle, MethodHandle, ProbeHandle};
use jepa_plugin_api::tch::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::Config;

/// What is checked: one method, backbone or probe of a plugin, which can be built again and again.
pub trait Subject {
    /// The settings that it is built by.
    fn config(&self) -> &Config;

    /// Builds it with these settings and weights of this seed.
    ///
    /// # Errors
    /// The plugin's failure.
    fn build(&self, seed: u64) -> anyhow::Result<Built>;

    /// Builds it with the given options in place of the settings', unchecked by the host.
    ///
    /// # Errors
    /// The plugin's failure, which a check may hope for.
    fn build_with(&self, options: &Value) -> anyhow::Result<Built>;

    /// The sum of the doubled elements of `x`, by the plugin: a call that does nothing else.
    ///
    /// # Errors
    /// The plugin's failure.
    fn cross(&self, x: &Tensor) -> anyhow::Result<Tensor>;
}

/// A subject, built.
pub enum Built {
    /// A method with its backbones.
    Method(MethodHandle),
    /// A backbone by itself.
    Backbone(BackboneHandle),
    /// A probe.
    Probe(ProbeHandle),
}

/// One promise.
#[derive(Clone, Copy)]
pub struct Check {
    /// Its name on the command line.
    pub name: &'static str,
    /// The promise in words.
    pub promise: &'static str,
    run: fn(&dyn Subject, &Path) -> anyhow::Result<Verdict>,
}

/// How a check ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "verdict", content = "detail")]
pub enum Verdict {
    /// The promise holds; what was measured.
    Passed(String),
    /// It does not; what was seen, and what to do.
    Failed(String),
}

/// Of anything that takes options.
const OPTIONS: Check =
    Check { name: "options", promise: "bad options are refused with a message", run: checks::options };

/// The checks of methods and backbones, in the order in which they run.
pub const CHECKS: [Check; 10] = [
    OPTIONS,
    Check { name: "gradients", promise: "gradients reach every trainable parameter", run: checks::gradients },
    Check { name: "seed", promise: "the same seed gives the same losses", run: checks::seed },
    Check { name: "state", promise: "the state survives save and load exactly", run: checks::state },
    Check { name: "bf16", promise: "numbers stay finite in bf16", run: checks::bf16 },
    Check {
        name: "features",
        promise: "features are finite, repeatable, and change nothing",
        run: checks::features,
    },
    Check { name: "sparse", promise: "hidden cells are zero and unseen", run: checks::sparse },
    Check { name: "panics", promise: "inputs that do not fit are contained", run: checks::panics },
    Check { name: "leaks", promise: "memory, threads and files do not grow", run: checks::leaks },
    Check { name: "cost", promise: "the boundary costs next to nothing", run: checks::cost },
];

/// The checks of probes.
pub const PROBE_CHECKS: [Check; 4] = [
    OPTIONS,
    Check {
        name: "metrics",
        promise: "metrics are finite, repeatable, and change nothing",
        run: probe::metrics,
    },
    Check { name: "panics", promise: "inputs that do not fit are contained", run: probe::panics },
    Check { name: "leaks", promise: "memory, threads and files do not grow", run: probe::leaks },
];

impl Check {
    /// Tries the promise on `subject`, with `scratch` as a folder to write to. What goes wrong on the way is a verdict
    /// too.
    pub fn run(&self, subject: &dyn Subject, scratch: &Path) -> Verdict {
        (self.run)(subject, scratch).unwrap_or_else(|error| Verdict::Failed(format!("{error:#}")))
    }
}
