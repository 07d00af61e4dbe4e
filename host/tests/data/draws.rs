//! What is drawn at random is distributed as what torchvision draws, over as many draws as there were of theirs.

use std::collections::BTreeMap;

use jepa_host::data::augment::{Augmenter, Operation, Plan, random_crop};
use jepa_host::data::resample::CropBox;
use jepa_plugin_api::{Interpolation, Rng, ViewSpec};
use serde_json::Value;

use crate::fixtures::path;

fn torchvision() -> Value {
    serde_json::from_slice(&std::fs::read(path("draws.json")).unwrap()).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Four standard errors of the difference of two shares of so many draws each.
fn share_bound(share: f64, draws: f64) -> f64 {
    4.0 * (2.0 * share * (1.0 - share) / draws).sqrt()
}

/// Mean, deviation and deciles.
fn assert_same_distribution(name: &str, mut values: Vec<f64>, theirs: &Value) {
    values.sort_by(f64::total_cmp);
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let std = (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count).sqrt();
    // Four standard errors of a difference of two means.
    let bound = 4.0 * std * (2.0 / count).sqrt();
    assert!((mean - number(&theirs["mean"])).abs() < bound, "{name}: mean {mean}");
    assert!((std - number(&theirs["std"])).abs() < bound, "{name}: std {std}");
    for (decile, theirs) in theirs["deciles"].as_array().unwrap().iter().enumerate() {
        let ours = values[values.len() * (decile + 1) / 10];
        assert!((ours - number(theirs)).abs() < 0.03 * std, "{name}: decile {decile} is {ours}");
    }
}

#[test]
fn crops() {
    let expected = torchvision();
    let draws = number(&expected["draws"]);
    let (width, height) = (number(&expected["width"]) as u32, number(&expected["height"]) as u32);
    for case in expected["crops"].as_array().unwrap() {
        let range = |name: &str| (number(&case[name][0]), number(&case[name][1]));
        let boxes: Vec<CropBox> = (0..draws as u64)
            .map(|draw| {
                random_crop(width, height, range("scale"), range("ratio"), &mut Rng::keyed(7, 0, draw, 0))
            })
            .collect();
        for (name, of, all) in [
            ("full_height", (|crop| crop.height) as fn(&CropBox) -> u32, height),
            ("full_width", |crop| crop.width, width),
        ] {
            let share = boxes.iter().filter(|crop| of(crop) == all).count() as f64 / draws;
            let theirs = number(&case[name]);
            assert!((share - theirs).abs() <= share_bound(theirs.max(1e-4), draws), "{name}: {share}");
        }
        let values = |of: &dyn Fn(&CropBox) -> Option<f64>| boxes.iter().filter_map(of).collect::<Vec<_>>();
        let area = f64::from(width) * f64::from(height);
        let area_fraction = values(&|crop| Some(f64::from(crop.width) * f64::from(crop.height) / area));
        let log_aspect = values(&|crop| Some((f64::from(crop.width) / f64::from(crop.height)).ln()));
        let relative =
            |at: u32, side: u32, all: u32| (side < all).then(|| f64::from(at) / f64::from(all - side));
        let relative_top = values(&|crop| relative(crop.top, crop.height, height));
        let relative_left = values(&|crop| relative(crop.left, crop.width, width));
        assert_same_distribution("area_fraction", area_fraction, &case["area_fraction"]);
        assert_same_distribution("log_aspect", log_aspect, &case["log_aspect"]);
        assert_same_distribution("relative_top", relative_top, &case["relative_top"]);
        assert_same_distribution("relative_left", relative_left, &case["relative_left"]);
    }
}

fn plans(view: ViewSpec, draws: u64) -> Vec<Plan> {
    let augmenter = Augmenter::new(&view, 8).unwrap();
    (0..draws).map(|draw| augmenter.draw(20, 20, &mut Rng::keyed(3, 1, draw, 0))).collect()
}

fn whole() -> ViewSpec {
    ViewSpec::new("view").resize_center_crop(1.0, Interpolation::Bilinear)
}

#[test]
fn jitter() {
    let (expected, jitter) = (torchvision(), &torchvision()["jitter"]);
    let draws = number(&expected["draws"]);
    const PARTS: [&str; 4] = ["brightness", "contrast", "saturation", "hue"];
    let [brightness, contrast, saturation, hue] = PARTS.map(|part| number(&jitter["strengths"][part]));
    let (mut factors, mut orders) = ([const { Vec::new() }; 4], BTreeMap::<String, f64>::new());
    for plan in plans(whole().color_jitter(1.0, brightness, contrast, saturation, hue), draws as u64) {
        let mut order = String::new();
        for operation in plan.operations {
            let (part, factor) = match operation {
                Operation::Brightness(factor) => (0, f64::from(factor)),
                Operation::Contrast(factor) => (1, f64::from(factor)),
                Operation::Saturation(factor) => (2, f64::from(factor)),
                Operation::Hue(turn) => (3, turn),
                other => panic!("{other:?} is no part of a jitter"),
            };
            factors[part].push(factor);
            order.push_str(&part.to_string());
        }
        *orders.entry(order).or_default() += 1.0 / draws;
    }
    for (part, factors) in PARTS.into_iter().zip(factors) {
        assert_same_distribution(part, factors, &jitter[part]);
    }
    assert_eq!(orders.len(), 24);
    for (order, share) in orders {
        let theirs = number(&jitter["orders"][&order]);
        assert!((share - theirs).abs() < share_bound(1.0 / 24.0, draws), "{order}: {share} and {theirs}");
    }
}

#[test]
fn flips() {
    let expected = torchvision();
    let (draws, p) = (number(&expected["draws"]), number(&expected["flips"]["p"]));
    let plans = plans(whole().horizontal_flip(p), draws as u64);
    let share = plans.iter().filter(|plan| plan.operations == [Operation::Flip]).count() as f64 / draws;
    let theirs = number(&expected["flips"]["share"]);
    assert!((share - theirs).abs() < share_bound(p, draws), "{share} and {theirs}");
}
