//! Means and variances over the values of all ranks, and the batch norm that is made of them by libtorch's operations.

use tch::{Device, Kind, Tensor};

use super::{BatchNorm, fused};
use crate::{autograd, ranks};

/// Count, mean and biased variance of each channel over all ranks, from those of the values here (which may be none): as
/// Chan, Golub and LeVeque add up (The American Statistician 37, 1983).
///
/// # Panics
/// When all ranks together have a single value for each channel, which has no variance.
pub(super) fn of_all_ranks(count: f64, mean: Vec<f64>, var: Vec<f64>) -> (f64, Vec<f64>, Vec<f64>) {
    if ranks::size() == 1 {
        return (count, mean, var);
    }
    let own = [&[count], mean.as_slice(), var.as_slice()].concat();
    let own = Tensor::from_slice(&own).unsqueeze(0);
    let (count, mean, var) = combined(&own, mean.len() as i64);
    let count = f64::try_from(count).expect("a number");
    require_several(count);
    (count, list(&mean), list(&var))
}

fn list(x: &Tensor) -> Vec<f64> {
    Vec::try_from(x).expect("a list of f64")
}

fn require_several(count: f64) {
    assert!(count > 1.0, "batch norm cannot train on a single value per channel: raise optimizer.batch_size");
}

/// Puts the statistics of all ranks into the running ones. On the CPU that is what [`fused`] does, to the bit: other ranks may go
/// that way, and one that has no values does not.
fn update_running(norm: &BatchNorm, mean: &Tensor, var: &Tensor, count: &Tensor) {
    if mean.device() == Device::Cpu {
        let count = f64::try_from(count).expect("a number");
        require_several(count);
        if [&norm.running_mean, &norm.running_var]
            .iter()
            .all(|x| x.kind() == Kind::Float && x.is_contiguous())
        {
            let [mean, var] = [mean, var].map(|x| list(x).into_iter().map(|x| x as f32).collect::<Vec<_>>());
            return fused::update_running(norm, &mean, &var, count);
        }
    }
    // On a GPU, which is not waited for, a single value leaves a variance of zero.
    let unbiased = var * (count / (count - 1.0).clamp_min(1.0));
    for (running, of_batch) in [(&norm.running_mean, mean), (&norm.running_var, &unbiased)] {
        let of_batch = of_batch.to_kind(running.kind());
        let _ = running.detach().lerp_(&of_batch, BatchNorm::MOMENTUM);
    }
}

/// Count, means and variances over all ranks of their rows `(1, 1 + 2 C)` of f64, each a count, means and variances.
fn combined(own: &Tensor, channels: i64) -> (Tensor, Tensor, Tensor) {
    let all = ranks::gathered(own);
    let counts = all.narrow(1, 0, 1);
    let (means, vars) = (all.narrow(1, 1, channels), all.narrow(1, 1 + channels, channels));
    let count = counts.sum(Kind::Double);
    let weighted = |x: &Tensor| {
        // Of no values there is no mean: what stands for it does not count.
        let sum = (x * &counts).where_scalarother(&counts.gt(0.0), 0.0);
        sum.sum_dim_intlist([0i64].as_slice(), false, Kind::Double) / &count
    };
    let mean = weighted(&means);
    let var = weighted(&(vars + (means - &mean).square()));
    (count, mean, var)
}

/// The standard deviation of each column of `(B, D)` over the rows of all ranks, without a graph.
pub(super) fn deviation(x: &Tensor) -> Tensor {
    let (var, mean) = x.detach().to_kind(Kind::Float).var_mean_dim([0i64].as_slice(), false, false);
    if ranks::size() == 1 {
        return var.sqrt();
    }
    let count = Tensor::full([1], x.size()[0] as f64, (Kind::Double, x.device()));
    let own = Tensor::cat(&[count, mean.to_kind(Kind::Double), var.to_kind(Kind::Double)], 0).unsqueeze(0);
    let (_, _, var) = combined(&own, x.size()[1]);
    var.sqrt().to_kind(Kind::Float)
}

/// Batch norm of `x`, of C channels in dimension 1, with the statistics of all ranks, on any device and in any layout.
pub(super) fn batch_norm(norm: &BatchNorm, x: &Tensor) -> Tensor {
    let no_grad = tch::no_grad_guard();
    let channels = norm.weight.size()[0];
    let others: Vec<i64> = (0..x.dim() as i64).filter(|dimension| *dimension != 1).collect();
    let mut shape = vec![1; x.dim()];
    shape[1] = channels;
    let wide = x.detach().to_kind(Kind::Float);
    let along = {
        let shape = shape.clone();
        move |x: &Tensor| x.to_kind(Kind::Float).view(shape.as_slice())
    };

    let (var, mean) = wide.var_mean_dim(others.as_slice(), false, false);
    let rows = x.numel() as i64 / channels;
    let count = Tensor::full([1], rows as f64, (Kind::Double, x.device()));
    let own = Tensor::cat(&[count, mean.to_kind(Kind::Double), var.to_kind(Kind::Double)], 0).unsqueeze(0);
    let (count, mean, var) = combined(&own, channels);
    update_running(norm, &mean, &var, &count);

    let inverse_std = (var + BatchNorm::EPS).rsqrt();
    let scale = along(&inverse_std) * along(&norm.weight.detach());
    let y = ((wide - along(&mean)) * &scale + along(&norm.bias.detach())).to_kind(x.kind());
    // As it came, which may be half as large as what the backward pass makes of it once more.
    let (kind, kept) = (x.kind(), x.detach());
    drop(no_grad);
    autograd::record("BatchNorm", &[x, &norm.weight, &norm.bias], y, move |grad| {
        let grad = grad.to_kind(Kind::Float);
        let centred = kept.to_kind(Kind::Float) - along(&mean);
        let sum = |x: &Tensor| x.sum_dim_intlist(others.as_slice(), false, Kind::Float).to_kind(Kind::Double);
        let (of_bias, of_product) = (sum(&grad), sum(&(&grad * &centred)));
        let of_all = ranks::summed(&Tensor::cat(&[&of_bias, &of_product], 0)) / &count;
        let (mean_grad, mean_product) = (of_all.narrow(0, 0, channels), of_all.narrow(0, channels, channels));
        let along_std = along(&(inverse_std.square() * mean_product));
        let of_x = (&grad - along(&mean_grad) - &centred * along_std) * &scale;
        let of_weight = of_product * &inverse_std;
        vec![
            Some(of_x.to_kind(kind)),
            Some(of_weight.to_kind(Kind::Float)),
            Some(of_bias.to_kind(Kind::Float)),
        ]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Params;

    fn close(a: &Tensor, b: &Tensor) {
        let off = (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).norm() / b.to_kind(Kind::Double).norm();
        assert!(f64::try_from(&off).unwrap() < 1e-5, "{off:?} apart");
    }

    #[test]
    fn means_and_variances_of_parts_are_those_of_the_whole() {
        let x = Tensor::randn([10, 3], (Kind::Double, Device::Cpu)) + 5.0;
        let of_part = |first, rows| {
            let (var, mean) = x.narrow(0, first, rows).var_mean_dim([0i64].as_slice(), false, false);
            Tensor::cat(&[Tensor::from_slice(&[rows as f64]), mean, var], 0)
        };
        // One part has no values, and a mean of none.
        let all = Tensor::stack(&[of_part(0, 7), of_part(7, 0), of_part(7, 3)], 0);
        let (count, mean, var) = combined(&all, 3);
        assert_eq!(f64::try_from(count).unwrap(), 10.0);
        close(&mean, &x.mean_dim([0i64].as_slice(), false, Kind::Double));
        close(&var, &x.var_dim([0i64].as_slice(), false, false));
    }

    #[test]
    fn batch_norm_of_operations_is_that_of_libtorch() {
        for shape in [vec![6, 4], vec![3, 4, 5, 2]] {
            let norm = BatchNorm::new(&Params::new(Device::Cpu), 4);
            let (weight, bias) = (norm.weight.detach(), norm.bias.detach());
            let _ = (weight.shallow_clone().uniform_(0.5, 2.0), bias.shallow_clone().uniform_(-1.0, 1.0));
            let x = Tensor::randn(shape.as_slice(), (Kind::Float, Device::Cpu)) * 3.0 + 2.0;
            let by = Tensor::randn(shape.as_slice(), (Kind::Float, Device::Cpu));
            let (own, theirs) = (x.copy().set_requires_grad(true), x.copy().set_requires_grad(true));
            let parameters = [&weight, &bias].map(|tensor| tensor.copy().set_requires_grad(true));
            let running = [
                Tensor::zeros([4], (Kind::Float, Device::Cpu)),
                Tensor::ones([4], (Kind::Float, Device::Cpu)),
            ];
            let y = theirs.batch_norm(
                Some(&parameters[0]),
                Some(&parameters[1]),
                Some(&running[0]),
                Some(&running[1]),
                true,
                BatchNorm::MOMENTUM,
                BatchNorm::EPS,
                false,
            );
            let ours = batch_norm(&norm, &own);
            close(&ours, &y);
            (&ours * &by).sum(Kind::Float).backward();
            (&y * &by).sum(Kind::Float).backward();
            close(&own.grad(), &theirs.grad());
            close(&norm.weight.grad(), &parameters[0].grad());
            close(&norm.bias.grad(), &parameters[1].grad());
            close(&norm.running_mean, &running[0]);
            close(&norm.running_var, &running[1]);
        }
    }
}
