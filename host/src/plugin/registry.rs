//! The plugins of a run, and what they offer.

use std::path::PathBuf;

use jepa_plugin_api::abi::Offer;
use jepa_plugin_api::schemars::Schema;

use super::{Admission, LoadedPlugin, PluginError, PluginSources, open, plugin_files};
use crate::nearest::nearest;

/// What a plugin can offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A pretraining method.
    Method,
    /// A convolutional network.
    Backbone,
    /// An evaluation of frozen features.
    Probe,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 3] = [Kind::Method, Kind::Backbone, Kind::Probe];

    /// As people say it.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Method => "method",
            Kind::Backbone => "backbone",
            Kind::Probe => "probe",
        }
    }

    /// What of this kind is on offer: each name, with the JSON Schema of its options.
    pub fn of(self, offer: &Offer) -> Vec<(&str, &Schema)> {
        match self {
            Kind::Method => offer.methods.iter().map(|o| (o.name.as_str(), &o.options)).collect(),
            Kind::Backbone => offer.backbones.iter().map(|o| (o.name.as_str(), &o.options)).collect(),
            Kind::Probe => offer.probes.iter().map(|o| (o.name.as_str(), &o.options)).collect(),
        }
    }

    /// Whether names of this kind are part of keys, in settings or in metrics, which points divide.
    fn names_are_in_keys(self) -> bool {
        matches!(self, Kind::Method | Kind::Probe)
    }
}

/// What is wrong with the names in `offer`, in words.
pub(super) fn check_offer(offer: &Offer) -> Result<(), String> {
    let in_keys = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    for kind in Kind::ALL {
        let offered = kind.of(offer);
        for (i, (name, _)) in offered.iter().enumerate() {
            let word = kind.word();
            if name.is_empty() || kind.names_are_in_keys() && !name.chars().all(in_keys) {
                return Err(format!(
                    "offers the {word} `{name}`: such a name has letters, digits, _ and - only"
                ));
            }
            if offered[..i].iter().any(|(earlier, _)| earlier == name) {
                return Err(format!("offers two {word}s named `{name}`"));
            }
        }
    }
    Ok(())
}

/// All loaded plugins. Names of plugins are unique in it, and so are the names of each kind that they offer.
#[derive(Default)]
pub struct Registry {
    plugins: Vec<LoadedPlugin>,
    admission: Admission,
}

impl Registry {
    /// An empty registry, with the rules for what comes into it.
    pub fn new(admission: &Admission) -> Self {
        Registry { plugins: Vec::new(), admission: admission.clone() }
    }

    /// The loaded plugins, in the order of loading.
    pub fn plugins(&self) -> &[LoadedPlugin] {
        &self.plugins
    }

    /// Opens the plugin at `path`. One that is open already, by the same path, is left alone.
    ///
    /// # Errors
    /// When it is refused, or a name in it is taken.
    pub fn load(&mut self, path: PathBuf) -> Result<&LoadedPlugin, PluginError> {
        if let Some(i) = self.plugins.iter().position(|loaded| loaded.file.path == path) {
            return Ok(&self.plugins[i]);
        }
        let new = open(&path, &self.admission)?;
        self.check_names(&new)?;
        tracing::debug!(plugin = new.name(), path = %path.display(), "plugin loaded");
        self.plugins.push(new);
        Ok(self.plugins.last().expect("just pushed"))
    }

    fn check_names(&self, new: &LoadedPlugin) -> Result<(), PluginError> {
        for old in &self.plugins {
            let files = || (old.file.path.clone(), new.file.path.clone());
            if old.name() == new.name() {
                let (first, second) = files();
                return Err(PluginError::SameName { name: new.name().to_owned(), first, second });
            }
            for kind in Kind::ALL {
                let taken = kind.of(old.plugin.offer());
                let offered = kind.of(new.plugin.offer());
                if let Some((name, _)) =
                    offered.iter().find(|(name, _)| taken.iter().any(|(other, _)| other == name))
                {
                    let (first, second) = files();
                    let (what, name) = (kind.word(), (*name).to_owned());
                    return Err(PluginError::SameOffer { what, name, first, second });
                }
            }
        }
        Ok(())
    }

    /// The plugin that offers `name`, with the JSON Schema of its options.
    ///
    /// # Errors
    /// When no loaded plugin offers it; the nearest name is in the message.
    pub fn find(&self, kind: Kind, name: &str) -> Result<(&LoadedPlugin, &Schema), PluginError> {
        let offered = |plugin: &'_ LoadedPlugin| {
            kind.of(plugin.plugin.offer()).iter().any(|(offered, _)| *offered == name)
        };
        let plugin = self.plugins.iter().find(|plugin| offered(plugin));
        let plugin = plugin.ok_or_else(|| unknown(kind, name, &self.names(kind), &[]))?;
        let found = kind.of(plugin.plugin.offer()).into_iter().find(|(offered, _)| *offered == name);
        Ok((plugin, found.expect("it offers that").1))
    }

    /// All names of a kind.
    pub fn names(&self, kind: Kind) -> Vec<&str> {
        let names = self.plugins.iter().flat_map(|plugin| kind.of(plugin.plugin.offer()));
        names.map(|(name, _)| name).collect()
    }

    /// Makes sure that a loaded plugin offers `name`: when none does, the plugins in `sources` are opened in turn until
    /// one has it. Files that are no plugins are passed over.
    ///
    /// # Errors
    /// When no plugin anywhere offers it; plugins that were refused are in the message.
    pub fn require(&mut self, kind: Kind, name: &str, sources: &PluginSources) -> Result<(), PluginError> {
        if self.names(kind).contains(&name) {
            return Ok(());
        }
        let mut refused = Vec::new();
        let mut offered: Vec<String> = self.names(kind).into_iter().map(str::to_owned).collect();
        for path in plugin_files(sources.folders()) {
            if self.plugins.iter().any(|loaded| loaded.file.path == path) {
                continue;
            }
            match open(&path, &self.admission) {
                Ok(found) => {
                    let names = kind.of(found.plugin.offer()).into_iter().map(|(name, _)| name.to_owned());
                    let names: Vec<String> = names.collect();
                    if names.iter().any(|offered| offered == name) {
                        self.check_names(&found)?;
                        tracing::info!("{} {name} comes from {}", kind.word(), path.display());
                        self.plugins.push(found);
                        return Ok(());
                    }
                    offered.extend(names);
                }
                Err(error) if error.is_no_plugin() => tracing::debug!("passed over: {error}"),
                Err(error) => refused.push(error),
            }
        }
        let offered: Vec<&str> = offered.iter().map(String::as_str).collect();
        Err(unknown(kind, name, &offered, &refused))
    }
}

fn unknown(kind: Kind, name: &str, known: &[&str], refused: &[PluginError]) -> PluginError {
    let what = kind.word();
    let nearest = nearest(name, known.iter().copied());
    let nearest = nearest.map(|n| format!(" (did you mean `{n}`?)")).unwrap_or_default();
    let known = match known {
        [] => format!("no {what} is loaded: name its plugin with --plugin, or its folder with --plugin-dir"),
        some => format!("there are {}", some.join(", ")),
    };
    PluginError::Unknown { what, name: name.to_owned(), nearest, known, refused: PluginError::tail(refused) }
}
