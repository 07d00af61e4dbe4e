//! Runs trials, each in a process of its own: [`Scheduler::run`], to be read from top to bottom.

use std::fs::{self, File};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use indicatif::ProgressBar;

use super::command::assignment;
use super::definition::{Definition, Goal};
use super::directory::{End, SweepDir, Trial};
use super::error::SweepError;
use super::hyperband::Verdict;
use super::leaderboard::{self, Point, best, is_held};
use super::search::Search;
use crate::train::{Signals, TrainError};

/// How often processes are looked at.
const GLANCE: Duration = Duration::from_millis(50);
/// How often the figures of running trials are read.
const READING: Duration = Duration::from_secs(1);
/// When so many trials fail before one ends well, the others would fail, too.
const FAILURES: usize = 3;

/// What trials may use.
#[derive(Clone, Debug)]
pub struct Resources {
    /// So many trials run at a time.
    pub parallel: usize,
    /// CUDA devices that they are dealt to in turn, as `CUDA_VISIBLE_DEVICES` names them; none leaves that alone.
    pub gpus: Vec<String>,
    /// Compute threads of a trial.
    pub threads: usize,
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
    trials: Vec<Known>,
    running: Vec<Running>,
    failed: usize,
    ended_well: bool,
    told_to_wait: bool,
    bar: ProgressBar,
    read: Instant,
}

/// A trial, and what is known of it.
#[derive(Debug)]
struct Known {
    trial: Trial,
    values: Vec<Point>,
    /// Whether this process has run it.
    begun: bool,
}

#[derive(Debug)]
struct Running {
    /// Which of the trials it is.
    at: usize,
    child: Child,
    /// Its place among those that run at a time.
    slot: usize,
    /// Why it was told to end.
    verdict: Option<Verdict>,
}

impl Scheduler {
    /// A sweep that begins, or goes on, in `directory`, with at most `most` trials that begin now. `bar` counts those
    /// that have ended.
    ///
    /// # Errors
    /// Trials that cannot be read.
    pub fn new(
        definition: Definition,
        search: Search,
        directory: SweepDir,
        resources: Resources,
        most: Option<u64>,
        bar: ProgressBar,
    ) -> Result<Self, SweepError> {
        let mut scheduler = Scheduler {
            left: most.unwrap_or(u64::MAX),
            trials: directory
                .trials()?
                .into_iter()
                .map(|trial| Known { trial, values: Vec::new(), begun: false })
                .collect(),
            definition,
            search,
            directory,
            resources,
            running: Vec::new(),
            failed: 0,
            ended_well: false,
            told_to_wait: false,
            bar,
            read: Instant::now(),
        };
        for at in 0..scheduler.trials.len() {
            scheduler.read_values(at);
        }
        Ok(scheduler)
    }

    /// Gives trials that have failed another chance.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn retry(&mut self) -> Result<(), SweepError> {
        for known in &mut self.trials {
            if matches!(known.trial.end, Some(End::Failed { .. })) {
                known.trial.end = None;
                self.directory.keep(&known.trial)?;
            }
        }
        Ok(())
    }

    /// Runs every trial to its end. A signal ends them with a checkpoint each, and running the sweep again goes on.
    ///
    /// # Errors
    /// When trials cannot be started or kept, when several in a row fail, and on a signal.
    pub fn run(&mut self, signals: &Signals) -> anyhow::Result<()> {
        loop {
            if let Some(signal) = signals.pending() {
                self.interrupt()?;
                return Err(TrainError::Stopped { signal }.into());
            }
            self.reap()?;
            if self.read.elapsed() > READING {
                self.read = Instant::now();
                self.judge();
            }
            self.begin_trials()?;
            if self.running.is_empty() && self.is_failing() {
                return Err(self.failing().into());
            }
            if self.running.is_empty() && !self.is_waiting() {
                return Ok(());
            }
            self.show();
            thread::sleep(GLANCE);
        }
    }

    /// Fills free places.
    fn begin_trials(&mut self) -> anyhow::Result<()> {
        while self.running.len() < self.resources.parallel && !self.is_failing() {
            let Some(at) = self.next_trial()? else { return Ok(()) };
            let slot = (0..).find(|slot| self.running.iter().all(|running| running.slot != *slot));
            self.begin(at, slot.expect("numbers do not end"))?;
        }
        Ok(())
    }

    /// A trial that was interrupted, else a new one.
    fn next_trial(&mut self) -> Result<Option<usize>, SweepError> {
        if self.left == 0 || self.has_reached_target() {
            return Ok(None);
        }
        let ready = |known: &Known| {
            !known.begun && known.trial.end.is_none() && !is_held(&self.directory.folder(&known.trial))
        };
        if let Some(at) = self.trials.iter().position(ready) {
            return Ok(Some(at));
        }
        let number = self.trials.last().map_or(0, |known| known.trial.number);
        if self.definition.run_cap.is_some_and(|cap| number >= cap) {
            return Ok(None);
        }
        let Some(parameters) = self.search.trial(number) else { return Ok(None) };
        let threads = self.resources.threads;
        let trial = Trial::new(number + 1, parameters, &self.definition, self.directory.path(), threads);
        self.directory.keep(&trial)?;
        self.trials.push(Known { trial, values: Vec::new(), begun: false });
        Ok(Some(self.trials.len() - 1))
    }

    /// Whether no trial can be expected to end well.
    fn is_failing(&self) -> bool {
        self.failed >= FAILURES && !self.ended_well
    }

    /// Whether a trial remains that another process still trains: the sweep was killed, and it is about to end.
    fn is_waiting(&mut self) -> bool {
        let held = |known: &&Known| {
            !known.begun && known.trial.end.is_none() && is_held(&self.directory.folder(&known.trial))
        };
        let Some(known) = self.trials.iter().find(held).filter(|_| self.left > 0) else { return false };
        if !std::mem::replace(&mut self.told_to_wait, true) {
            tracing::info!("another process trains {}: waiting for its end", known.trial.name());
        }
        true
    }

    fn begin(&mut self, at: usize, slot: usize) -> anyhow::Result<()> {
        let known = &mut self.trials[at];
        let trial = &known.trial;
        let log = self.directory.log(trial);
        let output = File::options().create(true).append(true).open(&log);
        let output = output.with_context(|| format!("cannot open {}", log.display()))?;
        let (program, arguments) = trial.command.split_first().expect("a command has words");
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        // A Ctrl-C at the terminal is for the sweep, which passes on one signal: a second one would cost the checkpoint.
        command.process_group(0);
        let threads = trial.threads.to_string();
        let unless_set = [
            ("OMP_NUM_THREADS", Some(&threads)),
            ("WANDB_RUN_GROUP", Some(&self.definition.name)),
            ("WANDB_ENTITY", self.definition.entity.as_ref()),
            ("WANDB_PROJECT", self.definition.project.as_ref()),
        ];
        for (name, value) in unless_set {
            if let (Some(value), None) = (value, std::env::var_os(name)) {
                command.env(name, value);
            }
        }
        if !self.resources.gpus.is_empty() {
            command.env("CUDA_VISIBLE_DEVICES", &self.resources.gpus[slot % self.resources.gpus.len()]);
        }
        end_with_us(&mut command);
        let child =
            command.spawn().with_context(|| format!("cannot start {program} (`program` of the sweep)"))?;
        tracing::info!("{} begins: {}", trial.name(), assignments(trial));
        known.begun = true;
        self.left -= 1;
        self.running.push(Running { at, child, slot, verdict: None });
        Ok(())
    }

    /// Takes note of the trials that have ended.
    fn reap(&mut self) -> anyhow::Result<()> {
        for place in (0..self.running.len()).rev() {
            if let Some(status) = self.running[place].child.try_wait()? {
                let running = self.running.swap_remove(place);
                self.read_values(running.at);
                self.note_end(&running, status)?;
            }
        }
        Ok(())
    }

    fn note_end(&mut self, running: &Running, status: ExitStatus) -> Result<(), SweepError> {
        let known = &mut self.trials[running.at];
        let name = known.trial.name();
        let last_words =
            || last_words(&fs::read_to_string(self.directory.log(&known.trial)).unwrap_or_default());
        let end = match (status.code(), running.verdict) {
            (Some(0), _) => End::Done,
            (_, Some(Verdict { band, value, threshold })) => {
                let sign = self.definition.goal().cost(1.0);
                End::Stopped { iteration: band, value: sign * value, threshold: sign * threshold }
            }
            (Some(5), None) => End::Diverged { error: last_words() },
            (_, None) if matches!(status.signal(), Some(libc::SIGINT | libc::SIGTERM | libc::SIGKILL)) => {
                tracing::warn!(
                    "{name} was ended from outside ({status}): run the sweep again to go on with it"
                );
                return Ok(());
            }
            (Some(_), None) => End::Failed { error: last_words() },
            (None, None) => End::Failed { error: format!("{status}, after: {}", last_words()) },
        };
        let result = best(&known.values, self.definition.goal());
        let result =
            result.map_or(String::new(), |best| format!(", {:.4} at step {}", best.value, best.step));
        match &end {
            End::Done => tracing::info!("{name} is done{result}"),
            End::Stopped { .. } => tracing::info!("{name} was stopped early{result}"),
            End::Diverged { error } => tracing::warn!("{name} has diverged{result}: {error}"),
            End::Failed { error } => tracing::error!("{name} has failed{result}: {error}"),
        }
        match end {
            End::Failed { .. } => self.failed += 1,
            _ => self.ended_well = true,
        }
        known.trial.end = Some(end);
        self.directory.keep(&known.trial)
    }

    /// Tells those to end that are not worth going on with.
    fn judge(&mut self) {
        for at in self.running.iter().map(|running| running.at).collect::<Vec<_>>() {
            self.read_values(at);
        }
        let Some(hyperband) = &self.definition.early_terminate else { return };
        let goal = self.definition.goal();
        let costs = |known: &Known| known.values.iter().map(|value| goal.cost(value.value)).collect();
        let verdicts = hyperband.judge(&self.trials.iter().map(costs).collect::<Vec<_>>());
        for running in &mut self.running {
            if let (Some(verdict), None) = (verdicts[running.at], running.verdict) {
                running.verdict = Some(verdict);
                terminate(&running.child);
            }
        }
    }

    /// Ends all that runs, and waits for the checkpoints.
    fn interrupt(&mut self) -> anyhow::Result<()> {
        self.running.iter().for_each(|running| terminate(&running.child));
        while !self.running.is_empty() {
            self.reap()?;
            thread::sleep(GLANCE);
        }
        Ok(())
    }

    fn read_values(&mut self, at: usize) {
        if let Some(metric) = &self.definition.metric {
            let known = &mut self.trials[at];
            known.values = leaderboard::values(&self.directory.folder(&known.trial), &metric.name);
        }
    }

    fn has_reached_target(&self) -> bool {
        let Some(target) = self.definition.metric.as_ref().and_then(|metric| metric.target) else {
            return false;
        };
        let goal = self.definition.goal();
        let all = self.trials.iter().filter_map(|known| best(&known.values, goal));
        all.into_iter().any(|best| goal.cost(best.value) <= goal.cost(target))
    }

    fn failing(&self) -> SweepError {
        let failed = |known: &&Known| known.begun && matches!(known.trial.end, Some(End::Failed { .. }));
        let last = self.trials.iter().rev().find(failed).expect("several have failed");
        let Some(End::Failed { error }) = &last.trial.end else { unreachable!("it has failed") };
        SweepError::Failing { count: self.failed, last: error.clone(), log: self.directory.log(&last.trial) }
    }

    fn show(&self) {
        self.bar.set_position(self.trials.iter().filter(|known| known.trial.end.is_some()).count() as u64);
        let running = self.running.iter().map(|running| {
            let known = &self.trials[running.at];
            let value = known.values.last().map_or(String::new(), |last| format!(" {:.4}", last.value));
            format!("{}{value}", known.trial.name())
        });
        let running: Vec<String> = running.collect();
        let all = self.trials.iter().flat_map(|known| &known.values).copied().collect::<Vec<_>>();
        let best = best(&all, self.definition.goal())
            .map_or(String::new(), |best| format!("  best {:.4}", best.value));
        self.bar.set_message(format!("{}{best}", running.join(", ")));
    }
}

impl Definition {
    /// Which direction is good.
    fn goal(&self) -> Goal {
        self.metric.as_ref().map_or(Goal::Minimize, |metric| metric.goal)
    }
}

fn assignments(trial: &Trial) -> String {
    let all = trial.parameters.iter().map(|(name, value)| assignment(name, value));
    all.collect::<Vec<_>>().join(" ")
}

/// The last error in what a trial has printed, else its last line.
fn last_words(output: &str) -> String {
    let mut lines = output.lines().rev().map(str::trim).filter(|line| !line.is_empty());
    let last = lines.next().unwrap_or("nothing at all");
    let error = std::iter::once(last).chain(lines).find_map(|line| line.strip_prefix("error: "));
    error.unwrap_or(last).to_owned()
}

fn terminate(child: &Child) {
    // SAFETY: kill takes numbers only. The child has not been waited for, so that its number is still its own.
    unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) };
}

/// When this process dies, however that may be, the child gets SIGTERM and leaves a checkpoint.
fn end_with_us(command: &mut Command) {
    // SAFETY: between fork and exec only prctl is called, which is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}
