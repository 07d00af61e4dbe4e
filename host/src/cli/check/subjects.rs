//! What `plugin check` checks of a plugin: its methods, backbones and probes, each built with the settings of a small run.

use std::path::Path;

use jepa_plugin_api::RunFacts;
use jepa_plugin_api::abi::Plugin;
use jepa_plugin_api::tch::Tensor;
use serde_json::{Value, json};

use crate::cli::session::{Session, seed_weights};
use crate::config::{Base, Config, Layers, ResolvedConfig};
use crate::conformance::{Built, CHECKS, CLASSES, Check, PROBE_CHECKS, Subject};
use crate::device::check_native;
use crate::plugin::{Kind, LoadedPlugin, PluginSources, Registry};

/// A method, a backbone or a probe of the plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct What {
    kind: Kind,
    name: String,
}

impl What {
    pub fn words(&self) -> String {
        format!("{} {}", self.kind.word(), self.name)
    }

    /// The setting that chooses it.
    fn setting(&self) -> String {
        match self.kind {
            Kind::Method => format!("method.name={}", self.name),
            Kind::Backbone => format!("backbone.name={}", self.name),
            Kind::Probe => format!("{}.enabled=true", self.section()),
        }
    }

    /// Where its options stand in the settings.
    fn section(&self) -> String {
        match self.kind {
            Kind::Method | Kind::Backbone => self.kind.word().to_owned(),
            Kind::Probe => format!("eval.probes.{}", self.name),
        }
    }

    pub fn checks(&self) -> &'static [Check] {
        match self.kind {
            Kind::Method | Kind::Backbone => &CHECKS,
            Kind::Probe => &PROBE_CHECKS,
        }
    }

    /// Builds it once: from the plugin in `file`, with these settings on top of those of a small run.
    pub fn build(
        &self,
        overrides: &[String],
        file: &Path,
        sources: &PluginSources,
    ) -> anyhow::Result<Box<dyn Subject>> {
        let own_backbone = overrides.iter().any(|setting| setting.starts_with("backbone.name="));
        let mut settings = json!({
            "data": { "size": 32 },
            "optimizer": { "batch_size": 8, "algorithm": "adamw" },
            "trainer": { "device": "cpu" },
        });
        if self.kind == Kind::Method && !own_backbone {
            settings["backbone"] =
                json!({ "name": "resnet18", "stem": "small", "width": 16, "depths": [1, 1, 1] });
        }
        if self.kind == Kind::Backbone {
            settings["data"]["size"] = json!(64);
            settings["optimizer"]["batch_size"] = json!(4);
        }
        let settings = settings.as_object().cloned().unwrap_or_default();
        let overrides = overrides.iter().cloned().chain([self.setting()]).collect();
        let base = Base { layer: "default of plugin check".to_owned(), settings };
        let layers = Layers { base: Some(base), overrides, ..Layers::default() };
        if self.kind == Kind::Method {
            let session = Session::open(&[file.to_owned()], layers, sources)?;
            session.device()?;
            return Ok(Box::new(MethodSubject(session)));
        }
        check_native()?;
        let mut registry = Registry::new(sources.admission());
        registry.load(file.to_owned())?;
        let mut settings = layers.with_process_environment().load()?;
        let (owner, options) = registry.find(self.kind, &self.name)?;
        settings.adopt_plugin_options(&self.section(), owner.name(), options.as_value())?;
        Ok(Box::new(PartSubject { registry, settings, what: self.clone() }))
    }
}

/// What to check of a plugin, and what not: all that the settings name, or else its methods, its probes, and the first of
/// the backbones that take the same options.
pub(super) fn choose(plugin: &LoadedPlugin, overrides: &[String]) -> (Vec<What>, Vec<What>) {
    let offer = plugin.plugin.offer();
    let all =
        |kind: Kind| kind.of(offer).into_iter().map(move |(name, _)| What { kind, name: name.to_owned() });
    // As in a run, the last of several values counts.
    let value_of = |key: &str| {
        let mut values = overrides.iter().filter_map(|setting| setting.strip_prefix(key)?.strip_prefix('='));
        values.next_back().map(|value| value.trim_matches('"').to_owned())
    };
    let (method, backbone) = (value_of("method.name"), value_of("backbone.name"));
    let enabled = |what: &What| value_of(&format!("{}.enabled", what.section())).as_deref() == Some("true");
    let named = |what: &What| match what.kind {
        Kind::Method => method.as_ref() == Some(&what.name),
        // Beside a method, it is the one that the method learns for.
        Kind::Backbone => method.is_none() && backbone.as_ref() == Some(&what.name),
        Kind::Probe => enabled(what),
    };
    let first_of_its_options = |what: &What| {
        let options = |name: &str| offer.backbones.iter().find(|b| b.name == name).map(|b| &b.options);
        let mut earlier = offer.backbones.iter().take_while(|earlier| earlier.name != what.name);
        backbone.is_none() && earlier.all(|earlier| Some(&earlier.options) != options(&what.name))
    };
    let everything: Vec<What> = Kind::ALL.into_iter().flat_map(all).collect();
    let any_named = method.is_some() || everything.iter().any(named);
    everything.into_iter().partition(|what| match what.kind {
        _ if any_named => named(what),
        Kind::Backbone => first_of_its_options(what),
        Kind::Method | Kind::Probe => true,
    })
}

struct MethodSubject(Session);

impl MethodSubject {
    fn facts(&self, seed: u64) -> RunFacts {
        let config = self.0.config();
        RunFacts {
            device: "cpu".to_owned(),
            image_size: config.data.size as i64,
            batch_size: config.optimizer.batch_size as i64,
            epochs: config.trainer.epochs,
            steps_per_epoch: 100,
            classes: CLASSES as i64,
            unlabelled: 0,
            seed,
        }
    }
}

impl Subject for MethodSubject {
    fn config(&self) -> &Config {
        self.0.config()
    }

    fn build(&self, seed: u64) -> anyhow::Result<Built> {
        let options = json!(self.config().method.options);
        Ok(Built::Method(self.0.build_method_with(&options, self.facts(seed))?))
    }

    fn build_with(&self, options: &Value) -> anyhow::Result<Built> {
        Ok(Built::Method(self.0.build_method_with(options, self.facts(0))?))
    }

    fn cross(&self, x: &Tensor) -> anyhow::Result<Tensor> {
        self.0.registry.find(Kind::Method, &self.0.method)?.0.plugin.cross(x)
    }
}

/// A backbone or a probe, which needs no method around it.
struct PartSubject {
    registry: Registry,
    settings: ResolvedConfig,
    what: What,
}

impl PartSubject {
    fn plugin(&self) -> anyhow::Result<&Plugin> {
        Ok(&self.registry.find(self.what.kind, &self.what.name)?.0.plugin)
    }
}

impl Subject for PartSubject {
    fn config(&self) -> &Config {
        &self.settings.config
    }

    fn build(&self, seed: u64) -> anyhow::Result<Built> {
        seed_weights(seed);
        let config = self.config();
        self.build_with(&match self.what.kind {
            Kind::Probe => json!(config.eval.probes.get(&self.what.name).map(|probe| &probe.options)),
            _ => json!(config.backbone.options),
        })
    }

    fn build_with(&self, options: &Value) -> anyhow::Result<Built> {
        let name = &self.what.name;
        Ok(match self.what.kind {
            Kind::Probe => Built::Probe(self.plugin()?.build_probe(name, options)?),
            _ => Built::Backbone(self.plugin()?.build_backbone(name, options, "cpu")?),
        })
    }

    fn cross(&self, x: &Tensor) -> anyhow::Result<Tensor> {
        self.plugin()?.cross(x)
    }
}
