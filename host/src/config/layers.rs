//! Reads one layer of settings at a time into single values, each with its dotted key and where it was set.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Number, Value};
use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Problem};

/// `JEPA_*` variables that are no settings: folders of plugins, wandb-core, and what our own builds, scripts and tests
/// use.
pub const RESERVED_VARIABLES: &[&str] = &[
    "JEPA_PLUGIN_PATH",
    "JEPA_WANDB_CORE",
    "JEPA_DEPS_LIB",
    "JEPA_HOST",
    "JEPA_TEST_EVERYTHING",
    "JEPA_OTHER_RUSTC",
];

const ENVIRONMENT_PREFIX: &str = "JEPA_";

/// One value as one layer gives it.
pub(super) struct Leaf {
    /// The dotted key.
    pub key: String,
    /// Its value; a list is one value, a table is taken apart.
    pub value: Value,
    /// Where it was set.
    pub layer: String,
    /// The text of the value where the layer has text only, so that `run.name=2024` can be a string.
    pub raw: Option<String>,
}

/// Takes a table apart. Empty tables vanish.
pub(super) fn leaves_of(
    values: &Map<String, Value>,
    prefix: &str,
    layer: &dyn Fn(&str) -> String,
) -> Vec<Leaf> {
    let mut leaves = Vec::new();
    for (name, value) in values {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match value {
            Value::Object(inner) => leaves.extend(leaves_of(inner, &key, layer)),
            _ => leaves.push(Leaf { layer: layer(&key), key, value: value.clone(), raw: None }),
        }
    }
    leaves
}

/// The settings of a `--config` file, after those of its group files, weakest first.
pub(super) fn read_file(path: &Path) -> Result<Vec<Leaf>, ConfigError> {
    let (groups, own) = read_toml(path)?;
    let mut leaves = Vec::new();
    for group in groups {
        let (nested, group_leaves) = read_toml(&group)?;
        if !nested.is_empty() {
            return Err(ConfigError::Invalid(vec![Problem {
                key: "groups".to_owned(),
                layer: group.display().to_string(),
                message: "a group file cannot name further groups: list them all in the --config file"
                    .to_owned(),
            }]));
        }
        leaves.extend(group_leaves);
    }
    leaves.extend(own);
    Ok(leaves)
}

/// The group files that a file names, and its own settings.
fn read_toml(path: &Path) -> Result<(Vec<PathBuf>, Vec<Leaf>), ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let syntax =
        |error: toml::de::Error| ConfigError::Syntax { path: path.to_owned(), message: error.to_string() };
    let mut table: toml::Table = text.parse().map_err(syntax)?;
    let spans = DeTable::parse(&text).map_err(syntax)?;
    let mut lines = HashMap::new();
    note_lines(spans.get_ref(), "", &text, &mut lines);
    let layer = |key: &str| match lines.get(key) {
        Some(line) => format!("{}:{line}", path.display()),
        None => path.display().to_string(),
    };
    let refuse = |key: &str, message: &str| {
        ConfigError::Invalid(vec![Problem {
            key: key.to_owned(),
            layer: layer(key),
            message: message.to_owned(),
        }])
    };

    let directory = path.parent().unwrap_or(Path::new(""));
    let groups = match table.remove("groups") {
        None => Vec::new(),
        Some(value) => value
            .as_array()
            .and_then(|files| files.iter().map(|file| Some(directory.join(file.as_str()?))).collect())
            .ok_or_else(|| {
                refuse("groups", "must be a list of files, such as [\"data/imagenet100.toml\"]")
            })?,
    };
    let mut values = Map::new();
    for (key, value) in table {
        let value = to_json(value).map_err(|message| refuse(&key, &message))?;
        values.insert(key, value);
    }
    Ok((groups, leaves_of(&values, "", &layer)))
}

/// The line of every key of a file.
fn note_lines(table: &DeTable<'_>, prefix: &str, text: &str, lines: &mut HashMap<String, usize>) {
    for (name, value) in table {
        let name_text = name.get_ref();
        let key = if prefix.is_empty() { name_text.to_string() } else { format!("{prefix}.{name_text}") };
        let before = &text.as_bytes()[..name.span().start];
        lines.insert(key.clone(), before.iter().filter(|byte| **byte == b'\n').count() + 1);
        if let DeValue::Table(inner) = value.get_ref() {
            note_lines(inner, &key, text, lines);
        }
    }
}

/// The settings in the environment: `JEPA_OPTIMIZER__LR=0.1` sets `optimizer.lr`.
pub(super) fn read_environment(variables: &[(String, String)]) -> Vec<Leaf> {
    variables
        .iter()
        .filter(|(name, _)| !RESERVED_VARIABLES.contains(&name.as_str()))
        .filter_map(|(name, text)| {
            let key = name.strip_prefix(ENVIRONMENT_PREFIX)?.to_lowercase().replace("__", ".");
            Some(from_text(key, text, format!("environment {name}")))
        })
        .collect()
}

/// One `key=value` of the command line.
pub(super) fn read_override(argument: &str) -> Result<Leaf, ConfigError> {
    match argument.split_once('=') {
        Some((key, text)) if !key.trim().is_empty() => {
            Ok(from_text(key.trim().to_owned(), text, "command line".to_owned()))
        }
        _ => Err(ConfigError::Override(argument.to_owned())),
    }
}

fn from_text(key: String, text: &str, layer: String) -> Leaf {
    let raw = Some(text.trim().to_owned());
    Leaf { key, value: parse_leniently(text.trim()), layer, raw }
}

/// A value as a person types it: TOML, Python's constants, or else a string.
fn parse_leniently(text: &str) -> Value {
    match text {
        "True" => return Value::Bool(true),
        "False" => return Value::Bool(false),
        "None" | "null" => return Value::Null,
        _ => {}
    }
    // Read as a table, so that text which smuggles in a second key is seen and stays a string.
    if let Ok(mut table) = format!("value = {text}").parse::<toml::Table>()
        && table.len() == 1
        && let Some(value) = table.remove("value")
        && !matches!(value, toml::Value::Datetime(_))
        && let Ok(value) = to_json(value)
    {
        return value;
    }
    // TOML wants digits on both sides of a point.
    if (text.trim_start_matches(['+', '-']).starts_with('.') || text.ends_with('.'))
        && let Some(number) = text.parse().ok().and_then(Number::from_f64)
    {
        return Value::Number(number);
    }
    Value::String(text.to_owned())
}

fn to_json(value: toml::Value) -> Result<Value, String> {
    Ok(match value {
        toml::Value::String(text) => Value::String(text),
        toml::Value::Integer(number) => number.into(),
        toml::Value::Float(number) => Value::Number(
            Number::from_f64(number).ok_or_else(|| format!("{number} cannot be used as a setting"))?,
        ),
        toml::Value::Boolean(value) => Value::Bool(value),
        toml::Value::Datetime(time) => Value::String(time.to_string()),
        toml::Value::Array(items) => Value::Array(items.into_iter().map(to_json).collect::<Result<_, _>>()?),
        toml::Value::Table(table) => Value::Object(
            table
                .into_iter()
                .map(|(key, value)| Ok((key, to_json(value)?)))
                .collect::<Result<_, String>>()?,
        ),
    })
}
