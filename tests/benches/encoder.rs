//! Forward and backward of an encoder, dense and over a share of its cells: one JSON object, for benches/encoder.py.
//!
//!     cargo bench -p jepa-tests --bench encoder -- BACKBONE BATCH SIZE THREADS ROUNDS SHARE…

use std::time::Instant;

use jepa_plugin_api::tch::{self, Device, Kind, Tensor};
use jepa_plugin_api::{Backbone, Params};
use serde_json::{Map, Value, json};
use sparse_convnext::ConvNeXt;
use sparse_resnet::ResNet;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let [backbone, batch, size, threads, rounds, shares @ ..] = arguments.as_slice() else {
        println!(
            "encoder: give BACKBONE BATCH SIZE THREADS ROUNDS SHARE…, such as resnet50 8 224 2 5 0.2 0.41"
        );
        return;
    };
    let [batch, size, threads, rounds] =
        [batch, size, threads, rounds].map(|text| text.parse().expect("a number"));
    let shares: Vec<f64> = shares.iter().map(|text| text.parse().expect("a share of the cells")).collect();
    tch::set_num_threads(threads as i32);
    let table = match backbone.starts_with("convnext") {
        true => measure::<ConvNeXt>(backbone, batch, size, rounds, &shares),
        false => measure::<ResNet>(backbone, batch, size, rounds, &shares),
    };
    println!("{}", Value::Object(table));
}

/// Medians over the rounds, in each of which every share has its turn.
fn measure<B: Backbone>(name: &str, batch: i64, size: i64, rounds: i64, shares: &[f64]) -> Map<String, Value>
where
    B::Options: Default,
{
    tch::manual_seed(0);
    let params = Params::new(Device::Cpu);
    let network = B::new(name, B::Options::default(), &params).expect("a backbone of this name");
    let images = Tensor::randn([batch, 3, size, size], (Kind::Float, Device::Cpu));
    let entries = params.entries();
    let pass = |mask: Option<&Tensor>| {
        for entry in entries.iter().filter(|entry| entry.tensor.requires_grad()) {
            entry.tensor.shallow_clone().zero_grad();
        }
        let start = Instant::now();
        let y = network.forward(&images, mask, true).expect("features");
        let forward = start.elapsed().as_secs_f64();
        y.square().mean(Kind::Float).backward();
        (forward, start.elapsed().as_secs_f64())
    };
    let cells = size / 32;
    let mask = |share: f64| {
        let visible = (share * (cells * cells) as f64).round() as i64;
        let order = Tensor::rand([batch, cells * cells], (Kind::Float, Device::Cpu)).argsort(1, false);
        let mask = Tensor::zeros([batch, cells * cells], (Kind::Bool, Device::Cpu));
        mask.scatter_value(1, &order.narrow(1, 0, visible), 1).view([batch, 1, cells, cells])
    };
    let mut cases: Vec<(String, Option<Tensor>)> = vec![("dense".to_owned(), None)];
    cases.extend(shares.iter().map(|share| (share.to_string(), Some(mask(*share)))));
    let mut times = vec![Vec::new(); cases.len()];
    for round in 0..rounds + 1 {
        for ((_, mask), times) in cases.iter().zip(&mut times) {
            let time = pass(mask.as_ref());
            if round > 0 {
                times.push(time);
            }
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let mut table = Map::new();
    for ((name, _), times) in cases.into_iter().zip(times) {
        let (forward, both): (Vec<f64>, Vec<f64>) = times.into_iter().unzip();
        table.insert(name, json!({ "forward_s": median(forward), "forward_backward_s": median(both) }));
    }
    table
}
