//! What can be wrong with a configuration.

use std::fmt;
use std::path::PathBuf;

/// One setting that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The dotted key, such as `optimizer.lr`.
    pub key: String,
    /// Where the value was set: a file and line, an environment variable, the command line.
    pub layer: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): {}", self.key, self.layer, self.message)
    }
}

/// A configuration that cannot be used. The command line exits with code 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A configuration file that cannot be read.
    #[error("cannot read the configuration file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A configuration file that is not TOML.
    #[error("{} is not valid TOML: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's words, with line and column.
        message: String,
    },
    /// An argument that is no override.
    #[error("`{0}` is neither a subcommand nor of the form key=value, such as optimizer.lr=0.02")]
    Override(String),
    /// Settings that are unknown, of the wrong type or out of range: all of them.
    #[error("{}", list(.0))]
    Invalid(Vec<Problem>),
    /// A setting that this command needs and that no layer gives.
    #[error("{key} is not set: give it in the configuration file or as {key}={example}")]
    Missing {
        /// The dotted key.
        key: String,
        /// What a value looks like.
        example: String,
    },
}

fn list(problems: &[Problem]) -> String {
    match problems {
        [problem] => problem.to_string(),
        _ => {
            let lines: Vec<String> = problems.iter().map(|problem| format!("\n  {problem}")).collect();
            format!("{} settings cannot be used:{}", problems.len(), lines.concat())
        }
    }
}
