//! `jepa-host settings`: the host's own settings, with what they mean.

use std::io::{self, Write};

use clap::Args;

use super::exit::Usage;
use super::output::print_text;
use crate::config::{Config, SchemaOption, schema_options};
use crate::nearest::nearest;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  jepa-host settings
  jepa-host settings data trainer
  jepa-host settings optimizer.lr
  jepa-host plugin info cnn_jepa     # the options of a method or a backbone")]
pub(super) struct SettingsArgs {
    /// Sections or settings; without any, all of them
    #[arg(value_name = "KEY")]
    keys: Vec<String>,
}

impl SettingsArgs {
    pub fn run(self) -> anyhow::Result<()> {
        let schema = Config::schema();
        let all = schema_options("", &schema);
        let is_of = |option: &SchemaOption, key: &String| {
            option.key.strip_prefix(key.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        for key in &self.keys {
            if !all.iter().any(|option| is_of(option, key)) {
                return Err(unknown(key, &all).into());
            }
        }
        let wanted = all
            .iter()
            .filter(|option| self.keys.is_empty() || self.keys.iter().any(|key| is_of(option, key)))
            .collect::<Vec<_>>();
        print_text(|out| {
            for option in wanted {
                print_option(option, out)?;
            }
            Ok(())
        })
    }
}

fn unknown(key: &str, all: &[SchemaOption]) -> Usage {
    let sections = all.iter().filter_map(|option| option.key.split_once('.')).map(|(section, _)| section);
    let keys: Vec<&str> = sections.chain(all.iter().map(|option| option.key.as_str())).collect();
    let advice = match nearest(key, keys) {
        Some(near) => format!("did you mean {near}?"),
        None => "jepa-host settings lists all".to_owned(),
    };
    Usage(format!("there is no setting {key}: {advice}"))
}

/// Prints a setting with its default, its choices, and its author's words.
pub(super) fn print_option(option: &SchemaOption, out: &mut dyn Write) -> io::Result<()> {
    let default = match option.default {
        None | Some(serde_json::Value::Null) => "not set".to_owned(),
        Some(value) => value.to_string(),
    };
    let choices: Vec<String> = option.choices.iter().map(|value| value.to_string()).collect();
    let choices = if choices.is_empty() { String::new() } else { format!("   ({})", choices.join(" | ")) };
    writeln!(out, "\n  {} = {default}{choices}", option.key)?;
    match option.about {
        Some(about) => writeln!(out, "      {}", about.replace('\n', "\n      ")),
        None => Ok(()),
    }
}
