//! What the boundary costs, as a table.

use faulty_plugin::Faulty;
use jepa_plugin_api::tch;
use jepa_tests::boundary::{Case, Cost, compare};
use serde_json::json;
use simclr::SimClr;

fn main() {
    tch::set_num_threads(1);
    println!("| forward and backward, one thread | linked | loaded | difference (quartiles) | share |");
    println!("| --- | --- | --- | --- | --- |");
    let nothing = Case {
        plugin: "faulty_plugin",
        method: "faulty",
        options: json!({}),
        backbone: json!({ "stem": "small", "width": 4, "depths": [1] }),
        views: 1,
        size: 16,
        batch: 8,
    };
    let cost = compare::<Faulty>(&nothing, 10_000);
    print("a step that does next to nothing: the mean colour of 8 images", &cost);
    let small = Case {
        plugin: "simclr",
        method: "simclr",
        options: json!({ "hidden": 16, "output": 8 }),
        backbone: json!({ "stem": "small", "width": 16, "depths": [1, 1, 1] }),
        views: 2,
        size: 32,
        batch: 8,
    };
    let cost = compare::<SimClr>(&small, 1000);
    print("SimCLR, ResNet-18 of width 16 and depths [1, 1, 1], 8 images of 32 px", &cost);
}

fn print(what: &str, cost: &Cost) {
    let Cost { linked, loaded, difference: [low, middle, high] } = cost;
    let share = 100.0 * middle / linked;
    println!(
        "| {what} | {linked:.1} µs | {loaded:.1} µs | {middle:+.1} µs ({low:+.1} to {high:+.1}) | {share:+.2} % |"
    );
}
