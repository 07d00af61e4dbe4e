//! Probes say what is true: everything where classes are apart, chance where labels mean nothing, errors otherwise.

use jepa_host::eval::descriptors::describe;
use jepa_host::eval::linear::{LinearResult, Options, probe};
use jepa_host::eval::{EvalError, Features, extract, knn};
use jepa_plugin_api::Rng;
use tch::{Device, Kind, Tensor};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

fn go_on() -> jepa_plugin_api::Result<()> {
    Ok(())
}

/// Normal enough for these tests: a sum of uniform numbers of variance 1.
fn noise(seed: u64, rows: usize, columns: usize) -> Tensor {
    let mut rng = Rng::keyed(seed, 0, 0, 0);
    let values: Vec<f32> = (0..rows * columns)
        .map(|_| (0..4).map(|_| rng.uniform(-1.0, 1.0)).sum::<f64>() as f32 * 0.866)
        .collect();
    Tensor::from_slice(&values).view([rows as i64, columns as i64])
}

/// `count` features around one centre per class, at a distance of `apart` deviations, and their labels.
fn blobs(seed: u64, count: usize, dimensions: usize, classes: i64, apart: f64) -> Features {
    let y = Tensor::arange(count as i64, (Kind::Int64, Device::Cpu)).remainder(classes);
    let centres = noise(99, classes as usize, dimensions) * apart;
    Features::new(&(centres.index_select(0, &y) + noise(seed, count, dimensions)), &y).unwrap()
}

fn options(seed: u64) -> Options {
    Options { epochs: 20, lr: 1e-2, batch_size: 64, seed }
}

#[test]
fn separable_classes_are_told_apart() {
    let (train, val) = (blobs(1, 600, 16, 10, 5.0), blobs(2, 200, 16, 10, 5.0));
    let linear = probe(&train, &val, 10, &options(42), &go_on).unwrap();
    assert_eq!(linear, LinearResult { top1: 1.0, top5: 1.0, top1_final: 1.0, top5_final: 1.0 });
    let nearest = knn::evaluate(&train, &val, 10, 20, 0.1, &go_on).unwrap();
    assert_eq!((nearest.top1, nearest.top5), (1.0, 1.0));
}

#[test]
fn labels_without_meaning_are_guessed_at_chance() {
    let (train, val) = (blobs(1, 2000, 8, 10, 0.0), blobs(2, 2000, 8, 10, 0.0));
    let linear = probe(&train, &val, 10, &options(42), &go_on).unwrap();
    assert!(
        (0.07..0.13).contains(&linear.top1_final) && (0.44..0.56).contains(&linear.top5_final),
        "{linear:?}"
    );
    assert!(linear.top1 >= linear.top1_final && linear.top5 >= linear.top5_final);
    let nearest = knn::evaluate(&train, &val, 10, 200, 0.1, &go_on).unwrap();
    assert!((0.07..0.13).contains(&nearest.top1) && (0.44..0.56).contains(&nearest.top5), "{nearest:?}");
}

#[test]
fn a_collapsed_encoder_scores_chance_and_not_all() {
    let y = Tensor::arange(100, (Kind::Int64, Device::Cpu)).remainder(10);
    let same = Features::new(&Tensor::ones([100, 4], F32), &y).unwrap();
    assert_eq!(probe(&same, &same, 10, &options(1), &go_on).unwrap().top1_final, 0.1);
    let nearest = knn::evaluate(&same, &same, 10, 200, 0.1, &go_on).unwrap();
    assert!((nearest.top1 - 0.1).abs() < 1e-9 && (nearest.top5 - 0.5).abs() < 1e-9, "{nearest:?}");
    let described = describe(&same.x).unwrap();
    assert!(described.std < 1e-6 && (described.rankme - 1.0).abs() < 1e-3, "{described:?}");
    let zeros = Features::new(&Tensor::zeros([100, 4], F32), &y).unwrap();
    knn::evaluate(&zeros, &zeros, 10, 5, 0.1, &go_on).unwrap();
    assert_eq!(describe(&zeros.x).unwrap().rankme, 0.0);
}

#[test]
fn the_same_seed_gives_the_same_result_and_another_seed_another_run() {
    let (train, val) = (blobs(1, 500, 16, 10, 0.3), blobs(2, 500, 16, 10, 0.3));
    let result = |seed| probe(&train, &val, 10, &options(seed), &go_on).unwrap();
    assert_eq!(result(7), result(7));
    assert_ne!(result(7), result(8));
}

#[test]
fn few_classes_and_small_banks_are_no_special_case() {
    let (train, val) = (blobs(1, 30, 4, 3, 5.0), blobs(2, 9, 4, 3, 5.0));
    let linear = probe(&train, &val, 3, &options(1), &go_on).unwrap();
    let nearest = knn::evaluate(&train, &val, 3, 200, 0.1, &go_on).unwrap();
    assert_eq!((linear.top5, linear.top5_final, nearest.top5), (1.0, 1.0, 1.0));
}

#[test]
fn many_queries_score_as_one_by_one() {
    let (train, val) = (blobs(1, 300, 4, 10, 1.0), blobs(2, 1500, 4, 10, 1.0));
    let all = knn::evaluate(&train, &val, 10, 20, 0.1, &go_on).unwrap();
    let halves: Vec<f64> = [0, 750]
        .iter()
        .map(|start| {
            let part = Features { x: val.x.narrow(0, *start, 750), y: val.y.narrow(0, *start, 750) };
            knn::evaluate(&train, &part, 10, 20, 0.1, &go_on).unwrap().top1
        })
        .collect();
    assert!((all.top1 - (halves[0] + halves[1]) / 2.0).abs() < 1e-9);
}

#[test]
fn a_tiny_temperature_leaves_the_nearest_neighbour() {
    let (train, val) = (blobs(1, 200, 4, 10, 1.0), blobs(2, 200, 4, 10, 1.0));
    let cold = knn::evaluate(&train, &val, 10, 20, 1e-6, &go_on).unwrap();
    assert_eq!(cold.top1, knn::evaluate(&train, &val, 10, 1, 1.0, &go_on).unwrap().top1);
}

#[test]
fn descriptors_of_known_features_are_known() {
    let identity = Tensor::eye(64, F32);
    let described = describe(&identity).unwrap();
    assert!((described.rankme - 64.0).abs() < 0.01, "{described:?}");
    let spread = describe(&noise(3, 4000, 16)).unwrap();
    assert!((spread.std - 0.25).abs() < 0.01 && spread.rankme > 15.8, "{spread:?}");
    // Two singular values, 3 and 1: entropy of (3/4, 1/4).
    let two = describe(&Tensor::from_slice(&[3f32, 0.0, 0.0, 1.0, 0.0, 0.0]).view([3, 2])).unwrap();
    assert!((two.rankme - (0.75f64.ln() * -0.75 + 0.25f64.ln() * -0.25).exp()).abs() < 1e-4, "{two:?}");
    // More dimensions than images.
    assert!((describe(&Tensor::eye(64, F32).narrow(0, 0, 8)).unwrap().rankme - 8.0).abs() < 0.01);
}

#[test]
fn features_are_collected_in_order_whatever_the_encoder_gives() {
    let mut calls = 0;
    let batches = [3i64, 3, 1].into_iter().map(|size| {
        calls += 1;
        Ok((
            Tensor::full([size, 3, 2, 2], calls, F32),
            Tensor::full([size], calls, (Kind::Uint8, Device::Cpu)),
        ))
    });
    let features = extract(batches, &mut |images| {
        Ok(images.mean_dim([2i64, 3].as_slice(), false, Kind::Float).to_kind(Kind::BFloat16))
    })
    .unwrap();
    assert_eq!((features.images(), features.dimensions()), (7, 3));
    assert_eq!((features.x.kind(), features.y.kind()), (Kind::Float, Kind::Int64));
    assert_eq!(Vec::<i64>::try_from(&features.y).unwrap(), [1, 1, 1, 2, 2, 2, 3]);
    assert_eq!(features.first(4).images(), 4);
}

#[test]
fn descriptors_equal_torch_s_own_functions() {
    // Correlated dimensions of different sizes, one of them constant, and fewer independent ones than there are.
    let independent = noise(5, 300, 6);
    let mixing = noise(6, 6, 10) * Tensor::from_slice(&[1.0f32, 2.0, 0.5, 3.0, 1.0, 1.0, 0.1, 4.0, 1.0, 1.0]);
    let x = independent.matmul(&mixing) + 0.3;
    let described = describe(&x).unwrap();
    let singular = x.to_kind(Kind::Double).svd(true, false).1;
    let number = |tensor: Tensor| f64::try_from(tensor).unwrap();
    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-6 * b.abs().max(1e-3), "{a} and {b}");

    let correlation = x.transpose(0, 1).to_kind(Kind::Double).corrcoef().abs();
    close(described.correlation, (number(correlation.sum(Kind::Double)) - 10.0) / 90.0);
    close(described.anisotropy, number(singular.max().square() / singular.square().sum(Kind::Double)));
    assert_eq!(described.rank, 7.0, "six, and the mean");
    assert_eq!(described.rank_ratio, 0.7);
    let share = &singular / singular.sum(Kind::Double) + 1e-7;
    close(described.rankme, number((-(&share * share.log()).sum(Kind::Double)).exp()));
    let unit = &x / x.norm_scalaropt_dim(2.0, [1i64].as_slice(), true);
    let std = number(unit.std_dim([0i64].as_slice(), false, false).mean(Kind::Double));
    assert!((described.std - std).abs() < 1e-5 * std);
    close(described.spread, described.std * 10f64.sqrt());

    let same = describe(&(Tensor::ones([50, 4], F32) * 3.0)).unwrap();
    assert!(same.spread < 1e-6 && same.rank == 1.0 && same.correlation == 1.0, "{same:?}");
    assert!((same.anisotropy - 1.0).abs() < 1e-9);
}

#[test]
fn what_cannot_be_evaluated_is_an_error_that_says_why() {
    let y = Tensor::from_slice(&[0i64, 1, 2]);
    let x = Tensor::ones([3, 2], F32);
    let good = Features::new(&x, &y).unwrap();

    let empty = Features::new(&Tensor::ones([0, 2], F32), &Tensor::ones([0], (Kind::Int64, Device::Cpu)));
    assert!(matches!(empty, Err(EvalError::Empty)));
    assert!(matches!(extract([], &mut |images| Ok(images.shallow_clone())), Err(EvalError::Empty)));
    let message = Features::new(&x, &Tensor::from_slice(&[0i64])).unwrap_err().to_string();
    assert!(message.ends_with("but are [3, 2] of Float and [1] of Int64"), "{message}");

    let broken = Tensor::from_slice(&[1f32, 2.0, 3.0, f32::NAN, f32::INFINITY, 0.0]).view([3, 2]);
    let message = Features::new(&broken, &y).unwrap_err().to_string();
    assert!(message.starts_with("the features of image 1 are not finite"), "{message}");
    let batches = (0..2).map(|_| Ok((x.shallow_clone(), y.shallow_clone())));
    let mut calls = 0;
    let error = extract(batches, &mut |images| {
        calls += 1;
        Ok(if calls == 2 { broken.shallow_clone() } else { images.shallow_clone() })
    });
    assert!(error.unwrap_err().to_string().starts_with("the features of image 4 are not finite"));

    let label = |label: i64| Features::new(&x, &Tensor::from_slice(&[0, label, 1])).unwrap();
    for wrong in [-1, 3] {
        let message = probe(&good, &label(wrong), 3, &options(1), &go_on).unwrap_err().to_string();
        assert!(
            message.starts_with(&format!("image 1 has label {wrong}, and the 3 classes are 0 to 2")),
            "{message}"
        );
        assert!(knn::evaluate(&label(wrong), &good, 3, 5, 0.1, &go_on).is_err());
    }
    let wide = Features::new(&Tensor::ones([3, 5], F32), &y).unwrap();
    let message = knn::evaluate(&good, &wide, 3, 5, 0.1, &go_on).unwrap_err().to_string();
    assert_eq!(message, "training features have 2 dimensions and held-out features 5");

    let huge = Features::new(&(&x * 1e38), &y).unwrap();
    let diverged = probe(&huge, &huge, 3, &Options { lr: 1e3, ..options(1) }, &go_on);
    assert!(matches!(diverged, Err(EvalError::Diverged { .. })), "{diverged:?}");

    let fails = extract([Ok((x, y))], &mut |_| anyhow::bail!("out of memory"));
    let chain: Vec<String> =
        anyhow::Error::from(fails.unwrap_err()).chain().map(ToString::to_string).collect();
    assert_eq!(chain, ["cannot compute features", "images 0 to 2", "out of memory"]);

    let stop = || anyhow::bail!("enough");
    for stopped in [
        probe(&good, &good, 3, &options(1), &stop).unwrap_err(),
        knn::evaluate(&good, &good, 3, 5, 0.1, &stop).unwrap_err(),
    ] {
        assert!(matches!(stopped, EvalError::Stopped(_)), "{stopped:?}");
    }
}
