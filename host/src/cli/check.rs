//! `jepa-host plugin check`: each check in a process of its own, so that a plugin that ends its process fails a check
//! and not the report.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, IsTerminal as _, Write};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use jepa_plugin_api::RunFacts;
use jepa_plugin_api::tch::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::exit::Usage;
use super::output::{Format, print};
use super::session::{Session, seed_weights};
use crate::config::{Base, Config, Layers, ResolvedConfig};
use crate::conformance::{Built, CHECKS, CLASSES, Subject, Verdict};
use crate::device::check_native;
use crate::plugin::{Admission, Kind, LoadedPlugin, PluginError, PluginSources, Registry, open};

/// A check that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(120);
/// The check before all others.
const LOADS: (&str, &str) = ("loads", "manifest, symbols, types and autograd fit this host");

const CHECK_HELP: &str = "\
Checks, in this order: loads, options, gradients, seed, state, bf16, features, sparse, panics, leaks, cost.

Probes are loaded and no more. A plugin's methods are checked, each with a small ResNet-18 on 32 px; or its backbone that backbone.name names, by
default the first one of a plugin without methods. Settings make it smaller, or choose what it needs:
  jepa-host plugin check libmy_method.so method.hidden=64
  jepa-host plugin check libmy_net.so backbone.name=my_net_50 data.size=64
  jepa-host plugin check libmy_method.so --format json > report.json";

/// Try every promise that the host relies on, on synthetic images; exit 3 when one is broken
#[derive(Debug, Args)]
#[command(after_help = CHECK_HELP)]
pub(super) struct CheckArgs {
    /// A path, a file name, or a bare name
    #[arg(value_name = "FILE")]
    plugin: PathBuf,
    /// Settings, such as method.hidden=64
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Run this check only, in this process: for a debugger
    #[arg(long, value_name = "CHECK")]
    only: Option<String>,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// What all checks said.
#[derive(Serialize, Deserialize)]
struct Report {
    file: PathBuf,
    passed: bool,
    checks: Vec<Line>,
}

/// What one check said.
#[derive(Clone, Serialize, Deserialize)]
struct Line {
    /// `plugin`, `method NAME` or `backbone NAME`.
    subject: String,
    check: String,
    promise: String,
    #[serde(flatten)]
    verdict: Verdict,
    seconds: f64,
}

/// A method or a backbone of the plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    Method(String),
    Backbone(String),
}

impl What {
    fn words(&self) -> String {
        match self {
            What::Method(name) => format!("method {name}"),
            What::Backbone(name) => format!("backbone {name}"),
        }
    }

    /// The setting that chooses it.
    fn setting(&self) -> String {
        match self {
            What::Method(name) => format!("method.name={name}"),
            What::Backbone(name) => format!("backbone.name={name}"),
        }
    }
}

impl CheckArgs {
    pub fn run(self, sources: &PluginSources) -> anyhow::Result<()> {
        let names = || [LOADS.0].into_iter().chain(CHECKS.iter().map(|check| check.name));
        if let Some(unknown) = self.only.as_ref().filter(|only| !names().any(|name| name == only.as_str())) {
            let all: Vec<_> = names().collect();
            return Err(Usage(format!("there is no check `{unknown}`; there are {}", all.join(", "))).into());
        }
        let file = sources.find(&self.plugin)?;
        let report = match &self.only {
            Some(only) => self.here(only, &file, sources)?,
            None => self.all(&file, sources)?,
        };
        print(self.format, &report, print_report)?;
        let broken = report.checks.iter().filter(|line| matches!(line.verdict, Verdict::Failed(_))).count();
        if broken == 0 {
            return Ok(());
        }
        Err(PluginError::Unfit {
            path: file,
            reason: format!("{broken} of {} checks failed", report.checks.len()),
        }
        .into())
    }

    /// One check of one subject, in this process.
    fn here(&self, only: &str, file: &Path, sources: &PluginSources) -> anyhow::Result<Report> {
        let begun = Instant::now();
        let plugin = open(file, sources.admission())?;
        let Some(check) = CHECKS.iter().find(|check| check.name == only) else {
            let fits = Verdict::Passed(format!("{} {}", plugin.name(), plugin.file.manifest.version));
            return Ok(report(file, vec![line("plugin".to_owned(), LOADS, fits, begun)]));
        };
        let mut lines = Vec::new();
        for what in self.subjects(&plugin) {
            let begun = Instant::now();
            let subject = self.subject(&what, file, sources)?;
            let scratch = Scratch::new()?;
            let verdict = check.run(&*subject, &scratch.0);
            lines.push(line(what.words(), (check.name, check.promise), verdict, begun));
        }
        Ok(report(file, lines))
    }

    /// Every check, each in a process.
    fn all(&self, file: &Path, sources: &PluginSources) -> anyhow::Result<Report> {
        let mut lines = vec![self.in_process(LOADS, "plugin", &[], file, sources)?];
        if matches!(lines[0].verdict, Verdict::Passed(_)) {
            let plugin = open(file, sources.admission())?;
            let subjects = self.subjects(&plugin);
            let offer = plugin.plugin.offer();
            if subjects.is_empty() && !(offer.methods.is_empty() && offer.backbones.is_empty()) {
                return Err(Usage(format!(
                    "{} offers nothing by the names in the settings; see `jepa-host plugin info {0}`",
                    file.display()
                ))
                .into());
            }
            for what in subjects {
                // Settings that do not fit are the user's, and no check.
                self.subject(&what, file, sources)?;
                for check in CHECKS {
                    let setting = [what.setting()];
                    lines.push(self.in_process(
                        (check.name, check.promise),
                        &what.words(),
                        &setting,
                        file,
                        sources,
                    )?);
                }
            }
        }
        Ok(report(file, lines))
    }

    /// Runs this program for one check, and reads what it says, or how it ended.
    fn in_process(
        &self,
        check: (&str, &str),
        subject: &str,
        settings: &[String],
        file: &Path,
        sources: &PluginSources,
    ) -> anyhow::Result<Line> {
        let begun = Instant::now();
        if io::stderr().is_terminal() {
            eprint!("\r\x1b[K{subject}: {}", check.0);
        }
        let scratch = Scratch::new()?;
        let (answer, words) = (scratch.0.join("answer.json"), scratch.0.join("words.txt"));
        let mut command = Command::new(std::env::current_exe().context("where is this program?")?);
        command.args(plugin_arguments(sources));
        command.args(["--quiet", "plugin", "check", "--format", "json", "--only", check.0]).arg(file);
        command.args(&self.overrides).args(settings);
        command.stdin(Stdio::null()).stdout(File::create(&answer)?).stderr(File::create(&words)?);
        let mut child = command.spawn().context("cannot start a process for a check")?;
        let status = loop {
            match child.try_wait()? {
                Some(status) => break Some(status),
                None if begun.elapsed() > PATIENCE => {
                    child.kill()?;
                    child.wait()?;
                    break None;
                }
                None => sleep(Duration::from_millis(10)),
            }
        };
        if io::stderr().is_terminal() {
            eprint!("\r\x1b[K");
        }
        let answer = serde_json::from_slice::<Report>(&fs::read(&answer)?);
        match (answer, status) {
            (Ok(Report { mut checks, .. }), Some(status)) if status.code().is_some() && checks.len() == 1 => {
                Ok(checks.remove(0))
            }
            (_, status) => {
                let words = String::from_utf8_lossy(&fs::read(&words)?).trim().to_owned();
                let verdict = Verdict::Failed(ending(status, &words));
                Ok(line(subject.to_owned(), check, verdict, begun))
            }
        }
    }

    /// What to check: the methods that `method.name` leaves, or one backbone.
    fn subjects(&self, plugin: &LoadedPlugin) -> Vec<What> {
        let wanted = |key: &str| {
            let mut values =
                self.overrides.iter().filter_map(|setting| setting.strip_prefix(key)?.strip_prefix('='));
            values.next_back().map(|name| name.trim_matches('"').to_owned())
        };
        let (method, backbone) = (wanted("method.name"), wanted("backbone.name"));
        let offer = plugin.plugin.offer();
        let mut backbones = offer.backbones.iter().map(|backbone| backbone.name.clone());
        let own = backbones.clone().find(|name| backbone.as_ref() == Some(name));
        match (own, offer.methods.is_empty()) {
            (Some(own), _) if method.is_none() => vec![What::Backbone(own)],
            (_, true) => {
                backbones.next().filter(|_| backbone.is_none()).map(What::Backbone).into_iter().collect()
            }
            _ => {
                let methods = offer.methods.iter().map(|method| method.name.clone());
                methods
                    .filter(|name| method.as_ref().is_none_or(|wanted| wanted == name))
                    .map(What::Method)
                    .collect()
            }
        }
    }

    fn subject(&self, what: &What, file: &Path, sources: &PluginSources) -> anyhow::Result<Box<dyn Subject>> {
        let mut overrides = self.overrides.clone();
        overrides.push(what.setting());
        let own_backbone = self.overrides.iter().any(|setting| setting.starts_with("backbone."));
        let mut settings = json!({
            "data": { "size": 32 },
            "optimizer": { "batch_size": 8, "algorithm": "adamw" },
            "trainer": { "device": "cpu" },
        });
        if matches!(what, What::Method(_)) && !own_backbone {
            settings["backbone"] =
                json!({ "name": "resnet18", "stem": "small", "width": 16, "depths": [1, 1, 1] });
        }
        if matches!(what, What::Backbone(_)) {
            settings["data"]["size"] = json!(64);
            settings["optimizer"]["batch_size"] = json!(4);
        }
        let settings = settings.as_object().cloned().unwrap_or_default();
        let base = Base { layer: "default of plugin check".to_owned(), settings };
        let layers = Layers { base: Some(base), overrides, ..Layers::default() };
        match what {
            What::Method(_) => {
                let session = Session::open(&[file.to_owned()], layers, sources)?;
                session.device()?;
                Ok(Box::new(MethodSubject(session)))
            }
            What::Backbone(name) => {
                check_native()?;
                let mut registry = Registry::new(sources.admission());
                registry.load(file.to_owned())?;
                let mut settings = layers.with_process_environment().load()?;
                let (owner, options) = registry.find(Kind::Backbone, name)?;
                settings.adopt_plugin_options("backbone", owner.name(), options.as_value())?;
                Ok(Box::new(BackboneSubject { registry, settings, name: name.clone() }))
            }
        }
    }
}

fn report(file: &Path, checks: Vec<Line>) -> Report {
    let passed = checks.iter().all(|line| matches!(line.verdict, Verdict::Passed(_)));
    Report { file: file.to_owned(), passed, checks }
}

fn line(subject: String, (check, promise): (&str, &str), verdict: Verdict, begun: Instant) -> Line {
    let seconds = begun.elapsed().as_secs_f64();
    Line { subject, check: check.to_owned(), promise: promise.to_owned(), verdict, seconds }
}

/// The arguments by which another process has the same plugins.
fn plugin_arguments(sources: &PluginSources) -> Vec<OsString> {
    let Admission { allow_untrusted, lock } = sources.admission();
    let folders = sources.folders().iter().flat_map(|folder| ["--plugin-dir".as_ref(), folder.as_os_str()]);
    let lock = lock.iter().flat_map(|lock| ["--plugin-lock".as_ref(), lock.path().as_os_str()]);
    let trust = allow_untrusted.then_some("--allow-untrusted-plugins".as_ref());
    folders.chain(lock).chain(trust).map(OsStr::to_owned).collect()
}

/// How a process ended that gave no answer.
fn ending(status: Option<ExitStatus>, words: &str) -> String {
    let last = words.lines().last().unwrap_or("it said nothing");
    let last = last.strip_prefix("error: ").unwrap_or(last);
    match status {
        None => format!("no end after {} s: it hangs", PATIENCE.as_secs()),
        Some(status) => match status.signal() {
            Some(signal) => format!("it ended the process by signal {signal}: {last}"),
            None if status.code() == Some(3) => last.to_owned(),
            None => format!("it ended the process with exit code {}: {last}", status.code().unwrap_or(-1)),
        },
    }
}

fn print_report(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    let mut subject = "";
    for line in &report.checks {
        if line.subject != subject {
            subject = &line.subject;
            writeln!(out, "{subject}")?;
        }
        let (sign, detail) = match &line.verdict {
            Verdict::Passed(detail) => ("pass", detail),
            Verdict::Failed(detail) => ("FAIL", detail),
        };
        writeln!(out, "  {sign}  {:<10} {:<52} {:>5.1} s", line.check, line.promise, line.seconds)?;
        writeln!(out, "        {:<10} {detail}", "")?;
    }
    let broken = report.checks.iter().filter(|line| matches!(line.verdict, Verdict::Failed(_))).count();
    match broken {
        0 => writeln!(out, "\nall {} checks passed", report.checks.len()),
        _ => writeln!(out, "\n{broken} of {} checks failed", report.checks.len()),
    }
}

struct MethodSubject(Session);

impl MethodSubject {
    fn facts(&self, seed: u64) -> RunFacts {
        let config = self.0.config();
        RunFacts {
            device: "cpu".to_owned(),
            image_size: config.data.size as i64,
            batch_size: config.optimizer.batch_size as i64,
            epochs: config.trainer.epochs,
            steps_per_epoch: 100,
            classes: CLASSES as i64,
            unlabelled: 0,
            seed,
        }
    }
}

impl Subject for MethodSubject {
    fn config(&self) -> &Config {
        self.0.config()
    }

    fn build(&self, seed: u64) -> anyhow::Result<Built> {
        let options = json!(self.config().method.options);
        Ok(Built::Method(self.0.build_method_with(&options, self.facts(seed))?))
    }

    fn build_with(&self, options: &Value) -> anyhow::Result<Built> {
        Ok(Built::Method(self.0.build_method_with(options, self.facts(0))?))
    }

    fn cross(&self, x: &Tensor) -> anyhow::Result<Tensor> {
        self.0.registry.find(Kind::Method, &self.0.method)?.0.plugin.cross(x)
    }
}

struct BackboneSubject {
    registry: Registry,
    settings: ResolvedConfig,
    name: String,
}

impl Subject for BackboneSubject {
    fn config(&self) -> &Config {
        &self.settings.config
    }

    fn build(&self, seed: u64) -> anyhow::Result<Built> {
        seed_weights(seed);
        self.build_with(&json!(self.config().backbone.options))
    }

    fn build_with(&self, options: &Value) -> anyhow::Result<Built> {
        let (plugin, _) = self.registry.find(Kind::Backbone, &self.name)?;
        Ok(Built::Backbone(plugin.plugin.build_backbone(&self.name, options, "cpu")?))
    }

    fn cross(&self, x: &Tensor) -> anyhow::Result<Tensor> {
        self.registry.find(Kind::Backbone, &self.name)?.0.plugin.cross(x)
    }
}

/// A folder for a check's files, which goes with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> anyhow::Result<Scratch> {
        let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos();
        let path = std::env::temp_dir().join(format!("jepa-host-check-{}-{nanos}", std::process::id()));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::debug!("{} stays: {error}", self.0.display());
        }
    }
}
