//! [`fused`](super::fused) on a GPU: the same passes over memory, by the kernels in `norm.cu`.

use tch::{Kind, Tensor};

use super::BatchNorm;
use super::fused::Then;
use crate::autograd;
use crate::cuda::{Arg, Program, aligned, of_kind};

static KERNELS: Program = Program::new("batch norm", include_str!("norm.cu"));

/// Threads in a block.
const THREADS: usize = 256;
/// Blocks, as many as keep a large GPU busy.
const BLOCKS: usize = 1056;

/// Whether they take rows `(N, C)`: of f32 or bf16, and whole 16 bytes of channels.
pub(super) fn takes(rows: &Tensor) -> bool {
    let Some(kernel) = of_kind(rows.kind(), ["apply_f32", "apply_bf16"]) else { return false };
    let whole = (rows.size()[1] as usize).is_multiple_of(lane(rows.kind()));
    whole && i32::try_from(rows.size()[0]).is_ok() && KERNELS.runs(kernel, rows)
}

/// Channels of a thread.
fn lane(kind: Kind) -> usize {
    if kind == Kind::BFloat16 { 8 } else { 4 }
}

/// How the rows of a tensor are dealt to threads.
#[derive(Clone, Copy)]
struct Dealt {
    kind: Kind,
    rows: i32,
    channels: i32,
    grid: [usize; 2],
    block: [usize; 2],
}

impl Dealt {
    fn new(rows: &Tensor) -> Self {
        let (count, channels) = (rows.size()[0] as usize, rows.size()[1] as usize);
        let lanes = channels / lane(rows.kind());
        let wide = lanes.min(32);
        let high = THREADS / wide;
        let across = lanes.div_ceil(wide);
        // Some rows for each thread: what it begins with costs as much as a few of them.
        let parts = count.div_ceil(4 * high).clamp(1, (BLOCKS / across).max(1));
        Dealt {
            kind: rows.kind(),
            rows: count as i32,
            channels: channels as i32,
            grid: [across, parts],
            block: [wide, high],
        }
    }

    /// Runs a kernel for these rows.
    ///
    /// # Safety
    /// As [`Program::launch`].
    unsafe fn launch(&self, names: [&'static str; 2], on: &Tensor, args: &[Arg]) {
        let name = of_kind(self.kind, names).expect("rows of f32 or bf16");
        // SAFETY: the caller's promise.
        unsafe { KERNELS.launch(name, on, self.grid, self.block, args) }
    }

    /// Runs one that adds up the parts of what others have done, for 32 channels in a block.
    ///
    /// # Safety
    /// As [`Program::launch`].
    unsafe fn launch_end(&self, names: [&'static str; 2], on: &Tensor, args: &[Arg]) {
        let name = of_kind(self.kind, names).expect("rows of f32 or bf16");
        let blocks = (self.channels as usize).div_ceil(32);
        // SAFETY: the caller's promise.
        unsafe { KERNELS.launch(name, on, [blocks, 1], [32, 32], args) }
    }

    /// Room for two sums of each channel from each part of the rows.
    fn parts(&self, on: &Tensor) -> Tensor {
        Tensor::empty([self.grid[1] as i64, 2, self.channels.into()], (Kind::Float, on.device()))
    }

    fn vectors(&self, count: i64, on: &Tensor) -> Tensor {
        Tensor::empty([count, self.channels.into()], (Kind::Float, on.device()))
    }

    /// Rows, channels and parts.
    fn shape(&self) -> [Arg<'static>; 3] {
        [self.rows, self.channels, self.grid[1] as i32].map(Arg::Int)
    }
}

/// Batch norm of `x` `(N, C)`, contiguous, and what follows, with the batch's statistics, which also go into the running ones.
pub(super) fn train(norm: &BatchNorm, x: &Tensor, then: Then) -> Tensor {
    let rows = aligned(&x.detach());
    let dealt = Dealt::new(&rows);
    let [count, channels, of_parts] = dealt.shape();
    let parts = dealt.parts(&rows);
    let moments = dealt.vectors(2, &rows);
    let (weight, bias) = (norm.weight.detach(), norm.bias.detach());
    let y = rows.empty_like();
    let other = then.other().map(|other| aligned(&other.detach()));
    let relu = !matches!(then, Then::Nothing);
    // SAFETY: the kernels of norm.cu, with arguments of their types: rows of one kind and shape, vectors of C f32, and room for
    // the sums of each part.
    unsafe {
        let args = [Arg::from(&rows), count, channels, Arg::from(&parts)];
        dealt.launch(["sum_moments_f32", "sum_moments_bf16"], &rows, &args);
        let args = [
            Arg::from(&rows),
            Arg::from(&parts),
            of_parts,
            count,
            channels,
            Arg::Float(BatchNorm::MOMENTUM as f32),
            Arg::Float(BatchNorm::EPS as f32),
            Arg::from(&moments),
            Arg::from(&norm.running_mean),
            Arg::from(&norm.running_var),
            Arg::from(&norm.num_batches_tracked),
        ];
        dealt.launch_end(["end_moments_f32", "end_moments_bf16"], &rows, &args);
        let args = [
            Arg::from(&rows),
            Arg::Tensor(other.as_ref()),
            Arg::from(&moments),
            Arg::from(&weight),
            Arg::from(&bias),
            Arg::Int(relu.into()),
            count,
            channels,
            Arg::from(&y),
        ];
        dealt.launch(["apply_f32", "apply_bf16"], &rows, &args);
    }

    // What the ReLU lets through of a sum is seen in the result, and is the gradient of both of its terms.
    let result = other.as_ref().map(|_| y.detach());
    let backward = move |grad: &Tensor| {
        let grad = aligned(&grad.to_kind(rows.kind()));
        let [count, channels, of_parts] = dealt.shape();
        let parts = dealt.parts(&rows);
        let passed = result.as_ref().map(|_| grad.empty_like());
        let (vectors, of_x) = (dealt.vectors(4, &rows), rows.empty_like());
        let (of_weight, of_bias, line) = (vectors.get(0), vectors.get(1), vectors.narrow(0, 2, 2));
        // SAFETY: as above.
        unsafe {
            let args = [
                Arg::from(&grad),
                Arg::from(&rows),
                Arg::Tensor(result.as_ref()),
                Arg::from(&moments),
                Arg::from(&weight),
                Arg::from(&bias),
                Arg::Int(relu.into()),
                count,
                channels,
                Arg::Tensor(passed.as_ref()),
                Arg::from(&parts),
            ];
            dealt.launch(["sum_gradients_f32", "sum_gradients_bf16"], &rows, &args);
            let args = [
                Arg::from(&parts),
                of_parts,
                count,
                channels,
                Arg::from(&moments),
                Arg::from(&weight),
                Arg::from(&of_weight),
                Arg::from(&of_bias),
                Arg::from(&line),
            ];
            dealt.launch_end(["end_gradients"; 2], &rows, &args);
            let args = [
                Arg::from(passed.as_ref().unwrap_or(&grad)),
                Arg::from(&rows),
                Arg::from(&moments),
                Arg::from(&weight),
                Arg::from(&bias),
                Arg::from(&line),
                // What has passed needs no ReLU any more.
                Arg::Int((relu && passed.is_none()).into()),
                count,
                channels,
                Arg::from(&of_x),
            ];
            dealt.launch(["gradient_f32", "gradient_bf16"], &rows, &args);
        }
        let mut gradients = vec![Some(of_x), Some(of_weight), Some(of_bias)];
        gradients.extend(passed.map(Some));
        gradients
    };
    let name = if let Then::AddRelu(_) = then { "BatchNormAddRelu" } else { "BatchNorm" };
    let inputs = [Some(x), Some(&norm.weight), Some(&norm.bias), then.other()];
    autograd::record(name, &inputs.into_iter().flatten().collect::<Vec<_>>(), y, backward)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compiling needs NVRTC, and no GPU. Where CUDA's libtorch is not installed, there is nothing to try.
    #[test]
    fn the_kernels_compile() {
        match KERNELS.compile_for("sm_90") {
            Err(reason) if reason.starts_with("NVRTC is not found") => eprintln!("not tried: {reason}"),
            compiled => compiled.unwrap(),
        }
    }
}
