//! The standard output: for people or for programs, read to its end or not.

use std::io::{self, Write};
use std::path::Path;

use clap::ValueEnum;
use serde::Serialize;

use super::exit::Usage;

/// How a result is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people
    #[default]
    Text,
    /// For programs
    Json,
}

/// Whether `out` may be written: not over a file that is there, unless by `force`, and in a folder that is there.
///
/// # Errors
/// What to do.
pub(super) fn check_out(out: &Path, force: bool) -> Result<(), Usage> {
    if out.exists() && !force {
        return Err(Usage(format!("{} exists: add --force to replace it", out.display())));
    }
    match out.parent() {
        Some(folder) if !folder.as_os_str().is_empty() && !folder.is_dir() => {
            Err(Usage(format!("{}: there is no folder {}; make it first", out.display(), folder.display())))
        }
        _ => Ok(()),
    }
}

/// Prints `result` as JSON, or as `text` writes it.
///
/// # Errors
/// When the standard output cannot be written, on a full disk for one.
pub(super) fn print<T: Serialize>(
    format: Format,
    result: &T,
    text: impl FnOnce(&T, &mut dyn Write) -> io::Result<()>,
) -> anyhow::Result<()> {
    print_text(|out| match format {
        Format::Text => text(result, out),
        Format::Json => {
            serde_json::to_writer_pretty(&mut *out, result)?;
            writeln!(out)
        }
    })
}

/// Prints what `text` writes.
///
/// # Errors
/// When the standard output cannot be written, on a full disk for one.
pub(super) fn print_text(text: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> anyhow::Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    match text(&mut out).and_then(|()| out.flush()) {
        // Whoever read the output, such as `head`, has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => Ok(printed?),
    }
}

/// Stands in a table where there is nothing.
pub(super) const NOTHING: &str = "–";

/// Prints a table with aligned columns. Behind each row may come lines that belong to it.
pub(super) fn print_columns(
    head: Vec<String>,
    rows: &[(Vec<String>, Vec<String>)],
    out: &mut dyn Write,
) -> io::Result<()> {
    let cells = || std::iter::once(&head).chain(rows.iter().map(|(cells, _)| cells));
    let width = |column: usize| cells().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut line = |cells: &[String]| {
        let padded: Vec<String> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        writeln!(out, "{}", padded.join("  ").trim_end())
    };
    line(&head)?;
    for (cells, lines) in rows {
        line(cells)?;
        for text in lines {
            line(&[format!("  {}", one_line(text))])?;
        }
    }
    Ok(())
}

/// What files say may hold anything; a terminal gets one line of letters.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
