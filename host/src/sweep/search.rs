//! What to try next.

use std::collections::BTreeMap;

use jepa_plugin_api::Rng;
use serde_json::Value;

use super::definition::{Definition, Method};
use super::distribution::Distribution;

/// Key of the numbers that trials are drawn from.
const PARAMETERS: u64 = 0x7377_6565_7000_0000;

/// The values of a trial, by the setting's name.
pub type Parameters = BTreeMap<String, Value>;

/// The trials of a sweep in order: the same ones for the same definition and seed, whenever they are asked for.
#[derive(Clone, Debug)]
pub enum Search {
    /// Every combination; the last parameter by name changes fastest.
    Grid(Vec<(String, Vec<Value>)>),
    /// Each parameter is drawn on its own, for ever.
    Random {
        /// What is drawn.
        parameters: BTreeMap<String, Distribution>,
        /// What the draws depend on.
        seed: u64,
    },
}

impl Search {
    /// The search that `definition` asks for.
    ///
    /// # Errors
    /// A parameter with endlessly many values in a grid.
    pub fn new(definition: &Definition, seed: u64) -> Result<Self, String> {
        let parameters = &definition.parameters;
        match definition.method {
            Method::Random => Ok(Search::Random { parameters: parameters.clone(), seed }),
            Method::Grid => {
                let axis = |(name, distribution): (&String, &Distribution)| match distribution.grid() {
                    Some(values) => Ok((name.clone(), without_repeats(values))),
                    None => Err(format!(
                        "parameters.{name} has no list of values, which method: grid needs (or too many of them): give values, whole min and \
                         max, or q_uniform; or use method: random"
                    )),
                };
                let axes: Vec<(String, Vec<Value>)> =
                    parameters.iter().map(axis).collect::<Result<_, _>>()?;
                let mut sizes = axes.iter().map(|(_, values)| values.len() as u64);
                match sizes.try_fold(1u64, |all, size| all.checked_mul(size)) {
                    Some(_) => Ok(Search::Grid(axes)),
                    None => {
                        Err("parameters have too many combinations for method: grid: use random".to_owned())
                    }
                }
            }
        }
    }

    /// How many trials there are; `None` when they do not end.
    pub fn len(&self) -> Option<u64> {
        match self {
            Search::Grid(axes) => Some(axes.iter().map(|(_, values)| values.len() as u64).product()),
            Search::Random { .. } => None,
        }
    }

    /// Whether there is no trial at all.
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// The trial of this number, from 0 on; `None` after the last one.
    pub fn trial(&self, number: u64) -> Option<Parameters> {
        match self {
            Search::Grid(axes) => {
                let mut rest = number;
                let mut parameters = Parameters::new();
                for (name, values) in axes.iter().rev() {
                    let count = values.len() as u64;
                    let value = values.get((rest.checked_rem(count)?) as usize)?;
                    parameters.insert(name.clone(), value.clone());
                    rest /= count;
                }
                (rest == 0).then_some(parameters)
            }
            Search::Random { parameters, seed } => {
                let draw = |(at, (name, distribution)): (usize, (&String, &Distribution))| {
                    let p = Rng::keyed(*seed, number, at as u64, PARAMETERS).unit();
                    (name.clone(), distribution.quantile(p))
                };
                Some(parameters.iter().enumerate().map(draw).collect())
            }
        }
    }
}

/// Equal values, 1 and 1.0 among them, are tried once.
fn without_repeats(values: Vec<Value>) -> Vec<Value> {
    let same = |a: &Value, b: &Value| match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    };
    let mut kept: Vec<Value> = Vec::new();
    for value in values {
        if !kept.iter().any(|other| same(other, &value)) {
            kept.push(value);
        }
    }
    kept
}
