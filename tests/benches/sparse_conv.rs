//! A convolution over visible positions in every way, forward and backward, by the share of cells that is visible: what
//! `sparse_conv::Way` chooses by.

use std::time::Instant;

use jepa_plugin_api::nn::{Conv2d, ConvOptions};
use jepa_plugin_api::{Params, tch};
use sparse_conv::{FeatureMap, Way};
use tch::{Device, Kind, Tensor};

fn main() {
    let threads: i32 = std::env::var("THREADS").map_or(2, |threads| threads.parse().expect("a number"));
    tch::set_num_threads(threads);
    const SHARES: [i64; 6] = [10, 20, 29, 39, 44, 49];
    let shares: Vec<String> = SHARES.iter().map(|cells| format!("{:.0} %", *cells as f64 / 0.49)).collect();
    println!(
        "batch 8, {threads} threads: time gathered, and tiled / time over the whole map; the time over the whole map\n"
    );
    println!("| convolution | {} | whole map |", shares.join(" | "));
    println!("| --- |{} --- |", " --- |".repeat(SHARES.len()));
    for (inputs, outputs, kernel, stride, side, groups) in [
        (3, 64, 7, 2, 224, 1),
        (64, 64, 3, 1, 56, 1),
        (128, 128, 3, 2, 56, 1),
        (128, 128, 3, 1, 28, 1),
        (256, 256, 3, 1, 14, 1),
        (512, 512, 3, 1, 7, 1),
        (16, 16, 3, 1, 28, 1),
        (256, 512, 1, 2, 56, 1),
        (96, 96, 7, 1, 56, 96),
        (192, 192, 7, 1, 28, 192),
        (384, 384, 7, 1, 14, 384),
        (768, 768, 7, 1, 7, 768),
    ] {
        let params = Params::new(Device::Cpu);
        let options =
            ConvOptions { stride, padding: kernel / 2, groups, bias: false, ..ConvOptions::default() };
        let conv = Conv2d::new(&params, inputs, outputs, kernel, options);
        let images = Tensor::randn([8, inputs, side, side], (Kind::Float, Device::Cpu));
        let images = images.set_requires_grad(inputs != 3);
        let time = |cells: i64, way: Way| {
            let order =
                Tensor::rand([8, 49], (Kind::Float, Device::Cpu)).argsort(1, false).narrow(1, 0, cells);
            let mask = Tensor::zeros([8, 49], (Kind::Bool, Device::Cpu)).scatter_value(1, &order, 1);
            let mask = mask.view([8, 1, 7, 7]);
            let mut times: Vec<f64> = (0..6)
                .map(|_| {
                    let x = FeatureMap::new(&images, Some(&mask)).expect("a fitting mask");
                    let start = Instant::now();
                    x.conv_by(&conv, Some(way)).relu().into_map().sum(Kind::Float).backward();
                    start.elapsed().as_secs_f64()
                })
                .collect();
            times.remove(0);
            times.sort_by(f64::total_cmp);
            times[2]
        };
        let whole = time(20, Way::WholeMap);
        let ratio = |cells: i64| {
            let gathered = format!("{:.2}", time(cells, Way::Gathered) / whole);
            match (kernel, stride) {
                (3, 1) => format!("{gathered}, {:.2}", time(cells, Way::Tiled) / whole),
                _ => gathered,
            }
        };
        let ratios: Vec<String> = SHARES.iter().map(|cells| ratio(*cells)).collect();
        let name =
            format!("{inputs} to {outputs}, {kernel}×{kernel}, stride {stride}, groups {groups}, {side} px");
        println!("| {name} | {} | {:.1} ms |", ratios.join(" | "), 1e3 * whole);
    }
}
