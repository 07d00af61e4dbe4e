//! Where the time of a step goes: a bar for each run, and the same in a table.

use std::fmt::Write as _;

use super::format::{milliseconds, name_of, percent};
use super::html::{self, Cell, Table, text};
use super::run::SavedRun;
use super::verdict::{Tone, wait_for_data};
use crate::train::Part;

/// Mean seconds of a step, by part.
type Seconds = [f64; Part::ALL.len()];

/// Bars, words and a table; none when no run has measured it, as older versions have not.
pub fn step_time(runs: &[SavedRun]) -> Option<String> {
    let means: Vec<Option<Seconds>> = runs.iter().map(means).collect();
    if means.iter().all(Option::is_none) {
        return None;
    }
    let slowest = means.iter().flatten().map(|seconds| seconds.iter().sum::<f64>()).fold(0.0, f64::max);
    let mut out = String::new();
    for (place, (run, seconds)) in runs.iter().zip(&means).enumerate() {
        let name = if runs.len() > 1 { format!("{}: ", html::run(place, &run.name)) } else { String::new() };
        match seconds {
            Some(seconds) => bar(&mut out, &name, &run.name, seconds, slowest),
            None => {
                let _ = writeln!(out, "<p>{name}not measured.</p>");
            }
        }
        if let Some(wait) = wait_for_data(run).filter(|wait| wait.tone == Tone::Watch) {
            let _ = writeln!(out, "<p><strong>{}.</strong> {}</p>", text(&wait.what), text(&wait.why));
        }
    }
    out.push_str(&table(&means).html());
    out.push_str(
        "<p class=\"note\">Means over the run, without its first log line, by the host's clock. A GPU works on after it has \
         been told what to do: what it takes longer is in “wait for device”, where figures are read.</p>\n",
    );
    Some(out)
}

/// Means over log lines, but for the first, whose steps fill the pipeline and choose algorithms.
fn means(run: &SavedRun) -> Option<Seconds> {
    let mean = |part: Part| {
        let seconds: Vec<f64> = run.series(part.metric()).map(|(_, seconds)| seconds).collect();
        let settled = &seconds[usize::from(seconds.len() > 1)..];
        settled.iter().sum::<f64>() / settled.len().max(1) as f64
    };
    let seconds = Part::ALL.map(mean);
    (seconds.iter().sum::<f64>() > 0.0).then_some(seconds)
}

/// A bar whose length says how the step compares with the `slowest` run's.
fn bar(out: &mut String, caption: &str, run: &str, seconds: &Seconds, slowest: f64) {
    let whole: f64 = seconds.iter().sum();
    let parts = || Part::ALL.into_iter().zip(seconds).enumerate();
    let words: Vec<String> =
        parts().map(|(_, (part, s))| format!("{} {}", name_of(part.metric()), percent(s / whole))).collect();
    let label = format!("{run}: of a step's {} ms, {}", milliseconds(whole), words.join(", "));
    let _ = write!(
        out,
        "<figure class=\"step\"><figcaption>{caption}{} ms a step</figcaption><div class=\"parts\" role=\"img\" style=\"width:{:.2}%\" aria-label=\"{}\">",
        milliseconds(whole),
        100.0 * whole / slowest,
        text(&label)
    );
    for (color, (_, s)) in parts() {
        let (share, words) = (s / whole, text(&words[color]));
        let _ = write!(out, "<i class=\"c{color}\" style=\"flex-grow:{share:.5}\" title=\"{words}\"></i>");
    }
    out.push_str("</div></figure>\n");
}

/// A row for each part, and two columns for each run.
fn table(means: &[Option<Seconds>]) -> Table {
    let mut table =
        Table::new("Milliseconds of a step by part, and their share", &[("part", false)], Vec::new());
    for place in 0..means.len() {
        let letter = if means.len() > 1 { format!("{}, ", html::letter(place)) } else { String::new() };
        table.columns.extend(["ms", "share"].map(|what| (format!("{letter}{what}"), true)));
    }
    let cells = |of: &dyn Fn(&Seconds) -> f64| {
        let of_run = move |seconds: &Option<Seconds>| {
            let figures = seconds.map(|seconds| {
                let part = of(&seconds);
                [milliseconds(part), percent(part / seconds.iter().sum::<f64>())]
            });
            figures.unwrap_or_else(|| ["–".to_owned(), "–".to_owned()]).map(Cell::Number)
        };
        means.iter().flat_map(of_run).collect::<Vec<_>>()
    };
    let row = |(place, part): (usize, Part)| {
        let head = Cell::Part(place, name_of(part.metric()));
        [head].into_iter().chain(cells(&|seconds| seconds[place])).collect()
    };
    let took_time = |(place, _): &(usize, Part)| means.iter().flatten().any(|seconds| seconds[*place] > 1e-6);
    let rows = Part::ALL.into_iter().enumerate().filter(took_time).map(row).collect();
    let whole = [Cell::Head("whole step".to_owned())].into_iter();
    table.groups = vec![rows, vec![whole.chain(cells(&|seconds| seconds.iter().sum())).collect()]];
    table
}
