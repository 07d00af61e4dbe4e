//! 3×3 convolutions of tiles, against libtorch's in fp64; and the layers that use them.

use std::sync::Arc;

use jepa_host::device::autocast_bf16;
use jepa_plugin_api::matmul::Layout;
use jepa_plugin_api::memory::{filled, values};
use jepa_plugin_api::nn::{Conv2d, ConvOptions};
use jepa_plugin_api::winograd::{self, Kernels, Tiles};
use jepa_plugin_api::{Params, tch};
use jepa_tests::draw::{Draw, alone};
use jepa_tests::fixture::relative_error;
use jepa_tests::threads::assert_same_for_any_number;
use sparse_conv::{FeatureMap, Way};
use tch::{Device, Kind, Tensor};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

/// [`relative_error`] of tensors of one shape.
fn error(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.size(), theirs.size());
    relative_error(ours, theirs)
}

fn conv(inputs: i64, outputs: i64, bias: bool) -> Conv2d {
    let options = ConvOptions { padding: 1, bias, ..ConvOptions::default() };
    Conv2d::new(&Params::new(Device::Cpu), inputs, outputs, 3, options)
}

/// The convolution of `x` `(B, C, H, W)` in fp64, its output multiplied with `shown`, and the gradients of x, the weight and the
/// bias for the gradient `grad`.
fn expected(conv: &Conv2d, x: &Tensor, shown: &Tensor, grad: &Tensor) -> Vec<Tensor> {
    let tensors = [Some(x), Some(&conv.weight), conv.bias.as_ref()].into_iter().flatten();
    let tensors: Vec<Tensor> =
        tensors.map(|x| x.detach().to_kind(Kind::Double).set_requires_grad(true)).collect();
    let y = tensors[0].conv2d(&tensors[1], tensors.get(2), [1; 2], [1; 2], [1; 2], 1) * shown;
    (&y * grad.to_kind(Kind::Double)).sum(Kind::Double).backward();
    std::iter::once(y.detach()).chain(tensors.iter().map(Tensor::grad)).collect()
}

#[test]
fn any_positions_of_any_map_equal_libtorchs_convolution() {
    for seed in 0..150 {
        let mut draw = Draw(seed);
        let _turn = alone(seed);
        let (batch, height, width) = (1 + draw.below(4), 1 + draw.below(20), 1 + draw.below(20));
        let (inputs, outputs) = (draw.of(&[16, 32, 48, 64, 80, 144]), draw.of(&[16, 32, 48, 64, 80, 144]));
        let bias = draw.below(2) == 0;
        let conv = conv(inputs, outputs, bias);
        let whole = draw.below(3) == 0;
        let share = if whole { 2.0 } else { draw.of(&[0.1, 0.5, 0.9]) };
        let mask = Tensor::rand([batch, height, width], F32).lt(share);
        let places = mask.flatten(0, -1).nonzero().flatten(0, -1);
        let tiles = match whole {
            true => Tiles::of_maps((height as usize, width as usize), batch as usize),
            false => {
                let images: Vec<Vec<(u32, u32)>> = (0..batch)
                    .map(|image| {
                        let at =
                            Vec::<i64>::try_from(mask.get(image).flatten(0, -1).nonzero().flatten(0, -1))
                                .unwrap();
                        at.iter().map(|at| ((at / width) as u32, (at % width) as u32)).collect()
                    })
                    .collect();
                Tiles::of_positions((height as usize, width as usize), images.iter().map(Vec::as_slice))
            }
        };
        assert_eq!(tiles.rows() as i64, places.numel() as i64);

        let rows = Tensor::randn([tiles.rows() as i64, inputs], F32).set_requires_grad(true);
        let y = conv.by_tiles(&rows, &Arc::new(tiles));
        let grad = Tensor::randn(y.size(), F32);
        (&y * &grad).sum(Kind::Float).backward();

        let map = |rows: &Tensor| {
            let channels = rows.size()[1];
            let zeros = Tensor::zeros([batch * height * width, channels], F32);
            let map = zeros.index_copy(0, &places, &rows.detach());
            map.view([batch, height, width, channels]).permute([0, 3, 1, 2])
        };
        let pick =
            |map: &Tensor| map.permute([0, 2, 3, 1]).reshape([-1, map.size()[1]]).index_select(0, &places);
        let theirs = expected(&conv, &map(&rows), &mask.unsqueeze(1).to_kind(Kind::Double), &map(&grad));
        let what = format!(
            "seed {seed}: {inputs} to {outputs}, {batch} of {height} × {width}, {} positions",
            places.numel()
        );
        if places.numel() == 0 {
            assert_eq!(conv.weight.grad().abs().max().double_value(&[]), 0.0, "{what}");
            continue;
        }
        assert!(error(&y, &pick(&theirs[0])) < 2e-6, "{what}: {:e}", error(&y, &pick(&theirs[0])));
        assert!(error(&rows.grad(), &pick(&theirs[1])) < 2e-6, "{what}: gradient of the input");
        let of_weight = error(&conv.weight.grad(), &theirs[2]);
        assert!(of_weight < 5e-6, "{what}: gradient of the weight: {of_weight:e}");
        if let Some(bias) = &conv.bias {
            assert!(error(&bias.grad(), &theirs[3]) < 5e-6, "{what}: gradient of the bias");
        }
    }
}

/// Several blocks of channels and several parts of the tiles, in a layer whose weight is channels-last, of rows that do not lie
/// together, and backwards twice.
#[test]
fn tensors_may_lie_in_memory_in_any_way() {
    let _turn = alone(5);
    let mut conv = conv(80, 80, false);
    let last = conv.weight.detach().permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]);
    conv.weight = last.set_requires_grad(true);
    assert!(!conv.weight.is_contiguous());
    let tiles = Arc::new(Tiles::of_maps((32, 32), 5));
    let wide = Tensor::randn([5 * 32 * 32, 160], F32).set_requires_grad(true);
    let y = conv.by_tiles(&wide.slice(1, 0, 160, 2), &tiles);
    let grad = Tensor::randn(y.size(), F32);
    let gradients =
        || Tensor::run_backward(&[(&y * &grad).sum(Kind::Float)], &[&wide, &conv.weight], true, false);
    let (first, second) = (gradients(), gradients());
    let map = |rows: &Tensor| rows.detach().view([5, 32, 32, -1]).permute([0, 3, 1, 2]);
    let x = map(&wide).slice(1, 0, 160, 2);
    let theirs = expected(&conv, &x, &Tensor::ones([1], F32), &map(&grad));
    assert!(error(&map(&y), &theirs[0]) < 2e-6);
    for ours in [first, second] {
        assert!(error(&map(&ours[0]).slice(1, 0, 160, 2), &theirs[1]) < 2e-6);
        assert!(error(&ours[1], &theirs[2]) < 5e-6);
    }
}

#[test]
fn what_is_frozen_gets_no_gradient() {
    let _turn = alone(6);
    let conv = conv(32, 32, true);
    let tiles = Arc::new(Tiles::of_maps((8, 8), 2));
    let x = Tensor::randn([128, 32], F32);
    conv.by_tiles(&x, &tiles).sum(Kind::Float).backward();
    assert!(conv.weight.grad().defined() && !x.grad().defined());
    let (mut weight, x) = (conv.weight.shallow_clone(), x.set_requires_grad(true));
    weight.zero_grad();
    let _ = weight.set_requires_grad(false);
    conv.by_tiles(&x, &tiles).sum(Kind::Float).backward();
    assert!(x.grad().defined());
    assert_eq!(weight.grad().abs().max().double_value(&[]), 0.0);
    assert!(!tch::no_grad(|| conv.by_tiles(&x, &tiles)).requires_grad());
}

#[test]
fn a_layer_takes_tiles_where_they_pay() {
    let _turn = alone(3);
    let conv = conv(32, 64, true);
    for side in [32, 33] {
        let x = Tensor::randn([4, 32, side, side], F32).set_requires_grad(true);
        assert!(conv.takes_tiles(&x));
        let tiles = Arc::new(Tiles::of_maps((side as usize, side as usize), 4));
        assert!(tiles.pay(32, 64));
        let y = conv.forward(&x);
        assert_eq!(y.size(), [4, 64, side, side]);
        let rows = y.permute([0, 2, 3, 1]);
        assert!(rows.is_contiguous(), "channels are last in memory");
        let of_tiles = conv.by_tiles(&x.permute([0, 2, 3, 1]).reshape([-1, 32]), &tiles);
        assert!(of_tiles.view_as(&rows).equal(&rows), "the layer does what its tiles do");

        let grad = Tensor::randn(y.size(), F32);
        (&y * &grad).sum(Kind::Float).backward();
        let theirs = expected(&conv, &x, &Tensor::ones([1], F32), &grad);
        let bias = conv.bias.as_ref().unwrap();
        for (i, ours) in [y.detach(), x.grad(), conv.weight.grad(), bias.grad()].iter().enumerate() {
            assert!(error(ours, &theirs[i]) < 5e-6, "{side} px: {i}: {:e}", error(ours, &theirs[i]));
        }
        for parameter in [&conv.weight, bias] {
            let _ = parameter.grad().zero_();
        }
    }
    // Neither with other kernels, strides and channels, nor other numbers.
    let other = |inputs: i64, kernel: i64, options: ConvOptions| {
        let conv = Conv2d::new(&Params::new(Device::Cpu), inputs, 32, kernel, options);
        conv.takes_tiles(&Tensor::zeros([1, inputs, 8, 8], F32))
    };
    let options = ConvOptions { padding: 1, ..ConvOptions::default() };
    assert!(other(32, 3, options));
    assert!(!other(32, 3, ConvOptions { stride: 2, ..options }));
    assert!(!other(32, 3, ConvOptions { padding: 0, ..options }));
    assert!(!other(32, 3, ConvOptions { groups: 2, ..options }));
    assert!(!other(24, 3, options));
    assert!(!other(32, 5, options));
    assert!(!conv.takes_tiles(&Tensor::zeros([1, 32, 8, 8], (Kind::Double, Device::Cpu))));
    assert!(!conv.takes_tiles(&Tensor::zeros([1, 64, 8, 8], F32)), "it has 32 channels");
    let x = Tensor::zeros([1, 32, 8, 8], F32);
    assert!(conv.takes_tiles(&x) && !autocast_bf16(true, Device::Cpu, || conv.takes_tiles(&x)).unwrap());
    // And not for few positions of many channels, whose kernels are transformed for nothing.
    assert!(!Tiles::of_maps((7, 7), 1).pay(512, 512));
}

#[test]
fn visible_cells_are_tiled_where_that_pays() {
    for (per_cell, way) in [(4, Way::Tiled), (1, Way::Gathered)] {
        let _turn = alone(7);
        let side = 8 * per_cell;
        let conv = conv(64, 64, false);
        let mask = Tensor::rand([16, 1, 8, 8], F32).lt(0.4);
        let images = Tensor::randn([16, 64, side, side], F32).set_requires_grad(true);
        // Where it is tiled, the whole map would be too, to the same bytes: `way.rs` tests which of them is chosen.
        let y =
            |way: Option<Way>| FeatureMap::new(&images, Some(&mask)).unwrap().conv_by(&conv, way).into_map();
        let chosen = y(None);
        assert!(chosen.equal(&y(Some(way))), "cells of {per_cell} px are {way:?}");
        let grad = Tensor::randn(chosen.size(), F32);
        (&chosen * &grad).sum(Kind::Float).backward();
        let shown = mask.to_kind(Kind::Uint8).upsample_nearest2d([side, side], None, None);
        let theirs = expected(&conv, &(&images * &shown), &shown, &grad);
        assert!(error(&chosen, &theirs[0]) < 2e-6);
        assert!(error(&images.grad(), &(&theirs[1] * &shown)) < 2e-6);
        assert!(error(&conv.weight.grad(), &theirs[2]) < 5e-6);
    }
}

#[test]
fn the_same_bytes_come_of_any_number_of_threads() {
    let _turn = alone(1);
    let (x, w) = (Tensor::randn([3 * 46 * 46, 64], F32), Tensor::randn([80, 64, 3, 3], F32));
    let grad = Tensor::randn([3 * 46 * 46, 80], F32);
    let layout = Layout::convolution(80, 64, 3);
    let tiles = Tiles::of_maps((46, 46), 3);
    assert_same_for_any_number(|| {
        let y = winograd::convolution(values(&x), &tiles, &Kernels::new(values(&w), &layout));
        let of_w = filled(&w.size(), |out| {
            winograd::gradient(values(&x), values(&grad), &tiles, &layout, out);
        });
        vec![y, of_w]
    });
}

#[test]
#[should_panic(expected = "channels come in groups of 16, not 24 and 32")]
fn other_channels_are_refused() {
    let _ = Kernels::new(&[0.0; 9 * 24 * 32], &Layout::convolution(32, 24, 3));
}

#[test]
#[should_panic(expected = "takes no tiles of")]
fn a_stride_is_refused() {
    let options = ConvOptions { stride: 2, padding: 1, ..ConvOptions::default() };
    let conv = Conv2d::new(&Params::new(Device::Cpu), 16, 16, 3, options);
    let _ = conv.by_tiles(&Tensor::zeros([16, 16], F32), &Arc::new(Tiles::of_maps((4, 4), 1)));
}

#[test]
#[should_panic(expected = "takes no tiles of")]
fn a_map_is_no_rows() {
    let _ = conv(16, 16, false)
        .by_tiles(&Tensor::zeros([1, 16, 4, 4], F32), &Arc::new(Tiles::of_maps((4, 4), 1)));
}

#[test]
#[should_panic(expected = "positions come line by line, each once")]
fn a_position_that_comes_twice_is_refused() {
    let _ = Tiles::of_positions((4, 4), [&[(1, 1), (1, 1)][..]]);
}

#[test]
#[should_panic(expected = "a position is not on its map")]
fn a_position_outside_is_refused() {
    let _ = Tiles::of_positions((4, 4), [&[(1, 4)][..]]);
}
