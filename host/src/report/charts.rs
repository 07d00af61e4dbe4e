//! The figures that the page's script draws: which metrics share a chart, which charts share a group, and the points.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::format::{Kind, kind_of, name_of};
use super::html::letter;
use super::run::SavedRun;

/// More points than this in one line are more than a screen has; of those between, the least and the greatest stay.
const POINTS: usize = 1600;

/// All that the script needs.
#[derive(Debug, Serialize)]
pub struct Charts {
    runs: Vec<Run>,
    groups: Vec<Group>,
}

/// A run's lines.
#[derive(Debug, Serialize)]
struct Run {
    letter: String,
    name: String,
    step: Vec<u64>,
    epoch: Vec<f64>,
    /// Hours since the first record that has a time.
    hours: Vec<Option<f64>>,
    lines: BTreeMap<String, Line>,
}

/// Values, and the places of their records.
#[derive(Debug, Serialize)]
struct Line {
    at: Vec<usize>,
    value: Vec<f64>,
    /// How many values there are in all.
    of: usize,
}

#[derive(Debug, Serialize)]
struct Group {
    name: String,
    charts: Vec<Chart>,
}

#[derive(Debug, Serialize)]
struct Chart {
    name: String,
    kind: Kind,
    /// The second line is dashed.
    lines: Vec<Part>,
}

#[derive(Debug, Serialize)]
struct Part {
    metric: String,
    label: String,
}

impl Charts {
    /// The charts of `runs`.
    pub fn of(runs: &[SavedRun]) -> Self {
        let mut metrics: BTreeSet<&str> = runs.iter().flat_map(SavedRun::metrics).collect();
        // Nearly always there were none, and a line at zero says nothing.
        if runs.iter().all(|run| run.series("train/replaced").all(|(_, images)| images == 0.0)) {
            metrics.remove("train/replaced");
        }
        let runs = runs.iter().enumerate().map(|(place, run)| Run::of(place, run)).collect();
        Charts { runs, groups: groups(metrics) }
    }

    /// Whether there is nothing to draw.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }
}

impl Run {
    fn of(place: usize, run: &SavedRun) -> Self {
        let lines = run.metrics().into_iter().map(|metric| (metric.to_owned(), Line::of(run, metric)));
        let start = run.records.iter().find_map(|record| record.time);
        let hours = |time: Option<f64>| Some(short((time? - start?) / 3600.0));
        Run {
            letter: letter(place),
            name: run.name.clone(),
            step: run.records.iter().map(|record| record.step).collect(),
            epoch: run.records.iter().map(|record| short(record.epoch)).collect(),
            hours: run.records.iter().map(|record| hours(record.time)).collect(),
            lines: lines.collect(),
        }
    }
}

impl Line {
    fn of(run: &SavedRun, metric: &str) -> Self {
        let all = run.records.iter().enumerate();
        let all: Vec<(usize, f64)> =
            all.filter_map(|(at, record)| Some((at, *record.figures.get(metric)?))).collect();
        let kept = thin(&all, POINTS);
        Line {
            at: kept.iter().map(|(at, _)| *at).collect(),
            value: kept.iter().map(|(_, value)| short(*value)).collect(),
            of: all.len(),
        }
    }
}

/// At most about `most` of `points`: the least and the greatest of each stretch, and both ends.
fn thin(points: &[(usize, f64)], most: usize) -> Vec<(usize, f64)> {
    if points.len() <= most {
        return points.to_vec();
    }
    let mut kept = vec![points[0]];
    for part in points.chunks(points.len().div_ceil(most / 2)) {
        let least = part.iter().min_by(|a, b| a.1.total_cmp(&b.1));
        let greatest = part.iter().max_by(|a, b| a.1.total_cmp(&b.1));
        let mut both: Vec<_> = least.into_iter().chain(greatest).copied().collect();
        both.sort_by_key(|point| point.0);
        kept.extend(both);
    }
    kept.push(points[points.len() - 1]);
    kept.dedup();
    kept.dedup_by_key(|point| point.0);
    kept
}

/// Six significant digits, for a smaller page.
fn short(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// Groups in the order in which they are read.
fn groups(metrics: BTreeSet<&str>) -> Vec<Group> {
    const HOST: [(&str, &[&[&str]]); 6] = [
        (
            "Loss and probes",
            &[
                &["train/loss", "val/loss"],
                &["eval/linear_top1_final", "eval/linear_top1"],
                &["eval/knn_top1"],
                &["eval/linear_top5_final", "eval/linear_top5"],
                &["eval/knn_top5"],
                &["eval/contrastive_accuracy"],
            ],
        ),
        (
            "Collapse",
            &[
                &["eval/rankme"],
                &["eval/spread"],
                &["eval/std"],
                &["eval/rank"],
                &["eval/rank_ratio"],
                &["eval/correlation"],
                &["eval/anisotropy"],
            ],
        ),
        (
            "Optimisation",
            &[&["train/lr"], &["train/grad_norm"], &["train/ema_momentum"], &["train/weight_decay"]],
        ),
        ("Speed", &[&["train/images_per_s"], &["train/data_wait"], &["train/replaced"]]),
        (
            "Seconds of a step",
            &[
                &["time/wait"],
                &["time/copy"],
                &["time/forward"],
                &["time/backward"],
                &["time/optimizer"],
                &["time/ema"],
                &["time/sync"],
                &["time/log"],
                &["time/read"],
                &["time/decode"],
                &["time/augment"],
            ],
        ),
        // Metrics of methods and of plugins' probes come between, and by name.
        ("Other", &[]),
    ];
    let mut left = metrics;
    let mut groups: Vec<Group> = HOST
        .into_iter()
        .map(|(name, charts)| {
            let present = |metrics: &&[&str]| metrics.iter().any(|metric| left.contains(metric));
            let charts: Vec<Chart> =
                charts.iter().copied().filter(present).map(|m| chart(m, &left)).collect();
            Group { name: name.to_owned(), charts }
        })
        .collect();
    let drawn = groups.iter().flat_map(|group| &group.charts).flat_map(|chart| &chart.lines);
    let drawn: Vec<String> = drawn.map(|part| part.metric.clone()).collect();
    drawn.iter().for_each(|metric| {
        left.remove(metric.as_str());
    });

    let mut of_methods: BTreeMap<&str, Vec<Chart>> = BTreeMap::new();
    let other = groups.last_mut().expect("there are groups");
    for metric in &left {
        let parts: Vec<&str> = metric.split('/').collect();
        match parts.as_slice() {
            ["train", method, name] => {
                let held_out = format!("val/{method}/{name}");
                let both = [*metric, held_out.as_str()];
                of_methods
                    .entry(method)
                    .or_default()
                    .push(Chart { name: (*name).to_owned(), ..chart(&both, &left) });
            }
            ["val", method, name] if left.contains(format!("train/{method}/{name}").as_str()) => {}
            _ => other.charts.push(chart(&[metric], &left)),
        }
    }
    let of_methods =
        of_methods.into_iter().map(|(name, charts)| Group { name: format!("Method {name}"), charts });
    groups.splice(1..1, of_methods);
    groups.retain(|group| !group.charts.is_empty());
    groups
}

fn chart(metrics: &[&str], present: &BTreeSet<&str>) -> Chart {
    let label = |metric: &str| match metric {
        "eval/linear_top1" | "eval/linear_top5" => "best of its epochs",
        "eval/linear_top1_final" | "eval/linear_top5_final" => "last epoch",
        _ if metric.starts_with("train/") => "training",
        _ if metric.starts_with("val/") => "held out",
        _ => "",
    };
    let here: Vec<&str> = metrics.iter().copied().filter(|metric| present.contains(metric)).collect();
    let name = match here.as_slice() {
        ["train/loss" | "val/loss", ..] => "loss".to_owned(),
        ["eval/linear_top1_final" | "eval/linear_top1", ..] => name_of("eval/linear_top1"),
        ["eval/linear_top5_final" | "eval/linear_top5", ..] => name_of("eval/linear_top5"),
        [first, ..] => name_of(first),
        [] => String::new(),
    };
    Chart {
        name,
        kind: here.first().map_or(Kind::Number, |metric| kind_of(metric)),
        lines: here.iter().map(|m| Part { metric: (*m).to_owned(), label: label(m).to_owned() }).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_keeps_its_ends_and_its_spikes() {
        let mut points: Vec<(usize, f64)> = (0..100_000).map(|at| (at, (at as f64).sin())).collect();
        points[54_321].1 = 99.0;
        let thinned = thin(&points, POINTS);
        assert!(thinned.len() <= POINTS + 2, "{}", thinned.len());
        assert!(thinned.contains(&(54_321, 99.0)));
        assert_eq!((thinned[0].0, thinned[thinned.len() - 1].0), (0, 99_999));
        assert!(thinned.is_sorted_by(|a, b| a.0 < b.0));
    }

    #[test]
    fn every_metric_is_in_one_chart() {
        let metrics =
            ["train/loss", "val/loss", "train/byol/a", "val/byol/a", "val/byol/b", "eval/mine", "x"];
        let groups = groups(BTreeSet::from(metrics));
        let drawn = groups.iter().flat_map(|g| &g.charts).flat_map(|c| &c.lines).map(|p| p.metric.as_str());
        let mut drawn: Vec<&str> = drawn.collect();
        drawn.sort_unstable();
        let mut all = metrics;
        all.sort_unstable();
        assert_eq!(drawn, all);
        let names: Vec<&str> = groups.iter().map(|group| group.name.as_str()).collect();
        assert_eq!(names, ["Loss and probes", "Method byol", "Other"]);
    }
}
