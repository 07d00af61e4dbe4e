//! Products that read rows where they lie, against libtorch in fp64; and the layers that use them.

use jepa_plugin_api::matmul::{self, Layout, Packed, Rows};
use jepa_plugin_api::memory::{filled, values};
use jepa_plugin_api::nn::{Conv2d, ConvOptions, Linear};
use jepa_plugin_api::{Params, Rng, tch};
use jepa_tests::fixture::relative_error as error;
use jepa_tests::threads::assert_same_for_any_number;
use tch::{Device, Kind, Tensor};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

/// One of the sizes, by keyed randomness.
fn one_of(rng: &mut Rng, sizes: &[usize]) -> usize {
    sizes[rng.below(sizes.len() as u64) as usize]
}

#[test]
fn products_equal_libtorchs() {
    for case in 0..150 {
        let mut rng = Rng::keyed(case, 0, 0, 0);
        let rows = one_of(&mut rng, &[1, 2, 5, 6, 7, 13, 100, 131, 400, 2100]);
        let columns = one_of(&mut rng, &[1, 3, 8, 16, 17, 31, 33, 48, 64, 65, 100, 200, 600]);
        let pieces = one_of(&mut rng, &[1, 2, 3, 7]);
        let length = one_of(&mut rng, &[1, 3, 5, 21, 48, 129, 260, 700]);
        let pitch = length + one_of(&mut rng, &[0, 1, 9]);
        tch::manual_seed(case as i64);
        let map = Tensor::randn([(pieces * pitch + 500) as i64], F32);
        let starts: Vec<usize> = (0..rows).map(|_| rng.below(500) as usize).collect();
        let sides = Rows { values: values(&map), starts: &starts, pieces, length, pitch };
        // The weights of a convolution: (columns, length, pieces).
        let weights = Tensor::randn([columns, length, pieces].map(|side| side as i64), F32);
        let layout = Layout {
            taps: (0..pieces).collect(),
            inner: (length, pieces),
            columns: (columns, length * pieces),
        };
        let bias = (case % 2 == 0).then(|| Tensor::randn([columns as i64], F32));

        let of_row = |start: &usize| {
            let run = |piece: usize| map.narrow(0, (start + piece * pitch) as i64, length as i64);
            Tensor::stack(&(0..pieces).map(run).collect::<Vec<_>>(), 1)
        };
        let left = Tensor::stack(&starts.iter().map(of_row).collect::<Vec<_>>(), 0);
        let left = left.flatten(1, -1).to_kind(Kind::Double);
        let right = weights.flatten(1, -1).tr().to_kind(Kind::Double);
        let mut expected = left.mm(&right);
        if let Some(bias) = &bias {
            expected += bias.to_kind(Kind::Double);
        }
        let what = format!("case {case}: ({rows}, {pieces} · {length}) × (…, {columns})");
        let packed = Packed::new(values(&weights), &layout);
        let ours = matmul::product(sides, &packed, bias.as_ref().map(values));
        assert!(error(&ours, &expected) < 2e-6, "{what}: {}", error(&ours, &expected));
        // Its rows are in the order of the runs, as those of `sides` are.
        let runs = weights.permute([2, 1, 0]).reshape([-1, columns as i64]);
        assert!(layout.matrix::<f32>(values(&weights)).equal(&runs), "{what}");

        let grad = Tensor::randn([rows as i64, columns as i64], F32);
        let expected = left.tr().mm(&grad.to_kind(Kind::Double)).tr();
        let ours = filled(&weights.size(), |out| matmul::gradient(sides, values(&grad), &layout, out));
        assert!(error(&ours.flatten(1, -1), &expected) < 2e-6, "{what}: gradient");
    }
}

#[test]
fn a_product_has_the_same_bytes_for_any_number_of_threads() {
    tch::manual_seed(1);
    let (x, w) = (Tensor::randn([5000, 300], F32), Tensor::randn([90, 300], F32));
    let grad = Tensor::randn([5000, 90], F32);
    let starts: Vec<usize> = (0..5000).map(|i| i * 300).collect();
    let layout = Layout::linear(90, 300);
    let rows = || Rows { values: values(&x), starts: &starts, pieces: 1, length: 300, pitch: 0 };
    assert_same_for_any_number(|| {
        let y = matmul::product(rows(), &Packed::new(values(&w), &layout), None);
        let of_w = filled(&[90, 300], |out| matmul::gradient(rows(), values(&grad), &layout, out));
        vec![y, of_w]
    });
}

/// `y` and the gradients of `inputs`, for a fixed gradient of y.
fn with_gradients(y: Tensor, inputs: &[&Tensor]) -> Vec<Tensor> {
    let weights = Tensor::arange(y.numel() as i64, (y.kind(), Device::Cpu)).view(y.size().as_slice()).sin();
    let gradients = Tensor::run_backward(&[(&y * weights).sum(y.kind())], inputs, false, false);
    std::iter::once(y.detach()).chain(gradients).collect()
}

#[test]
fn layers_equal_libtorchs() {
    for (rows, inputs, outputs, bias) in [(128, 33, 20, true), (300, 64, 128, false), (40, 16, 16, true)] {
        let layer = Linear::new(&Params::new(Device::Cpu), inputs, outputs, bias);
        let x = Tensor::randn([3, rows, inputs], F32).set_requires_grad(true);
        let tensors: Vec<&Tensor> = [&x, &layer.weight].into_iter().chain(&layer.bias).collect();
        let ours = with_gradients(layer.forward(&x), &tensors);
        let double: Vec<Tensor> =
            tensors.iter().map(|x| x.detach().to_kind(Kind::Double).set_requires_grad(true)).collect();
        let y = double[0].linear(&double[1], double.get(2));
        let theirs = with_gradients(y, &double.iter().collect::<Vec<_>>());
        for (i, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            assert!(
                error(ours, theirs) < 1e-5,
                "({rows}, {inputs}, {outputs}): {i}: {}",
                error(ours, theirs)
            );
        }
    }
    for (side, stride) in [(14, 1), (14, 2), (15, 2), (16, 3)] {
        let options = ConvOptions { stride, ..ConvOptions::default() };
        let layer = Conv2d::new(&Params::new(Device::Cpu), 24, 40, 1, options);
        let x = Tensor::randn([4, 24, side, side], F32).set_requires_grad(true);
        let bias = layer.bias.as_ref().unwrap();
        let ours = with_gradients(layer.forward(&x), &[&x, &layer.weight, bias]);
        let double =
            [&x, &layer.weight, bias].map(|x| x.detach().to_kind(Kind::Double).set_requires_grad(true));
        let y = double[0].conv2d(&double[1], Some(&double[2]), [stride; 2], [0; 2], [1; 2], 1);
        let theirs = with_gradients(y, &[&double[0], &double[1], &double[2]]);
        for (i, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            assert!(error(ours, theirs) < 1e-5, "{side} px, stride {stride}: {i}: {}", error(ours, theirs));
        }
    }
}

#[test]
fn a_frozen_layer_gets_no_gradient_and_costs_none() {
    let layer = Linear::new(&Params::new(Device::Cpu), 16, 32, true);
    let _ = layer.weight.set_requires_grad(false);
    let x = Tensor::randn([256, 16], F32).set_requires_grad(true);
    layer.forward(&x).sum(Kind::Float).backward();
    assert!(!layer.weight.grad().defined() && x.grad().defined());
    assert!(layer.bias.as_ref().unwrap().grad().equal(&Tensor::full([32], 256.0, F32)));
    assert!(!tch::no_grad(|| layer.forward(&x)).requires_grad());
}

#[test]
fn the_result_of_a_layer_may_be_changed_in_place() {
    let layer = Linear::new(&Params::new(Device::Cpu), 8, 8, true);
    for shape in [&[256, 8][..], &[4, 64, 8]] {
        let x = Tensor::randn(shape, F32);
        let expected = layer.forward(&x).relu();
        let mut y = layer.forward(&x);
        let _ = y.relu_();
        assert!(y.equal(&expected));
        y.sum(Kind::Float).backward();
    }
    assert!(layer.weight.grad().defined());
}

#[test]
#[should_panic(expected = "does not lie in 5 weights")]
fn weights_that_are_missing_are_said() {
    let _ = Packed::new(&[0.0; 5], &Layout::linear(2, 3));
}

#[test]
fn no_rows_make_an_empty_product_and_no_gradient() {
    let rows = Rows { values: &[], starts: &[], pieces: 1, length: 3, pitch: 0 };
    let layout = Layout::linear(2, 3);
    assert_eq!(matmul::product(rows, &Packed::new(&[1.0; 6], &layout), None).size(), [0, 2]);
    let mut weights = [1.0; 6];
    matmul::gradient(rows, &[], &layout, &mut weights);
    assert_eq!(weights, [0.0; 6]);
}

#[test]
#[should_panic(expected = "the sides of a matrix product do not match")]
fn sides_that_do_not_match_are_said() {
    let x = [0.0; 8];
    let rows = Rows { values: &x, starts: &[0, 4], pieces: 1, length: 4, pitch: 0 };
    let packed = Packed::new(&[0.0; 6], &Layout::linear(2, 3));
    let _ = matmul::product(rows, &packed, None);
}
