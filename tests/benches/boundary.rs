//! What the boundary costs: the same method with the same backbone, linked into this program and loaded from their plugin
//! files, step by step in turns.

use std::path::Path;
use std::time::Instant;

use faulty_plugin::Faulty;
use jepa_host::plugin::{Admission, open};
use jepa_plugin_api::abi::MethodHandle;
use jepa_plugin_api::testing::{self, LinkedMethod};
use jepa_plugin_api::{Backbone as _, Batch, Method, RunFacts, tch};
use jepa_tests::real::plugin;
use serde_json::{Value, json};
use simclr::SimClr;
use sparse_resnet::ResNet;
use tch::{Device, Kind, Tensor};

const ROUNDS: usize = 1000;

/// A method with its options, a ResNet-18, and the views of a step.
struct Case {
    what: &'static str,
    plugin: &'static str,
    method: &'static str,
    options: Value,
    backbone: Value,
    views: usize,
    size: i64,
    batch: i64,
}

fn main() {
    tch::set_num_threads(1);
    println!("| forward and backward, one thread | linked | loaded | difference | share |");
    println!("| --- | --- | --- | --- | --- |");
    let heads = json!({ "hidden": 16, "output": 8 });
    compare::<Faulty>(&Case {
        what: "a step that does next to nothing: the mean colour of 8 images",
        plugin: "faulty_plugin",
        method: "faulty",
        options: json!({}),
        backbone: json!({ "stem": "small", "width": 4, "depths": [1] }),
        views: 1,
        size: 16,
        batch: 8,
    });
    compare::<SimClr>(&Case {
        what: "SimCLR, ResNet-18 of width 16 and depths [1, 1, 1], 8 images of 32 px",
        plugin: "simclr",
        method: "simclr",
        options: heads,
        backbone: json!({ "stem": "small", "width": 16, "depths": [1, 1, 1] }),
        views: 2,
        size: 32,
        batch: 8,
    });
}

fn compare<M: Method>(case: &Case) {
    let (mut linked, mut loaded) = (linked::<M>(case), loaded(case));
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..ROUNDS + 50 {
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
            if round >= 50 {
                times[who].push(begun.elapsed().as_secs_f64() * 1e6);
            }
        }
    }
    let mut differences: Vec<f64> = times[1].iter().zip(&times[0]).map(|(a, b)| a - b).collect();
    let (linked, loaded, difference) =
        (median(&mut times[0]), median(&mut times[1]), median(&mut differences));
    let share = 100.0 * difference / linked;
    println!("| {} | {linked:.1} µs | {loaded:.1} µs | {difference:+.1} µs | {share:+.2} % |", case.what);
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

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
