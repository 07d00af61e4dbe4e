//! The plugins of a run, and what they offer.

use std::path::PathBuf;

use jepa_plugin_api::abi::{BackboneOffer, MethodOffer};

use super::{Admission, LoadedPlugin, PluginError, PluginSources, open, plugin_files};
use crate::config::nearest;

/// All loaded plugins. Names of plugins, methods and backbones are unique in it.
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
            let (first, second) = (old.file.path.clone(), new.file.path.clone());
            if old.name() == new.name() {
                return Err(PluginError::SameName { name: new.name().to_owned(), first, second });
            }
            let (theirs, ours) = (old.plugin.offer(), new.plugin.offer());
            if let Some(method) =
                ours.methods.iter().find(|m| theirs.methods.iter().any(|t| t.name == m.name))
            {
                return Err(PluginError::SameOffer {
                    what: "method",
                    name: method.name.clone(),
                    first,
                    second,
                });
            }
            if let Some(backbone) =
                ours.backbones.iter().find(|b| theirs.backbones.iter().any(|t| t.name == b.name))
            {
                return Err(PluginError::SameOffer {
                    what: "backbone",
                    name: backbone.name.clone(),
                    first,
                    second,
                });
            }
        }
        Ok(())
    }

    /// The method called `name`, and the plugin that has it.
    ///
    /// # Errors
    /// When no loaded plugin offers it; the nearest name is in the message.
    pub fn method(&self, name: &str) -> Result<(&LoadedPlugin, &MethodOffer), PluginError> {
        let all = || self.plugins.iter().flat_map(|p| p.plugin.offer().methods.iter().map(move |m| (p, m)));
        all()
            .find(|(_, method)| method.name == name)
            .ok_or_else(|| unknown("method", name, all().map(|(_, method)| method.name.as_str()).collect()))
    }

    /// The names of all methods.
    pub fn method_names(&self) -> Vec<&str> {
        self.plugins.iter().flat_map(|p| p.plugin.offer().methods.iter().map(|m| m.name.as_str())).collect()
    }

    /// The backbone called `name`, and the plugin that has it.
    ///
    /// # Errors
    /// When no loaded plugin offers it; the nearest name is in the message.
    pub fn backbone(&self, name: &str) -> Result<(&LoadedPlugin, &BackboneOffer), PluginError> {
        let all = || self.plugins.iter().flat_map(|p| p.plugin.offer().backbones.iter().map(move |b| (p, b)));
        all().find(|(_, backbone)| backbone.name == name).ok_or_else(|| {
            unknown("backbone", name, all().map(|(_, backbone)| backbone.name.as_str()).collect())
        })
    }

    /// Makes sure that a loaded plugin offers backbone `name`: when none does, the plugins in `sources` are opened in
    /// turn until one has it. Files that are no plugins are passed over.
    ///
    /// # Errors
    /// When no plugin anywhere offers it; plugins that were refused are in the message.
    pub fn require_backbone(&mut self, name: &str, sources: &PluginSources) -> Result<(), PluginError> {
        if self.backbone(name).is_ok() {
            return Ok(());
        }
        let mut refused = Vec::new();
        let mut offered: Vec<String> = self
            .plugins
            .iter()
            .flat_map(|p| p.plugin.offer().backbones.iter().map(|b| b.name.clone()))
            .collect();
        for path in plugin_files(sources.folders()) {
            if self.plugins.iter().any(|loaded| loaded.file.path == path) {
                continue;
            }
            match open(&path, &self.admission) {
                Ok(found) if found.plugin.offer().backbones.iter().any(|b| b.name == name) => {
                    self.check_names(&found)?;
                    tracing::info!("backbone {name} comes from {}", path.display());
                    self.plugins.push(found);
                    return Ok(());
                }
                Ok(found) => offered.extend(found.plugin.offer().backbones.iter().map(|b| b.name.clone())),
                Err(error @ (PluginError::Untrusted { .. } | PluginError::Locked { .. })) => {
                    refused.push(error.to_string());
                }
                Err(error) => tracing::debug!("passed over: {error}"),
            }
        }
        let mut error = unknown("backbone", name, offered.iter().map(String::as_str).collect());
        if let PluginError::Unknown { known, .. } = &mut error {
            refused.iter().for_each(|refused| known.push_str(&format!("; refused: {refused}")));
        }
        Err(error)
    }
}

fn unknown(what: &'static str, name: &str, known: Vec<&str>) -> PluginError {
    let nearest = nearest(name, known.iter().copied());
    let nearest = nearest.map(|n| format!(" (did you mean `{n}`?)")).unwrap_or_default();
    let known = match known.as_slice() {
        [] => format!("no {what} is loaded: name its plugin with --plugin, or its folder with --plugin-dir"),
        some => format!("there are {}", some.join(", ")),
    };
    PluginError::Unknown { what, name: name.to_owned(), nearest, known }
}
