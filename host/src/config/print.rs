//! A configuration as TOML in which every value tells where it came from, and which can be read back as it is.

use std::fmt::Write as _;

use serde_json::{Map, Value};

use super::resolve::ResolvedConfig;

impl ResolvedConfig {
    /// Valid TOML: a line `key = value  # from …` for each setting. What is not set reads `"none"`.
    pub fn print(&self) -> String {
        let mut text = String::new();
        if let Ok(Value::Object(values)) = serde_json::to_value(&self.config) {
            self.print_table(&values, "", &mut text);
        }
        text
    }

    fn print_table(&self, values: &Map<String, Value>, prefix: &str, text: &mut String) {
        let key_of =
            |name: &str| if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") };
        let plain: Vec<_> = values.iter().filter(|(_, value)| !value.is_object()).collect();
        if !prefix.is_empty() && !plain.is_empty() {
            let header: Vec<String> = prefix.split('.').map(toml_key).collect();
            let _ = write!(text, "\n[{}]\n", header.join("."));
        }
        let lines: Vec<String> =
            plain.iter().map(|(name, value)| format!("{} = {}", toml_key(name), toml_value(value))).collect();
        let width = lines.iter().map(|line| line.chars().count()).max().unwrap_or(0).min(60);
        for (line, (name, _)) in lines.iter().zip(&plain) {
            let _ = writeln!(text, "{line:width$}  # from {}", self.sources.layer(&key_of(name)));
        }
        for (name, value) in values {
            if let Value::Object(inner) = value {
                self.print_table(inner, &key_of(name), text);
            }
        }
    }
}

fn toml_key(name: &str) -> String {
    let bare = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    if bare { name.to_owned() } else { toml_string(name) }
}

/// On one line, so that the comment after it stays a comment. JSON's escapes are TOML's too.
fn toml_string(text: &str) -> String {
    Value::String(text.to_owned()).to_string().replace('\u{7f}', "\\u007f")
}

fn toml_value(value: &Value) -> String {
    match value {
        Value::Null => toml_string("none"),
        Value::String(text) => toml_string(text),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(toml_value).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(table) => {
            let entries: Vec<String> = table
                .iter()
                .map(|(name, value)| format!("{} = {}", toml_key(name), toml_value(value)))
                .collect();
            format!("{{ {} }}", entries.join(", "))
        }
        other => other.to_string(),
    }
}
