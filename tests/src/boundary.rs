//! The same method with the same backbone, linked into this program and loaded from their plugin files, step by step in
//! turns: what the boundary costs.

use std::path::Path;
use std::time::Instant;

use jepa_host::plugin::{Admission, open};
use jepa_plugin_api::abi::MethodHandle;
use jepa_plugin_api::testing::{self, LinkedMethod};
use jepa_plugin_api::{Backbone as _, Batch, Method, RunFacts, tch};
use serde_json::Value;
use sparse_resnet::ResNet;
use tch::{Device, Kind, Tensor};

use crate::real::plugin;

/// A method with its options, a ResNet-18, and the views of a step.
pub struct Case {
    /// Name of the method's plugin file.
    pub plugin: &'static str,
    /// Name of the method.
    pub method: &'static str,
    /// Options of the method.
    pub options: Value,
    /// Options of the backbone.
    pub backbone: Value,
    /// Number of views.
    pub views: usize,
    /// Side of an image.
    pub size: i64,
    /// Images in a batch.
    pub batch: i64,
}

/// Microseconds of a step, forward and backward.
pub struct Cost {
    /// Without the boundary, in the middle.
    pub linked: f64,
    /// Through the boundary, in the middle.
    pub loaded: f64,
    /// Loaded less linked, of each pair of steps: the lower quartile, the middle, and the upper quartile.
    pub difference: [f64; 3],
}

/// Times `rounds` pairs of steps.
///
/// # Panics
/// When the plugins are not built, or do not train.
pub fn compare<M: Method>(case: &Case, rounds: usize) -> Cost {
    let (mut linked, mut loaded) = (linked::<M>(case), loaded(case));
    let mut times = [Vec::new(), Vec::new()];
    let warm_up = 50;
    for round in 0..rounds + warm_up {
        // Who goes second finds warmer caches: each does so as often.
        for who in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
            let batch = batch(case);
            let begun = Instant::now();
            let step = match who {
                0 => linked.method.step(&batch).expect("it trains"),
                _ => loaded.step(batch).expect("it trains"),
            };
            step.loss.backward();
            drop(step);
            if round >= warm_up {
                times[who].push(begun.elapsed().as_secs_f64() * 1e6);
            }
        }
    }
    let mut differences: Vec<f64> = times[1].iter().zip(&times[0]).map(|(a, b)| a - b).collect();
    let difference = [0.25, 0.5, 0.75].map(|share| quantile(&mut differences, share));
    let [linked, loaded] = times.map(|mut times| quantile(&mut times, 0.5));
    Cost { linked, loaded, difference }
}

fn facts(case: &Case) -> RunFacts {
    RunFacts { image_size: case.size, batch_size: case.batch, ..testing::facts() }
}

fn linked<M: Method>(case: &Case) -> LinkedMethod<M> {
    let options = case.backbone.clone();
    let backbone =
        move |params: &_| ResNet::new("resnet18", serde_json::from_value(options.clone())?, params);
    testing::method(case.options.clone(), facts(case), backbone).expect("it is built")
}

fn loaded(case: &Case) -> MethodHandle {
    let open = |path: &Path| open(path, &Admission::default()).expect("the plugin is built").plugin;
    let (methods, backbones) = (open(&plugin(case.plugin)), open(&plugin("sparse_resnet")));
    let options = case.backbone.clone();
    let backbone = Box::new(move || backbones.build_backbone("resnet18", &options, "cpu"));
    methods.build_method(case.method, &case.options, facts(case), backbone).expect("it is built")
}

fn batch(case: &Case) -> Batch {
    let view = || Tensor::randn([case.batch, 3, case.size, case.size], (Kind::Float, Device::Cpu));
    testing::batch((0..case.views).map(|_| view()).collect())
}

fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * share).round() as usize]
}
