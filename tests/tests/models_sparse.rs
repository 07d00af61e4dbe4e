//! Convolution and pooling over visible cells, against libtorch's own in fp64 on the whole map with zeros at what is
//! hidden: over random masks, sizes, kernels, strides, and channels.

use std::panic::{AssertUnwindSafe, catch_unwind};

use jepa_host::device::autocast_bf16;
use jepa_plugin_api::nn::{BatchNorm, Conv2d, ConvOptions, LayerNorm2d};
use jepa_plugin_api::{Params, tch};
use jepa_tests::draw::{Draw, alone};
use sparse_conv::{FeatureMap, Way};
use tch::{Device, Kind, Tensor};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

fn worst(name: &str, seed: u64, ours: &Tensor, expected: &Tensor, tolerance: f64) {
    worst_of(name, seed, ours, expected, tolerance, 1e-3);
}

/// The greatest difference, over the greatest number that is expected; or over `least`, if that is more.
fn worst_of(name: &str, seed: u64, ours: &Tensor, expected: &Tensor, tolerance: f64, least: f64) {
    assert_eq!(ours.size(), expected.size(), "seed {seed}: {name}");
    let expected = expected.to_kind(Kind::Double);
    let difference = f64::try_from((ours.to_kind(Kind::Double) - &expected).abs().max()).unwrap();
    let scale = f64::try_from(expected.abs().max()).unwrap().max(least);
    assert!(difference <= tolerance * scale, "seed {seed}: {name} is off by {difference:.2e} of {scale:.2e}");
}

fn double(x: &Tensor) -> Tensor {
    x.detach().to_kind(Kind::Double)
}

/// A mask of `cells` `(B, 1, f, f)` that shows something, and of some images nothing.
fn random_mask(draw: &mut Draw, batch: i64, cells: i64) -> Tensor {
    let share = draw.of(&[0.1, 0.4, 0.6, 1.0]);
    let mask = Tensor::rand([batch, 1, cells, cells], F32).lt(share);
    let _ = mask.get(0).get(0).get(draw.below(cells)).get(draw.below(cells)).fill_(1);
    mask
}

fn at(mask: &Tensor, side: i64) -> Tensor {
    mask.to_kind(Kind::Uint8).upsample_nearest2d([side, side], None, None).to_kind(Kind::Double)
}

#[test]
fn convolutions_equal_libtorchs_of_the_whole_map() {
    for seed in 0..300 {
        let mut draw = Draw(seed);
        let _turn = alone(seed);
        let (batch, cells, per_cell) = (1 + draw.below(3), 1 + draw.below(4), draw.of(&[1, 2, 4]));
        let side = cells * per_cell;
        let stride = if per_cell > 1 { draw.of(&[1, 2]) } else { 1 };
        let kernel = draw.of(&[1, 2, 3, 5, 7]);
        // The map that comes out divides into the cells.
        let padding = match kernel % 2 {
            1 => kernel / 2,
            _ if stride == kernel => 0,
            _ => continue,
        };
        let depthwise = draw.below(2) == 0;
        let inputs = draw.of(&[1, 3, 8, 20, 33, 70]);
        let (outputs, groups) = if depthwise { (inputs, inputs) } else { (draw.of(&[1, 5, 16, 40]), 1) };
        let bias = draw.below(2) == 0;
        let params = Params::new(Device::Cpu);
        let options = ConvOptions { stride, padding, groups, bias, ..ConvOptions::default() };
        let conv = Conv2d::new(&params, inputs, outputs, kernel, options);

        let mask = random_mask(&mut draw, batch, cells);
        let images = Tensor::randn([batch, inputs, side, side], F32).set_requires_grad(true);
        let way = draw.of(&[Some(Way::Gathered), Some(Way::Gathered), Some(Way::WholeMap), None]);
        let y = FeatureMap::new(&images, Some(&mask)).unwrap().conv_by(&conv, way).into_map();
        let weights = Tensor::randn(y.size(), F32);
        (&y * &weights).sum(Kind::Float).backward();

        let x = double(&images).set_requires_grad(true);
        let weight = double(&conv.weight).set_requires_grad(true);
        let of_bias = conv.bias.as_ref().map(|bias| double(bias).set_requires_grad(true));
        let seen = &x * at(&mask, side);
        let expected = seen.conv2d(&weight, of_bias.as_ref(), [stride; 2], [padding; 2], [1, 1], groups);
        let expected = &expected * at(&mask, expected.size()[2]);
        (&expected * double(&weights)).sum(Kind::Double).backward();

        worst("output", seed, &y, &expected, 2e-6);
        worst("gradient of the input", seed, &images.grad(), &x.grad(), 2e-6);
        // Sums of many numbers of about 1, which may leave next to nothing.
        worst_of("gradient of the weight", seed, &conv.weight.grad(), &weight.grad(), 5e-6, 1.0);
        if let (Some(bias), Some(expected)) = (&conv.bias, &of_bias) {
            worst_of("gradient of the bias", seed, &bias.grad(), &expected.grad(), 5e-6, 1.0);
        }
    }
}

#[test]
fn max_pools_equal_libtorchs_of_the_whole_map() {
    for seed in 0..100 {
        let mut draw = Draw(seed);
        let _turn = alone(seed);
        let (batch, cells, channels) = (1 + draw.below(3), 1 + draw.below(4), draw.of(&[1, 8, 33]));
        let (kernel, stride, padding, per_cell) =
            draw.of(&[(3, 2, 1, 2), (3, 2, 1, 4), (2, 2, 0, 2), (3, 1, 1, 2)]);
        let side = cells * per_cell;
        let mask = random_mask(&mut draw, batch, cells);
        // Equal values too: which of them gets the gradient has to be the same one.
        let values = Tensor::randint_low(-3, 4, [batch, channels, side, side], F32);
        let images = values.copy().set_requires_grad(true);
        let y = FeatureMap::new(&images, Some(&mask)).unwrap().max_pool(kernel, stride, padding).into_map();
        let weights = Tensor::randn(y.size(), F32);
        (&y * &weights).sum(Kind::Float).backward();

        let x = values.to_kind(Kind::Double).set_requires_grad(true);
        let seen = &x * at(&mask, side);
        let expected = seen.max_pool2d([kernel; 2], [stride; 2], [padding; 2], [1, 1], false);
        let expected = &expected * at(&mask, expected.size()[2]);
        (&expected * double(&weights)).sum(Kind::Double).backward();
        worst("output", seed, &y, &expected, 0.0);
        worst("gradient", seed, &images.grad(), &x.grad(), 1e-6);
    }
}

/// A small network of everything that the backbones are made of.
struct Network {
    stem: Conv2d,
    norms: [BatchNorm; 2],
    conv: Conv2d,
    depthwise: Conv2d,
    layer_norm: LayerNorm2d,
}

impl Network {
    fn new(params: &Params, channels: i64) -> Self {
        let conv = |name: &str, inputs, kernel, stride, groups| {
            let options =
                ConvOptions { stride, padding: kernel / 2, groups, bias: false, ..ConvOptions::default() };
            Conv2d::new(&params.sub(name), inputs, channels, kernel, options)
        };
        Network {
            stem: conv("stem", 3, 7, 2, 1),
            conv: conv("conv", channels, 3, 1, 1),
            depthwise: conv("depthwise", channels, 7, 1, channels),
            norms: [BatchNorm::new(&params.sub("a"), channels), BatchNorm::new(&params.sub("b"), channels)],
            layer_norm: LayerNorm2d::new(&params.sub("c"), channels),
        }
    }

    fn forward(&self, x: &FeatureMap) -> Tensor {
        let x = x.conv(&self.stem).batch_norm_relu(&self.norms[0], true).unwrap().max_pool(3, 2, 1);
        let y = x.conv(&self.conv).batch_norm_add_relu(&self.norms[1], &x, true).unwrap();
        y.conv(&self.depthwise).layer_norm(&self.layer_norm).add(&y).into_map()
    }
}

#[test]
fn bf16_follows_fp32() {
    let _turn = alone(0);
    let params = Params::new(Device::Cpu);
    let network = Network::new(&params, 24);
    let images = Tensor::randn([2, 3, 64, 64], F32);
    let mask = random_mask(&mut Draw(1), 2, 4);
    let run = |images: &Tensor| {
        let x = FeatureMap::new(images, Some(&mask)).unwrap();
        let y = network.forward(&x);
        for entry in params.entries().iter().filter(|entry| entry.tensor.requires_grad()) {
            entry.tensor.shallow_clone().zero_grad();
        }
        y.to_kind(Kind::Float).square().mean(Kind::Float).backward();
        (y, network.stem.weight.grad().copy(), network.depthwise.weight.grad().copy())
    };
    let (y, stem, depthwise) = run(&images);
    let (y16, stem16, depthwise16) = autocast_bf16(true, Device::Cpu, || run(&images)).unwrap();
    assert_eq!(y16.kind(), Kind::BFloat16);
    worst("features", 0, &y16, &y, 0.05);
    worst("gradient of the stem", 0, &stem16, &stem, 0.2);
    worst("gradient of the depthwise convolution", 0, &depthwise16, &depthwise, 0.2);
}

#[test]
fn what_does_not_fit_is_said() {
    let features = |channels, side| {
        let map = Tensor::randn([1, channels, side, side], F32);
        FeatureMap::new(&map, Some(&Tensor::ones([1, 1, 1, 1], (Kind::Bool, Device::Cpu)))).unwrap()
    };
    let conv = |inputs, kernel, padding| {
        let options = ConvOptions { padding, stride: kernel, ..ConvOptions::default() };
        Conv2d::new(&Params::new(Device::Cpu), inputs, 4, kernel, options)
    };
    let said = |what: &dyn Fn()| {
        let payload = catch_unwind(AssertUnwindSafe(what)).unwrap_err();
        *payload.downcast::<String>().unwrap()
    };
    let message = said(&|| drop(features(4, 4).conv(&conv(8, 2, 0))));
    assert!(message.contains("features of 4 channels met a convolution that takes 8"), "{message}");
    let message = said(&|| drop(features(4, 1).conv(&conv(4, 2, 0))));
    assert!(message.contains("has no room for a kernel of 2"), "{message}");
    let message = said(&|| drop(features(4, 4).max_pool(2, 2, 2)));
    assert!(message.contains("pad should be at most half of effective kernel size"), "{message}");
}
