//! `jepa-host report`: runs as one HTML page.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;
use jepa_plugin_api::tch::{Device, Tensor};
use serde_json::json;

use super::exit::Usage;
use super::output::{Format, print, print_text};
use super::session::SavedArgs;
use crate::checkpoint::{find_run, replace_file};
use crate::config::Config;
use crate::data::Dataset;
use crate::eval::{evaluation_view, extract, feature_loader};
use crate::plugin::PluginSources;
use crate::report::{FeatureMap, Report, SavedRun, SweepOfTrials, serve};
use crate::sweep::read_sweep;
use crate::track::METRICS_FILE;

/// The name of a page that is written into its run.
const REPORT_FILE: &str = "report.html";

/// Write runs as one HTML page: a verdict, curves, probes, settings, provenance; it opens without a network
#[derive(Debug, Args)]
pub(super) struct ReportArgs {
    /// Run directories: runs/<name> (its newest version) or a version; several are compared, and all trials of a sweep
    #[arg(value_name = "RUN|SWEEP", required = true)]
    runs: Vec<PathBuf>,
    /// The file to write; by default report.html in the directory of the run or the sweep, or here for several
    #[arg(long, short, value_name = "FILE", conflicts_with = "serve")]
    out: Option<PathBuf>,
    /// Map the features of so many held-out images, and show nearest neighbours; 0 leaves that out
    #[arg(long, value_name = "N", default_value_t = 1000, conflicts_with = "serve")]
    features: usize,
    /// Serve the page instead, always up to date, at this address
    #[arg(long, value_name = "ADDRESS", num_args = 0..=1, default_missing_value = "127.0.0.1:6007")]
    serve: Option<String>,
    /// How to print where the page is
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl ReportArgs {
    pub fn run(self, sources: &PluginSources) -> anyhow::Result<()> {
        let (runs, sweep) = self.find()?;
        if let Some(address) = &self.serve {
            return self.serve(address, &runs, sweep);
        }
        for run in &runs {
            for damage in &run.damage {
                tracing::warn!("{}: {damage}", run.path.display());
            }
        }
        let features = runs.iter().map(|run| self.features_of(run, sources)).collect();
        let out = match (&self.out, runs.as_slice(), self.runs.as_slice()) {
            (Some(out), _, _) => out.clone(),
            (None, _, [directory]) if sweep.is_some() => directory.join(REPORT_FILE),
            (None, [run], _) => run.path.join(REPORT_FILE),
            (None, _, _) => REPORT_FILE.into(),
        };
        let report = Report { runs, features, sweep, live: false };
        let page = report.html();
        replace_file(&out, page.as_bytes()).with_context(|| format!("cannot write {}", out.display()))?;
        let names: Vec<&str> = report.runs.iter().map(|run| run.name.as_str()).collect();
        let result = json!({ "file": out, "bytes": page.len(), "runs": names });
        print(self.format, &result, |_, to| writeln!(to, "{}", out.display()))
    }

    /// The runs that are meant; and the sweep, if they are the trials of a single one.
    fn find(&self) -> anyhow::Result<(Vec<SavedRun>, Option<SweepOfTrials>)> {
        let (mut runs, mut sweep) = (Vec::new(), None);
        for path in &self.runs {
            let Some((definition, trials)) = read_sweep(path)? else {
                runs.push(SavedRun::find(path)?);
                continue;
            };
            let folders = trials.iter().map(|trial| path.join(trial.name()));
            // A trial that has not come to be a run has nothing to report.
            let begun = folders.filter_map(|folder| find_run(&folder).ok());
            let before = runs.len();
            runs.extend(begun.map(|run| SavedRun::read(&run)));
            if runs.len() == before {
                return Err(
                    Usage(format!("no trial of the sweep in {} has begun yet", path.display())).into()
                );
            }
            let parameters = definition.varied().map(str::to_owned).collect();
            sweep = Some(SweepOfTrials { name: definition.name, parameters });
        }
        Ok((runs, sweep.filter(|_| self.runs.len() == 1)))
    }

    /// What the encoder of `run` makes of held-out images, or why that cannot be told.
    fn features_of(&self, run: &SavedRun, sources: &PluginSources) -> Result<FeatureMap, String> {
        if self.features == 0 {
            return Err("The map of features is left out, as --features 0 asks.".to_owned());
        }
        if run.checkpoint.is_none() {
            return Err("There is no map of features: the run has no checkpoint.".to_owned());
        }
        map_features(&run.path, self.features, sources).map_err(|error| {
            let why = format!("There is no map of features: {}.", format!("{error:#}").trim_end_matches('.'));
            tracing::info!("{}: {why}", run.name);
            why
        })
    }

    fn serve(&self, address: &str, runs: &[SavedRun], sweep: Option<SweepOfTrials>) -> anyhow::Result<()> {
        let address: SocketAddr = address.parse().map_err(|_| {
            Usage(format!(
                "--serve {address} is no address: give one such as 127.0.0.1:6007, with port 0 for any"
            ))
        })?;
        let listener = TcpListener::bind(address).with_context(|| {
            format!("cannot listen at {address}; another port, or 0 for any, may be free")
        })?;
        let own = listener.local_addr()?;
        if !own.ip().is_loopback() {
            tracing::warn!("{own} is open to everyone who can reach this machine");
        }
        print_text(|out| writeln!(out, "http://{own}/ until it is interrupted"))?;
        let paths: Vec<&Path> = runs.iter().map(|run| run.path.as_path()).collect();
        let page = || {
            let runs: Vec<SavedRun> = paths.iter().map(|path| SavedRun::read(path)).collect();
            let left_out = "The map of features is left out of a page that is served: `jepa-host report` without --serve draws it.";
            let features = runs.iter().map(|_| Err(left_out.to_owned())).collect();
            Report { runs, features, sweep: sweep.clone(), live: true }.html()
        };
        let stamp = || {
            let state = |path: &&Path| {
                let length = fs::metadata(path.join(METRICS_FILE)).map_or(0, |metadata| metadata.len());
                let ended = fs::metadata(path.join("provenance.json")).map_or(0, |metadata| metadata.len());
                format!("{length}.{ended}.{} ", crate::checkpoint::RunDir::is_held(path))
            };
            paths.iter().map(state).collect()
        };
        Ok(serve(&listener, &page, &stamp)?)
    }
}

/// The features of `count` held-out images, the same ones for every run with these images.
fn map_features(run: &Path, count: usize, sources: &PluginSources) -> anyhow::Result<FeatureMap> {
    let mut saved = SavedArgs::of(run.to_owned()).open(sources)?;
    let config = saved.session.config();
    let val = config.data.val.as_ref().context("the run has no data.val")?;
    let set = Arc::new(Dataset::open(val).context("data.val")?);
    let view = evaluation_view(config, saved.model.method.views());
    let shared = Config { seed: 0, ..config.clone() };
    let loader = feature_loader(&shared, view, &set, set.len() > count)?;
    let batches = count.div_ceil(config.eval.batch_size);
    let mut indices: Vec<u64> = Vec::new();
    let batches = loader.batches(0, 0).take(batches).map(|batch| {
        let batch = batch?.finish(Device::Cpu)?;
        indices.extend(&batch.indices);
        Ok((batch.views[0].shallow_clone(), batch.labels))
    });
    let (device, model) = (saved.device, &mut saved.model);
    let mut encode = |images: &Tensor| model.encode(images, device);
    let features = extract(batches, &mut encode)?.first(count as i64);
    indices.truncate(count);
    FeatureMap::new(&features, &indices, &set, saved.state.step)
}
