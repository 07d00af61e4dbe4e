//! What a sweep is: W&B's YAML, as far as it can be run here.

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroU64;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::distribution::Distribution;
use super::error::SweepError;
use super::hyperband::Hyperband;
use super::search::Search;
use crate::nearest::nearest;
use crate::report::format::{Kind, kind_of};
use crate::track::lower_is_better;

/// A sweep: what to run, which settings to try, and what is good.
#[derive(Clone, Debug, PartialEq)]
pub struct Definition {
    /// What it is called; by default as its file.
    pub name: String,
    /// The program that trains.
    pub program: String,
    /// What is run for a trial; `${...}` stand for the program, the parameters and variables of the environment.
    pub command: Vec<String>,
    /// How trials are chosen.
    pub method: Method,
    /// The parameters by the setting's name; nested ones are joined by dots.
    pub parameters: BTreeMap<String, Distribution>,
    /// What is compared.
    pub metric: Option<Metric>,
    /// Which runs are ended before they are done.
    pub early_terminate: Option<Hyperband>,
    /// So many trials at most.
    pub run_cap: Option<NonZeroU64>,
    /// Where its runs go in W&B.
    pub entity: Option<String>,
    /// Where its runs go in W&B.
    pub project: Option<String>,
}

/// How trials are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Every combination.
    Grid,
    /// Each parameter drawn on its own.
    Random,
}

/// What trials are compared by.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metric {
    /// As in `metrics.jsonl`.
    pub name: String,
    /// Which direction is good.
    #[serde(default)]
    pub goal: Goal,
    /// Once a run has this value, no further one begins.
    pub target: Option<f64>,
    #[serde(rename = "impute")]
    _impute: Option<Value>,
    #[serde(rename = "impute_while_running")]
    _impute_while_running: Option<Value>,
}

/// Which direction is good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// Less is better.
    #[default]
    Minimize,
    /// More is better.
    Maximize,
}

impl Metric {
    /// Where the goal is against what the name says.
    fn doubt(&self) -> Option<String> {
        let goal = match self.goal {
            Goal::Minimize if kind_of(&self.name) == Kind::Percent && !self.name.ends_with("data_wait") => {
                "maximize"
            }
            Goal::Maximize if lower_is_better(&self.name) => "minimize",
            _ => return None,
        };
        let against = if goal == "maximize" { "minimize (which is the default)" } else { "maximize" };
        Some(format!("metric: the goal for {} is {against}: did you mean goal: {goal}?", self.name))
    }
}

impl Goal {
    /// `value` in the sense that less is better.
    pub fn cost(self, value: f64) -> f64 {
        match self {
            Goal::Minimize => value,
            Goal::Maximize => -value,
        }
    }
}

/// The file. Keys that only concern W&B's site are known, too.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entries {
    program: Option<String>,
    command: Option<Vec<Value>>,
    method: String,
    parameters: Map<String, Value>,
    metric: Option<Metric>,
    early_terminate: Option<Hyperband>,
    run_cap: Option<NonZeroU64>,
    name: Option<String>,
    entity: Option<String>,
    project: Option<String>,
    #[serde(rename = "description")]
    _description: Option<String>,
    #[serde(rename = "apiVersion")]
    _api_version: Option<String>,
    #[serde(rename = "kind")]
    _kind: Option<String>,
    #[serde(rename = "controller")]
    _controller: Option<Value>,
}

impl Definition {
    /// Reads `path`.
    ///
    /// # Errors
    /// [`SweepError::Read`]; [`SweepError::Definition`] for what W&B would refuse, and for what only W&B can do.
    pub fn read(path: &Path) -> Result<Self, SweepError> {
        let text =
            fs::read_to_string(path).map_err(|source| SweepError::Read { path: path.to_owned(), source })?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        Definition::parse(&text, &name).map_err(|why| SweepError::Definition { path: path.to_owned(), why })
    }

    /// The definition in `text`, called `name` unless it says otherwise.
    ///
    /// # Errors
    /// What is wrong, and what to do.
    pub fn parse(text: &str, name: &str) -> Result<Self, String> {
        let entries: Entries =
            serde_saphyr::from_str(text).map_err(|error| quoted(&advised(&error.to_string()), text))?;
        let method = match entries.method.as_str() {
            "grid" => Method::Grid,
            "random" => Method::Random,
            "bayes" => {
                return Err(
                    "method: bayes is not offered here: use random, or let `wandb agent` run it".to_owned()
                );
            }
            other => return Err(format!("method: {other} is unknown: use grid or random")),
        };
        let mut parameters = BTreeMap::new();
        flatten(&entries.parameters, "", &mut parameters)?;
        if parameters.is_empty() {
            return Err("parameters is empty: there is nothing to try".to_owned());
        }
        if entries.early_terminate.is_some() && entries.metric.is_none() {
            return Err("early_terminate needs metric, by which it compares".to_owned());
        }
        let Some(command) = entries.command else {
            return Err("command is missing: W&B's default starts Python. Write [${program}, --plugin, …, \
                        ${args_no_hyphens}] as examples/sweep.yaml does"
                .to_owned());
        };
        let definition = Definition {
            name: entries.name.unwrap_or_else(|| name.to_owned()),
            program: entries.program.unwrap_or_else(|| "jepa-host".to_owned()),
            command: command
                .iter()
                .map(|word| word.as_str().map_or_else(|| word.to_string(), str::to_owned))
                .collect(),
            method,
            parameters,
            metric: entries.metric,
            early_terminate: entries.early_terminate,
            run_cap: entries.run_cap,
            entity: entries.entity,
            project: entries.project,
        };
        if Search::new(&definition, 0)?.is_empty() {
            return Err("parameters leave nothing to try: a range is empty".to_owned());
        }
        super::command::check(&definition.command)?;
        Ok(definition)
    }

    /// The parameters that trials can differ in.
    pub fn varied(&self) -> impl Iterator<Item = &str> {
        let varied = self.parameters.iter().filter(|(_, distribution)| !distribution.is_constant());
        varied.map(|(name, _)| name.as_str())
    }

    /// What can be run, and is probably not what was meant.
    pub fn doubts(&self) -> Vec<String> {
        let of_parameter = |(name, distribution): (&String, &Distribution)| {
            Some(format!("parameters.{name}: {}", distribution.doubt()?))
        };
        self.parameters
            .iter()
            .filter_map(of_parameter)
            .chain(self.metric.as_ref().and_then(Metric::doubt))
            .collect()
    }

    /// The keys in which another definition is another sweep.
    pub fn differences(&self, other: &Definition) -> Vec<&'static str> {
        let same = [
            ("method", self.method == other.method),
            ("parameters", self.parameters == other.parameters),
            ("metric", self.metric == other.metric),
            ("early_terminate", self.early_terminate == other.early_terminate),
            ("program", self.program == other.program),
            ("command", self.command == other.command),
        ];
        same.into_iter().filter(|(_, same)| !same).map(|(key, _)| key).collect()
    }
}

/// `error` with the line of `text` that it names, where that is short.
fn quoted(error: &str, text: &str) -> String {
    const SHORT: usize = 80;
    let line = || {
        let (place, why) = error.split_once(": ")?;
        let number: usize = place.strip_prefix("line ")?.split(' ').next()?.parse().ok()?;
        let line = text.lines().nth(number.checked_sub(1)?)?.trim();
        (line.chars().count() <= SHORT).then(|| format!("{place}, `{line}`: {why}"))
    };
    line().unwrap_or_else(|| error.to_owned())
}

/// The parser's first line, without the excerpt that says it once more, and with the nearest one of the names that are
/// expected in place of all.
pub(super) fn advised(error: &str) -> String {
    let line = error.lines().next().unwrap_or_default();
    let line = line.strip_prefix("error: ").unwrap_or(line);
    let close = || {
        let (head, expected) = line.split_once(", expected ")?;
        let given = head.split_once("unknown ")?.1.split('`').nth(1)?;
        let names = expected.strip_prefix("one of ").unwrap_or(expected);
        let names = names
            .split([',', ' '])
            .map(|name| name.trim_matches('`'))
            .filter(|name| !["", "or"].contains(name));
        Some(format!("{head}: did you mean {}?", nearest(given, names)?))
    };
    close().unwrap_or_else(|| line.to_owned())
}

/// Takes up the parameters in `entries`, whose names begin with `prefix`.
fn flatten(
    entries: &Map<String, Value>,
    prefix: &str,
    parameters: &mut BTreeMap<String, Distribution>,
) -> Result<(), String> {
    for (name, entry) in entries {
        let name = format!("{prefix}{name}");
        let Value::Object(entry) = entry else {
            return Err(format!("parameters.{name} must hold keys such as value, values, or min and max"));
        };
        if let (Some(Value::Object(inner)), 1) = (entry.get("parameters"), entry.len()) {
            flatten(inner, &format!("{name}."), parameters)?;
            continue;
        }
        let distribution =
            Distribution::parse(entry.clone()).map_err(|why| format!("parameters.{name}: {why}"))?;
        if parameters.insert(name.clone(), distribution).is_some() {
            return Err(format!("parameters.{name} is there twice"));
        }
    }
    Ok(())
}
