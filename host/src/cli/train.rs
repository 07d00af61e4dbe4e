//! `jepa-host train`: from the command line to a run. What is wrong is found here, before anything is written.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use clap::Args;
use jepa_plugin_api::abi::MethodHandle;
use jepa_plugin_api::{Interpolation, Rng, RunFacts, Transform, ViewSpec, tch};
use serde_json::json;

use super::exit::Usage;
use super::output::print_text;
use crate::checkpoint::{
    self, Checkpoint, FORMAT, PluginRecord, Resume, RunDir, State, resolve_resume, restore,
};
use crate::config::{Config, Layers, ResolvedConfig};
use crate::data::{Dataset, Loader, LoaderOptions};
use crate::device::{self, check_native, cpu_capability, device_text, libtorch};
use crate::eval::Evaluation;
use crate::plugin::{Registry, SearchPath};
use crate::provenance;
use crate::track::{METRICS_FILE, Trackers};
use crate::train::{Model, Optimizer, Outcome, Resources, Signals, run, steps_per_epoch};

/// Key of the number that libtorch's generator starts from when weights are drawn.
const INITIAL_WEIGHTS: u64 = 0x696e_6974_0000_0000;

#[derive(Debug, Default, PartialEq, Args)]
pub(super) struct TrainArgs {
    /// Plugin to load: a path, a file name (libcnn_jepa.so) or a bare name (cnn_jepa); may be repeated
    #[arg(long, value_name = "PLUGIN", help_heading = "Plugins")]
    plugin: Vec<PathBuf>,
    /// Configuration in TOML
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Go on from a checkpoint: `auto` for the newest of this run (or a fresh start, if there is none), or the path
    /// of a run directory or a checkpoint
    #[arg(long, value_name = "auto|PATH")]
    resume: Option<String>,
    /// Resume although plugins, libtorch or settings that matter have changed
    #[arg(long, requires = "resume")]
    allow_changes: bool,
    /// Print every setting with its value and where it comes from, and exit
    #[arg(long)]
    print_config: bool,
    /// Settings, such as optimizer.lr=0.02; they win over everything else
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

impl TrainArgs {
    /// Whether nothing of all this was given.
    pub fn is_empty(&self) -> bool {
        *self == TrainArgs::default()
    }

    pub fn run(self, search: &SearchPath) -> anyhow::Result<()> {
        let signals = Signals::install().context("cannot take over signals")?;
        let torch = libtorch();
        check_native()?;

        let mut registry = Registry::new(&torch.version);
        for name in &self.plugin {
            registry.load(search.find(name)?)?;
        }
        let mut settings = self.settings()?;
        let method_name = self.choose_method(&settings.config, &registry)?;
        settings.config.method.name = Some(method_name.clone());
        let backbone_name = settings.config.backbone_name()?.to_owned();
        registry.require_backbone(&backbone_name, search)?;
        let (owner, offer) = registry.method(&method_name)?;
        settings.adopt_plugin_options("method", &owner.manifest.name, offer.options.as_value())?;
        let (owner, offer) = registry.backbone(&backbone_name)?;
        settings.adopt_plugin_options("backbone", &owner.manifest.name, offer.options.as_value())?;
        if self.print_config {
            return print_text(|out| out.write_all(settings.print().as_bytes()));
        }
        let config = &settings.config;

        let device = device::choose(config.trainer.device)?;
        if config.trainer.threads > 0 {
            tch::set_num_threads(config.trainer.threads as i32);
        }
        let train_set = Arc::new(Dataset::open(config.train_file()?)?);
        let val_set = config.data.val.as_ref().map(Dataset::open).transpose()?.map(Arc::new);

        let steps_per_epoch =
            steps_per_epoch(train_set.len(), config.optimizer.batch_size, config.trainer.accumulate)?;
        let method = build_method(config, &registry, device, &train_set, steps_per_epoch)?;
        let views = method.views().to_vec();
        let model = Model::adopt(method, &registry.method(&method_name)?.0.manifest.name)?;
        let optimizer = Optimizer::new(&config.optimizer, model.trained());

        let mut state = State {
            format: FORMAT,
            step: 0,
            epoch: 0,
            batch_in_epoch: 0,
            ema_is_ahead: false,
            seed: config.seed,
            method: method_name.clone(),
            backbone: backbone_name,
            best: None,
            first_eval: None,
            last_eval: None,
            meters: BTreeMap::new(),
            metrics_lines: 0,
            config: serde_json::to_value(config)?,
            data_fingerprint: train_set.fingerprint()?,
            plugins: registry
                .plugins()
                .iter()
                .map(|p| PluginRecord {
                    name: p.manifest.name.clone(),
                    version: p.manifest.version.clone(),
                    sha256: p.sha256.clone(),
                })
                .collect(),
            host: env!("CARGO_PKG_VERSION").to_owned(),
            libtorch: torch.version,
            device: match device {
                tch::Device::Cpu => format!("cpu ({})", cpu_capability()?),
                _ => "cuda".to_owned(),
            },
            threads: tch::get_num_threads() as usize,
        };

        let train = loader(config, &train_set, views.clone(), true)?;
        let validation = match &val_set {
            Some(set) => Some(loader(config, set, views.clone(), false)?),
            None => None,
        };
        let evaluation = match &val_set {
            Some(val_set) if config.eval.every_epochs > 0 => {
                Some(Evaluation::new(config, evaluation_view(config, &views), &train_set, val_set)?)
            }
            Some(_) => None,
            None => {
                tracing::warn!("data.val is not set: no validation loss and no evaluation");
                None
            }
        };

        let runs = &config.run.dir;
        let resume = match &self.resume {
            Some(request) => resolve_resume(request, runs, config.run_name(&method_name))?,
            None => None,
        };
        let directory = match resume {
            Some(Resume { run, checkpoint }) => {
                let directory = RunDir::open(&run)?;
                let saved = checkpoint::load(&checkpoint)?;
                self.check_changes(&saved.state, &state)?;
                let batch_in_epoch = saved.state.batches_done(&state).map_err(Usage)?;
                restore(&model.tensors(), &saved.model)?;
                restore(&optimizer.tensors(), &saved.optimizer)?;
                directory.rewind(&saved.state, METRICS_FILE)?;
                state = State { batch_in_epoch, ..resumed(saved, state) };
                tracing::info!("going on at step {} of {}", state.step, directory.path().display());
                directory
            }
            None => {
                let directory = RunDir::create(runs, config.run_name(&method_name))?;
                tracing::info!("run {}", directory.path().display());
                directory
            }
        };
        provenance::write(directory.path(), &settings, &state)?;

        let path = directory.path().to_owned();
        let trackers = Trackers::open(&path)?;
        let (config, started) = (settings.config, Instant::now());
        let outcome = run(Resources {
            config,
            device,
            model,
            optimizer,
            train,
            validation,
            evaluation,
            directory,
            trackers,
            signals,
            state,
            steps_per_epoch,
        })?;
        print_text(|out| print_outcome(&outcome, started.elapsed().as_secs_f64(), out))
    }

    fn settings(&self) -> anyhow::Result<ResolvedConfig> {
        // A run that is resumed by path brings its own configuration.
        let file = match (&self.config, self.resume.as_deref()) {
            (Some(file), _) => Some(file.clone()),
            (None, Some(path)) if path != "auto" => resolve_resume(path, "".as_ref(), "")?
                .map(|resume| resume.run.join("config.toml"))
                .filter(|file| file.is_file()),
            _ => None,
        };
        let layers = Layers { file, overrides: self.overrides.clone(), ..Layers::default() };
        Ok(layers.with_process_environment().load()?)
    }

    /// `method.name`, or the only method there is.
    fn choose_method(&self, config: &Config, registry: &Registry) -> anyhow::Result<String> {
        if let Some(name) = &config.method.name {
            return Ok(name.clone());
        }
        match registry.method_names().as_slice() {
            [only] => Ok((*only).to_owned()),
            [] => Err(Usage(
                "no method is loaded: name its plugin with --plugin, such as --plugin cnn_jepa; `jepa-host plugin \
                 list` shows what there is"
                    .to_owned(),
            )
            .into()),
            several => Err(Usage(format!("set method.name to one of {}", several.join(", "))).into()),
        }
    }

    /// Refuses to go on with something else than what the run began with, unless that is allowed.
    fn check_changes(&self, saved: &State, now: &State) -> anyhow::Result<()> {
        let changes = saved.changes(now);
        if changes.is_empty() {
            return Ok(());
        }
        let list = changes.join("; ");
        if self.allow_changes {
            tracing::warn!("going on although {list}");
            return Ok(());
        }
        Err(Usage(format!("this would not be the same run: {list}. Undo that, or add --allow-changes"))
            .into())
    }
}

/// Where the checkpoint stands, with what this process is made of.
fn resumed(saved: Checkpoint, now: State) -> State {
    State {
        plugins: now.plugins,
        config: now.config,
        host: now.host,
        libtorch: now.libtorch,
        device: now.device,
        threads: now.threads,
        ..saved.state
    }
}

fn build_method(
    config: &Config,
    registry: &Registry,
    device: tch::Device,
    train_set: &Dataset,
    steps_per_epoch: u64,
) -> anyhow::Result<MethodHandle> {
    let (method_plugin, method) = registry.method(config.method.name.as_deref().unwrap_or_default())?;
    let (backbone_plugin, backbone) = registry.backbone(config.backbone_name()?)?;
    let facts = RunFacts {
        device: device_text(device),
        image_size: config.data.size as i64,
        batch_size: config.optimizer.batch_size as i64,
        epochs: config.trainer.epochs,
        steps_per_epoch,
        classes: train_set.classes() as i64,
        seed: config.seed,
    };
    let (plugin, name) = (backbone_plugin.plugin.clone(), backbone.name.clone());
    let options = json!(config.backbone.options);
    let on = facts.device.clone();
    let build_backbone = Box::new(move || plugin.build_backbone(&name, &options, &on));
    tch::manual_seed(Rng::keyed(config.seed, 0, 0, INITIAL_WEIGHTS).bits() as i64);
    method_plugin.plugin.build_method(&method.name, &json!(config.method.options), facts, build_backbone)
}

fn loader(config: &Config, set: &Arc<Dataset>, views: Vec<ViewSpec>, train: bool) -> anyhow::Result<Loader> {
    let options = LoaderOptions {
        batch_size: config.optimizer.batch_size,
        seed: config.seed,
        threads: config.data.threads,
        on_error: config.data.on_error,
        shuffle: train,
        drop_last: train,
        ..LoaderOptions::new(views, config.data.size as u32)
    };
    Ok(Loader::new(Arc::clone(set), options)?)
}

/// What the probes see: a centre crop, normalised as the method's own views are.
fn evaluation_view(config: &Config, views: &[ViewSpec]) -> ViewSpec {
    let crop =
        ViewSpec::new("evaluation").resize_center_crop(config.eval.crop_ratio, Interpolation::Bilinear);
    let transforms = views.iter().flat_map(|view| &view.transforms);
    match transforms.into_iter().find(|transform| matches!(transform, Transform::Normalize { .. })) {
        Some(normalize) => crop.then(normalize.clone()),
        None => crop,
    }
}

/// The table that a run ends with.
fn print_outcome(outcome: &Outcome, seconds: f64, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "{} steps, {seconds:.0} s", outcome.steps)?;
    if let Some(last) = &outcome.last {
        let first = outcome.first.as_ref();
        writeln!(out, "\n{:<24}{:>10}{:>10}", "", "before", "after")?;
        for (name, value) in last {
            let before = first.and_then(|f| f.get(name)).map_or("-".to_owned(), |v| format!("{v:.4}"));
            writeln!(out, "{name:<24}{before:>10}{value:>10.4}")?;
        }
    }
    match &outcome.checkpoint {
        Some(checkpoint) => writeln!(out, "\ncheckpoint {}", checkpoint.display()),
        None => Ok(()),
    }
}
