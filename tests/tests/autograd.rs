//! Functions with their own gradient, work on libtorch's threads, and the batch norm that is made of both.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use jepa_plugin_api::nn::BatchNorm;
use jepa_plugin_api::{Params, autograd, parallel, tch};
use tch::{Device, Kind, Tensor};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

/// Counts how often it was dropped.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn doubled(x: &Tensor, kept: Counted) -> Tensor {
    autograd::record("Doubled", &[x], tch::no_grad(|| x * 2), move |grad| {
        let _ = &kept;
        vec![Some(grad * 2)]
    })
}

#[test]
fn what_is_kept_is_freed_as_soon_as_it_is_not_needed() {
    let dropped = Arc::new(AtomicUsize::new(0));
    let seen = || dropped.load(Ordering::SeqCst);
    let kept = || Counted(Arc::clone(&dropped));
    let x = Tensor::ones([3], F32);
    drop(doubled(&x, kept()));
    assert_eq!(seen(), 1, "no input needs a gradient");
    let x = x.set_requires_grad(true);
    drop(tch::no_grad(|| doubled(&x, kept())));
    assert_eq!(seen(), 2, "no graph is recorded");
    drop(doubled(&x, kept()));
    assert_eq!(seen(), 3, "the graph is gone");
    let y = doubled(&doubled(&x, kept()), kept());
    y.sum(Kind::Float).backward();
    assert_eq!(seen(), 5, "after the backward pass, though y is still there");
    assert!(x.grad().equal(&Tensor::full([3], 4, F32)));
}

#[test]
fn an_input_without_a_gradient_gets_none() {
    let [a, b] = [1.0, 2.0].map(|value| Tensor::full([2], value, F32).set_requires_grad(true));
    let y = autograd::record("First", &[&a, &b], tch::no_grad(|| &a * 3), |grad| vec![Some(grad * 3), None]);
    y.sum(Kind::Float).backward();
    assert!(a.grad().equal(&Tensor::full([2], 3, F32)));
    assert!(!b.grad().defined());
}

#[test]
fn what_goes_wrong_in_a_backward_pass_is_its_error() {
    let error = |backward: fn(&Tensor) -> Vec<Option<Tensor>>| {
        let x = Tensor::ones([2], F32).set_requires_grad(true);
        let y = autograd::record("Faulty", &[&x], tch::no_grad(|| &x + 1), backward);
        y.sum(Kind::Float).f_backward().unwrap_err().to_string()
    };
    let message = error(|_| panic!("no gradient today"));
    assert!(message.contains("the gradient of Faulty: no gradient today"), "{message}");
    let message = error(|_| Vec::new());
    assert!(message.contains("it made 0 gradients for 1 inputs"), "{message}");
    let message = error(|grad| vec![Some(Tensor::zeros([5], (grad.kind(), grad.device())))]);
    assert!(message.contains("Faulty returned an invalid gradient"), "{message}");
}

#[test]
fn a_second_pass_and_a_second_derivative_are_refused_with_the_reason() {
    let dropped = Arc::new(AtomicUsize::new(0));
    let x = Tensor::ones([2], F32).set_requires_grad(true);
    let y = doubled(&x, Counted(dropped)).sum(Kind::Float);
    y.backward();
    let message = y.f_backward().unwrap_err().to_string();
    assert!(message.contains("a second time"), "{message}");

    let y = doubled(&x, Counted(Arc::default())).square().sum(Kind::Float);
    let message = Tensor::f_run_backward(&[&y], &[&x], true, true).unwrap_err().to_string();
    assert!(message.contains("Doubled has no second derivative"), "{message}");
}

#[test]
fn a_panic_on_another_thread_arrives_here() {
    tch::set_num_threads(2);
    let caught = catch_unwind(AssertUnwindSafe(|| {
        parallel::for_each(0..100, |i| assert!(i != 70, "number {i}"));
    }));
    let message = caught.unwrap_err().downcast::<String>().unwrap();
    assert_eq!(*message, "number 70");
    // And the threads are as good as before.
    let count = AtomicUsize::new(0);
    parallel::for_each(0..100, |_| {
        count.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(count.into_inner(), 100);
}

/// A norm with weights and running statistics that are not those of the beginning.
fn norm(channels: i64) -> BatchNorm {
    let norm = BatchNorm::new(&Params::new(Device::Cpu), channels);
    tch::no_grad(|| {
        let _ = norm.weight.shallow_clone().uniform_(-1.0, 2.0);
        let _ = norm.bias.shallow_clone().uniform_(-1.0, 1.0);
        let _ = norm.running_mean.shallow_clone().uniform_(-1.0, 1.0);
        let _ = norm.running_var.shallow_clone().uniform_(0.5, 2.0);
    });
    norm
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Then {
    Nothing,
    Relu,
    AddRelu,
}

/// y, the gradients of x, weight, bias and other, and the running statistics, by libtorch in fp64.
fn expected(
    norm: &BatchNorm,
    x: &Tensor,
    other: &Tensor,
    weights: &Tensor,
    then: Then,
    train: bool,
) -> Vec<Tensor> {
    let double = |x: &Tensor| x.detach().to_kind(Kind::Double);
    let leaf = |x: &Tensor| double(x).set_requires_grad(true);
    let (x, other, weight, bias) = (leaf(x), leaf(other), leaf(&norm.weight), leaf(&norm.bias));
    let (mean, var) = (double(&norm.running_mean).copy(), double(&norm.running_var).copy());
    let (momentum, eps) = (BatchNorm::MOMENTUM, BatchNorm::EPS);
    let y = x.batch_norm(Some(&weight), Some(&bias), Some(&mean), Some(&var), train, momentum, eps, false);
    let y = match then {
        Then::Nothing => y,
        Then::Relu => y.relu(),
        Then::AddRelu => (y + &other).relu(),
    };
    (&y * double(weights)).sum(Kind::Double).backward();
    let of_other = if then == Then::AddRelu { other.grad() } else { other.zeros_like() };
    vec![y, x.grad(), weight.grad(), bias.grad(), of_other, mean, var]
}

fn forward(norm: &BatchNorm, x: &Tensor, other: &Tensor, then: Then, train: bool) -> Tensor {
    match then {
        Then::Nothing => norm.forward(x, train),
        Then::Relu => norm.forward_relu(x, train),
        Then::AddRelu => norm.forward_add_relu(x, other, train),
    }
}

fn ours(
    norm: &BatchNorm,
    x: &Tensor,
    other: &Tensor,
    weights: &Tensor,
    then: Then,
    train: bool,
) -> Vec<Tensor> {
    let leaf = |x: &Tensor| x.detach().set_requires_grad(true);
    let (x, other) = (leaf(x), leaf(other));
    let y = forward(norm, &x, &other, then, train);
    (&y * weights).sum(Kind::Float).backward();
    let of_other = if then == Then::AddRelu { other.grad() } else { other.zeros_like() };
    let statistics = [&norm.running_mean, &norm.running_var].map(Tensor::copy);
    let [mean, var] = statistics;
    vec![y, x.grad(), norm.weight.grad(), norm.bias.grad(), of_other, mean, var]
}

#[test]
fn batch_norm_and_what_follows_equal_libtorch_in_fp64() {
    const NAMES: [&str; 7] = ["y", "of x", "of weight", "of bias", "of other", "running mean", "running var"];
    let mut tried = 0;
    for (seed, (shape, far)) in [
        (vec![1000, 3], 0.0),
        (vec![257, 64], 100.0),
        (vec![7, 2048], 3.0),
        (vec![5, 20, 9, 6], 0.0),
        (vec![9, 33, 1, 1], 0.0),
        (vec![2, 1, 4, 4], 0.0),
    ]
    .into_iter()
    .enumerate()
    {
        for then in [Then::Nothing, Then::Relu, Then::AddRelu] {
            for (kind, tolerance) in [(Kind::Float, 5e-6), (Kind::BFloat16, 4e-2)] {
                for train in [true, false] {
                    tch::manual_seed(seed as i64);
                    // Maps as the backbones keep them, channels last; bf16 has no digits for a mean so far away.
                    let far = if kind == Kind::Float { far } else { 0.0 };
                    let make = |shift: f64| {
                        let x = (Tensor::randn(&shape, F32) + shift).to_kind(kind);
                        match shape.len() {
                            4 => x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]),
                            _ => x,
                        }
                    };
                    let (x, other, weights) = (make(far), make(0.0), make(0.0));
                    let norm = norm(shape[1]);
                    let expected = expected(&norm, &x, &other, &weights, then, train);
                    // With running statistics and a graph it is libtorch that computes: the kernel is for inference.
                    let ours = match train {
                        true => ours(&norm, &x, &other, &weights, then, true),
                        false => vec![tch::no_grad(|| forward(&norm, &x, &other, then, false))],
                    };
                    for ((name, ours), expected) in NAMES.iter().zip(ours).zip(expected) {
                        // In bf16 a value near zero may fall on the other side of a ReLU: then the mean error tells.
                        let size = |x: &Tensor| match kind {
                            Kind::Float => f64::try_from(x.abs().max()).unwrap(),
                            _ => f64::try_from(x.square().mean(Kind::Double).sqrt()).unwrap(),
                        };
                        let off = size(&(ours.to_kind(Kind::Double) - &expected));
                        let scale = size(&expected).max(1.0);
                        let tolerance = if far > 0.0 { 20.0 * tolerance } else { tolerance };
                        assert!(
                            off <= tolerance * scale,
                            "{name}, {shape:?} {kind:?} {then:?} train {train}: off by {off:.1e} of {scale:.1e}"
                        );
                        tried += 1;
                    }
                }
            }
        }
    }
    assert_eq!(tried, 6 * 3 * 2 * (7 + 1));
}

#[test]
fn batch_norm_gives_the_same_bytes_on_any_number_of_threads() {
    let run = |threads: i32| {
        tch::set_num_threads(threads);
        tch::manual_seed(0);
        let norm = norm(24);
        let x = Tensor::randn([3000, 24], F32);
        let made = ours(&norm, &x, &x, &x, Then::AddRelu, true);
        tch::set_num_threads(1);
        made
    };
    assert!(run(1).iter().zip(run(2)).all(|(one, two)| one.equal(&two)));
}

#[test]
fn what_is_no_number_stays_so() {
    let norm = norm(2);
    let x = Tensor::from_slice(&[1.0f32, 2.0, f32::NAN, 3.0, 5.0, 7.0]).view([3, 2]);
    let y = norm.forward_relu(&x, false);
    assert!(y.isnan().get(1).get(0).equal(&Tensor::from(true)));
    assert_eq!(i64::try_from(y.isnan().sum(Kind::Int64)).unwrap(), 1);
}

#[test]
fn a_shortcut_gets_its_gradient_also_with_running_statistics() {
    let norm = norm(3);
    let frozen = [&norm.weight, &norm.bias].map(|x| x.set_requires_grad(false));
    assert!(frozen.iter().all(|x| !x.requires_grad()));
    let (x, other) = (Tensor::randn([5, 3], F32), Tensor::randn([5, 3], F32).set_requires_grad(true));
    let y = norm.forward_add_relu(&x, &other, false);
    y.sum(Kind::Float).backward();
    assert!(other.grad().equal(&y.gt(0.0).to_kind(Kind::Float)));
}
