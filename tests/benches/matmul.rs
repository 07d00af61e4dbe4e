//! The products of ResNet-50's 1×1 convolutions at batch 8 and 224 px, forward, to the input's gradient and to the weights'
//! gradient, with what packing the weights takes: GFLOP/s on all threads.

use std::time::Instant;

use jepa_plugin_api::matmul::{self, Layout, Packed, Rows};
use jepa_plugin_api::memory::{filled, values};
use jepa_plugin_api::tch::{self, Device, Kind, Tensor};

fn main() {
    let threads: i32 = std::env::var("THREADS").map_or(2, |threads| threads.parse().expect("a number"));
    tch::set_num_threads(threads);
    println!("GFLOP/s, {threads} threads\n");
    println!(
        "| positions | channels | forward | to the input | to the weights | packing, share of forward |"
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    for (positions, inputs, outputs) in [
        (25088, 64, 256),
        (25088, 256, 64),
        (6272, 128, 512),
        (6272, 512, 128),
        (1568, 256, 1024),
        (1568, 1024, 256),
        (392, 512, 2048),
        (392, 2048, 512),
    ] {
        let random =
            |shape: [usize; 2]| Tensor::randn(shape.map(|side| side as i64), (Kind::Float, Device::Cpu));
        let (x, weight) = (random([positions, inputs]), random([outputs, inputs]));
        let grad = random([positions, outputs]);
        let starts = |length: usize| (0..positions).map(|i| i * length).collect::<Vec<_>>();
        let (of_x, of_grad) = (starts(inputs), starts(outputs));
        let rows = |values, starts, length| Rows { values, starts, pieces: 1, length, pitch: 0 };
        let layout = Layout::linear(outputs, inputs);
        let forward = || {
            let packed = Packed::new(values(&weight), &layout);
            drop(matmul::product(rows(values(&x), &of_x, inputs), &packed, None));
        };
        let pack = || drop(Packed::new(values(&weight), &layout));
        let to_input = || {
            let packed = Packed::new(values(&weight), &Layout::linear_transposed(outputs, inputs));
            drop(matmul::product(rows(values(&grad), &of_grad, outputs), &packed, None));
        };
        let to_weight = || {
            let rows = rows(values(&x), &of_x, inputs);
            drop(filled(&weight.size(), |out| matmul::gradient(rows, values(&grad), &layout, out)));
        };
        let work = 2e-9 * (positions * inputs * outputs) as f64;
        let [forward, pack, to_input, to_weight] =
            [seconds(&forward), seconds(&pack), seconds(&to_input), seconds(&to_weight)];
        println!(
            "| {positions} | {inputs} to {outputs} | {:.0} | {:.0} | {:.0} | {:.0} % |",
            work / forward,
            work / to_input,
            work / to_weight,
            100.0 * pack / forward,
        );
    }
}

/// Median of some calls.
fn seconds(call: &dyn Fn()) -> f64 {
    let mut times: Vec<f64> = (0..25)
        .map(|_| {
            let begin = Instant::now();
            call();
            begin.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
