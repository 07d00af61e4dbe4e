//! Masks have the areas that the options ask for, reach every cell, and belong to an image, not to its place.

use std::collections::BTreeSet;

use cnn_jepa::{MaskOptions, MaskSampler, Masks, Sampling, Strategy};
use jepa_plugin_api::{Batch, testing};
use serde_json::json;
use tch::{Kind, Tensor};

fn options(strategy: Strategy, sampling: Sampling) -> MaskOptions {
    MaskOptions { strategy, sampling, ..MaskOptions::default() }
}

fn sampler(options: &MaskOptions, f: i64) -> MaskSampler {
    MaskSampler::new(options, f).expect("options that fit")
}

fn batch(step: u64, samples: impl IntoIterator<Item = u64>) -> Batch {
    let samples: Vec<u64> = samples.into_iter().collect();
    Batch { samples, step, seed: 7, ..testing::batch(Vec::new()) }
}

/// Cells of each image, row by row.
fn rows(mask: &Tensor) -> Vec<Vec<bool>> {
    let cells = mask.size()[2] * mask.size()[3];
    Vec::<Vec<bool>>::try_from(mask.view([-1, cells])).expect("bools")
}

fn count(cells: &[bool]) -> i64 {
    cells.iter().filter(|inside| **inside).count() as i64
}

/// How often each cell was context and target in `steps` batches of 16.
fn frequencies(sampler: &MaskSampler, steps: u64) -> (Tensor, Tensor) {
    let sum =
        |mask: &Tensor| mask.to_kind(Kind::Float).sum_dim_intlist([0, 1].as_slice(), false, Kind::Float);
    let each = (0..steps).map(|step| sampler.draw(&batch(step, 0..16)));
    let (context, target): (Vec<_>, Vec<_>) = each.map(|m| (sum(&m.context), sum(&m.target))).unzip();
    (
        Tensor::stack(&context, 0).sum_dim_intlist([0].as_slice(), false, Kind::Float),
        Tensor::stack(&target, 0).sum_dim_intlist([0].as_slice(), false, Kind::Float),
    )
}

fn zeros(counts: &Tensor) -> i64 {
    i64::try_from(counts.eq(0).sum(Kind::Int64)).expect("a count")
}

#[test]
fn random_masks_keep_a_fixed_share() {
    for (f, kept) in [(4, 6), (7, 20), (8, 26)] {
        let Masks { context, target } =
            sampler(&options(Strategy::Random, Sampling::Uniform), f).draw(&batch(3, 0..64));
        assert!(context.logical_not().equal(&target), "every cell is either");
        assert!(rows(&context).iter().all(|cells| count(cells) == kept), "f = {f}");
    }
    let (context, target) = frequencies(&sampler(&options(Strategy::Random, Sampling::Uniform), 7), 100);
    assert_eq!((zeros(&context), zeros(&target)), (0, 0));
}

#[test]
fn context_and_targets_are_disjoint_and_never_empty() {
    for strategy in [Strategy::Random, Strategy::MultiBlock, Strategy::Mixed] {
        for f in [4, 5, 6, 7, 8, 14] {
            let sampler = sampler(&options(strategy, Sampling::Uniform), f);
            for step in 0..40 {
                let Masks { context, target } = sampler.draw(&batch(step, 0..16));
                assert_eq!(context.size(), [16, 1, f, f]);
                for (context, target) in rows(&context).iter().zip(rows(&target)) {
                    assert!(context.iter().zip(&target).all(|(context, target)| !(context & target)));
                    assert!(count(context) > 0 && count(&target) > 0, "{strategy:?}, f = {f}");
                }
            }
        }
    }
}

#[test]
fn multi_block_areas_are_the_published_ones() {
    let sampler = sampler(&options(Strategy::MultiBlock, Sampling::Uniform), 7);
    let mut target_areas = BTreeSet::new();
    for step in 0..400 {
        let Masks { context, target } = sampler.draw(&batch(step, 0..8));
        for (context, target) in rows(&context).iter().zip(rows(&target)) {
            // One block has 6 to 12 cells here; four of them overlap or not, and leave more than 5.
            assert!((6..=43).contains(&count(&target)));
            // The context block is the whole map.
            assert_eq!(count(context) + count(&target), 49);
            target_areas.insert(count(&target));
        }
    }
    assert!(target_areas.len() > 15, "areas vary: {target_areas:?}");
}

#[test]
fn a_batch_shares_the_size_of_its_blocks() {
    let one_block = MaskOptions { num_targets: 1, ..options(Strategy::MultiBlock, Sampling::Uniform) };
    let sampler = sampler(&one_block, 7);
    let mut sizes = BTreeSet::new();
    for step in 0..200 {
        let areas: BTreeSet<i64> =
            rows(&sampler.draw(&batch(step, 0..32)).target).iter().map(|cells| count(cells)).collect();
        assert_eq!(areas.len(), 1);
        sizes.extend(areas);
    }
    // 2 × 3, 4 × 2, 3 × 3 and 4 × 3: what rounding makes of 7 to 9 cells of aspect 0.75 to 1.5.
    assert_eq!(sizes, BTreeSet::from([6, 8, 9, 12]));
}

#[test]
fn uniform_sampling_reaches_every_cell() {
    for f in [4, 7, 8] {
        let (context, target) =
            frequencies(&sampler(&options(Strategy::MultiBlock, Sampling::Uniform), f), 400);
        assert_eq!((zeros(&context), zeros(&target)), (0, 0), "f = {f}");
    }
}

#[test]
fn reference_sampling_has_the_published_gap() {
    let (context, target) =
        frequencies(&sampler(&options(Strategy::MultiBlock, Sampling::Reference), 7), 400);
    assert_eq!(zeros(&target), 13, "13 of 49 cells are never targets");
    let outside = |cells: &Tensor| zeros(cells);
    assert_eq!((outside(&target.get(6)), outside(&target.select(1, 6))), (7, 7), "the last row and column");
    assert_eq!(zeros(&context), 0);
}

#[test]
fn mixed_masks_are_multi_block_in_three_batches_of_four() {
    let sampler = sampler(&options(Strategy::Mixed, Sampling::Uniform), 7);
    let is_random = |step: u64| {
        let context = rows(&sampler.draw(&batch(step, 0..16)).context);
        context.iter().all(|cells| count(cells) == 20)
    };
    let random = (0..1000).filter(|&step| is_random(step)).count();
    assert!((200..300).contains(&random), "{random} of 1000 batches are random");
}

#[test]
fn masks_belong_to_the_image_and_the_step() {
    let sampler = sampler(&MaskOptions::default(), 7);
    for step in 0..20 {
        let (whole, turned) = (sampler.draw(&batch(step, 0..8)), sampler.draw(&batch(step, (0..8).rev())));
        let alone = sampler.draw(&batch(step, [5]));
        assert!(
            whole.context.flip([0]).equal(&turned.context) && whole.target.flip([0]).equal(&turned.target)
        );
        assert!(whole.target.get(5).equal(&alone.target.get(0)));
    }
    let (a, b) = (sampler.draw(&batch(0, 0..8)), sampler.draw(&batch(1, 0..8)));
    assert!(!a.target.equal(&b.target));
    assert!(!a.target.get(0).equal(&a.target.get(1)));
}

#[test]
fn a_crowded_map_gives_up_target_blocks_before_context() {
    let crowded =
        MaskOptions { num_targets: 30, min_keep: 8, ..options(Strategy::MultiBlock, Sampling::Uniform) };
    let sampler = sampler(&crowded, 4);
    for step in 0..50 {
        let Masks { context, target } = sampler.draw(&batch(step, 0..16));
        for (context, target) in rows(&context).iter().zip(rows(&target)) {
            assert!(count(context) > 8 && count(&target) > 0);
        }
    }
}

#[test]
fn maps_without_room_are_refused_by_key() {
    let refused = |options: serde_json::Value, f: i64| {
        let options: MaskOptions = serde_json::from_value(options).expect("options");
        MaskSampler::new(&options, f).expect_err("an error").to_string()
    };
    assert!(refused(json!({}), 1).contains("data.size"));
    assert!(refused(json!({ "strategy": "random", "ratio": 0.99 }), 4).contains("method.mask.ratio"));
    assert!(refused(json!({ "strategy": "random", "ratio": 1.0 }), 7).contains("method.mask.ratio"));
    assert!(refused(json!({ "target_scale": [0.9, 1.0] }), 7).contains("method.mask.target_scale"));
    assert!(refused(json!({ "target_scale": [0.5, 0.2] }), 7).contains("method.mask.target_scale"));
    assert!(refused(json!({ "min_keep": 45 }), 7).contains("method.mask.min_keep"));
    let error = refused(json!({ "context_scale": [0.05, 0.05] }), 7);
    assert!(error.contains("method.mask.context_scale") && error.contains("more than 5 "), "{error}");
    assert!(refused(json!({ "num_targets": 0 }), 7).contains("method.mask.num_targets"));
    assert!(refused(json!({ "target_aspect": [0.0, 1.0] }), 7).contains("method.mask.target_aspect"));
    assert!(refused(json!({ "multi_block_probability": 2 }), 7).contains("multi_block_probability"));
}
