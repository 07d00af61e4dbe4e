//! What every command that works with a method puts together: its plugins, its settings, and the method itself.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;
use jepa_plugin_api::abi::{MethodHandle, MethodOffer};
use jepa_plugin_api::{Rng, RunFacts, tch};
use serde_json::{Value, json};

use super::exit::Usage;
use crate::checkpoint::{State, find_checkpoint, load_model, restore};
use crate::config::{self, Base, Config, Layers, ResolvedConfig};
use crate::data::Dataset;
use crate::device::{self, check_native, device_text};
use crate::dist::Comm;
use crate::eval::PluginProbe;
use crate::plugin::{Kind, PluginRecord, PluginSources, Registry};
use crate::train::Model;

/// Key of the number that libtorch's generator starts from when weights are drawn.
const INITIAL_WEIGHTS: u64 = 0x696e_6974_0000_0000;

/// The plugins of a command, and its settings with the options of method and backbone checked and complete.
pub(super) struct Session {
    pub registry: Registry,
    pub settings: ResolvedConfig,
    /// Name of the method.
    pub method: String,
    /// Name of the backbone.
    pub backbone: String,
}

impl Session {
    /// Loads `plugins`, and one with the backbone should they lack it; reads the settings in `layers` and in the
    /// environment.
    pub fn open(plugins: &[PathBuf], layers: Layers, sources: &PluginSources) -> anyhow::Result<Session> {
        check_native()?;
        let mut registry = Registry::new(sources.admission());
        for name in plugins {
            registry.load(sources.find(name)?)?;
        }
        let named: BTreeSet<String> =
            registry.plugins().iter().map(|plugin| plugin.name().to_owned()).collect();
        let named_methods = registry.names(Kind::Method).len();
        let mut settings = layers.with_process_environment().load()?;

        let method = choose_method(&settings.config, &registry)?;
        if settings.config.method.name.is_none() {
            settings.config.method.name = Some(method.clone());
            settings.sources.set("method.name", "--plugin");
        }
        let backbone = settings.config.backbone_name()?.to_owned();
        let probes = chosen_probes(&settings.config, &registry);
        let chosen = [("method", Kind::Method, &method), ("backbone", Kind::Backbone, &backbone)];
        for (section, kind, name) in chosen {
            registry.require(kind, name, sources)?;
            let (owner, options) = registry.find(kind, name)?;
            if kind == Kind::Method && named_methods > 0 && !named.contains(owner.name()) {
                tracing::warn!(
                    "method.name is {name}, of the plugin {}: none of those that --plugin names",
                    owner.name()
                );
            }
            settings.adopt_plugin_options(section, owner.name(), options.as_value())?;
        }
        for probe in probes {
            registry.require(Kind::Probe, &probe, sources)?;
            let (owner, options) = registry.find(Kind::Probe, &probe)?;
            let section = format!("eval.probes.{probe}");
            settings.adopt_plugin_options(&section, owner.name(), options.as_value())?;
        }
        Ok(Session { registry, settings, method, backbone })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.settings.config
    }

    /// The images in the file `path`, which `key` names, large enough for `data.size`.
    pub fn open_images(&self, key: &'static str, path: &Path) -> anyhow::Result<Arc<Dataset>> {
        let settings = &self.config().data;
        let set = Dataset::open(path).context(key)?;
        if !settings.upscale {
            set.require_size(settings.size).context(key)?;
        }
        Ok(Arc::new(set))
    }

    /// What the method's plugin says about it.
    pub fn offer(&self) -> anyhow::Result<&MethodOffer> {
        let (plugin, _) = self.registry.find(Kind::Method, &self.method)?;
        let of_name = |offer: &&MethodOffer| offer.name == self.method;
        let offer = plugin.plugin.offer().methods.iter().find(of_name);
        offer.with_context(|| format!("plugin {} does not offer the method {}", plugin.name(), self.method))
    }

    /// Builds the method on `device` for a training set of so many `classes`, images without a label, and steps an
    /// epoch. Its weights are random, by the seed.
    pub fn build_method(
        &self,
        device: tch::Device,
        classes: u64,
        unlabelled: u64,
        steps_per_epoch: u64,
    ) -> anyhow::Result<MethodHandle> {
        let config = self.config();
        let facts = RunFacts {
            device: device_text(device),
            image_size: config.data.size as i64,
            batch_size: config.optimizer.batch_size as i64,
            epochs: config.trainer.epochs,
            steps_per_epoch,
            classes: classes as i64,
            unlabelled,
            seed: config.seed,
        };
        self.build_method_with(&json!(config.method.options), facts)
    }

    /// Builds the method with these options, unchecked, in a run of these `facts`.
    pub fn build_method_with(&self, options: &Value, facts: RunFacts) -> anyhow::Result<MethodHandle> {
        let config = self.config();
        let (method_plugin, _) = self.registry.find(Kind::Method, &self.method)?;
        let (backbone_plugin, _) = self.registry.find(Kind::Backbone, &self.backbone)?;
        let (plugin, name) = (backbone_plugin.plugin.clone(), self.backbone.clone());
        let (backbone_options, on) = (json!(config.backbone.options), facts.device.clone());
        let build_backbone = Box::new(move || plugin.build_backbone(&name, &backbone_options, &on));
        seed_weights(facts.seed);
        method_plugin.plugin.build_method(&self.method, options, facts, build_backbone)
    }

    /// The plugins' probes that are enabled, each with its options tried.
    pub fn probes(&self) -> anyhow::Result<Vec<PluginProbe>> {
        let enabled = self.config().eval.probes.iter().filter(|(_, settings)| settings.enabled);
        let probe = |(name, settings): (&String, &config::PluginProbe)| {
            let plugin = self.registry.find(Kind::Probe, name)?.0.plugin.clone();
            PluginProbe::new(name, json!(settings.options), plugin)
        };
        enabled.map(probe).collect()
    }

    /// The device that `trainer.device` asks for, with the threads that `trainer.threads` asks for.
    pub fn device(&self) -> anyhow::Result<tch::Device> {
        self.device_of(None)
    }

    /// The same for a rank: where nothing else is asked for, a device of its own, and its share of the cores.
    pub fn device_of(&self, comm: Option<&Comm>) -> anyhow::Result<tch::Device> {
        let trainer = &self.config().trainer;
        let device = device::choose(trainer.device, comm.map_or(0, |comm| comm.local_rank() as usize))?;
        match (trainer.threads, comm) {
            (0, None) => {}
            (0, Some(comm)) => tch::set_num_threads(cores_of(comm) as i32),
            (threads, _) => {
                let cores = available_cores();
                if threads > cores {
                    tracing::warn!(
                        "trainer.threads={threads} on {cores} cores: threads that wait for each other make a step slower"
                    );
                }
                tch::set_num_threads(threads as i32);
            }
        }
        Ok(device)
    }
}

/// The cores that a rank has for itself, at least 1.
pub(super) fn cores_of(comm: &Comm) -> usize {
    (available_cores() / comm.cores_shared_by()).max(1)
}

fn available_cores() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get())
}

/// Puts libtorch's generator where a run of `seed` draws its weights from.
pub(super) fn seed_weights(seed: u64) {
    tch::manual_seed(Rng::keyed(seed, 0, 0, INITIAL_WEIGHTS).bits() as i64);
}

/// `method.name`, or the only method there is.
fn choose_method(config: &Config, registry: &Registry) -> anyhow::Result<String> {
    if let Some(name) = &config.method.name {
        return Ok(name.clone());
    }
    match registry.names(Kind::Method).as_slice() {
        [only] => Ok((*only).to_owned()),
        [] => Err(Usage(
            "no method is loaded: name its plugin with --plugin, such as --plugin cnn_jepa; `jepa-host plugin list` \
             shows what there is"
                .to_owned(),
        )
        .into()),
        several => Err(Usage(format!("set method.name to one of {}", several.join(", "))).into()),
    }
}

/// Probes in the settings, and those of the plugins that were asked for.
fn chosen_probes(config: &Config, registry: &Registry) -> BTreeSet<String> {
    let loaded = registry.names(Kind::Probe).into_iter().map(str::to_owned);
    config.eval.probes.keys().cloned().chain(loaded).collect()
}

/// A trained model to work with, on the command line.
#[derive(Clone, Debug, Args)]
pub(super) struct SavedArgs {
    /// A run directory (the newest checkpoint is taken), or a checkpoint
    #[arg(value_name = "RUN|CHECKPOINT")]
    run: PathBuf,
    /// Plugin to load; by default those that the run was trained with, by their names
    #[arg(long, value_name = "PLUGIN", help_heading = "Plugins")]
    plugin: Vec<PathBuf>,
    /// Settings that differ from the run's, such as data.val=other.h5
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

/// How to name a plugin that a run was trained with: where it was, unless the folders that are searched have it.
pub(super) fn where_it_is(plugin: &PluginRecord, sources: &PluginSources) -> PathBuf {
    let name = PathBuf::from(&plugin.name);
    match &plugin.file {
        Some(file) if sources.find(&name).is_err() && file.is_file() => file.clone(),
        _ => name,
    }
}

/// A trained model, with what it was trained by.
pub(super) struct Saved {
    pub session: Session,
    pub device: tch::Device,
    /// With the weights of the checkpoint.
    pub model: Model,
    pub state: State,
    pub checkpoint: PathBuf,
}

impl SavedArgs {
    /// The model of `run` as it was trained.
    pub fn of(run: PathBuf) -> Self {
        SavedArgs { run, plugin: Vec::new(), overrides: Vec::new() }
    }

    /// The same, with one more setting.
    pub fn with(&self, setting: String) -> Self {
        let mut more = self.clone();
        more.overrides.push(setting);
        more
    }

    /// Builds the method as the run did, and gives it the weights of the checkpoint.
    pub fn open(&self, sources: &PluginSources) -> anyhow::Result<Saved> {
        let checkpoint = find_checkpoint(&self.run)?;
        let (state, weights) = load_model(&checkpoint)?;
        let plugins = match self.plugin.as_slice() {
            [] => state.plugins.iter().map(|plugin| where_it_is(plugin, sources)).collect(),
            named => named.to_vec(),
        };
        // Those of the checkpoint, and not of the run, which may have gone on with others.
        let mut settings = state.config.as_object().cloned().unwrap_or_default();
        let unknown = Config::drop_unknown(&mut settings);
        if !unknown.is_empty() {
            let version = &state.host;
            tracing::warn!(
                "settings that jepa-host {version} had and this one has not: {}",
                unknown.join(", ")
            );
        }
        let base = Base { layer: checkpoint.display().to_string(), settings };
        let layers = Layers { base: Some(base), overrides: self.overrides.clone(), ..Layers::default() };
        let session = Session::open(&plugins, layers, sources)?;
        for plugin in session.registry.plugins() {
            let then = state.plugins.iter().find(|then| then.name == plugin.name());
            if then.is_some_and(|then| then.sha256 != plugin.file.sha256) {
                tracing::warn!(
                    "{} is not the file that the run was trained with: results may differ",
                    plugin.file.path.display()
                );
            }
        }
        let device = session.device()?;
        let method = session.build_method(device, state.classes, 0, state.steps_per_epoch)?;
        let model = Model::adopt(method, session.registry.find(Kind::Method, &session.method)?.0.name())?;
        restore(&model.tensors(), &weights).with_context(|| format!("{}", checkpoint.display()))?;
        Ok(Saved { session, device, model, state, checkpoint })
    }
}
