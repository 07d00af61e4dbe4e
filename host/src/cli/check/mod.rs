//! `jepa-host plugin check`: each check in a process of its own, so that a plugin that ends its process fails a check
//! and not the report.

mod subjects;

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
use serde::{Deserialize, Serialize};

use self::subjects::What;
use super::exit::Usage;
use super::output::{Format, print};
use crate::conformance::{CHECKS, Check, PROBE_CHECKS, Verdict};
use crate::plugin::{Admission, LoadedPlugin, PluginError, PluginSources, open};

/// A check that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(120);
/// The check before all others.
const LOADS: (&str, &str) = ("loads", "manifest, symbols, types and autograd fit this host");

const HELP: &str = "\
Methods are checked with a small ResNet-18 on 32 px. Of backbones that take the same options the first is checked, and
others where backbone.name names one: the report lists what is left out. Settings make a subject smaller, or choose what
it needs:
  jepa-host plugin check libmy_method.so method.hidden=64
  jepa-host plugin check libmy_net.so backbone.name=my_net_50 data.size=64
  jepa-host plugin check libmy_probe.so eval.probes.my_probe.cosine=false
  jepa-host plugin check libmy_method.so --format json > report.json";

/// Try every promise that the host relies on, on synthetic images; exit 3 when one is broken
#[derive(Debug, Args)]
#[command(after_help = help())]
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
    /// What the plugin offers besides.
    unchecked: Vec<String>,
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
            return Ok(report(file, vec![line("plugin".to_owned(), LOADS, fits, begun)], &[]));
        }
        let mut lines = Vec::new();
        let (chosen, unchecked) = self.choose(&plugin);
        for what in chosen {
            let Some(check) = what.checks().iter().find(|check| check.name == only) else { continue };
            let begun = Instant::now();
            let subject = what.build(&self.overrides, file, sources)?;
            let scratch = Scratch::new()?;
            let verdict = check.run(&*subject, &scratch.0);
            lines.push(line(what.words(), (check.name, check.promise), verdict, begun));
        }
        if lines.is_empty() {
            return Err(
                Usage(format!("{} offers nothing that `{only}` is a check of", file.display())).into()
            );
        }
        Ok(report(file, lines, &unchecked))
    }

    /// Every check, each in a process.
    fn all(&self, file: &Path, sources: &PluginSources) -> anyhow::Result<Report> {
        let mut lines = vec![self.in_process(LOADS, None, file, sources)?];
        let mut unchecked = Vec::new();
        if matches!(lines[0].verdict, Verdict::Passed(_)) {
            let plugin = open(file, sources.admission())?;
            let (chosen, left_out) = self.choose(&plugin);
            if chosen.is_empty() {
                return Err(Usage(format!(
                    "{} offers nothing by the names in the settings; see `jepa-host plugin info {0}`",
                    file.display()
                ))
                .into());
            }
            unchecked = left_out;
            for what in chosen {
                // Settings that do not fit are the user's, and no check.
                what.build(&self.overrides, file, sources)?;
                for check in what.checks() {
                    let check = (check.name, check.promise);
                    lines.push(self.in_process(check, Some(&what), file, sources)?);
                }
            }
        }
        Ok(report(file, lines, &unchecked))
    }

    /// What to check of the plugin, and what not.
    fn choose(&self, plugin: &LoadedPlugin) -> (Vec<What>, Vec<What>) {
        let (mut chosen, left_out) = subjects::choose(plugin, &self.overrides);
        chosen.retain(|what| self.subject.as_ref().is_none_or(|words| *words == what.words()));
        (chosen, left_out)
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
}

fn help() -> String {
    let names = |checks: &[Check]| checks.iter().map(|check| check.name).collect::<Vec<_>>().join(", ");
    let (first, all, of_probes) = (LOADS.0, names(&CHECKS), names(&PROBE_CHECKS));
    format!("Checks, in this order: {first}, {all}.\nOf a probe: {of_probes}.\n\n{HELP}")
}

fn report(file: &Path, checks: Vec<Line>, unchecked: &[What]) -> Report {
    let passed = checks.iter().all(|line| matches!(line.verdict, Verdict::Passed(_)));
    Report { file: file.to_owned(), passed, checks, unchecked: unchecked.iter().map(What::words).collect() }
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
    if !report.unchecked.is_empty() {
        writeln!(out, "\nnot checked: {}", report.unchecked.join(", "))?;
    }
    let broken = report.checks.iter().filter(|line| matches!(line.verdict, Verdict::Failed(_))).count();
    match broken {
        0 => writeln!(out, "\nall {} checks passed", report.checks.len()),
        _ => writeln!(out, "\n{broken} of {} checks failed", report.checks.len()),
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
