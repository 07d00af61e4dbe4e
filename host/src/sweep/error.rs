//! What can go wrong with a sweep itself. Every message names the file and says what to do.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;

/// A sweep that cannot be begun or gone on with.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// A definition that cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A definition that makes no sense here.
    #[error("{}: {why}", path.display())]
    Definition {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        why: String,
    },
    /// A directory that holds another sweep.
    #[error(
        "{} holds the trials of another definition ({differences}): name another directory with --dir, or undo that",
        path.display()
    )]
    Another {
        /// The directory.
        path: PathBuf,
        /// The keys that differ.
        differences: String,
    },
    /// A directory that holds something else than a sweep.
    #[error(
        "{} holds {folder}, and no sweep: name another directory with --dir, or another name in the file", path.display()
    )]
    Occupied {
        /// The directory.
        path: PathBuf,
        /// A folder in it.
        folder: String,
    },
    /// A directory without a sweep.
    #[error(
        "{} holds no sweep: without --leaderboard, one begins there; --dir names another directory", path.display()
    )]
    NoSweep {
        /// The directory.
        path: PathBuf,
    },
    /// A directory in which another process runs this sweep.
    #[error("another process runs the sweep in {}", path.display())]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// A file of the sweep that cannot be read or written.
    #[error("{}: {action}: {why}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        why: String,
    },
    /// A program that does not take the parameters.
    #[error("{trial} cannot begin: {why}. It was asked in {} for `{command} --print-config`", folder.display())]
    Refused {
        /// The trial.
        trial: String,
        /// Its program's last words, or why there is no program.
        why: String,
        /// Where relative paths begin.
        folder: PathBuf,
        /// The program and its arguments.
        command: String,
    },
    /// A trial that has nothing to be compared by.
    #[error(
        "{trial} is done and has no value of metric.name = {metric}, so that no further one begins: {}",
        advice(close, names)
    )]
    NoMetric {
        /// The trial.
        trial: String,
        /// What was looked for.
        metric: String,
        /// What was probably meant.
        close: Option<String>,
        /// What it has recorded.
        names: BTreeSet<String>,
    },
    /// Trials that somebody else has ended.
    #[error("{count} trials were ended from outside: run this again to go on with them")]
    Unfinished {
        /// How many.
        count: usize,
    },
    /// Trials fail one after the other.
    #[error(
        "{count} trials in a row have failed, and no further one begins. The last said: {last}. All of its words are \
         in {}; mend what is wrong, then run this again with --retry",
        log.display()
    )]
    Failing {
        /// How many.
        count: usize,
        /// The last one's last error.
        last: String,
        /// What it has printed.
        log: PathBuf,
    },
}

fn advice(close: &Option<String>, names: &BTreeSet<String>) -> String {
    match close {
        Some(close) => format!("did you mean {close}?"),
        None => {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            format!("it has recorded {}", names.join(", "))
        }
    }
}
