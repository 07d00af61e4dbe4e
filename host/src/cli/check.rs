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
use jepa_plugin_api::abi::Plugin;
use jepa_plugin_api::tch::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::exit::Usage;
use super::output::{Format, print};
use super::session::{Session, seed_weights};
use crate::config::{Base, Config, Layers, ResolvedConfig};
use crate::conformance::{Built, CHECKS, CLASSES, Check, PROBE_CHECKS, Subject, Verdict};
use crate::device::check_native;
use crate::plugin::{Admission, Kind, LoadedPlugin, PluginError, PluginSources, Registry, open};

/// A check that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(120);
/// The check before all others.
const LOADS: (&str, &str) = ("loads", "manifest, symbols, types and autograd fit this host");

const CHECK_HELP: &str = "\
Checks, in this order: loads, options, gradients, seed, state, bf16, features, sparse, panics, leaks, cost.
Of a probe: options, metrics, panics, leaks.

A plugin's methods and probes are checked, each method with a small ResNet-18 on 32 px; or its backbone that
backbone.name names, by default the first one of a plugin without methods. Settings make it smaller, or choose what it
needs:
  jepa-host plugin check libmy_method.so method.hidden=64
  jepa-host plugin check libmy_net.so backbone.name=my_net_50 data.size=64
  jepa-host plugin check libmy_probe.so eval.probes.my_probe.cosine=false
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
    /// Check this subject only, in the words of the report
    #[arg(long, hide = true)]
    subject: Option<String>,
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
    /// `plugin`, `method NAME`, `backbone NAME` or `probe NAME`.
    subject: String,
    check: String,
    promise: String,
    #[serde(flatten)]
    verdict: Verdict,
    seconds: f64,
}

/// A method, a backbone or a probe of the plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
struct What {
    kind: Kind,
    name: String,
}

impl What {
    fn words(&self) -> String {
        format!("{} {}", self.kind.word(), self.name)
    }

    /// The setting that chooses it.
    fn setting(&self) -> String {
        match self.kind {
            Kind::Method => format!("method.name={}", self.name),
            Kind::Backbone => format!("backbone.name={}", self.name),
            Kind::Probe => format!("{}.enabled=true", self.section()),
        }
    }

    /// Where its options stand in the settings.
    fn section(&self) -> String {
        match self.kind {
            Kind::Method | Kind::Backbone => self.kind.word().to_owned(),
            Kind::Probe => format!("eval.probes.{}", self.name),
        }
    }

    fn checks(&self) -> &'static [Check] {
        match self.kind {
            Kind::Method | Kind::Backbone => &CHECKS,
            Kind::Probe => &PROBE_CHECKS,
        }
    }
}

impl CheckArgs {
    pub fn run(self, sources: &PluginSources) -> anyhow::Result<()> {
        let of_probes =
            PROBE_CHECKS.iter().filter(|check| CHECKS.iter().all(|other| other.name != check.name));
        let names =
            || [LOADS.0].into_iter().chain(CHECKS.iter().chain(of_probes.clone()).map(|check| check.name));
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
        if only == LOADS.0 {
            let fits = Verdict::Passed(format!("{} {}", plugin.name(), plugin.file.manifest.version));
            return Ok(report(file, vec![line("plugin".to_owned(), LOADS, fits, begun)]));
        }
        let mut lines = Vec::new();
        for what in self.subjects(&plugin) {
            let Some(check) = what.checks().iter().find(|check| check.name == only) else { continue };
            let begun = Instant::now();
            let subject = self.subject(&what, file, sources)?;
            let scratch = Scratch::new()?;
            let verdict = check.run(&*subject, &scratch.0);
            lines.push(line(what.words(), (check.name, check.promise), verdict, begun));
        }
        if lines.is_empty() {
            return Err(
                Usage(format!("{} offers nothing that `{only}` is a check of", file.display())).into()
            );
        }
        Ok(report(file, lines))
    }

    /// Every check, each in a process.
    fn all(&self, file: &Path, sources: &PluginSources) -> anyhow::Result<Report> {
        let mut lines = vec![self.in_process(LOADS, None, file, sources)?];
        if matches!(lines[0].verdict, Verdict::Passed(_)) {
            let plugin = open(file, sources.admission())?;
            let subjects = self.subjects(&plugin);
            if subjects.is_empty() {
                return Err(Usage(format!(
                    "{} offers nothing by the names in the settings; see `jepa-host plugin info {0}`",
                    file.display()
                ))
                .into());
            }
            for what in subjects {
                // Settings that do not fit are the user's, and no check.
                self.subject(&what, file, sources)?;
                for check in what.checks() {
                    let check = (check.name, check.promise);
                    lines.push(self.in_process(check, Some(&what), file, sources)?);
                }
            }
        }
        Ok(report(file, lines))
    }

    /// Runs this program for one check, and reads what it says, or how it ended.
    fn in_process(
        &self,
        check: (&str, &str),
        what: Option<&What>,
        file: &Path,
        sources: &PluginSources,
    ) -> anyhow::Result<Line> {
        let begun = Instant::now();
        let subject = what.map_or("plugin".to_owned(), What::words);
        if io::stderr().is_terminal() {
            eprint!("\r\x1b[K{subject}: {}", check.0);
        }
        let scratch = Scratch::new()?;
        let (answer, words) = (scratch.0.join("answer.json"), scratch.0.join("words.txt"));
        let mut command = Command::new(std::env::current_exe().context("where is this program?")?);
        command.args(plugin_arguments(sources));
        command.args(["--quiet", "plugin", "check", "--format", "json", "--only", check.0]).arg(file);
        command.args(&self.overrides);
        if what.is_some() {
            command.args(["--subject", &subject]);
        }
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
                Ok(line(subject, check, verdict, begun))
            }
        }
    }

    /// What to check: methods and probes, or one backbone, or what the settings name.
    fn subjects(&self, plugin: &LoadedPlugin) -> Vec<What> {
        let all = |kind: Kind| {
            let names = kind.of(plugin.plugin.offer()).into_iter().map(|(name, _)| name.to_owned());
            names.map(move |name| What { kind, name }).collect::<Vec<_>>()
        };
        let (methods, backbones, probes) = (all(Kind::Method), all(Kind::Backbone), all(Kind::Probe));
        // As in a run, the last of several values counts.
        let value_of = |key: &str| {
            let values =
                self.overrides.iter().filter_map(|setting| setting.strip_prefix(key)?.strip_prefix('='));
            values.last().map(|value| value.trim_matches('"').to_owned())
        };
        let (method, backbone) = (value_of("method.name"), value_of("backbone.name"));
        let own_backbone = backbones.iter().find(|what| backbone.as_ref() == Some(&what.name)).cloned();
        let enabled =
            |what: &&What| value_of(&format!("{}.enabled", what.section())).as_deref() == Some("true");
        let named_probes: Vec<What> = probes.iter().filter(enabled).cloned().collect();

        let mut subjects = match (method, own_backbone) {
            (Some(method), _) => methods.into_iter().filter(|what| what.name == method).collect(),
            (None, Some(own)) => [vec![own], named_probes].concat(),
            (None, None) if !named_probes.is_empty() => named_probes,
            (None, None) => {
                let alone = methods.is_empty() && backbone.is_none();
                let first = backbones.into_iter().take(usize::from(alone)).collect();
                [methods, first, probes].concat()
            }
        };
        subjects.retain(|what| self.subject.as_ref().is_none_or(|words| *words == what.words()));
        subjects
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
        if what.kind == Kind::Method && !own_backbone {
            settings["backbone"] =
                json!({ "name": "resnet18", "stem": "small", "width": 16, "depths": [1, 1, 1] });
        }
        if what.kind == Kind::Backbone {
            settings["data"]["size"] = json!(64);
            settings["optimizer"]["batch_size"] = json!(4);
        }
        let settings = settings.as_object().cloned().unwrap_or_default();
        let base = Base { layer: "default of plugin check".to_owned(), settings };
        let layers = Layers { base: Some(base), overrides, ..Layers::default() };
        if what.kind == Kind::Method {
            let session = Session::open(&[file.to_owned()], layers, sources)?;
            session.device()?;
            return Ok(Box::new(MethodSubject(session)));
        }
        check_native()?;
        let mut registry = Registry::new(sources.admission());
        registry.load(file.to_owned())?;
        let mut settings = layers.with_process_environment().load()?;
        let (owner, options) = registry.find(what.kind, &what.name)?;
        settings.adopt_plugin_options(&what.section(), owner.name(), options.as_value())?;
        Ok(Box::new(PartSubject { registry, settings, what: what.clone() }))
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

/// A backbone or a probe, which needs no method around it.
struct PartSubject {
    registry: Registry,
    settings: ResolvedConfig,
    what: What,
}

impl PartSubject {
    fn plugin(&self) -> anyhow::Result<&Plugin> {
        Ok(&self.registry.find(self.what.kind, &self.what.name)?.0.plugin)
    }
}

impl Subject for PartSubject {
    fn config(&self) -> &Config {
        &self.settings.config
    }

    fn build(&self, seed: u64) -> anyhow::Result<Built> {
        seed_weights(seed);
        let config = self.config();
        self.build_with(&match self.what.kind {
            Kind::Probe => json!(config.eval.probes.get(&self.what.name).map(|probe| &probe.options)),
            _ => json!(config.backbone.options),
        })
    }

    fn build_with(&self, options: &Value) -> anyhow::Result<Built> {
        let name = &self.what.name;
        Ok(match self.what.kind {
            Kind::Probe => Built::Probe(self.plugin()?.build_probe(name, options)?),
            _ => Built::Backbone(self.plugin()?.build_backbone(name, options, "cpu")?),
        })
    }

    fn cross(&self, x: &Tensor) -> anyhow::Result<Tensor> {
        self.plugin()?.cross(x)
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
