//! `jepa-host eval`: judges a trained model once more, or on other images.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use jepa_plugin_api::tch::{Tensor, no_grad};

use super::exit::Usage;
use super::output::{Format, print};
use super::session::{SavedArgs, evaluation_view};
use crate::data::Dataset;
use crate::eval::Evaluation;
use crate::plugin::SearchPath;
use crate::train::{Signals, TrainError};

/// Judge a trained model: the same protocol as in training, so the same figures for the same settings
#[derive(Debug, Subcommand)]
pub(super) enum EvalCommand {
    /// A linear classifier on frozen features
    Linear(EvalArgs),
    /// A vote of the nearest training features
    Knn(EvalArgs),
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
    pub fn run(self, search: &SearchPath) -> anyhow::Result<()> {
        let signals = Signals::install()?;
        let (EvalCommand::Linear(args) | EvalCommand::Knn(args)) = &self;
        let mut saved = args.saved.open(search)?;
        let mut config = saved.session.config().clone();
        config.eval.linear.enabled = matches!(self, EvalCommand::Linear(_));
        config.eval.knn.enabled = matches!(self, EvalCommand::Knn(_));
        let Some(val) = &config.data.val else {
            return Err(Usage("the run has no data.val: add data.val=held_out.h5".to_owned()).into());
        };
        let (train_set, val_set) = (
            Dataset::open(config.train_file()?).context("data.train")?,
            Dataset::open(val).context("data.val")?,
        );
        let view = evaluation_view(&config, saved.model.method.views());
        let evaluation = Evaluation::new(&config, view, &Arc::new(train_set), &Arc::new(val_set))?;

        let (device, method) = (saved.device, &mut saved.model.method);
        let mut encode = |images: &Tensor| -> anyhow::Result<Tensor> {
            Ok(no_grad(|| method.encode(&images.to_device(device)))?)
        };
        let run = saved.checkpoint.clone();
        let go_on = || match signals.pending() {
            Some(signal) => Err(TrainError::Interrupted { signal, run: run.clone() }.into()),
            None => Ok(()),
        };
        let figures: BTreeMap<String, f64> = evaluation.run(device, &mut encode, &go_on)?;
        print(args.format, &figures, |figures, out| {
            writeln!(out, "{} of step {}", saved.checkpoint.display(), saved.state.step)?;
            figures.iter().try_for_each(|(name, value)| writeln!(out, "{name:<24}{value:>10.4}"))
        })
    }
}
