//! What a GPU computes with kernels of ours, against the CPU's: these are compared with other people's numbers elsewhere. On a
//! machine without one, nothing is tried, and each test says so.

use std::time::Duration;

use jepa_host::config;
use jepa_host::device::{choose, gradients, has_cuda_library, pinned, to_device};
use jepa_host::dist::{Comm, Keeper, Launch, Launcher, Reduce};
use jepa_plugin_api::nn::{BatchNorm, Conv2d, ConvOptions};
use jepa_plugin_api::{Params, tch};
use jepa_tests::draw::Draw;
use jepa_tests::ranks::free_port;
use jepa_tests::real::{Room, Running, TINY_BACKBONE, demo_images, records, say_not_tried, setting};
use sparse_conv::FeatureMap;
use tch::{Device, Kind, Tensor};

/// The first GPU, if there is one.
fn gpu(test: &str) -> Option<Device> {
    choose(config::Device::Cuda(None), 0).inspect_err(|error| say_not_tried(&format!("{test}: {error}"))).ok()
}

/// Normal numbers on the CPU, some of them far from zero.
fn numbers(draw: &mut Draw, size: &[i64], kind: Kind) -> Tensor {
    (Tensor::randn(size, (Kind::Float, Device::Cpu)) + draw.of(&[0.0, 3.0])).to_kind(kind)
}

/// The norm of the difference is at most so much of the norm: single numbers may be on the other side of a ReLU.
fn close(what: &str, on_gpu: &Tensor, on_cpu: &Tensor, tolerance: f64) {
    assert_eq!(on_gpu.size(), on_cpu.size(), "{what}");
    let [ours, expected] = [on_gpu, on_cpu].map(|x| x.detach().to_device(Device::Cpu).to_kind(Kind::Double));
    let [difference, scale] = [ours - &expected, expected].map(|x| f64::try_from(x.norm()).unwrap());
    assert!(difference <= tolerance * scale.max(1e-3), "{what} is off by {difference:.2e} of {scale:.2e}");
}

fn leaf(x: &Tensor, device: Device) -> Tensor {
    x.to_device(device).copy().set_requires_grad(true)
}

fn channels_last(x: &Tensor) -> Tensor {
    x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
}

#[test]
fn batch_norm_and_what_follows_are_the_same() {
    let Some(gpu) = gpu("batch norm") else { return };
    for seed in 0..60 {
        tch::manual_seed(seed);
        let mut draw = Draw(seed as u64);
        let (kind, tolerance) = draw.of(&[(Kind::Float, 2e-4), (Kind::BFloat16, 3e-2)]);
        let channels = draw.of(&[8, 24, 64, 72, 256, 2048]);
        let map = draw.below(2) == 0;
        let rows = draw.of(&[7, 130, 3000]);
        let size = if map { vec![1 + rows / 30, channels, 5, 6] } else { vec![rows, channels] };
        let follows = draw.below(3);
        let [x, other, grad] = [0; 3].map(|_| numbers(&mut draw, &size, kind));
        let weight = numbers(&mut draw, &[channels], Kind::Float);
        let run = |device: Device| {
            let norm = BatchNorm::new(&Params::new(device), channels);
            tch::no_grad(|| norm.weight.shallow_clone().copy_(&weight));
            let (x, other) = (leaf(&x, device), leaf(&other, device));
            let layout = |x: &Tensor| if map { channels_last(x) } else { x.shallow_clone() };
            let y = match follows {
                0 => norm.forward(&layout(&x), true),
                1 => norm.forward_relu(&layout(&x), true),
                _ => norm.forward_add_relu(&layout(&x), &layout(&other), true),
            };
            (&y * grad.to_device(device)).sum(Kind::Float).backward();
            let mut all = vec![y, x.grad(), norm.weight.grad(), norm.bias.grad()];
            all.extend([norm.running_mean, norm.running_var, norm.num_batches_tracked]);
            if follows == 2 {
                all.push(other.grad());
            }
            all
        };
        let names = ["y", "∂x", "∂weight", "∂bias", "mean", "var", "batches", "∂other"];
        for ((name, ours), expected) in names.iter().zip(run(gpu)).zip(run(Device::Cpu)) {
            close(&format!("seed {seed}, {kind:?} {size:?}, {follows}: {name}"), &ours, &expected, tolerance);
        }
    }
}

#[test]
fn sparse_convolutions_and_pools_are_the_same() {
    let Some(gpu) = gpu("sparse convolution") else { return };
    for seed in 0..60 {
        tch::manual_seed(seed);
        let mut draw = Draw(seed as u64);
        // TF32 and bf16 keep three digits.
        let (kind, tolerance) = draw.of(&[(Kind::Float, 5e-3), (Kind::BFloat16, 5e-2)]);
        let (batch, cells, per_cell) = (1 + draw.below(3), 1 + draw.below(4), draw.of(&[2, 4]));
        let side = cells * per_cell;
        let channels = draw.of(&[3, 8, 20, 64, 264]);
        let outputs = draw.of(&[8, 40]);
        let (kernel, stride) = (draw.of(&[1, 3, 7]), draw.of(&[1, 2]));
        let sparse = draw.below(4) > 0;
        let mask = Tensor::rand([batch, 1, cells, cells], (Kind::Float, Device::Cpu)).lt(0.5);
        let _ = mask.get(0).get(0).get(0).get(0).fill_(1);
        let x = numbers(&mut draw, &[batch, channels, side, side], kind);
        let weight = numbers(&mut draw, &[outputs, channels, kernel, kernel], Kind::Float);
        let run = |device: Device, mask: &Tensor| {
            let options = ConvOptions { stride, padding: kernel / 2, bias: false, ..ConvOptions::default() };
            let conv = Conv2d::new(&Params::new(device), channels, outputs, kernel, options);
            tch::no_grad(|| conv.weight.shallow_clone().copy_(&weight));
            // Images have three channels and no gradient.
            let x = leaf(&x, device).set_requires_grad(channels > 3);
            let weight = conv.weight.shallow_clone();
            let conv = Conv2d { weight: weight.to_kind(kind), ..conv };
            let map = FeatureMap::new(&x, sparse.then_some(mask)).unwrap();
            let y = map.conv(&conv).into_map();
            let pooled = FeatureMap::new(&x, sparse.then_some(mask)).unwrap().max_pool(3, 2, 1).into_map();
            let sum = y.to_kind(Kind::Float).square().sum(Kind::Float)
                + (pooled.to_kind(Kind::Float) * Tensor::arange(pooled.size()[3], (Kind::Float, device)))
                    .sum(Kind::Float);
            sum.backward();
            let of_x = if channels > 3 { x.grad() } else { x };
            [y, pooled, weight.grad(), of_x]
        };
        let expected = run(Device::Cpu, &mask);
        let what = format!("seed {seed}, {kind:?} {:?}, {kernel}/{stride}, sparse {sparse}", x.size());
        // The mask may be here or there.
        for mask in [mask.shallow_clone(), mask.to_device(gpu)] {
            for ((name, ours), expected) in
                ["conv", "pool", "∂weight", "∂x"].iter().zip(run(gpu, &mask)).zip(&expected)
            {
                close(&format!("{what}: {name}"), &ours, expected, tolerance);
            }
        }
    }
}

#[test]
fn copies_beside_the_computation_are_whole() {
    let Some(gpu) = gpu("copies") else { return };
    let work = Tensor::randn([4096, 4096], (Kind::Float, gpu));
    let mut differences = Vec::new();
    for round in 0..20 {
        // The GPU is behind: what follows is queued, and its copies are read late.
        let _ = work.matmul(&work);
        let mut here = pinned(&[64, 3, 224, 224], Kind::Float).unwrap();
        let _ = here.fill_(f64::from(round));
        let labels = Tensor::from_slice(&[i64::from(round); 64]);
        let there = to_device(&[&here, &labels], gpu).unwrap();
        // Its memory goes to a later round, which must not write before this copy has read.
        drop(here);
        let _ = work.matmul(&work);
        differences.push((&there[0] - f64::from(round)).abs().max());
        differences.push((&there[1] - i64::from(round)).abs().max().to_kind(Kind::Float));
    }
    assert_eq!(f64::try_from(Tensor::stack(&differences, 0).max()).unwrap(), 0.0);
}

/// One rank is all that one GPU has room for: NCCL takes each GPU once. So sums and means are what they were, and this shows that
/// the calls go through and leave nothing out.
#[test]
fn one_rank_talks_to_itself_over_nccl() {
    let Some(gpu) = gpu("NCCL") else { return };
    let launch = Launch {
        launcher: Launcher::Environment,
        group: String::new(),
        rank: 0,
        size: 1,
        local_rank: None,
        host: "127.0.0.1".to_owned(),
        port: free_port(),
        keeper: Keeper::First,
    };
    let comm = Comm::join(launch, Duration::from_secs(60)).unwrap();
    if !comm.join_gpus().unwrap() {
        return say_not_tried("libjepa_cuda.so is not there");
    }
    let x = Tensor::arange(1000, (Kind::Float, gpu));
    let mut sum = x.copy();
    comm.all_reduce(&mut sum, Reduce::Sum).unwrap();
    assert_eq!(sum, x);
    assert_eq!(comm.all_gather(&x).unwrap().view(-1), x);

    // Gradients in parts of one parameter and more, and figures beside them.
    let params: Vec<Tensor> =
        [10, 2000, 30].map(|n| leaf(&Tensor::ones([n], (Kind::Float, gpu)), gpu)).into();
    let mut exchange = comm.exchange(&params, 1024).unwrap();
    let figures = Tensor::from_slice(&[0.5f64]).to_device(gpu);
    for round in 1..4 {
        jepa_host::device::zero_gradients(&params).unwrap();
        exchange.begin(&figures).unwrap();
        let sum = params.iter().map(|param| (param * f64::from(round)).sum(Kind::Float));
        sum.reduce(|a, b| a + b).unwrap().backward();
        exchange.finish().unwrap();
        for gradient in gradients(&params).unwrap() {
            let gradient = gradient.expect("every parameter has one");
            assert_eq!(f64::try_from((gradient - f64::from(round)).abs().max()).unwrap(), 0.0);
        }
    }
    assert_eq!(f64::try_from(figures).unwrap(), 0.5);
    // In each round the figures, a part of the last two parameters and one of the first.
    let traffic = comm.traffic();
    assert_eq!((traffic.times, traffic.parts_of_gradients), (3, 9));
}

/// 12 steps of a method on the GPU.
fn train(room: &Room, plugin: &str, settings: &[&str]) -> Running {
    let fixed = [
        "trainer.max_steps=12",
        "trainer.log_every_steps=1",
        "trainer.device=cuda",
        "data.size=16",
        "eval.every_epochs=0",
    ];
    let images = setting("data.train", &demo_images());
    let arguments = ["--plugin", plugin, &images].into_iter().chain(TINY_BACKBONE).chain(fixed);
    room.start(arguments.chain(settings.iter().copied()))
}

/// Whether this machine captures CUDA graphs.
fn captures(test: &str) -> bool {
    let captures = gpu(test).is_some();
    if captures && !has_cuda_library() {
        say_not_tried("libjepa_cuda.so is not there");
    }
    captures && has_cuda_library()
}

/// The first four steps are computed in both runs, and those from the fifth on are replayed in one of them. Their kernels are the
/// same: what differs is what sums in another order make.
#[test]
fn replayed_steps_are_the_computed_ones() {
    if !captures("CUDA graphs") {
        return;
    }
    for (precision, tolerance) in [("fp32", 0.01), ("bf16", 0.05)] {
        let figures = |more: &[&str]| {
            let room = Room::new();
            let precision = format!("trainer.precision={precision}");
            let settings = [
                "method.hidden=16",
                "method.output=8",
                "optimizer.batch_size=32",
                "trainer.clip=1.0",
                &precision,
            ];
            let all: Vec<&str> = settings.into_iter().chain(more.iter().copied()).collect();
            let ended = train(&room, "simclr", &all).wait().expect(0);
            let records = records(&room.file("runs/simclr/version_0"));
            let of_steps =
                |name: &str| records.iter().filter_map(|record| record[name].as_f64()).collect::<Vec<_>>();
            (
                ["train/loss", "train/grad_norm"].map(of_steps),
                ended.stderr.contains("replayed as a CUDA graph"),
            )
        };
        let (computed, _) = figures(&[]);
        let (replayed, by_graph) = figures(&["trainer.cuda_graphs=true"]);
        assert!(by_graph);
        for (name, (computed, replayed)) in ["loss", "norm"].iter().zip(computed.iter().zip(&replayed)) {
            assert_eq!((computed.len(), replayed.len()), (12, 12));
            for (step, (computed, replayed)) in computed.iter().zip(replayed).enumerate() {
                let off = (computed - replayed).abs();
                assert!(
                    off <= tolerance * computed,
                    "{precision}, step {step}, {name}: {replayed}, not {computed}"
                );
            }
        }
    }
}

#[test]
fn methods_that_are_not_capturable_are_found_out() {
    if !captures("methods that cannot be captured") {
        return;
    }
    let cases = [
        ("method.hidden_state=true", "the method or the backbone does something else in each step"),
        ("method.panic_at_pass=99", "no step can be captured: use trainer.cuda_graphs=false"),
    ];
    for (fault, says) in cases {
        let room = Room::new();
        let settings = [fault, "optimizer.batch_size=32"];
        train(&room, "faulty_plugin", &[&settings[..], &["trainer.cuda_graphs=true"]].concat())
            .wait()
            .expect(6)
            .error_says(&[says]);
        // Nothing is lost.
        let again = [&settings[..], &["--resume", "auto"]].concat();
        let ended = train(&room, "faulty_plugin", &again).wait().expect(0);
        assert!(ended.stderr.contains("going on at step"), "{}", ended.stderr);
    }
}
