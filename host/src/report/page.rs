//! The page: one HTML file with its style, its script and its data inside. Tables and words are written here, so that
//! they are there without a script; charts and maps are drawn by the script beside this file.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::charts::Charts;
use super::features::FeatureMap;
use super::format::{count, date, in_figures, name_of, number, percent, plural, span, value_of};
use super::html::{self, Cell, Table, letter, text};
use super::run::{SavedRun, Status};
use super::step_time::step_time;
use super::verdict::{Tone, findings, settled_waits};
use super::views::views;

const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

const NOTHING: &str = "–";

/// What a page says of the sweep whose trials it shows.
#[derive(Clone, Debug)]
pub struct SweepOfTrials {
    /// What it is called.
    pub name: String,
    /// The parameters in which trials differ.
    pub parameters: Vec<String>,
}

/// Everything that a page shows.
#[derive(Debug)]
pub struct Report {
    /// At least one.
    pub runs: Vec<SavedRun>,
    /// For each run what its encoder makes of images, or a sentence why that is not there.
    pub features: Vec<Result<FeatureMap, String>>,
    /// The sweep that the runs are trials of.
    pub sweep: Option<SweepOfTrials>,
    /// Whether the page asks where it came from for news.
    pub live: bool,
}

impl Report {
    /// The page.
    pub fn html(&self) -> String {
        let (charts, several) = (Charts::of(&self.runs), self.runs.len() > 1);
        let mut content = String::new();
        self.header(&mut content);
        content.push_str("<div class=\"first\">\n");
        section(&mut content, "verdict", "Verdict", &self.verdict());
        section(&mut content, "probes", "Probes", &self.probes());
        content.push_str("</div>\n");
        let curves = match charts.is_empty() {
            true => "<p>There are no records to draw.</p>\n".to_owned(),
            false => "<noscript><p>The curves are drawn by a script, and scripts are off.</p></noscript>\n"
                .to_owned(),
        };
        section(&mut content, "curves", "Curves", &curves);
        section(&mut content, "collapse", "Collapse", &self.collapse());
        section(&mut content, "speed", "Speed", &self.speed());
        if let Some(bars) = step_time(&self.runs) {
            section(&mut content, "step-time", "Time of a step", &bars);
        }
        section(&mut content, "views", "Example views", &views(&self.runs));
        section(&mut content, "features", "Features", &self.feature_section());
        let title = if several { "Settings that differ" } else { "Settings that were chosen" };
        section(&mut content, "settings", title, &self.settings());
        section(&mut content, "provenance", "Provenance", &self.provenance());

        let hash = STANDARD.encode(Sha256::digest(format!("\n{SCRIPT}")));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        fill(PAGE, &|name| match name {
            "script_hash" => hash.clone(),
            "connect" => if self.live { "'self'" } else { "'none'" }.to_owned(),
            "title" => text(&self.title()),
            "style" => STYLE.to_owned(),
            "live" => if self.live { " data-live" } else { "" }.to_owned(),
            "content" => content.clone(),
            "version" => env!("CARGO_PKG_VERSION").to_owned(),
            "written" => date(now),
            "data" => html::json(&self.data(&charts)),
            "script" => SCRIPT.to_owned(),
            other => unreachable!("the page has a place {other}"),
        })
    }

    fn title(&self) -> String {
        match (&self.sweep, self.runs.as_slice()) {
            (Some(sweep), runs) => format!("Sweep {}: {}", sweep.name, plural(runs.len() as u64, "trial")),
            (None, [run]) => run.name.clone(),
            (None, runs) => format!("{} runs", runs.len()),
        }
    }

    /// What the script draws. Runs that show the same images share their sheet.
    fn data(&self, charts: &Charts) -> Value {
        let mut sheets: Vec<&str> = Vec::new();
        let maps: Vec<Value> = self
            .features
            .iter()
            .map(|map| {
                let Ok(map) = map else { return Value::Null };
                let sheet = sheets.iter().position(|sheet| *sheet == map.sheet).unwrap_or_else(|| {
                    sheets.push(&map.sheet);
                    sheets.len() - 1
                });
                let mut map = json!(map);
                map["sheet"] = json!(sheet);
                map
            })
            .collect();
        json!({ "charts": charts, "maps": maps, "sheets": sheets })
    }

    fn header(&self, out: &mut String) {
        let _ = writeln!(out, "<header><h1>{}</h1>", text(&self.title()));
        match self.runs.as_slice() {
            [run] => {
                out.push_str("<dl class=\"facts\">\n");
                for (name, value) in facts(run) {
                    let _ = writeln!(out, "<div><dt>{}</dt><dd>{}</dd></div>", text(name), text(&value));
                }
                out.push_str("</dl>\n");
            }
            runs => {
                let parameters = self.sweep.as_ref().map_or(&[][..], |sweep| sweep.parameters.as_slice());
                out.push_str(&overview(runs, parameters).html());
            }
        }
        out.push_str("</header>\n");
    }

    fn verdict(&self) -> String {
        let mut out = String::new();
        for (place, run) in self.runs.iter().enumerate() {
            if self.runs.len() > 1 {
                let _ = writeln!(out, "<h3>{}</h3>", html::run(place, &run.name));
            }
            out.push_str("<ul class=\"findings\">\n");
            for finding in findings(run) {
                let (class, word) = match finding.tone {
                    Tone::Wrong => ("wrong", "Wrong"),
                    Tone::Watch => ("watch", "Look"),
                    Tone::Well => ("well", "Well"),
                };
                let _ = writeln!(
                    out,
                    "<li class=\"{class}\"><span class=\"tone\">{word}</span> <div><strong>{}.</strong> {}</div></li>",
                    text(&finding.what),
                    text(&finding.why)
                );
            }
            out.push_str("</ul>\n");
        }
        out
    }

    /// The metrics of all runs for which `keep` holds.
    fn metrics(&self, keep: impl Fn(&str) -> bool) -> BTreeSet<&str> {
        self.runs.iter().flat_map(SavedRun::metrics).filter(|metric| keep(metric)).collect()
    }

    fn probes(&self) -> String {
        let mut metrics: Vec<&str> = self
            .metrics(|metric| metric.starts_with("eval/") && !DESCRIPTORS.contains(&metric))
            .into_iter()
            .collect();
        if metrics.is_empty() {
            return "<p>No probe has judged the features: data.val is not set, or eval.every_epochs is 0, or the first evaluation is still to come.</p>\n".to_owned();
        }
        let order = ["eval/linear_top1_final", "eval/knn_top1", "eval/linear_top1"];
        metrics.sort_by_key(|metric| order.iter().position(|known| known == metric).unwrap_or(order.len()));
        let row = |run: &SavedRun, metric: &str| {
            let values: Vec<(u64, f64)> =
                run.series(metric).map(|(record, value)| (record.step, value)).collect();
            let figure = |value: Option<f64>| {
                Cell::Number(value.map_or(NOTHING.to_owned(), |value| value_of(metric, value)))
            };
            let (best_step, best) = run.best(metric).unzip();
            let best_step = best_step.map_or(NOTHING.to_owned(), |step| count(step as i64));
            let of = |end: Option<&(u64, f64)>| figure(end.map(|(_, value)| *value));
            vec![of(values.first()), figure(best), Cell::Number(best_step), of(values.last())]
        };
        let columns = [("first", true), ("best", true), ("at step", true), ("final", true)];
        let caption =
            "First, best and final figures of each probe, on held-out images; the best one is of training";
        self.by_metric(caption, &metrics, &columns, &row)
    }

    /// A table with a row for each of `metrics`, or, of several runs, a row for each run in each of them.
    fn by_metric(
        &self,
        caption: &str,
        metrics: &[&str],
        columns: &[(&str, bool)],
        row: &dyn Fn(&SavedRun, &str) -> Vec<Cell>,
    ) -> String {
        let several = self.runs.len() > 1;
        let mut table = Table::new(caption, &[("metric", false)], Vec::new());
        if several {
            table.columns.push(("run".to_owned(), false));
        }
        table.columns.extend(columns.iter().map(|(name, number)| ((*name).to_owned(), *number)));
        let group = |metric: &&str| -> Vec<Vec<Cell>> {
            let rows = self.runs.iter().enumerate().map(|(place, run)| {
                let mut cells = Vec::new();
                if place == 0 {
                    cells.push(Cell::HeadOf(name_of(metric), self.runs.len()));
                }
                if several {
                    cells.push(Cell::Run(place, String::new()));
                }
                cells.extend(row(run, metric));
                cells
            });
            rows.collect()
        };
        let groups: Vec<_> = metrics.iter().map(group).collect();
        table.groups = if several { groups } else { vec![groups.into_iter().flatten().collect()] };
        table.html()
    }

    fn collapse(&self) -> String {
        let metrics = self.metrics(|metric| DESCRIPTORS.contains(&metric));
        if metrics.is_empty() {
            return "<p>No evaluation has described the features yet.</p>\n".to_owned();
        }
        let metrics: Vec<&str> = DESCRIPTORS.into_iter().filter(|metric| metrics.contains(metric)).collect();
        let row = |run: &SavedRun, metric: &str| {
            let values: Vec<f64> = run.series(metric).map(|(_, value)| value).collect();
            let (Some(first), Some(last)) = (values.first(), values.last()) else {
                return vec![Cell::Number(NOTHING.to_owned()); 4];
            };
            let least = values.iter().copied().fold(f64::INFINITY, f64::min);
            let greatest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            [*first, least, greatest, *last].map(|value| Cell::Number(value_of(metric, value))).into()
        };
        let columns = [("first", true), ("least", true), ("greatest", true), ("final", true)];
        let mut out = self.by_metric("How much of their space the features fill", &metrics, &columns, &row);
        out.push_str(
            "<p class=\"note\">Spread: 1 when features point everywhere, 0 when all are the same. RankMe: the effective \
             number of dimensions. Correlation: of two dimensions, 0 when none tells of another. Anisotropy: 1 when \
             features lie on one line.</p>\n",
        );
        out
    }

    fn speed(&self) -> String {
        let row = |(place, run): (usize, &SavedRun)| {
            let of = |metric: &str| run.series(metric).map(|(_, value)| value).collect::<Vec<f64>>();
            let (mut speeds, waits) = (of("train/images_per_s"), settled_waits(run));
            speeds.sort_by(f64::total_cmp);
            let figure = |value: Option<f64>, write: fn(f64) -> String| {
                Cell::Number(value.map_or(NOTHING.to_owned(), write))
            };
            let mean = (!waits.is_empty()).then(|| waits.iter().sum::<f64>() / waits.len() as f64);
            vec![
                Cell::Run(place, run.name.clone()),
                figure(speeds.get(speeds.len() / 2).copied(), number),
                figure(speeds.first().copied(), number),
                figure(speeds.last().copied(), number),
                figure(mean, percent),
                figure(waits.iter().copied().reduce(f64::max), percent),
                Cell::Number(images_seen(run).map_or(NOTHING.to_owned(), |images| count(images as i64))),
                figure(wall_time(run), span),
            ]
        };
        let columns = [
            ("run", false),
            ("images/s, median", true),
            ("least", true),
            ("greatest", true),
            ("wait for data, mean", true),
            ("greatest wait", true),
            ("images seen", true),
            ("first to last record", true),
        ];
        let rows = self.runs.iter().enumerate().map(row).collect();
        Table::new("Training images per second, and the share of time spent waiting for data", &columns, rows)
            .html()
    }

    fn feature_section(&self) -> String {
        let mut out = String::new();
        let left_out = self.features.iter().zip(&self.runs).enumerate();
        for (place, (map, run)) in left_out {
            if let Err(why) = map {
                let which = match self.runs.len() {
                    1 => String::new(),
                    _ => format!("{}: ", html::run(place, &run.name)),
                };
                let _ = writeln!(out, "<p>{which}{}</p>", text(why));
            }
        }
        if self.features.iter().any(Result::is_ok) {
            out.push_str("<noscript><p>The map is drawn by a script, and scripts are off.</p></noscript>\n");
        }
        out
    }

    fn settings(&self) -> String {
        let mut out = String::new();
        match self.runs.as_slice() {
            [run] => {
                let row = |setting: &super::Setting| {
                    vec![
                        Cell::HeadOf(setting.key.clone(), 1),
                        Cell::Code(setting.value.clone()),
                        Cell::Text(setting.layer.clone()),
                    ]
                };
                let columns = [("setting", false), ("value", false), ("from", false)];
                let (chosen, rest): (Vec<_>, Vec<_>) = run.settings.iter().partition(|s| s.is_chosen());
                let chosen = chosen.into_iter().map(row).collect();
                out.push_str(&Table::new("Settings that somebody chose", &columns, chosen).html());
                let _ =
                    writeln!(out, "<details><summary>{} settings have their defaults</summary>", rest.len());
                let rest = rest.into_iter().map(row).collect();
                out.push_str(&Table::new("Settings with their defaults", &columns, rest).html());
                out.push_str("</details>\n");
            }
            runs => {
                let mut keys: Vec<&str> = Vec::new();
                let mut known = BTreeSet::new();
                for setting in runs.iter().flat_map(|run| &run.settings) {
                    if known.insert(setting.key.as_str()) {
                        keys.push(&setting.key);
                    }
                }
                let values: Vec<BTreeMap<&str, &str>> = runs
                    .iter()
                    .map(|run| run.settings.iter().map(|s| (s.key.as_str(), s.value.as_str())).collect())
                    .collect();
                let row = |key: &str| {
                    let cells = values.iter().map(|of_run| {
                        Cell::Code(of_run.get(key).map_or(NOTHING.to_owned(), |value| (*value).to_owned()))
                    });
                    [Cell::Head(key.to_owned())].into_iter().chain(cells).collect::<Vec<Cell>>()
                };
                let differs = |key: &str| values.iter().any(|of_run| of_run.get(key) != values[0].get(key));
                let (different, equal): (Vec<&str>, Vec<&str>) =
                    keys.into_iter().partition(|key| differs(key));
                let letters: Vec<String> = (0..runs.len()).map(letter).collect();
                let columns: Vec<(&str, bool)> = [("setting", false)]
                    .into_iter()
                    .chain(letters.iter().map(|l| (l.as_str(), false)))
                    .collect();
                let different: Vec<_> = different.into_iter().map(row).collect();
                if different.is_empty() {
                    out.push_str("<p>All settings are the same.</p>\n");
                } else {
                    out.push_str(
                        &Table::new("Settings that differ between the runs", &columns, different).html(),
                    );
                }
                let _ = writeln!(out, "<details><summary>{} settings are the same</summary>", equal.len());
                let equal = equal.into_iter().map(|key| row(key).into_iter().take(2).collect()).collect();
                let columns = [("setting", false), ("value", false)];
                out.push_str(&Table::new("Settings that are the same in all runs", &columns, equal).html());
                out.push_str("</details>\n");
            }
        }
        out
    }

    fn provenance(&self) -> String {
        let words = |value: &Value, pointer: &str| match value.pointer(pointer) {
            None | Some(Value::Null) => NOTHING.to_owned(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        };
        let short = |hash: String| hash.chars().take(12).collect::<String>();
        let (mut sessions, mut plugins) = (Vec::new(), Vec::new());
        for (place, run) in self.runs.iter().enumerate() {
            for session in &run.sessions {
                let started = session.get("started_unix_s").and_then(Value::as_f64).map(date);
                let command = session.get("command").and_then(Value::as_array);
                let command: Option<Vec<&str>> =
                    command.map(|c| c.iter().filter_map(Value::as_str).collect());
                sessions.push(vec![
                    Cell::Run(place, run.name.clone()),
                    Cell::Text(started.unwrap_or_else(|| NOTHING.to_owned())),
                    Cell::Number(words(session, "/from_step")),
                    Cell::Text(words(session, "/end/exit_code")),
                    Cell::Text(format!(
                        "{}, {} threads",
                        words(session, "/device"),
                        words(session, "/threads")
                    )),
                    Cell::Text(words(session, "/host/name")),
                    Cell::Code(short(words(session, "/git"))),
                    Cell::Text(format!(
                        "{}, {}",
                        words(session, "/jepa-host"),
                        words(session, "/libtorch/version")
                    )),
                    Cell::Code(short(words(session, "/data_fingerprint"))),
                    Cell::Code(command.map_or(NOTHING.to_owned(), |words| words.join(" "))),
                ]);
            }
            let last = run.sessions.last().and_then(|session| session.get("plugins")?.as_array());
            for plugin in last.into_iter().flatten() {
                plugins.push(vec![
                    Cell::Run(place, run.name.clone()),
                    Cell::Text(words(plugin, "/name")),
                    Cell::Text(words(plugin, "/version")),
                    Cell::Code(words(plugin, "/sha256")),
                ]);
            }
        }
        if sessions.is_empty() {
            return "<p>There is no provenance.json.</p>\n".to_owned();
        }
        let columns = [
            ("run", false),
            ("started", false),
            ("from step", true),
            ("exit code", false),
            ("device", false),
            ("machine", false),
            ("git", false),
            ("jepa-host, libtorch", false),
            ("data", false),
            ("command", false),
        ];
        let mut out = Table::new("Each start of a run, with what it ran on", &columns, sessions).html();
        let columns = [("run", false), ("plugin", false), ("version", false), ("SHA-256 of its file", false)];
        out.push_str(&Table::new("Plugins", &columns, plugins).html());
        out
    }
}

/// Metrics that tell of collapse, in the order in which they are read.
const DESCRIPTORS: [&str; 7] = [
    "eval/rankme",
    "eval/spread",
    "eval/std",
    "eval/rank",
    "eval/rank_ratio",
    "eval/correlation",
    "eval/anisotropy",
];

fn facts(run: &SavedRun) -> Vec<(&'static str, String)> {
    let setting = |key: &str| run.setting(key).unwrap_or(NOTHING).to_owned();
    let mut facts = vec![
        ("status", run.status.text().to_owned()),
        ("method", setting("method.name")),
        ("backbone", setting("backbone.name")),
        ("steps", steps(run)),
        ("epochs", epochs(run)),
    ];
    for (name, metric) in [("linear top-1", "eval/linear_top1_final"), ("kNN top-1", "eval/knn_top1")] {
        facts.extend(run.last(metric).map(|value| (name, percent(value))));
    }
    facts.extend(run.last("train/loss").map(|loss| ("loss", number(loss))));
    facts.extend(wall_time(run).map(|time| ("time", span(time))));
    facts.extend(run.updated.map(|time| ("last record", date(time))));
    facts
}

/// The runs, with those `parameters` of a sweep in which they differ.
fn overview(runs: &[SavedRun], parameters: &[String]) -> Table {
    let mut columns = vec![
        ("run", false),
        ("status", false),
        ("method", false),
        ("backbone", false),
        ("steps", true),
        ("epochs", true),
        ("linear top-1", true),
        ("kNN top-1", true),
        ("loss", true),
        ("time", true),
    ];
    let row = |(place, run): (usize, &SavedRun)| {
        let setting = |key: &str| Cell::Text(run.setting(key).unwrap_or(NOTHING).to_owned());
        let last =
            |metric: &str| Cell::Number(run.last(metric).map_or(NOTHING.to_owned(), |v| value_of(metric, v)));
        let parameter = |name: &String| {
            let value = run.trial.as_ref().and_then(|trial| trial.parameters.get(name));
            Cell::Number(value.map_or(NOTHING.to_owned(), in_figures))
        };
        let mut cells = vec![
            Cell::Run(place, run.name.clone()),
            Cell::Text(run.status.text().to_owned()),
            setting("method.name"),
            setting("backbone.name"),
            Cell::Number(steps(run)),
            Cell::Number(epochs(run)),
            last("eval/linear_top1_final"),
            last("eval/knn_top1"),
            last("train/loss"),
            Cell::Number(wall_time(run).map_or(NOTHING.to_owned(), span)),
        ];
        cells.splice(2..2, parameters.iter().map(parameter));
        cells
    };
    columns.splice(2..2, parameters.iter().map(|name| (name.as_str(), true)));
    let rows = runs.iter().enumerate().map(row).collect();
    Table::new("The runs, with their last figures", &columns, rows)
}

fn steps(run: &SavedRun) -> String {
    let step = count(run.step() as i64);
    match run.total_steps {
        Some(total) if run.status != Status::Done => format!("{step} of {}", count(total as i64)),
        _ => step,
    }
}

/// Epochs done, of those that are meant.
pub(super) fn epochs(run: &SavedRun) -> String {
    let epoch = format!("{:.2}", run.epoch());
    let epoch = epoch.trim_end_matches('0').trim_end_matches('.');
    match run.epochs() {
        Some(epochs) if run.epoch() < epochs as f64 => format!("{epoch} of {epochs}"),
        _ => epoch.to_owned(),
    }
}

fn wall_time(run: &SavedRun) -> Option<f64> {
    let times = || run.records.iter().filter_map(|record| record.time);
    Some(times().next_back()? - times().next()?).filter(|time| *time > 0.0)
}

fn images_seen(run: &SavedRun) -> Option<u64> {
    let number = |key: &str| run.setting(key)?.parse::<u64>().ok();
    run.step().checked_mul(number("optimizer.batch_size")?)?.checked_mul(number("trainer.accumulate")?)
}

fn section(out: &mut String, id: &str, title: &str, content: &str) {
    let _ = write!(
        out,
        "<section id=\"{id}\" aria-labelledby=\"{id}-title\">\n<h2 id=\"{id}-title\">{title}</h2>\n{content}</section>\n"
    );
}

/// `template` with each `{{name}}` replaced, once: what is put in is not looked at again.
fn fill(template: &str, value: &dyn Fn(&str) -> String) -> String {
    let mut parts = template.split("{{");
    let mut page = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, rest) = part.split_once("}}").expect("a place in the template is closed");
        page.push_str(&value(name));
        page.push_str(rest);
    }
    page
}
