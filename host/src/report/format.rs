//! Numbers, spans and dates as papers and people write them. The page's script has the same rules for charts.

use serde_json::Value;
use time::OffsetDateTime;

/// How the values of a metric are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A share of 1, written in percent: accuracies, the wait for data.
    Percent,
    /// A whole number.
    Count,
    /// Four significant digits.
    Number,
}

/// How `metric` is written.
pub fn kind_of(metric: &str) -> Kind {
    let name = metric.rsplit('/').next().unwrap_or(metric);
    let is_share =
        ["top1", "top5", "accuracy", "_share", "rank_ratio", "data_wait", "top1_final", "top5_final"];
    match name {
        "rank" | "replaced" => Kind::Count,
        _ if is_share.iter().any(|end| name.ends_with(end)) => Kind::Percent,
        _ => Kind::Number,
    }
}

/// `value` of `metric`, such as `67.50 %`, `128`, `0.1415`, `2.0e-6`.
pub fn value_of(metric: &str, value: f64) -> String {
    match kind_of(metric) {
        Kind::Percent => percent(value),
        Kind::Count => count(value.round() as i64),
        Kind::Number => number(value),
    }
}

/// A share as `67.50 %`.
pub fn percent(share: f64) -> String {
    format!("{:.2}\u{a0}%", 100.0 * share)
}

/// Four significant digits; beyond 10,000 none after the point, and below 0.001 a power of ten.
pub fn number(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 {
        "0".to_owned()
    } else if !(1e-3..1e7).contains(&size) {
        format!("{value:.2e}")
    } else {
        let places = (3 - size.log10().floor() as i32).clamp(0, 6) as usize;
        let text = format!("{value:.places$}");
        match text.split_once('.') {
            None => count(value.round() as i64),
            Some((whole, rest)) => format!("{}.{rest}", with_commas(whole)),
        }
    }
}

/// A parameter of a trial: numbers that are no whole ones with four significant digits.
pub fn in_figures(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(value) if value.is_f64() => value.as_f64().map_or_else(String::new, number),
        value => value.to_string(),
    }
}

/// Seconds in milliseconds, three digits: `0.02`, `4.56`, `12.3`, `1,234`.
pub fn milliseconds(seconds: f64) -> String {
    let ms = 1e3 * seconds;
    match ms {
        ..10.0 => format!("{ms:.2}"),
        ..100.0 => format!("{ms:.1}"),
        _ => count(ms.round() as i64),
    }
}

/// A whole number as `60,000`.
pub fn count(value: i64) -> String {
    with_commas(&value.to_string())
}

fn with_commas(digits: &str) -> String {
    let (sign, digits) = digits.strip_prefix('-').map_or(("", digits), |digits| ("-", digits));
    let mut text = String::from(sign);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 image`, `2 images`.
pub fn plural(value: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(value as i64), if value == 1 { "" } else { "s" })
}

/// A span in its two greatest units: `45 s`, `4 min 12 s`, `3 h 5 min`, `2 d 7 h`.
pub fn span(seconds: f64) -> String {
    let s = seconds.max(0.0).round() as u64;
    let two = |great: u64, unit: &str, small: u64, small_unit: &str| match small {
        0 => format!("{great} {unit}"),
        _ => format!("{great} {unit} {small} {small_unit}"),
    };
    match s {
        0..60 => format!("{s} s"),
        60..3600 => two(s / 60, "min", s % 60, "s"),
        3600..86400 => two(s / 3600, "h", s % 3600 / 60, "min"),
        _ => two(s / 86400, "d", s % 86400 / 3600, "h"),
    }
}

/// How long ago, in its greatest unit: `12 s ago`, `3 h ago`.
pub fn ago(seconds: f64) -> String {
    let s = seconds.max(0.0) as u64;
    match s {
        0..60 => format!("{s} s ago"),
        60..3600 => format!("{} min ago", s / 60),
        3600..172_800 => format!("{} h ago", s / 3600),
        _ => format!("{} d ago", s / 86400),
    }
}

/// `2026-11-25 09:31 UTC`.
pub fn date(unix_s: f64) -> String {
    match OffsetDateTime::from_unix_timestamp(unix_s as i64) {
        Ok(t) => format!(
            "{}-{:02}-{:02} {:02}:{:02} UTC",
            t.year(),
            u8::from(t.month()),
            t.day(),
            t.hour(),
            t.minute()
        ),
        Err(_) => "an unknown time".to_owned(),
    }
}

/// What people call a metric: `eval/linear_top1_final` is `linear top-1, final`.
pub fn name_of(metric: &str) -> String {
    let known = match metric {
        "eval/linear_top1" => "linear top-1",
        "eval/linear_top5" => "linear top-5",
        "eval/linear_top1_final" => "linear top-1, final",
        "eval/linear_top5_final" => "linear top-5, final",
        "eval/knn_top1" => "kNN top-1",
        "eval/knn_top5" => "kNN top-5",
        "eval/contrastive_accuracy" => "contrastive accuracy",
        "eval/rankme" => "RankMe",
        "eval/rank" => "rank",
        "eval/rank_ratio" => "rank ratio",
        "eval/spread" => "spread",
        "eval/std" => "standard deviation",
        "eval/correlation" => "correlation",
        "eval/anisotropy" => "anisotropy",
        "train/loss" => "training loss",
        "val/loss" => "held-out loss",
        "train/lr" => "learning rate",
        "train/grad_norm" => "gradient norm",
        "train/ema_momentum" => "EMA momentum",
        "train/weight_decay" => "weight decay",
        "train/images_per_s" => "images per second",
        "train/data_wait" => "wait for data",
        "train/replaced" => "replaced images",
        "time/wait" => "wait for data",
        "time/copy" => "copy to device",
        "time/forward" => "forward",
        "time/backward" => "backward",
        "time/optimizer" => "optimizer",
        "time/ema" => "EMA",
        "time/exchange" => "exchange gradients",
        "time/sync" => "wait for device",
        "time/log" => "log",
        "time/read" => "read, beside the step",
        "time/decode" => "decode, beside the step",
        "time/augment" => "augment, beside the step",
        other => other,
    };
    known.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_as_in_a_paper() {
        let cases = [
            ("train/loss", 0.141_544_669, "0.1415"),
            ("train/loss", -17.198_29, "-17.20"),
            ("train/lr", 2e-6, "2.00e-6"),
            ("train/images_per_s", 12_345.6, "12,346"),
            ("train/images_per_s", 2_547.79, "2,548"),
            ("eval/linear_top1_final", 0.675, "67.50\u{a0}%"),
            ("eval/rank", 128.0, "128"),
            ("eval/rankme", 0.0, "0"),
        ];
        for (metric, value, text) in cases {
            assert_eq!(value_of(metric, value), text, "{metric}");
        }
        assert_eq!(
            (span(45.4), span(252.0), span(7200.0)),
            ("45 s".into(), "4 min 12 s".into(), "2 h".into())
        );
        let ms = [0.000_02, 0.004_56, 0.012_34, 1.234].map(milliseconds);
        assert_eq!(ms, ["0.02", "4.56", "12.3", "1,234"]);
        assert_eq!(date(1_795_598_460.2), "2026-11-25 09:21 UTC");
    }
}
