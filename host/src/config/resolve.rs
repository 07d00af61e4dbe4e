//! Merges the layers into one typed configuration and remembers where each value came from.

use std::collections::BTreeMap;
use std::path::PathBuf;

use figment::value::{Dict, Map as ProfileMap, Value as Merged};
use figment::{Figment, Metadata, Profile, Provider};
use serde_json::{Map, Value};

use super::check::{self, Checked};
use super::error::{ConfigError, Problem};
use super::layers::{self, Leaf};
use super::schema::Config;

/// The layer's name of what nobody set.
pub(super) const DEFAULT: &str = "default";

/// Where settings are read from, weakest first.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    /// What a subcommand gives in place of defaults.
    pub base: Option<Base>,
    /// The `--config` file.
    pub file: Option<PathBuf>,
    /// Environment variables, of which those that begin with `JEPA_` are read.
    pub environment: Vec<(String, String)>,
    /// `key=value` arguments; a later one wins.
    pub overrides: Vec<String>,
}

/// Settings by sections, as [`Config`] has them, with the name of whatever they come from.
#[derive(Clone, Debug, PartialEq)]
pub struct Base {
    /// What [`Sources`] tell of them.
    pub layer: String,
    /// Any part of a [`Config`] as JSON; what is null is not set.
    pub settings: Map<String, Value>,
}

/// A configuration and the source of each of its values.
#[derive(Clone, Debug)]
pub struct ResolvedConfig {
    /// The settings.
    pub config: Config,
    /// Where they came from.
    pub sources: Sources,
}

/// Where one value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// `default`, `default of …`, a file and line, `environment JEPA_…` or `command line`.
    pub layer: String,
    /// What was typed, where the layer has text only.
    pub raw: Option<String>,
}

/// The source of each value that some layer sets, by dotted key.
#[derive(Clone, Debug, Default)]
pub struct Sources(BTreeMap<String, Source>);

impl Sources {
    /// The layer that set `key`, or the list or table that it lies in.
    pub fn layer(&self, key: &str) -> &str {
        let mut key = key;
        loop {
            if let Some(source) = self.0.get(key) {
                return &source.layer;
            }
            match key.rfind(['.', '[']) {
                Some(end) => key = &key[..end],
                None => return DEFAULT,
            }
        }
    }

    /// The source of exactly this key.
    pub fn get(&self, key: &str) -> Option<&Source> {
        self.0.get(key)
    }

    /// Notes that `layer` set `key`.
    pub fn set(&mut self, key: &str, layer: &str) {
        self.0.insert(key.to_owned(), Source { layer: layer.to_owned(), raw: None });
    }
}

impl Layers {
    /// These layers with the variables of this process.
    pub fn with_process_environment(mut self) -> Self {
        let text = |part: std::ffi::OsString| part.to_string_lossy().into_owned();
        self.environment = std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect();
        self
    }

    /// Reads, checks and merges all layers. The options of method and backbone are checked later, when their
    /// plugins are known: [`ResolvedConfig::adopt_plugin_options`].
    ///
    /// # Errors
    /// Whatever is wrong in any layer, all at once, even where a stronger layer would hide it.
    pub fn load(&self) -> Result<ResolvedConfig, ConfigError> {
        let mut leaves = Vec::new();
        if let Some(base) = &self.base {
            let leaves_of_base = layers::leaves_of(&base.settings, "", &|_| base.layer.clone());
            leaves.extend(leaves_of_base.into_iter().filter(|leaf| !leaf.value.is_null()));
        }
        if let Some(file) = &self.file {
            leaves.extend(layers::read_file(file)?);
        }
        leaves.extend(layers::read_environment(&self.environment));
        for argument in &self.overrides {
            leaves.push(layers::read_override(argument)?);
        }
        merge(leaves)
    }
}

fn merge(leaves: Vec<Leaf>) -> Result<ResolvedConfig, ConfigError> {
    let schema = Config::schema();
    let defaults =
        serde_json::to_value(Config::default()).map_err(|error| fault("", DEFAULT, error.to_string()))?;
    let default_leaves = match &defaults {
        Value::Object(values) => layers::leaves_of(values, "", &|_| DEFAULT.to_owned()),
        _ => Vec::new(),
    };
    let mut figment = Figment::new();
    for leaf in default_leaves {
        figment = figment.merge(leaf);
    }
    let mut problems = Vec::new();
    for mut leaf in leaves {
        match check::check_setting(&leaf.key, &leaf.value, leaf.raw.as_deref(), &schema) {
            Checked::Known(value) => leaf.value = value,
            Checked::Free => {}
            Checked::Wrong(faults) => {
                problems.extend(faults.into_iter().map(|(key, message)| Problem {
                    key,
                    layer: leaf.layer.clone(),
                    message,
                }));
                continue;
            }
        }
        figment = figment.merge(leaf);
    }
    if !problems.is_empty() {
        return Err(ConfigError::Invalid(problems));
    }

    let mut sources = Sources::default();
    let merged = figment.find_value("").map_err(|error| fault("", DEFAULT, error.to_string()))?;
    note_sources(&merged, "", &figment, &mut sources);
    let config: Config = figment.extract().map_err(|error| {
        ConfigError::Invalid(
            error
                .into_iter()
                .map(|error| {
                    let key = error.path.join(".");
                    Problem { layer: sources.layer(&key).to_owned(), message: error.kind.to_string(), key }
                })
                .collect(),
        )
    })?;
    let faults = config.faults();
    if !faults.is_empty() {
        let problem = |(key, message): (&str, String)| Problem {
            key: key.to_owned(),
            layer: sources.layer(key).to_owned(),
            message,
        };
        return Err(ConfigError::Invalid(faults.into_iter().map(problem).collect()));
    }
    Ok(ResolvedConfig { config, sources })
}

fn fault(key: &str, layer: &str, message: String) -> ConfigError {
    ConfigError::Invalid(vec![Problem { key: key.to_owned(), layer: layer.to_owned(), message }])
}

fn note_sources(value: &Merged, key: &str, figment: &Figment, sources: &mut Sources) {
    if let Merged::Dict(_, inner) = value {
        for (name, value) in inner {
            let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            note_sources(value, &key, figment, sources);
        }
    } else if let Some(metadata) = figment.get_metadata(value.tag()) {
        let raw = metadata.source.as_ref().and_then(|source| source.custom()).map(str::to_owned);
        sources.0.insert(key.to_owned(), Source { layer: metadata.name.to_string(), raw });
    }
}

/// Each value is a provider of its own: figment then knows the source of every value to the line.
impl Provider for Leaf {
    fn metadata(&self) -> Metadata {
        let metadata = Metadata::named(self.layer.clone());
        match &self.raw {
            Some(raw) => metadata.source(figment::Source::Custom(raw.clone())),
            None => metadata,
        }
    }

    fn data(&self) -> Result<ProfileMap<Profile, Dict>, figment::Error> {
        let mut value = Merged::serialize(&self.value)?;
        for name in self.key.rsplit('.') {
            value = Merged::from(Dict::from([(name.to_owned(), value)]));
        }
        match value {
            Merged::Dict(_, dict) => Ok(ProfileMap::from([(Profile::Default, dict)])),
            _ => Ok(ProfileMap::new()),
        }
    }
}

impl ResolvedConfig {
    /// Checks the options of the method, the backbone or a probe (`section`: `method`, `backbone`, `eval.probes.NAME`)
    /// against the schema that its plugin publishes and fills in its defaults. `owner` is the plugin's name for
    /// messages.
    ///
    /// # Errors
    /// Unknown options, wrong types, values out of range, options that have no default and are not set.
    pub fn adopt_plugin_options(
        &mut self,
        section: &str,
        owner: &str,
        schema: &Value,
    ) -> Result<(), ConfigError> {
        let options = match section.strip_prefix("eval.probes.") {
            Some(probe) => &mut self.config.eval.probes.entry(probe.to_owned()).or_default().options,
            None if section == "method" => &mut self.config.method.options,
            None => &mut self.config.backbone.options,
        };
        let given = Value::Object(options.clone());
        let Value::Object(full) = check::validate_plugin_options(section, &given, schema, &self.sources)?
        else {
            return Ok(());
        };
        *options = full;
        let layer = format!("default of {owner}");
        for leaf in layers::leaves_of(options, section, &|_| layer.clone()) {
            if self.sources.get(&leaf.key).is_none() {
                self.sources.set(&leaf.key, &layer);
            }
        }
        Ok(())
    }
}
