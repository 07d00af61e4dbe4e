//! `jepa-host train`: from the command line to a run. What is wrong is found here, before anything is written.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, CommandFactory as _};
use jepa_plugin_api::abi::{Failure, FailureKind, MethodHandle};
use jepa_plugin_api::tch::{self, Tensor};
use serde_json::json;

use super::exit::{self, Usage};
use super::output::print_text;
use super::session::{Session, cores_of};
use super::trackers::{open_trackers, patience_at_end};
use crate::checkpoint::{
    self, Checkpoint, FORMAT, Resume, RunDir, State, adapt, encoder_of, find_run, read_encoder,
    resolve_resume, restore,
};
use crate::config::{Base, Config, Data, Layers, LrScale};
use crate::data::{Augment, Dataset, Loader, LoaderOptions, Share, cuts_on};
use crate::device::{Graph, cpu_capability, libtorch};
use crate::dist::{Comm, DistError, Launch, Launcher};
use crate::eval::{Evaluation, evaluation_view};
use crate::nearest::nearest;
use crate::plugin::{Kind, LoadedPlugin, PluginSources};
use crate::provenance::{self, is_of_this_job};
use crate::trace::Trace;
use crate::track::console::{keep_log, speak_up};
use crate::track::{METRICS_FILE, Trackers};
use crate::train::{Model, Optimizer, Outcome, Ranks, Resources, Signals, or_part, run, steps_per_epoch};

/// What comes of Ctrl-C.
const ON_SIGNAL: &str = "ending after this step, with a checkpoint; a second signal ends at once, with the checkpoints that are there";

/// The minor version of the API since which plugins know of ranks.
const RANKS_SINCE: u16 = 1;

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
    /// Write what each thread does when, for ui.perfetto.dev or chrome://tracing: the first million spans; a file
    /// that is there is replaced
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Settings, such as optimizer.lr=0.02; they win over everything else
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// What another subcommand begins with: weaker than all of the above.
    #[arg(skip)]
    base: Option<Base>,
}

impl TrainArgs {
    /// A run that begins with the settings `base`, under those of the environment and of `overrides`.
    pub fn on(base: Base, plugin: Vec<PathBuf>, overrides: Vec<String>, print_config: bool) -> Self {
        TrainArgs { plugin, overrides, print_config, base: Some(base), ..TrainArgs::default() }
    }

    /// Whether nothing of all this was given.
    pub fn is_empty(&self) -> bool {
        *self == TrainArgs::default()
    }

    pub fn run(self, sources: &PluginSources) -> anyhow::Result<()> {
        self.refuse_words()?;
        let session = self.session(sources)?;
        if self.print_config {
            return print_text(|out| out.write_all(session.settings.print().as_bytes()));
        }
        let comm = join_ranks(&session)?;
        // Whoever waits for other ranks has nothing to lose, and is ended at once.
        let signals = Signals::install(ON_SIGNAL).context("cannot take over signals")?;
        let first = comm.as_ref().is_none_or(|comm| comm.rank() == 0);
        if first {
            tell_of_optimizer(session.config());
        }
        let begin = || {
            let trace = self.trace.as_deref().filter(|_| first).map(begin_trace).transpose()?;
            anyhow::Ok((self.begin(&session, comm.as_ref(), trace.clone())?, trace))
        };
        let (Begun { prepared, directory, mut trackers }, trace) = or_part(comm.as_ref(), begin())?;
        let Prepared { device, model, optimizer, train, validation, evaluation, state } = prepared;
        let settings = session.settings.config;
        let ranks = match comm {
            Some(comm) => Ranks::new(comm, &model, settings.ranks.bucket_mib << 20)?,
            None => Ranks::alone(),
        };

        let started = Instant::now();
        let run_path = directory.path().to_owned();
        let resources = Resources {
            config: settings,
            device,
            model,
            optimizer,
            train,
            validation,
            evaluation,
            directory,
            signals,
            ranks,
            steps_per_epoch: state.steps_per_epoch,
            state,
            trace: trace.clone(),
        };
        let ended = run(resources, &mut trackers);
        if !first {
            return ended.map(drop);
        }
        let exit_code = ended.as_ref().err().map_or(0, exit::code);
        if let Err(error) = provenance::note_end(&run_path, exit_code, ended.as_ref().err()) {
            tracing::warn!("{error:#}");
        }
        trackers.close(exit_code.into(), patience_at_end(exit_code));
        if let Some(Err(error)) = trace.map(|trace| trace.finish()) {
            tracing::warn!("--trace: the file is not complete: {error}");
        }
        let outcome = ended?;
        print_text(|out| print_outcome(&outcome, started.elapsed().as_secs_f64(), out))
    }

    /// Everything up to the first step. Of several ranks the first alone reads and writes what is kept of the run, and the
    /// others take from it where to begin.
    fn begin(&self, session: &Session, comm: Option<&Comm>, trace: Option<Trace>) -> anyhow::Result<Begun> {
        let first = comm.is_none_or(|comm| comm.rank() == 0);
        let resume = if first { self.find_resume(session, comm)? } else { None };
        let has_weights = resume.is_some() || !first;
        let mut prepared = prepare(session, Purpose::Training { has_weights }, comm, trace)?;
        if let Some(comm) = comm {
            refuse_differences(comm, &prepared)?;
        }
        let mut directory = None;
        let take_up = || {
            let (taken_up, state) = self.take_up(session, &prepared, resume)?;
            let (path, peers) = (taken_up.path().to_owned(), comm.map_or(&[][..], Comm::peers));
            provenance::write(&path, &session.settings, &state, peers)?;
            keep_log(&path)?;
            if let Some(comm) = comm {
                comm.note_run(&path)?;
            }
            directory = Some(taken_up);
            Ok((path, state))
        };
        let (path, state) = match comm {
            Some(comm) => comm.from_first(take_up)?,
            None => take_up()?,
        };
        if let Some(comm) = comm {
            let tensors = prepared.model.tensors().into_iter().chain(prepared.optimizer.tensors());
            for (_, mut tensor) in tensors {
                let mut of_first = tensor.detach().contiguous();
                comm.broadcast(&mut of_first, 0)?;
                tch::no_grad(|| tensor.copy_(&of_first));
            }
            speak_up();
        }
        prepared.state = state;
        Ok(match directory {
            Some(directory) => {
                let trackers = open_trackers(session, &directory)?;
                Begun { prepared, directory, trackers }
            }
            None => Begun { prepared, directory: RunDir::of_first(path), trackers: Trackers::none() },
        })
    }

    /// Where to go on: where the attempt before this one was, of a launcher that begins anew after a failure or of a SLURM job
    /// that was requeued; or as asked for.
    fn find_resume(&self, session: &Session, comm: Option<&Comm>) -> anyhow::Result<Option<Resume>> {
        let config = session.config();
        let (runs, name) = (&config.run.dir, config.run_name(&session.method));
        let counts =
            |variable: &str| std::env::var(variable).is_ok_and(|count| !["", "0"].contains(&count.trim()));
        let run = match comm {
            // Not by TORCHELASTIC_RESTART_COUNT: it stays on a machine that begins anew because another one has failed.
            Some(comm) if comm.launch().launcher == Launcher::Torchrun => {
                comm.noted_run(&json!(config).to_string())?
            }
            _ if counts("SLURM_RESTART_COUNT") => {
                find_run(&runs.join(name)).ok().filter(|run| is_of_this_job(run))
            }
            _ => None,
        };
        // It has gone further than what this command, given once more, asks for.
        if let Some(run) = run
            && let Some(checkpoint) = checkpoint::latest(&run)?
        {
            return Ok(Some(Resume { run, checkpoint }));
        }
        match &self.resume {
            Some(request) => Ok(resolve_resume(request, runs, name)?),
            None => Ok(None),
        }
    }

    /// The directory of the run, and where it stands: at its beginning, or where `resume` says, with the tensors of that.
    fn take_up(
        &self,
        session: &Session,
        prepared: &Prepared,
        resume: Option<Resume>,
    ) -> anyhow::Result<(RunDir, State)> {
        let (config, Prepared { model, optimizer, state, .. }) = (session.config(), prepared);
        let Some(Resume { run, checkpoint }) = resume else {
            let directory = RunDir::create(&config.run.dir, config.run_name(&session.method))?;
            tracing::info!("run {}", directory.path().display());
            return Ok((directory, state.clone()));
        };
        let directory = RunDir::open(&run)?;
        let saved = checkpoint::load(&checkpoint)?;
        self.check_changes(&saved.state, state)?;
        let batch_in_epoch = saved.state.batches_done(state).map_err(Usage)?;
        restore(&model.tensors(), &saved.model)?;
        restore_optimizer(optimizer, &saved, config)?;
        directory.rewind(&saved.state, METRICS_FILE)?;
        let state = State { batch_in_epoch, ..resumed(saved, state.clone()) };
        tracing::info!("going on at step {} of {}", state.step, directory.path().display());
        Ok((directory, state))
    }

    /// The plugins and settings that were asked for.
    pub fn session(&self, sources: &PluginSources) -> anyhow::Result<Session> {
        let layers = |file| Layers {
            base: self.base.clone(),
            file,
            overrides: self.overrides.clone(),
            ..Layers::default()
        };
        // A run that is resumed by path brings its own configuration.
        let file = match (&self.config, self.resume.as_deref()) {
            (Some(file), _) => Some(file.clone()),
            (None, Some(path)) if path != "auto" => resolve_resume(path, "".as_ref(), "")?
                .map(|resume| resume.run.join("config.toml"))
                .filter(|file| file.is_file()),
            _ => None,
        };
        Session::open(&self.plugin, layers(file), sources)
    }

    /// A word that is no `key=value` stands where a subcommand might: names the nearest one.
    pub fn refuse_words(&self) -> Result<(), Usage> {
        let Some(word) = self.overrides.iter().find(|word| !word.contains('=')) else { return Ok(()) };
        let cli = super::Cli::command();
        let close = nearest(word, cli.get_subcommands().map(clap::Command::get_name));
        let close = close.map(|close| format!(" (did you mean `{close}`?)")).unwrap_or_default();
        Err(Usage(format!(
            "`{word}` is neither a subcommand{close} nor a setting, which reads key=value; see jepa-host --help"
        )))
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

/// What a method is put together for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A run; one that goes on, and a rank that is not the first, will be given weights.
    Training { has_weights: bool },
    /// Steps that are measured: nothing is evaluated.
    Measuring,
}

/// All that training needs, but for a place to write to.
pub(super) struct Prepared {
    pub device: tch::Device,
    pub model: Model,
    pub optimizer: Optimizer,
    pub train: Loader,
    pub validation: Option<Loader>,
    pub evaluation: Option<Evaluation>,
    /// Of the beginning.
    pub state: State,
}

/// Sees to it that steps can be captured as CUDA graphs.
fn prepare_graphs(session: &Session, device: tch::Device, comm: Option<&Comm>) -> anyhow::Result<()> {
    let method = &session.method;
    let refuse = |what: String| {
        Err(Usage(format!("trainer.cuda_graphs is for {what}; use trainer.cuda_graphs=false")).into())
    };
    if !session.offer()?.capturable {
        return refuse(format!(
            "methods whose every step is the same to a GPU, and {method} does not say that its steps are"
        ));
    }
    if let accumulate @ 2.. = session.config().trainer.accumulate {
        return refuse(format!("steps of one batch, and trainer.accumulate is {accumulate}"));
    }
    if let Some(comm) = comm {
        return refuse(format!("runs of one process, and this one has {} ranks", comm.size()));
    }
    match device {
        tch::Device::Cuda(gpu) => Ok(Graph::prepare(gpu)?),
        _ => {
            tracing::warn!("trainer.cuda_graphs is for GPUs: it changes nothing on a CPU");
            Ok(())
        }
    }
}

/// What a run begins with.
struct Begun {
    prepared: Prepared,
    directory: RunDir,
    trackers: Trackers,
}

/// Opens the data and builds the method with what goes with it: all of it, or what a rank has of it.
pub(super) fn prepare(
    session: &Session,
    purpose: Purpose,
    comm: Option<&Comm>,
    trace: Option<Trace>,
) -> anyhow::Result<Prepared> {
    let config = session.config();
    let device = session.device_of(comm)?;
    if config.data.augment == Augment::Gpu && device == tch::Device::Cpu {
        tracing::warn!(
            "data.augment = \"gpu\" on a CPU: crops stay with the data threads, and colours take the time of the steps, which is slower"
        );
    }
    if config.trainer.cuda_graphs {
        prepare_graphs(session, device, comm)?;
    }
    let crop_on_device = config.data.augment == Augment::Gpu && cuts_on(device);
    let train_set = session.open_images("data.train", config.train_file()?)?;
    let val_set = match &config.data.val {
        Some(path) if purpose != Purpose::Measuring => Some(session.open_images("data.val", path)?),
        _ => None,
    };
    if session.offer()?.needs_labels {
        require_labels(&session.method, &train_set, val_set.as_deref())?;
    }
    if let Some(val_set) = &val_set {
        let labels_matter = session.offer()?.needs_labels || config.eval.every_epochs > 0;
        judge_by(val_set, &train_set, labels_matter)?;
    }

    let steps_per_epoch =
        steps_per_epoch(train_set.len(), config.optimizer.batch_size, config.trainer.accumulate)?;
    tell_of_remainder(train_set.len(), config);
    let classes = train_set.classes() as u64;
    let method = session.build_method(device, classes, train_set.unlabelled() as u64, steps_per_epoch)?;
    if let (Some(from), false) = (&config.init.from, purpose == Purpose::Training { has_weights: true }) {
        initialise(&method, from)?;
    }
    let views = method.views().to_vec();
    let encoder = method.encoder().to_owned();
    let mut model = Model::adopt(method, session.registry.find(Kind::Method, &session.method)?.0.name())?;
    try_encoder(&mut model, config.data.size, device)?;
    let optimizer = Optimizer::new(&config.optimizer, model.trained());

    let state = State {
        format: FORMAT,
        step: 0,
        epoch: 0,
        batch_in_epoch: 0,
        ema_is_ahead: false,
        seed: config.seed,
        method: session.method.clone(),
        backbone: session.backbone.clone(),
        encoder,
        best: None,
        first_eval: None,
        last_eval: None,
        judged: Some(0),
        meters: BTreeMap::new(),
        metrics_lines: 0,
        config: serde_json::to_value(config)?,
        classes,
        steps_per_epoch,
        data_fingerprint: train_set.fingerprint()?,
        plugins: session.registry.plugins().iter().map(LoadedPlugin::record).collect(),
        host: env!("CARGO_PKG_VERSION").to_owned(),
        libtorch: libtorch().version,
        device: match device {
            tch::Device::Cpu => format!("cpu ({})", cpu_capability()?),
            _ => "cuda".to_owned(),
        },
        threads: tch::get_num_threads() as usize,
        ranks: comm.map_or(1, |comm| comm.size() as usize),
    };

    let (of_each, of_all) = match comm {
        Some(comm) => {
            let (part, parts) = (comm.rank() as usize, comm.size() as usize);
            (Share::OfEachBatch { part, parts }, Share::OfBatches { part, parts })
        }
        None => (Share::Whole, Share::Whole),
    };
    let loader = |set: &Arc<Dataset>, train, share, trace| {
        let options = LoaderOptions {
            trace,
            batch_size: config.optimizer.batch_size,
            share,
            seed: config.seed,
            threads: threads_of_loader(config, comm),
            on_error: config.data.on_error,
            decode: config.data.decode,
            augment: config.data.augment,
            crop_on_device,
            pinned: device.is_cuda(),
            shuffle: train,
            drop_last: train,
            ..LoaderOptions::new(views.clone(), config.data.size as u32)
        };
        Loader::new(Arc::clone(set), options)
    };
    let train = loader(&train_set, true, of_each, trace)?;
    let validation = match &val_set {
        Some(set) => Some(loader(set, false, of_all, None)?),
        None => None,
    };
    let evaluation = match &val_set {
        Some(val_set) if config.eval.every_epochs > 0 => {
            let threads = threads_of_loader(config, comm);
            let config = &Config { data: Data { threads, ..config.data.clone() }, ..config.clone() };
            let view = evaluation_view(config, &views);
            Some(Evaluation::new(config, view, &train_set, val_set, session.probes()?, of_all)?)
        }
        None if purpose != Purpose::Measuring => {
            tracing::warn!("data.val is not set: no validation loss and no evaluation");
            None
        }
        _ => None,
    };
    Ok(Prepared { device, model, optimizer, train, validation, evaluation, state })
}

/// The file of `--trace`.
pub(super) fn begin_trace(path: &Path) -> anyhow::Result<Trace> {
    Trace::create(path).map_err(|error| Usage(format!("--trace {}: {error}", path.display())).into())
}

/// What `--print-config` does not show: the peak learning rate after its scaling, and settings that do nothing.
fn tell_of_optimizer(config: &Config) {
    let settings = &config.optimizer;
    let algorithm = json!(settings.algorithm);
    for key in settings.without_effect() {
        tracing::warn!("{key} has no effect: optimizer.algorithm is {algorithm}");
    }
    if settings.lr_scale != LrScale::None {
        let images = settings.batch_size * config.trainer.accumulate;
        let (peak, lr) = (config.peak_lr(), settings.lr);
        tracing::info!(
            "the peak learning rate is {peak}: optimizer.lr is {lr} for 256 images, and a step has {images}"
        );
    }
}

/// What is not part of a whole step is not trained on in that epoch: said where it is much of the set.
fn tell_of_remainder(images: usize, config: &Config) {
    let in_step = config.optimizer.batch_size * config.trainer.accumulate;
    let rest = images % in_step;
    if rest * 20 > images {
        tracing::info!(
            "{rest} of {images} images are left out of each epoch, others each time: a step takes {in_step}"
        );
    }
}

/// Gives `optimizer` its state, unless another algorithm has saved it: whoever allows that change begins it anew.
fn restore_optimizer(optimizer: &Optimizer, saved: &Checkpoint, now: &Config) -> anyhow::Result<()> {
    let (was, is) = (saved.state.config.pointer("/optimizer/algorithm"), json!(now.optimizer.algorithm));
    if let Some(was) = was.filter(|was| **was != is) {
        tracing::warn!("the optimizer's state begins at zero: what {was} has saved means nothing to {is}");
        return Ok(());
    }
    Ok(restore(&optimizer.tensors(), &saved.optimizer)?)
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
        ranks: now.ranks,
        ..saved.state
    }
}

/// Refuses held-out images whose labels mean other classes, where that matters, and says when they are not held out.
pub(super) fn judge_by(val: &Dataset, train: &Dataset, labels_matter: bool) -> anyhow::Result<()> {
    if labels_matter {
        val.require_same_classes(train, "data.train").context("data.val")?;
    }
    if val.len() == train.len() && val.fingerprint()? == train.fingerprint()? {
        tracing::warn!("data.val has the images of data.train: it judges by what was trained on");
    }
    Ok(())
}

/// Refuses data sets that `method` cannot learn labels from, and be validated with.
fn require_labels(method: &str, train: &Dataset, val: Option<&Dataset>) -> anyhow::Result<()> {
    train.require_labels(method).context("data.train")?;
    if let Some(val) = val {
        val.require_labels(method)
            .and_then(|_| val.require_classes(train.classes(), "data.train"))
            .context("data.val")?;
    }
    Ok(())
}

/// Shows the method a blank image, as an evaluation would: sizes that do not fit fail before a run begins.
fn try_encoder(model: &mut Model, size: usize, device: tch::Device) -> anyhow::Result<()> {
    let side = size as i64;
    let image = Tensor::f_zeros([1, 3, side, side], (tch::Kind::Float, device))?;
    model.encode(&image, device).map(drop).map_err(|error| match error.downcast_ref::<Failure>() {
        Some(failure) if failure.kind == FailureKind::Error => {
            Usage(format!("images of data.size = {size} px do not fit: {failure}")).into()
        }
        _ => error,
    })
}

/// Gives every backbone of `method` the weights in `from`.
fn initialise(method: &MethodHandle, from: &Path) -> anyhow::Result<()> {
    let weights = read_encoder(from).context("init.from")?;
    for backbone in method.backbones() {
        let entries = method.entries().iter().map(|entry| (entry.name.clone(), entry.tensor.shallow_clone()));
        let into = encoder_of(entries.collect(), backbone);
        restore(&into, &adapt(&weights, &into)).map_err(|error| {
            Usage(format!(
                "init.from = {} does not fit backbone.name and its options: {error}",
                from.display()
            ))
        })?;
    }
    tracing::info!("{} tensors of the backbone come from {}", weights.len(), from.display());
    Ok(())
}

/// The other processes that a launcher has started, if it has.
pub(super) fn join_ranks(session: &Session) -> anyhow::Result<Option<Comm>> {
    let Some(launch) = Launch::from_environment()?.filter(|launch| launch.size > 1) else { return Ok(None) };
    // Built before there were ranks: its batch norms would look at their own share of a batch alone.
    for plugin in session.registry.plugins() {
        let minor = plugin.file.manifest.api_minor;
        if minor < RANKS_SINCE && !plugin.record().only_probes {
            return Err(Usage(format!(
                "plugin {} is of API 1.{minor}, which knows no ranks: build it against 1.{RANKS_SINCE} or later, or start \
                 one process",
                plugin.name()
            ))
            .into());
        }
    }
    let timeout = Duration::from_secs(session.config().ranks.timeout_s);
    let comm = Comm::join(launch, timeout)?;
    if comm.rank() == 0 {
        tracing::info!("{} ranks of {}", comm.size(), comm.launch().launcher);
    }
    Ok(Some(comm))
}

/// Refuses ranks that would not do the same as the first.
fn refuse_differences(comm: &Comm, prepared: &Prepared) -> anyhow::Result<()> {
    let own = &prepared.state;
    let validation = prepared.validation.as_ref().map(|loader| loader.dataset().fingerprint()).transpose()?;
    let states = comm.collect(&serde_json::to_string(&(own, &validation))?)?;
    let differences = comm.from_first(|| {
        let mut differences = Vec::new();
        for (rank, state) in states.iter().flatten().enumerate().skip(1) {
            let (state, of_validation): (State, Option<String>) = serde_json::from_str(state)?;
            let mut of_rank = own.differences(&state);
            if of_validation != validation {
                of_rank.push("the images of data.val are others".to_owned());
            }
            if !of_rank.is_empty() {
                differences.push(format!("rank {rank} differs from rank 0: {}", of_rank.join(", ")));
            }
        }
        Ok(differences)
    })?;
    match differences.is_empty() {
        true => Ok(()),
        false => Err(DistError::Differ(differences.join("; ")).into()),
    }
}

/// `data.threads`, or what a rank has of the cores.
fn threads_of_loader(config: &Config, comm: Option<&Comm>) -> usize {
    match (config.data.threads, comm) {
        (0, Some(comm)) => cores_of(comm),
        (threads, _) => threads,
    }
}

/// The table that a run ends with.
fn print_outcome(outcome: &Outcome, seconds: f64, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "{} steps, {seconds:.0} s", outcome.steps)?;
    if let Some(last) = outcome.last.as_ref().filter(|last| !last.is_empty()) {
        let first = outcome.first.as_ref();
        let width = last.keys().map(String::len).max().unwrap_or(0).max(22) + 2;
        writeln!(out, "\n{:<width$}{:>10}{:>10}", "", "before", "after")?;
        for (name, value) in last {
            let before = first.and_then(|f| f.get(name)).map_or("-".to_owned(), |v| format!("{v:.4}"));
            writeln!(out, "{name:<width$}{before:>10}{value:>10.4}")?;
        }
    }
    match &outcome.checkpoint {
        Some(checkpoint) => writeln!(out, "\ncheckpoint {}", checkpoint.display()),
        None => Ok(()),
    }
}
