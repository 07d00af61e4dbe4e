//! What the boundary costs: the same method with the same backbone, linked into this program and loaded from their plugin
//! files, step by step in turns.

use std::path::Path;
use std::time::Instant;

use jepa_host::plugin::{Admission, open};
use jepa_plugin_api::abi::MethodHandle;
use jepa_plugin_api::testing::{self, LinkedMethod};
use jepa_plugin_api::{Backbone as _, Batch, Method as _, RunFacts, Step, tch};
use jepa_tests::real::plugin;
use serde_json::{Value, json};
use simclr::SimClr;
use sparse_resnet::ResNet;
use tch::{Device, Kind, Tensor};

const ROUNDS: usize = 1000;

struct Case {
    name: &'static str,
    backbone: Value,
    size: i64,
    batch: i64,
}

fn main() {
    tch::set_num_threads(1);
    println!("| SimCLR, one thread, forward and backward | linked | loaded | difference | share |");
    println!("| --- | --- | --- | --- | --- |");
    for case in [
        Case {
            name: "ResNet-18, width 4, depths [1, 1], 16 px, batch 4",
            backbone: json!({ "stem": "small", "width": 4, "depths": [1, 1] }),
            size: 16,
            batch: 4,
        },
        Case {
            name: "ResNet-18, width 16, depths [1, 1, 1], 32 px, batch 8",
            backbone: json!({ "stem": "small", "width": 16, "depths": [1, 1, 1] }),
            size: 32,
            batch: 8,
        },
    ] {
        let (mut linked, mut loaded) = (linked(&case), loaded(&case));
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..ROUNDS + 50 {
            // Who goes second finds warmer caches: each does so as often.
            let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
            for who in order {
                let batch = batch(&case);
                let begun = Instant::now();
                let step = match who {
                    0 => linked.method.step(&batch).expect("it trains"),
                    _ => loaded.step(batch).expect("it trains"),
                };
                differentiate(step);
                if round >= 50 {
                    times[who].push(begun.elapsed().as_secs_f64() * 1e6);
                }
            }
        }
        let mut differences: Vec<f64> = times[1].iter().zip(&times[0]).map(|(a, b)| a - b).collect();
        let (linked, loaded) = (median(&mut times[0]), median(&mut times[1]));
        let difference = median(&mut differences);
        let share = 100.0 * difference / linked;
        println!("| {} | {linked:.1} µs | {loaded:.1} µs | {difference:+.1} µs | {share:+.2} % |", case.name);
    }
}

fn differentiate(step: Step) {
    step.loss.backward();
}

fn facts(case: &Case) -> RunFacts {
    RunFacts { image_size: case.size, batch_size: case.batch, ..testing::facts() }
}

fn options() -> Value {
    json!({ "hidden": 16, "output": 8 })
}

fn linked(case: &Case) -> LinkedMethod<SimClr> {
    let options_of_backbone = case.backbone.clone();
    let backbone = move |params: &_| {
        ResNet::new("resnet18", serde_json::from_value(options_of_backbone.clone())?, params)
    };
    testing::method(options(), facts(case), backbone).expect("it is built")
}

fn loaded(case: &Case) -> MethodHandle {
    let open = |path: &Path| open(path, &Admission::default()).expect("the plugin is built").plugin;
    let (methods, backbones) = (open(&plugin("simclr")), open(&plugin("sparse_resnet")));
    let options_of_backbone = case.backbone.clone();
    let backbone = Box::new(move || backbones.build_backbone("resnet18", &options_of_backbone, "cpu"));
    methods.build_method("simclr", &options(), facts(case), backbone).expect("it is built")
}

fn batch(case: &Case) -> Batch {
    let view = || Tensor::randn([case.batch, 3, case.size, case.size], (Kind::Float, Device::Cpu));
    testing::batch(vec![view(), view()])
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
