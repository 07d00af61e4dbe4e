//! `config.toml` of a run as a list: each setting with its value and with the layer that it came from.

use toml::{Table, Value};

/// One setting of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Dotted, such as `optimizer.lr`.
    pub key: String,
    /// As the file has it, strings without their quotes.
    pub value: String,
    /// What set it: `default`, `default of …`, a file and line, `command line`; empty where the file does not say.
    pub layer: String,
}

impl Setting {
    /// Whether somebody chose it.
    pub fn is_chosen(&self) -> bool {
        self.layer != "default" && !self.layer.starts_with("default of ")
    }
}

/// Reads what [`ResolvedConfig::print`](crate::config::ResolvedConfig::print) has written: a line for each setting.
///
/// # Errors
/// In words, the first line that is neither a setting nor a section.
pub fn parse(text: &str) -> Result<Vec<Setting>, String> {
    let mut section = String::new();
    let mut settings = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let (content, layer) = split_source(line);
        let table: Table =
            toml::from_str(content).map_err(|error| format!("line {}: {}", number + 1, error.message()))?;
        let Some((name, value)) = table.iter().next() else { continue };
        if content.trim_start().starts_with('[') {
            section = path_of(name, value);
            continue;
        }
        let key = if section.is_empty() { name.clone() } else { format!("{section}.{name}") };
        let value = match value {
            Value::String(text) => text.clone(),
            // As it was written: 1e-8 and not 0.00000001.
            _ => content.split_once('=').map_or("", |(_, value)| value.trim()).to_owned(),
        };
        settings.push(Setting { key, value, layer: layer.to_owned() });
    }
    Ok(settings)
}

/// A line without its comment, and what the comment says after `from`. The text of a value may look like a comment.
fn split_source(line: &str) -> (&str, &str) {
    const MARK: &str = "# from ";
    let ends = line.match_indices(MARK).map(|(at, _)| at);
    let found = ends.into_iter().find(|at| toml::from_str::<Table>(&line[..*at]).is_ok());
    found.map_or((line, ""), |at| (&line[..at], &line[at + MARK.len()..]))
}

/// The dotted name of a section's header, which reads as tables within tables.
fn path_of(name: &str, value: &Value) -> String {
    match value.as_table().and_then(|table| table.iter().next()) {
        Some((inner, value)) => format!("{name}.{}", path_of(inner, value)),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_look_like_comments_are_values() {
        let text = "seed = 1  # from default\n\n[eval.\"a b\"]\nname = \"x # from y\"  # from a#b # from c.toml:3\neps = 1e-8\n";
        let setting = |key: &str, value: &str, layer: &str| Setting {
            key: key.to_owned(),
            value: value.to_owned(),
            layer: layer.to_owned(),
        };
        let expected = [
            setting("seed", "1", "default"),
            setting("eval.a b.name", "x # from y", "a#b # from c.toml:3"),
            setting("eval.a b.eps", "1e-8", ""),
        ];
        assert_eq!(parse(text).unwrap(), expected);
        assert!(parse("seed = \n").unwrap_err().starts_with("line 1: "));
    }
}
