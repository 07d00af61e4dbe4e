//! `jepa-host eval`: judges a trained model once more, or on other images.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use jepa_plugin_api::tch::Tensor;
use serde_json::{Value, json};

use super::exit::Usage;
use super::output::{Format, print};
use super::session::{SavedArgs, where_it_is};
use super::train::{TrainArgs, judge_by};
use crate::checkpoint::{find_checkpoint, load_state};
use crate::config::Base;
use crate::data::Share;
use crate::eval::{Evaluation, evaluation_view};
use crate::plugin::PluginSources;
use crate::train::{Signals, TrainError};

/// Judge a trained model: the same protocol as in training, so the same figures for the same settings
#[derive(Debug, Subcommand)]
pub(super) enum EvalCommand {
    /// A linear classifier on frozen features
    Linear(EvalArgs),
    /// A vote of the nearest training features
    Knn(EvalArgs),
    /// A probe of a plugin
    Probe {
        /// Its name, as `jepa-host plugin list` shows it
        #[arg(value_name = "PROBE")]
        name: String,
        #[command(flatten)]
        args: EvalArgs,
    },
    /// Train backbone and a linear classifier with labels, from the weights of a run
    ///
    /// This is a training run of its own, by default of 20 epochs: it has checkpoints, `jepa-host --plugin supervised
    /// --resume ITS_RUN` goes on with it, and every setting of training is a setting here. Data and backbone are those
    /// of the run. The result is val/supervised/top1.
    Finetune(FinetuneArgs),
}

#[derive(Debug, Args)]
pub(super) struct FinetuneArgs {
    /// A run directory (the newest checkpoint is taken), or a checkpoint
    #[arg(value_name = "RUN|CHECKPOINT")]
    run: PathBuf,
    /// The method that trains it, and by default the name of its plugin
    #[arg(long, value_name = "METHOD", default_value = "supervised")]
    method: String,
    /// Plugin to load; by default that of the method, and those that the run was trained with
    #[arg(long, value_name = "PLUGIN", help_heading = "Plugins")]
    plugin: Vec<PathBuf>,
    /// Print every setting with its value and where it comes from, and exit
    #[arg(long)]
    print_config: bool,
    /// Settings of training, such as optimizer.lr=1e-4 or trainer.epochs=50
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    #[command(flatten)]
    saved: SavedArgs,
}

impl EvalCommand {
    pub fn run(self, sources: &PluginSources) -> anyhow::Result<()> {
        match self {
            EvalCommand::Linear(args) => args.run(Probe::Linear, sources),
            EvalCommand::Knn(args) => args.run(Probe::Knn, sources),
            EvalCommand::Probe { name, args } => args.run(Probe::OfPlugin(name), sources),
            EvalCommand::Finetune(args) => args.run(sources),
        }
    }
}

#[derive(PartialEq)]
enum Probe {
    Linear,
    Knn,
    OfPlugin(String),
}

impl EvalArgs {
    fn run(&self, probe: Probe, sources: &PluginSources) -> anyhow::Result<()> {
        let signals = Signals::install("ending; a second signal ends at once")?;
        let mut saved = match &probe {
            // Named in the settings, it is looked for, and refused when it is nowhere.
            Probe::OfPlugin(name) => {
                self.saved.with(format!("eval.probes.{name}.enabled=true")).open(sources)?
            }
            Probe::Linear | Probe::Knn => self.saved.open(sources)?,
        };
        let config = &mut saved.session.settings.config;
        config.eval.linear.enabled = probe == Probe::Linear;
        config.eval.knn.enabled = probe == Probe::Knn;
        config
            .eval
            .probes
            .iter_mut()
            .for_each(|(name, settings)| settings.enabled = probe == Probe::OfPlugin(name.clone()));
        let (config, probes) = (saved.session.config(), saved.session.probes()?);
        let Some(val) = &config.data.val else {
            return Err(Usage("the run has no data.val: add data.val=held_out.h5".to_owned()).into());
        };
        let train_set = saved.session.open_images("data.train", config.train_file()?)?;
        let val_set = saved.session.open_images("data.val", val)?;
        judge_by(&val_set, &train_set, true)?;
        let view = evaluation_view(config, saved.model.method.views());
        let evaluation = Evaluation::new(config, view, &train_set, &val_set, probes, Share::Whole)?;

        let (device, model) = (saved.device, &mut saved.model);
        let mut encode = |images: &Tensor| model.encode(images, device);
        let go_on = || match signals.pending() {
            Some(signal) => Err(TrainError::Stopped { signal }.into()),
            None => Ok(()),
        };
        let figures: BTreeMap<String, f64> = evaluation.run(device, &mut encode, &go_on)?;
        print(self.format, &figures, |figures, out| {
            writeln!(out, "{} of step {}", saved.checkpoint.display(), saved.state.step)?;
            figures.iter().try_for_each(|(name, value)| writeln!(out, "{name:<28}{value:>10.4}"))
        })
    }
}

impl FinetuneArgs {
    /// Trains another method on the run's images, its backbone beginning with the run's weights.
    fn run(self, sources: &PluginSources) -> anyhow::Result<()> {
        let checkpoint = find_checkpoint(&self.run)?;
        let state = load_state(&checkpoint)?;
        let of_run = |key: &str| state.config.pointer(key).cloned().unwrap_or(Value::Null);
        let name = format!("{}_finetuned", of_run("/run/name").as_str().unwrap_or(&state.method));
        let settings = json!({
            "seed": of_run("/seed"),
            "run": { "name": name, "dir": of_run("/run/dir") },
            "init": { "from": checkpoint },
            "method": { "name": self.method },
            "backbone": of_run("/backbone"),
            "data": of_run("/data"),
            "optimizer": {
                "algorithm": "adamw",
                "lr": 1e-3,
                "weight_decay": 0.05,
                "batch_size": of_run("/optimizer/batch_size"),
                "warmup_epochs": 1.0,
            },
            "trainer": {
                "epochs": 20,
                "device": of_run("/trainer/device"),
                "threads": of_run("/trainer/threads"),
                "precision": of_run("/trainer/precision"),
            },
            // Probes judge frozen features; here the classifier is trained with them.
            "eval": { "every_epochs": 0, "at_start": false },
        });
        let Value::Object(settings) = settings else { unreachable!("written above") };
        let layer = format!("eval finetune of {}", checkpoint.display());
        let mut plugins = self.plugin;
        if plugins.is_empty() {
            let of_run = state.plugins.iter().filter(|plugin| plugin.name != self.method);
            plugins.push(self.method.clone().into());
            plugins.extend(of_run.map(|plugin| where_it_is(plugin, sources)));
        }
        TrainArgs::on(Base { layer, settings }, plugins, self.overrides, self.print_config).run(sources)
    }
}
