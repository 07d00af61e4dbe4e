//! Runs trials, each in a process of its own: [`Scheduler::run`], to be read from top to bottom.

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use indicatif::ProgressBar;

use super::command::assignment;
use super::definition::{Definition, Goal};
use super::directory::{End, SweepDir, Trial};
use super::error::SweepError;
use super::hyperband::Verdict;
use super::process;
use super::rehearsal::rehearse;
use super::search::Search;
use super::series::{Point, Series, best, is_held, names_in};
use crate::nearest::nearest;
use crate::report::Setting;
use crate::report::format::number;
use crate::train::{Signals, TrainError};

/// How often processes are looked at.
const GLANCE: Duration = Duration::from_millis(50);
/// How often the figures of running trials are read.
const READING: Duration = Duration::from_secs(1);
/// How long a trial that is told to end may take for it.
const PATIENCE: Duration = Duration::from_secs(300);
/// When so many trials fail in a row, and none has ended well before, the others would fail, too.
const FIRST_FAILURES: usize = 3;
/// The same, when some have ended well.
const LATER_FAILURES: usize = 10;

/// What trials may use.
#[derive(Clone, Debug)]
pub struct Resources {
    /// So many trials run at a time.
    pub parallel: usize,
    /// CUDA devices that they are dealt to in turn, as `CUDA_VISIBLE_DEVICES` names them; none leaves that alone.
    pub gpus: Vec<String>,
    /// Compute threads of a trial, unless its settings say otherwise.
    pub threads: usize,
    /// Threads that load a trial's images, unless its settings say otherwise; none leaves that to the trial.
    pub loaders: Option<usize>,
}

/// A sweep that goes on until every trial has ended.
#[derive(Debug)]
pub struct Scheduler {
    definition: Definition,
    search: Search,
    directory: SweepDir,
    resources: Resources,
    /// So many trials may still begin.
    left: u64,
    /// By number.
    trials: BTreeMap<u64, Known>,
    running: Vec<Running>,
    /// Why no further trial begins.
    trouble: Option<anyhow::Error>,
    failed_in_a_row: usize,
    ended_well: bool,
    ended_from_outside: usize,
    told_to_wait: bool,
    /// What trials get in their environment, once the program has shown that it takes the parameters.
    variables: Option<Vec<(&'static str, String)>>,
    bar: ProgressBar,
}

/// A trial, and what is known of it.
#[derive(Debug)]
struct Known {
    trial: Trial,
    series: Series,
    /// Whether this process has begun it.
    begun: bool,
    /// Whether the disk has not taken how it ended.
    unkept: bool,
}

#[derive(Debug)]
struct Running {
    /// Of the trial.
    number: u64,
    child: Child,
    /// Its place among those that run at a time.
    slot: usize,
    /// Where in the trial's log its words begin.
    words_from: u64,
    /// Whether it was told to end because the sweep is.
    interrupted: bool,
    /// Why it was told to end early, and when.
    verdict: Option<(Verdict, Instant)>,
}

impl Scheduler {
    /// A sweep that begins, or goes on, in `directory`, with at most `most` trials that begin now. `bar` counts those
    /// that have ended.
    ///
    /// # Errors
    /// Trials that cannot be read, or that are of another seed.
    pub fn new(
        definition: Definition,
        search: Search,
        directory: SweepDir,
        resources: Resources,
        most: Option<u64>,
        bar: ProgressBar,
    ) -> Result<Self, SweepError> {
        let mut trials = BTreeMap::new();
        for trial in directory.trials()? {
            if search.trial(trial.number - 1).as_ref() != Some(&trial.parameters) {
                let path = directory.path().to_owned();
                return Err(SweepError::Another { path, differences: "--seed".to_owned() });
            }
            let known = Known { trial, series: Series::default(), begun: false, unkept: false };
            trials.insert(known.trial.number, known);
        }
        let mut scheduler = Scheduler {
            definition,
            search,
            directory,
            resources,
            left: most.unwrap_or(u64::MAX),
            trials,
            running: Vec::new(),
            trouble: None,
            failed_in_a_row: 0,
            ended_well: false,
            ended_from_outside: 0,
            told_to_wait: false,
            variables: None,
            bar,
        };
        for number in scheduler.trials.keys().copied().collect::<Vec<_>>() {
            scheduler.read_figures(number);
        }
        Ok(scheduler)
    }

    /// Gives trials that have failed another chance.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn retry(&mut self) -> Result<(), SweepError> {
        for known in self.trials.values_mut() {
            if matches!(known.trial.end, Some(End::Failed { .. })) {
                known.trial.end = None;
                self.directory.keep(&known.trial)?;
            }
        }
        Ok(())
    }

    /// Runs every trial to its end. A signal ends them with a checkpoint each, and running the sweep again goes on.
    /// Whatever else goes wrong, trials that run come to their end first.
    ///
    /// # Errors
    /// When trials cannot be started or kept, when they fail one after the other, when one has no value of the metric,
    /// when some were ended from outside, and on a signal.
    pub fn run(&mut self, signals: &Signals) -> anyhow::Result<()> {
        let mut read = Instant::now();
        loop {
            if let Some(signal) = signals.pending() {
                self.end_all();
                return Err(TrainError::Stopped { signal }.into());
            }
            self.reap();
            if read.elapsed() > READING {
                read = Instant::now();
                self.judge();
                self.keep_ends();
                self.show();
            }
            if self.trouble.is_none()
                && let Err(error) = self.begin_trials()
            {
                self.trouble = Some(error);
            }
            if self.running.is_empty() && (self.trouble.is_some() || !self.is_waiting()) {
                break;
            }
            thread::sleep(GLANCE);
        }
        for known in self.trials.values().filter(|known| known.unkept) {
            self.directory.keep(&known.trial)?;
        }
        if self.trouble.is_none() {
            self.tell_end();
        }
        match (self.trouble.take(), self.ended_from_outside) {
            // A Ctrl-C at the terminal ends the rehearsal, too.
            (Some(_), _) if let Some(signal) = signals.pending() => {
                Err(TrainError::Stopped { signal }.into())
            }
            (Some(trouble), _) => Err(trouble),
            (None, 0) => Ok(()),
            (None, count) => Err(SweepError::Unfinished { count }.into()),
        }
    }

    /// Fills free places. Trials that another process still trains take one, too.
    fn begin_trials(&mut self) -> anyhow::Result<()> {
        let held = self.trials.values().filter(|known| self.is_held(known)).count();
        while self.running.len() + held < self.resources.parallel {
            let Some(number) = self.next_trial()? else { return Ok(()) };
            let slot = (0..).find(|slot| self.running.iter().all(|running| running.slot != *slot));
            self.begin(number, slot.expect("numbers do not end"))?;
        }
        Ok(())
    }

    /// The number of a trial that was interrupted, else of a new one.
    fn next_trial(&mut self) -> Result<Option<u64>, SweepError> {
        if self.left == 0 || self.has_reached_target() {
            return Ok(None);
        }
        let ready = |known: &&Known| !known.begun && known.trial.end.is_none() && !self.is_held(known);
        if let Some(known) = self.trials.values().find(ready) {
            return Ok(Some(known.trial.number));
        }
        let number = (1..).find(|number| !self.trials.contains_key(number)).expect("numbers do not end");
        if self.definition.run_cap.is_some_and(|cap| number > cap.get()) {
            return Ok(None);
        }
        let Some(parameters) = self.search.trial(number - 1) else { return Ok(None) };
        let threads = self.resources.threads;
        let trial = Trial::new(number, parameters, &self.definition, self.directory.path(), threads);
        self.trials.insert(number, Known { trial, series: Series::default(), begun: false, unkept: false });
        Ok(Some(number))
    }

    /// Whether another process trains it: the sweep was killed, and this trial of it is about to end.
    fn is_held(&self, known: &Known) -> bool {
        !known.begun && known.trial.end.is_none() && is_held(&self.directory.folder(&known.trial))
    }

    fn is_waiting(&mut self) -> bool {
        let Some(known) = self.trials.values().find(|known| self.left > 0 && self.is_held(known)) else {
            return false;
        };
        if !self.told_to_wait {
            tracing::info!("another process trains {}: waiting for its end", known.trial.name());
        }
        self.told_to_wait = true;
        true
    }

    fn begin(&mut self, number: u64, slot: usize) -> anyhow::Result<()> {
        let known = self.trials.get_mut(&number).context("a trial without a number")?;
        // The command is made anew: the directory may have another name by now.
        let Trial { parameters, threads, .. } = known.trial.clone();
        known.trial = Trial::new(number, parameters, &self.definition, self.directory.path(), threads);
        let mut variables = match &self.variables {
            Some(variables) => variables.clone(),
            None => {
                self.variables.insert(variables(&known.trial, &self.definition, &self.resources)?).clone()
            }
        };
        variables.push(("OMP_NUM_THREADS", known.trial.threads.to_string()));
        self.directory.keep(&known.trial)?;
        let log = self.directory.log(&known.trial);
        let output = File::options().create(true).append(true).open(&log);
        let output = output.with_context(|| format!("cannot open {}", log.display()))?;
        let words_from = output.metadata().map_or(0, |file| file.len());
        if let Some(gpu) = self.resources.gpus.iter().cycle().nth(slot) {
            variables.push(("CUDA_VISIBLE_DEVICES", gpu.clone()));
        }
        let child = process::start(&known.trial.command, &variables, output)
            .with_context(|| format!("cannot start {} (`program` of the sweep)", known.trial.command[0]))?;
        let assignments = known.trial.parameters.iter().map(|(name, value)| assignment(name, value));
        tracing::info!("{} begins: {}", known.trial.name(), assignments.collect::<Vec<_>>().join(" "));
        known.begun = true;
        self.left -= 1;
        self.running.push(Running { number, child, slot, words_from, interrupted: false, verdict: None });
        Ok(())
    }

    /// Takes note of the trials that have ended.
    fn reap(&mut self) {
        for place in (0..self.running.len()).rev() {
            match self.running[place].child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => {
                    let running = self.running.swap_remove(place);
                    self.read_figures(running.number);
                    self.note_end(&running, status);
                }
                Err(error) => {
                    let running = self.running.swap_remove(place);
                    self.trouble =
                        Some(anyhow::Error::new(error).context(format!("process {}", running.child.id())));
                }
            }
        }
    }

    fn note_end(&mut self, running: &Running, status: ExitStatus) {
        let goal = self.definition.goal();
        let Some(known) = self.trials.get_mut(&running.number) else { return };
        let (name, log) = (known.trial.name(), self.directory.log(&known.trial));
        let words = || {
            let output = fs::read(&log).unwrap_or_default();
            process::last_words(output.get(running.words_from as usize..).unwrap_or_default())
        };
        let from_outside = matches!(status.signal(), Some(libc::SIGINT | libc::SIGTERM | libc::SIGKILL));
        let end = match (status.code(), running.verdict) {
            (Some(0), _) => End::Done,
            (_, Some((Verdict { band, value, threshold }, _))) => {
                let sign = goal.cost(1.0);
                End::Stopped { iteration: band, value: sign * value, threshold: sign * threshold }
            }
            (Some(5), None) => End::Diverged { error: words() },
            _ if running.interrupted && (from_outside || status.code() == Some(143)) => {
                tracing::info!("{name} is interrupted");
                return;
            }
            _ if from_outside || matches!(status.code(), Some(130 | 138 | 143)) => {
                tracing::warn!(
                    "{name} was ended from outside ({status}): run the sweep again to go on with it"
                );
                self.ended_from_outside += 1;
                // A machine without enough memory ends them one after the other.
                self.failed_in_a_row += usize::from(status.signal() == Some(libc::SIGKILL));
                self.give_up_if_failing(format!("nothing more ({status})"), running.number);
                return;
            }
            (Some(_), None) => End::Failed { error: words() },
            (None, None) => End::Failed { error: format!("{status}, after: {}", words()) },
        };
        let result = best(known.series.points(), goal);
        let result =
            result.map_or(String::new(), |best| format!(", {:.4} at step {}", best.value, best.step));
        match &end {
            End::Done => tracing::info!("{name} is done{result}"),
            End::Stopped { .. } => tracing::info!("{name} was stopped early{result}"),
            End::Diverged { error } => tracing::warn!("{name} has diverged{result}: {error}"),
            End::Failed { error } => tracing::error!("{name} has failed{result}: {error}"),
        }
        known.trial.end = Some(end.clone());
        known.unkept = true;
        self.keep_ends();
        match end {
            End::Failed { error } => {
                self.failed_in_a_row += 1;
                self.give_up_if_failing(error, running.number);
            }
            _ => {
                self.failed_in_a_row = 0;
                self.ended_well = true;
            }
        }
        self.require_metric(running.number);
    }

    fn give_up_if_failing(&mut self, last: String, number: u64) {
        let most = if self.ended_well { LATER_FAILURES } else { FIRST_FAILURES };
        if self.failed_in_a_row >= most && self.trouble.is_none() {
            let log = self.directory.log(&self.trials[&number].trial);
            self.trouble = Some(SweepError::Failing { count: self.failed_in_a_row, last, log }.into());
        }
    }

    /// A trial that is done without a value of the metric says that none will have one.
    fn require_metric(&mut self, number: u64) {
        let known = &self.trials[&number];
        let Some(metric) = &self.definition.metric else { return };
        if known.trial.end != Some(End::Done) || !known.series.points().is_empty() || self.trouble.is_some() {
            return;
        }
        let names = names_in(&self.directory.folder(&known.trial));
        let close = nearest(&metric.name, names.iter().map(String::as_str)).map(str::to_owned);
        let (trial, metric) = (known.trial.name(), metric.name.clone());
        self.trouble = Some(SweepError::NoMetric { trial, metric, close, names }.into());
    }

    /// Keeps how trials have ended. What the disk does not take, a full one for one, is tried again.
    fn keep_ends(&mut self) {
        for known in self.trials.values_mut().filter(|known| known.unkept) {
            match self.directory.keep(&known.trial) {
                Ok(()) => known.unkept = false,
                Err(error) => tracing::warn!("{error}; it is tried again"),
            }
        }
    }

    /// Reads the figures of those that run, and tells those to end that are not worth going on with.
    fn judge(&mut self) {
        for number in self.running.iter().map(|running| running.number).collect::<Vec<_>>() {
            self.read_figures(number);
        }
        let late = |running: &&Running| running.verdict.is_some_and(|(_, told)| told.elapsed() > PATIENCE);
        for running in self.running.iter().filter(late) {
            process::signal(&running.child, libc::SIGKILL);
        }
        let Some(hyperband) = &self.definition.early_terminate else { return };
        let goal = self.definition.goal();
        let costs =
            |known: &Known| known.series.points().iter().map(|point| goal.cost(point.value)).collect();
        let verdicts = hyperband.judge(&self.trials.values().map(costs).collect::<Vec<_>>());
        let verdicts: BTreeMap<u64, _> = self.trials.keys().copied().zip(verdicts).collect();
        for running in self.running.iter_mut().filter(|running| running.verdict.is_none()) {
            if let Some(verdict) = verdicts[&running.number] {
                running.verdict = Some((verdict, Instant::now()));
                process::signal(&running.child, libc::SIGTERM);
            }
        }
    }

    /// Ends all that runs, and waits for the checkpoints.
    fn end_all(&mut self) {
        // A second signal would cost the checkpoint.
        for running in self.running.iter_mut().filter(|running| running.verdict.is_none()) {
            running.interrupted = true;
            process::signal(&running.child, libc::SIGTERM);
        }
        while !self.running.is_empty() {
            self.reap();
            thread::sleep(GLANCE);
        }
    }

    fn read_figures(&mut self, number: u64) {
        if let (Some(metric), Some(known)) = (&self.definition.metric, self.trials.get_mut(&number)) {
            known.series.read_on(&self.directory.folder(&known.trial), &metric.name);
        }
    }

    fn best(&self) -> Option<Point> {
        let goal = self.definition.goal();
        let all: Vec<Point> =
            self.trials.values().filter_map(|known| best(known.series.points(), goal)).collect();
        best(&all, goal)
    }

    fn has_reached_target(&self) -> bool {
        let goal = self.definition.goal();
        let target = self.definition.metric.as_ref().and_then(|metric| metric.target);
        target.zip(self.best()).is_some_and(|(target, best)| goal.cost(best.value) <= goal.cost(target))
    }

    /// Says why no further trial begins, where that is not plain to see.
    fn tell_end(&self) {
        let count = self.trials.len();
        if self.has_reached_target()
            && let (Some(metric), Some(best)) = (&self.definition.metric, self.best())
        {
            let (value, target) = (number(best.value), metric.target.map(number).unwrap_or_default());
            tracing::info!(
                "the target is reached, {target} of {}, with {value}: no further trial begins",
                metric.name
            );
        } else if self.left == 0 && !self.trials.values().any(|known| known.begun) {
            tracing::info!("--count 0: no trial begins");
        } else if !self.trials.values().any(|known| known.begun) {
            tracing::info!("all {count} trials have ended before: there is nothing left to do");
        }
    }

    fn show(&self) {
        self.bar.set_position(self.trials.values().filter(|known| known.trial.end.is_some()).count() as u64);
        let running = self.running.iter().map(|running| {
            let known = &self.trials[&running.number];
            let value =
                known.series.points().last().map_or(String::new(), |last| format!(" {:.4}", last.value));
            format!("{}{value}", known.trial.name())
        });
        let running: Vec<String> = running.collect();
        let best = self.best().map_or(String::new(), |best| format!("  best {:.4}", best.value));
        self.bar.set_message(format!("{}{best}", running.join(", ")));
    }
}

/// What every trial gets in its environment, unless somebody has said otherwise. `first` says what is set.
fn variables(
    first: &Trial,
    definition: &Definition,
    resources: &Resources,
) -> Result<Vec<(&'static str, String)>, SweepError> {
    let settings = rehearse(first)?.unwrap_or_default();
    let Definition { name, entity, project, .. } = definition;
    let for_wandb = [
        ("WANDB_RUN_GROUP", Some(name)),
        ("WANDB_ENTITY", entity.as_ref()),
        ("WANDB_PROJECT", project.as_ref()),
    ];
    let unset = for_wandb.into_iter().filter(|(name, _)| env::var_os(name).is_none());
    let mut variables: Vec<_> = unset.filter_map(|(name, value)| Some((name, value?.clone()))).collect();
    let is_free = |setting: &Setting| setting.key == "data.threads" && !setting.is_chosen();
    if let Some(loaders) = resources.loaders.filter(|_| settings.iter().any(is_free)) {
        variables.push(("JEPA_DATA__THREADS", loaders.to_string()));
    }
    Ok(variables)
}

impl Definition {
    /// Which direction is good.
    pub(super) fn goal(&self) -> Goal {
        self.metric.as_ref().map_or(Goal::Minimize, |metric| metric.goal)
    }
}
