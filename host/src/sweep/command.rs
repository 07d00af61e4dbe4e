//! From a trial's parameters to the words of its command line, as W&B's agent writes them.

use std::env;

use serde_json::Value;

use super::definition::Definition;
use super::search::Parameters;

/// Stands for every parameter as `key=value`.
const ARGUMENTS: &str = "${args_no_hyphens}";

/// Whether the parameters reach the program in a way that it reads.
///
/// # Errors
/// What to write instead.
pub(super) fn check(command: &[String]) -> Result<(), String> {
    if let Some(word) = command.iter().find(|word| word.starts_with("${args") && *word != ARGUMENTS) {
        return Err(format!(
            "command: {word} writes parameters as jepa-host does not read them: use {ARGUMENTS}"
        ));
    }
    if command.contains(&"${interpreter}".to_owned()) {
        return Err(
            "command: ${interpreter} is Python, which jepa-host does not need: leave it out".to_owned()
        );
    }
    if !command.contains(&ARGUMENTS.to_owned()) {
        return Err(format!("command: without {ARGUMENTS} the parameters would reach nobody"));
    }
    Ok(())
}

/// The words that run `definition` with `parameters`. Of `${envvar:NAME}` the name remains where there is no such
/// variable.
pub fn render(definition: &Definition, parameters: &Parameters) -> Vec<String> {
    let mut words = Vec::new();
    for word in &definition.command {
        match word.as_str() {
            ARGUMENTS => words.extend(parameters.iter().map(|(name, value)| assignment(name, value))),
            "${program}" => words.push(definition.program.clone()),
            "${env}" => words.push("/usr/bin/env".to_owned()),
            word => words.push(with_variables(word)),
        }
    }
    words
}

fn with_variables(word: &str) -> String {
    let Some((before, rest)) = word.split_once("${envvar:") else { return word.to_owned() };
    let Some((name, after)) = rest.split_once('}') else { return word.to_owned() };
    let value = env::var(name).unwrap_or_else(|_| name.to_owned());
    format!("{before}{value}{}", with_variables(after))
}

/// A parameter as an argument: `key=value`, in which the value reads as Python prints it.
pub fn assignment(name: &str, value: &Value) -> String {
    format!(
        "{name}={}",
        match value {
            Value::String(text) => text.clone(),
            value => python(value),
        }
    )
}

fn python(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Array(items) => format!("[{}]", items.iter().map(python).collect::<Vec<_>>().join(", ")),
        Value::String(text) if !text.contains('\'') => format!("'{text}'"),
        // Numbers; and texts with quotes and tables, which settings take as JSON has them.
        value => value.to_string(),
    }
}
