//! Checks values against a JSON Schema as `schemars` writes it, in words for the person who typed them.
//!
//! Looked at: `$ref`, `type`, `enum`, `const`, `anyOf`, `oneOf`, `allOf`, `minimum`, `maximum` and their exclusive
//! forms, `items`, `prefixItems`, `minItems`, `maxItems`, `properties`, `required`, `additionalProperties` and
//! `default`. A plugin's own deserialisation says the rest.

use serde_json::{Map, Number, Value, json};

use super::advice::advice;
use super::error::{ConfigError, Problem};
use super::json_schema::{JsonSchema, forms_of, join, properties, types};
use super::resolve::Sources;
use crate::nearest::nearest;

/// What stands for "not set" where a value may be left out, because TOML has no null.
const UNSET: &str = "none";

/// The verdict on one setting of the host.
pub(super) enum Checked {
    /// A setting of the host's, with the value in its own type.
    Known(Value),
    /// An option of a plugin, to be checked against the plugin's schema.
    Free,
    /// (key, message) of everything wrong with it.
    Wrong(Vec<(String, String)>),
}

/// Checks one dotted key and its value against the host's schema.
pub(super) fn check_setting(key: &str, value: &Value, raw: Option<&str>, schema: &Value) -> Checked {
    let mut checker = Checker { section: "", schema: JsonSchema(schema), problems: Vec::new() };
    let mut at = checker.schema.resolve(schema);
    for name in key.split('.') {
        match at.get("properties").and_then(|properties| properties.get(name)) {
            Some(inner) => at = checker.schema.resolve(inner),
            None if at.get("additionalProperties").is_some_and(|rest| rest != &json!(false)) => {
                return Checked::Free;
            }
            None if key == "groups" => {
                let message = "group files can be named in the --config file only".to_owned();
                return Checked::Wrong(vec![(key.to_owned(), message)]);
            }
            None => {
                let message = format!("unknown key; {}", advice(key, &checker.schema.keys(schema, "")));
                return Checked::Wrong(vec![(key.to_owned(), message)]);
            }
        }
    }
    let has_name = at.get("properties").is_some_and(|properties| properties.get("name").is_some());
    if let (true, Value::String(text)) = (has_name, value) {
        let message = format!("is a section, not a value; did you mean {key}.name={text}?");
        return Checked::Wrong(vec![(key.to_owned(), message)]);
    }
    let value = checker.check(key, value, raw, at);
    if checker.problems.is_empty() { Checked::Known(value) } else { Checked::Wrong(checker.problems) }
}

/// Checks the options that a method or backbone was given (`values`, the content of `section`) against the JSON
/// Schema that its plugin publishes, and returns them complete: defaults filled in, whole numbers where the schema
/// wants them.
///
/// # Errors
/// Every unknown option (with the nearest known one), wrong type, value out of range and missing option, each with
/// the layer that set it.
pub fn validate_plugin_options(
    section: &str,
    values: &Value,
    schema: &Value,
    sources: &Sources,
) -> Result<Value, ConfigError> {
    let mut checker = Checker { section, schema: JsonSchema(schema), problems: Vec::new() };
    let given = values.as_object().cloned().unwrap_or_default();
    let full = checker.check_object(section, &given, checker.schema.resolve(schema), Some(sources), true);
    if checker.problems.is_empty() {
        return Ok(full);
    }
    let problem =
        |(key, message): (String, String)| Problem { layer: sources.layer(&key).to_owned(), key, message };
    Err(ConfigError::Invalid(checker.problems.into_iter().map(problem).collect()))
}

struct Checker<'a> {
    /// Where the schema's root lies among all settings.
    section: &'a str,
    schema: JsonSchema<'a>,
    problems: Vec<(String, String)>,
}

impl<'a> Checker<'a> {
    fn refuse(&mut self, key: &str, message: String) {
        self.problems.push((key.to_owned(), message));
    }

    /// Notes what is wrong with a value; returns it in the type that the schema wants.
    fn check(&mut self, key: &str, value: &Value, raw: Option<&str>, schema: &'a Value) -> Value {
        let schema = self.schema.resolve(schema);
        if let Some(parts) = schema.get("allOf").and_then(Value::as_array) {
            return parts.iter().fold(value.clone(), |value, part| self.check(key, &value, raw, part));
        }
        let forms: Vec<&'a Value> =
            forms_of(schema).into_iter().flatten().map(|form| self.schema.resolve(form)).collect();
        if forms.iter().any(|form| types(form) == ["null"]) && is_unset(value) {
            return Value::Null;
        }
        if let Some(allowed) = self.schema.choices(schema) {
            return self.check_choice(key, value, raw, &allowed);
        }
        if !forms.is_empty() {
            return self.check_forms(key, value, raw, &forms);
        }
        let types = types(schema);
        if types.is_empty() {
            return value.clone();
        }
        if types.contains(&"null") && is_unset(value) {
            return Value::Null;
        }
        for name in &types {
            match (*name, value) {
                ("boolean", Value::Bool(_)) => return value.clone(),
                ("string", Value::String(_)) => return value.clone(),
                ("integer", Value::Number(number)) => {
                    if let Some(whole) = whole(number) {
                        self.check_range(key, &whole, schema);
                        return Value::Number(whole);
                    }
                }
                ("number", Value::Number(number)) => {
                    self.check_range(key, number, schema);
                    return number.as_f64().and_then(Number::from_f64).map_or(value.clone(), Value::Number);
                }
                ("array", Value::Array(items)) => return self.check_array(key, items, schema),
                ("object", Value::Object(entries)) => {
                    return self.check_object(key, entries, schema, None, false);
                }
                _ => {}
            }
        }
        match raw {
            // `run.name=2024`: the layer has text only, and the schema says which kind it is.
            Some(raw) if types.contains(&"string") => Value::String(raw.to_owned()),
            _ => {
                let wanted: Vec<&str> = types.iter().map(|name| type_words(name)).collect();
                self.refuse(key, format!("{} is not {}", words(value), wanted.join(" or ")));
                value.clone()
            }
        }
    }

    /// `anyOf` and `oneOf`: an optional value, or alternatives.
    fn check_forms(&mut self, key: &str, value: &Value, raw: Option<&str>, forms: &[&'a Value]) -> Value {
        let attempts: Vec<(Value, Vec<(String, String)>)> = forms
            .iter()
            .filter(|form| types(form) != ["null"])
            .map(|form| {
                let mut attempt =
                    Checker { section: self.section, schema: self.schema, problems: Vec::new() };
                (attempt.check(key, value, raw, form), attempt.problems)
            })
            .collect();
        // The form that the value came closest to tells best what is wrong.
        match attempts.into_iter().min_by_key(|(_, problems)| problems.len()) {
            Some((value, problems)) => {
                self.problems.extend(problems);
                value
            }
            None => value.clone(),
        }
    }

    fn check_choice(&mut self, key: &str, value: &Value, raw: Option<&str>, allowed: &[&Value]) -> Value {
        if allowed.contains(&value) {
            return value.clone();
        }
        if let Some(raw) = raw.map(|raw| Value::String(raw.to_owned())).filter(|raw| allowed.contains(&raw)) {
            return raw;
        }
        if allowed.contains(&&Value::Null) && is_unset(value) {
            return Value::Null;
        }
        let names: Vec<String> =
            allowed.iter().filter(|value| !value.is_null()).map(|value| words(value)).collect();
        let close =
            value.as_str().and_then(|text| nearest(text, allowed.iter().filter_map(|value| value.as_str())));
        let close = close.map(|close| format!("; did you mean {close}?")).unwrap_or_default();
        self.refuse(key, format!("{} is not one of {}{close}", words(value), names.join(", ")));
        value.clone()
    }

    fn check_range(&mut self, key: &str, number: &Number, schema: &Value) {
        let Some(value) = number.as_f64() else { return };
        let mut limits = Vec::new();
        for (name, says, holds) in [
            ("minimum", "at least", (|value, limit| value >= limit) as fn(f64, f64) -> bool),
            ("exclusiveMinimum", "greater than", |value, limit| value > limit),
            ("maximum", "at most", |value, limit| value <= limit),
            ("exclusiveMaximum", "less than", |value, limit| value < limit),
        ] {
            if let Some(limit) =
                schema.get(name).filter(|limit| limit.as_f64().is_some_and(|l| !holds(value, l)))
            {
                limits.push(format!("{says} {}", plain(limit)));
            }
        }
        if !limits.is_empty() {
            self.refuse(key, format!("{number} is out of range: must be {}", limits.join(" and ")));
        }
    }

    fn check_array(&mut self, key: &str, items: &[Value], schema: &'a Value) -> Value {
        let limit = |name| schema.get(name).and_then(Value::as_u64);
        let (least, most) = (limit("minItems").unwrap_or(0), limit("maxItems").unwrap_or(u64::MAX));
        let count = items.len() as u64;
        if count < least || count > most {
            let wanted = match (least, most) {
                (least, most) if least == most => format!("{least}"),
                (least, u64::MAX) => format!("at least {least}"),
                (0, most) => format!("at most {most}"),
                (least, most) => format!("{least} to {most}"),
            };
            self.refuse(key, format!("has {count} values and needs {wanted}"));
            return Value::Array(items.to_vec());
        }
        let prefix = schema.get("prefixItems").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let rest = schema.get("items").filter(|items| items.is_object());
        let checked = items.iter().enumerate().map(|(place, item)| match prefix.get(place).or(rest) {
            Some(schema) => self.check(&format!("{key}[{place}]"), item, None, schema),
            None => item.clone(),
        });
        Value::Array(checked.collect())
    }

    /// `sources` gives the typed text of single values; `closed` refuses unknown entries even where the schema lists
    /// none. Missing entries are filled in with their defaults.
    fn check_object(
        &mut self,
        key: &str,
        given: &Map<String, Value>,
        schema: &'a Value,
        sources: Option<&Sources>,
        closed: bool,
    ) -> Value {
        let properties = properties(schema);
        let rest = schema.get("additionalProperties");
        let mut full = Map::new();

        for (name, inner) in properties.into_iter().flatten() {
            let path = join(key, name);
            let default = inner.get("default");
            let table = self.schema.table(inner);
            match (given.get(name), default) {
                // A table that is given in part keeps the default's other entries.
                (Some(Value::Object(part)), default) if let Some(schema) = table => {
                    let mut values = default.and_then(Value::as_object).cloned().unwrap_or_default();
                    values.extend(part.clone());
                    let value = self.check_object(&path, &values, schema, sources, false);
                    full.insert(name.clone(), value);
                }
                (Some(value), _) => {
                    let raw = sources
                        .and_then(|sources| sources.get(&path))
                        .and_then(|source| source.raw.as_deref());
                    let value = self.check(&path, value, raw, inner);
                    full.insert(name.clone(), value);
                }
                (None, Some(Value::Object(values))) if let Some(schema) = table => {
                    let value = self.check_object(&path, values, schema, sources, false);
                    full.insert(name.clone(), value);
                }
                (None, Some(default)) => {
                    full.insert(name.clone(), default.clone());
                }
                (None, None) if requires(schema, name) => self.refuse(&path, "must be set".to_owned()),
                (None, None) => {}
            }
        }

        let open = match rest {
            Some(rest) => rest != &json!(false),
            None => !closed && properties.is_none(),
        };
        for (name, value) in given {
            if properties.is_some_and(|properties| properties.contains_key(name)) {
                continue;
            }
            let path = join(key, name);
            match rest.filter(|rest| rest.is_object()) {
                Some(inner) => {
                    let value = self.check(&path, value, None, inner);
                    full.insert(name.clone(), value);
                }
                None if open => {
                    full.insert(name.clone(), value.clone());
                }
                None => {
                    let known =
                        properties.map_or(Vec::new(), |_| self.schema.keys(self.schema.0, self.section));
                    let message = match known.as_slice() {
                        [] => "unknown key; there are no options here".to_owned(),
                        known => format!("unknown key; {}", advice(&path, known)),
                    };
                    self.refuse(&path, message);
                }
            }
        }
        Value::Object(full)
    }
}

fn requires(schema: &Value, name: &str) -> bool {
    schema.get("required").and_then(Value::as_array).is_some_and(|names| names.iter().any(|n| n == name))
}

fn is_unset(value: &Value) -> bool {
    value.is_null() || value.as_str().is_some_and(|text| text.eq_ignore_ascii_case(UNSET))
}

/// The number as a whole one, when it is: sweeps and Python write 128.0.
fn whole(number: &Number) -> Option<Number> {
    if number.is_f64() {
        let value = number.as_f64().filter(|value| value.fract() == 0.0 && value.abs() < 2f64.powi(53))?;
        return Some(Number::from(value as i64));
    }
    Some(number.clone())
}

fn plain(limit: &Value) -> String {
    limit.as_number().and_then(whole).map_or_else(|| limit.to_string(), |limit| limit.to_string())
}

fn type_words(name: &str) -> &str {
    match name {
        "boolean" => "true or false",
        "integer" => "a whole number",
        "number" => "a number",
        "string" => "a string",
        "array" => "a list",
        "object" => "a table",
        "null" => "\"none\"",
        other => other,
    }
}

fn words(value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        Value::Object(_) => "a table".to_owned(),
        other => other.to_string(),
    }
}
