//! What a parameter of a sweep may be, and how a value is drawn.

use serde::Deserialize;
use serde_json::{Map, Number, Value, json};
use statrs::distribution::{Beta, ContinuousCDF as _, Normal};

use super::definition::advised;
use crate::report::format::number as in_figures;

/// A parameter of a sweep, with W&B's names and meanings. Where a name begins with q, the number is rounded to a multiple
/// of `q`, and is a whole one if `q` is.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "distribution", rename_all = "snake_case", deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields are W&B's keys, and each variant says what they are")]
pub enum Distribution {
    /// Always the same.
    Constant { value: Value },
    /// Each value as likely as the others.
    Categorical { values: Vec<Value> },
    /// Each value with its probability; these add up to 1.
    CategoricalWProbabilities { values: Vec<Value>, probabilities: Vec<f64> },
    /// A whole number from `min` to `max`, both included.
    IntUniform { min: i64, max: i64 },
    /// A number from `min` to `max`.
    Uniform { min: f64, max: f64 },
    /// The logarithm is uniform from `min` to `max`.
    LogUniform { min: f64, max: f64 },
    /// From `min` to `max`, and its logarithm is uniform.
    LogUniformValues { min: f64, max: f64 },
    /// The logarithm of the inverse is uniform from `min` to `max`.
    InvLogUniform { min: f64, max: f64 },
    /// From `min` to `max`, and the logarithm of the inverse is uniform.
    InvLogUniformValues { min: f64, max: f64 },
    /// Normal, with mean and standard deviation.
    Normal {
        #[serde(default)]
        mu: f64,
        #[serde(default = "one")]
        sigma: f64,
    },
    /// The logarithm is normal.
    LogNormal {
        #[serde(default)]
        mu: f64,
        #[serde(default = "one")]
        sigma: f64,
    },
    /// Beta, with its two shapes.
    Beta {
        #[serde(default = "one")]
        a: f64,
        #[serde(default = "one")]
        b: f64,
    },
    /// [`Uniform`](Self::Uniform), rounded.
    QUniform {
        min: Number,
        max: Number,
        #[serde(default = "unit")]
        q: Number,
    },
    /// [`LogUniform`](Self::LogUniform), rounded.
    QLogUniform {
        min: f64,
        max: f64,
        #[serde(default = "unit")]
        q: Number,
    },
    /// [`LogUniformValues`](Self::LogUniformValues), rounded.
    QLogUniformValues {
        min: f64,
        max: f64,
        #[serde(default = "unit")]
        q: Number,
    },
    /// [`Normal`](Self::Normal), rounded.
    QNormal {
        #[serde(default)]
        mu: f64,
        #[serde(default = "one")]
        sigma: f64,
        #[serde(default = "unit")]
        q: Number,
    },
    /// [`LogNormal`](Self::LogNormal), rounded.
    QLogNormal {
        #[serde(default)]
        mu: f64,
        #[serde(default = "one")]
        sigma: f64,
        #[serde(default = "unit")]
        q: Number,
    },
    /// [`Beta`](Self::Beta), rounded.
    QBeta {
        #[serde(default = "one")]
        a: f64,
        #[serde(default = "one")]
        b: f64,
        #[serde(default = "unit")]
        q: Number,
    },
}

/// Nobody tries so many values one by one.
const LARGEST_GRID: i64 = 1_000_000;

fn one() -> f64 {
    1.0
}

fn unit() -> Number {
    Number::from_f64(1.0).expect("1 is finite")
}

impl Distribution {
    /// The distribution that an entry of the file describes. Where the entry names none, its keys tell.
    ///
    /// # Errors
    /// What is missing, too much, or impossible.
    pub(super) fn parse(mut entry: Map<String, Value>) -> Result<Self, String> {
        if !entry.contains_key("distribution") {
            let whole = |key| entry.get(key).is_some_and(Value::is_i64);
            let implied = match () {
                () if entry.contains_key("value") => "constant",
                () if entry.contains_key("probabilities") => "categorical_w_probabilities",
                () if entry.contains_key("values") => "categorical",
                () if whole("min") && whole("max") => "int_uniform",
                () if entry.contains_key("min") && entry.contains_key("max") => "uniform",
                () => return Err("it needs value, values, min and max, or a distribution".to_owned()),
            };
            entry.insert("distribution".to_owned(), json!(implied));
        } else if entry["distribution"] == "categorical" && entry.contains_key("probabilities") {
            entry.insert("distribution".to_owned(), json!("categorical_w_probabilities"));
        }
        let distribution: Self =
            serde_json::from_value(Value::Object(entry)).map_err(|error| advised(&error.to_string()))?;
        distribution.check()?;
        Ok(distribution)
    }

    /// Whether it has one value only.
    pub(super) fn is_constant(&self) -> bool {
        match self {
            Self::Constant { .. } => true,
            Self::Categorical { values } | Self::CategoricalWProbabilities { values, .. } => {
                values.len() == 1
            }
            _ => false,
        }
    }

    /// What was probably meant otherwise: bounds that are exponents, and look like the values themselves.
    pub(super) fn doubt(&self) -> Option<String> {
        let (Self::LogUniform { min, max } | Self::QLogUniform { min, max, .. }) = self else { return None };
        let [from, to, from_exp, to_exp] = [*min, *max, min.exp(), max.exp()].map(in_figures);
        (*min > 0.0 && (*min < 0.1 || *max <= 1.0 || *max > 30.0)).then(|| {
            format!(
                "min and max of log_uniform are exponents, and give values from {from_exp} to {to_exp}: for values from \
                 {from} to {to} use log_uniform_values"
            )
        })
    }

    fn check(&self) -> Result<(), String> {
        let ensure = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_owned()) };
        match self {
            Self::Constant { .. } => Ok(()),
            Self::Categorical { values } => ensure(!values.is_empty(), "values is empty"),
            Self::CategoricalWProbabilities { values, probabilities } => {
                ensure(!values.is_empty(), "values is empty")?;
                ensure(values.len() == probabilities.len(), "values and probabilities differ in length")?;
                let sum: f64 = probabilities.iter().sum();
                let possible = (sum - 1.0).abs() < 1e-6 && probabilities.iter().all(|p| *p >= 0.0);
                ensure(possible, "probabilities must add up to 1, and none may be negative")
            }
            Self::IntUniform { min, max } => {
                ensure(min <= max, "min is greater than max")?;
                let size = i128::from(*max) - i128::from(*min);
                ensure(size < i128::from(u32::MAX), "there are more than four thousand million numbers in it")
            }
            Self::Uniform { min, max } => ensure(min <= max, "min is greater than max"),
            Self::LogUniform { min, max } | Self::InvLogUniform { min, max } => {
                ensure(min <= max, "min is greater than max")?;
                let finite = [min, max, &-min, &-max].iter().all(|end| end.exp().is_finite());
                ensure(
                    finite,
                    "min and max are logarithms here, and too large: use the distribution with _values",
                )
            }
            Self::LogUniformValues { min, max } | Self::InvLogUniformValues { min, max } => {
                ensure(*min > 0.0, "min must be greater than 0: this is no logarithm but the value itself")?;
                ensure(min <= max, "min is greater than max")
            }
            Self::Normal { mu, sigma } | Self::LogNormal { mu, sigma } => {
                Normal::new(*mu, *sigma).map(drop).map_err(|error| error.to_string())
            }
            Self::Beta { a, b } => Beta::new(*a, *b).map(drop).map_err(|error| error.to_string()),
            Self::QUniform { q, .. }
            | Self::QLogUniform { q, .. }
            | Self::QLogUniformValues { q, .. }
            | Self::QNormal { q, .. }
            | Self::QLogNormal { q, .. }
            | Self::QBeta { q, .. } => {
                ensure(float(q) > 0.0, "q must be greater than 0")?;
                self.unrounded().map_or(Ok(()), |(unrounded, _)| unrounded.check())
            }
        }
    }

    /// What is drawn before it is rounded to a multiple of the second.
    fn unrounded(&self) -> Option<(Self, &Number)> {
        Some(match self {
            Self::QUniform { min, max, q } => (Self::Uniform { min: float(min), max: float(max) }, q),
            Self::QLogUniform { min, max, q } => (Self::LogUniform { min: *min, max: *max }, q),
            Self::QLogUniformValues { min, max, q } => (Self::LogUniformValues { min: *min, max: *max }, q),
            Self::QNormal { mu, sigma, q } => (Self::Normal { mu: *mu, sigma: *sigma }, q),
            Self::QLogNormal { mu, sigma, q } => (Self::LogNormal { mu: *mu, sigma: *sigma }, q),
            Self::QBeta { a, b, q } => (Self::Beta { a: *a, b: *b }, q),
            _ => return None,
        })
    }

    /// The value below which a share `p` of all draws lies: a draw, when `p` is drawn from 0 to 1.
    pub fn quantile(&self, p: f64) -> Value {
        if let Some((unrounded, q)) = self.unrounded() {
            let value = unrounded.quantile(p).as_f64().unwrap_or(f64::NAN);
            return decimal((value / float(q)).round_ties_even() * float(q), &[q]);
        }
        let between = |min: f64, max: f64| min + p * (max - min);
        let normal = |mu, sigma| Normal::new(mu, sigma).expect("it was checked").inverse_cdf(p);
        let value = match self {
            Self::Constant { value } => return value.clone(),
            Self::Categorical { values } => return values[part(p, values.len())].clone(),
            Self::CategoricalWProbabilities { values, probabilities } => {
                let sums = probabilities.iter().scan(0.0, |sum, probability| {
                    *sum += probability;
                    Some(*sum)
                });
                let passed = sums.take_while(|sum| p >= *sum).count();
                return values[passed.min(values.len() - 1)].clone();
            }
            Self::IntUniform { min, max } => return json!(min + part(p, (max - min + 1) as usize) as i64),
            Self::Uniform { min, max } => between(*min, *max),
            Self::LogUniform { min, max } => between(*min, *max).exp(),
            Self::LogUniformValues { min, max } => between(min.ln(), max.ln()).exp(),
            Self::InvLogUniform { min, max } => (-between(*max, *min)).exp(),
            Self::InvLogUniformValues { min, max } => between(min.ln(), max.ln()).exp(),
            Self::Normal { mu, sigma } => normal(*mu, *sigma),
            Self::LogNormal { mu, sigma } => normal(*mu, *sigma).exp(),
            Self::Beta { a, b } => Beta::new(*a, *b).expect("it was checked").inverse_cdf(p),
            _ => unreachable!("rounded ones are done"),
        };
        json!(value)
    }

    /// All values in order, where there are not too many to try one by one. Those of `q_uniform` begin at `min` and
    /// leave `max` out.
    pub fn grid(&self) -> Option<Vec<Value>> {
        match self {
            Self::Constant { value } => Some(vec![value.clone()]),
            Self::Categorical { values } => Some(values.clone()),
            Self::IntUniform { min, max } if max - min < LARGEST_GRID => {
                Some((*min..=*max).map(|value| json!(value)).collect())
            }
            Self::QUniform { min, max, q } => {
                let count = ((float(max) - float(min)) / float(q)).ceil().max(0.0) as i64;
                (count < LARGEST_GRID).then(|| {
                    (0..count).map(|i| decimal(float(min) + i as f64 * float(q), &[min, q, max])).collect()
                })
            }
            _ => None,
        }
    }
}

/// Which of `count` equal parts of 0 to 1 holds `p`.
fn part(p: f64, count: usize) -> usize {
    ((p * count as f64).ceil() as usize).clamp(1, count) - 1
}

fn float(number: &Number) -> f64 {
    number.as_f64().expect("a JSON number is a float, too")
}

/// `value`, made of `parts`, with no more decimal places than they have: 0.3 and not 0.30000000000000004. A whole number
/// if they are.
fn decimal(value: f64, parts: &[&Number]) -> Value {
    if parts.iter().all(|part| part.is_i64()) {
        return json!(value as i64);
    }
    let places =
        |part: &&Number| float(part).to_string().split_once('.').map_or(0, |(_, places)| places.len());
    let places = parts.iter().map(places).max().unwrap_or(0);
    json!(format!("{value:.places$}").parse().unwrap_or(value))
}
