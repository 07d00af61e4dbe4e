//! The kernels of this crate on a GPU: rows to maps, maps to rows, and max-pools, of visible positions or of all.

use jepa_plugin_api::autograd;
use jepa_plugin_api::cuda::{Arg, Program, aligned, of_kind};
use jepa_plugin_api::nn::Conv2d;
use tch::{Kind, Tensor};

use crate::conv::Window;
use crate::visible::{Cells, Level, Size};

static KERNELS: Program = Program::new("sparse convolution", include_str!("kernels.cu"));

/// Threads in a block.
const THREADS: usize = 128;

/// Whether rows can be copied as [`gather`] and [`scatter`] do.
pub(crate) fn copies(x: &Tensor) -> bool {
    matches!(x.kind(), Kind::Float | Kind::BFloat16) && KERNELS.runs("pick_16", x)
}

/// Whether they can be pooled as [`max_pool`] does: with whole 16 bytes of channels.
pub(crate) fn pools(x: &Tensor, channels: i64) -> bool {
    let lane = if x.kind() == Kind::BFloat16 { 8 } else { 4 };
    channels % lane == 0 && copies(x)
}

/// Blocks of so many units or lanes and rows, for all rows.
fn dealt(lanes: usize, rows: i64) -> [[usize; 2]; 2] {
    let wide = lanes.clamp(1, 32);
    let high = THREADS / wide;
    [[(rows as usize).div_ceil(high), 1], [wide, high]]
}

/// An index, or a number of something, for a kernel.
fn int(number: i64) -> Arg<'static> {
    Arg::Int(i32::try_from(number).expect("fewer than 2³¹ positions in a batch"))
}

/// The largest unit that rows of C numbers can be copied by, in bytes, and the kernels for it.
fn units(x: &Tensor, channels: i64) -> (i64, [&'static str; 2]) {
    let bytes = channels * x.kind().elt_size_in_bytes() as i64;
    match bytes {
        _ if bytes % 16 == 0 => (bytes / 16, ["pick_16", "paint_16"]),
        _ if bytes % 4 == 0 => (bytes / 4, ["pick_4", "paint_4"]),
        _ => (bytes / 2, ["pick_2", "paint_2"]),
    }
}

/// The values `(N, C)` at visible positions of a map `(B, H, W, C)`.
pub(crate) fn gather(map: &Tensor, level: &Level) -> Tensor {
    let (cells, size, batch) = (cells_of(level), level.size, level.batch);
    let rows = pick(&aligned(&map.detach()), &cells, size, level.count());
    autograd::record("SparseGather", &[map], rows, move |grad| {
        vec![Some(paint(&aligned(grad), &cells, size, batch))]
    })
}

/// The map `(B, H, W, C)` with `rows` `(N, C)` at visible positions, and zeros.
pub(crate) fn scatter(rows: &Tensor, level: &Level) -> Tensor {
    let (cells, size, count) = (cells_of(level), level.size, level.count());
    let map = paint(&aligned(&rows.detach()), &cells, size, level.batch);
    autograd::record("SparseScatter", &[rows], map, move |grad| {
        vec![Some(pick(&aligned(grad), &cells, size, count))]
    })
}

fn cells_of(level: &Level) -> Cells {
    level.cells().expect("a level on a GPU")
}

fn pick(map: &Tensor, cells: &Cells, (height, width): Size, count: i64) -> Tensor {
    let channels = map.size()[3];
    let rows = Tensor::empty([count, channels], (map.kind(), map.device()));
    let (units, [kernel, _]) = units(map, channels);
    let [grid, block] = dealt(units as usize, count);
    let [lines, columns] = cells.grid;
    let args = [
        Arg::from(map),
        Arg::from(&cells.visible),
        int(height),
        int(width),
        int(lines),
        int(columns),
        int(count),
        int(units),
        Arg::from(&rows),
    ];
    // SAFETY: a kernel of kernels.cu, with a map of this size, its visible cells, and room for their rows.
    unsafe { KERNELS.launch(kernel, map, grid, block, &args) };
    rows
}

fn paint(rows: &Tensor, cells: &Cells, (height, width): Size, batch: i64) -> Tensor {
    let channels = rows.size()[1];
    let map = Tensor::empty([batch, height, width, channels], (rows.kind(), rows.device()));
    let (units, [_, kernel]) = units(rows, channels);
    let count = batch * height * width;
    let [grid, block] = dealt(units as usize, count);
    let [lines, columns] = cells.grid;
    let args = [
        Arg::from(rows),
        Arg::from(&cells.numbers),
        int(height),
        int(width),
        int(lines),
        int(columns),
        int(count),
        int(units),
        Arg::from(&map),
    ];
    // SAFETY: a kernel of kernels.cu, with the numbers of the cells of this map, a row for each of their positions, and room
    // for all positions.
    unsafe { KERNELS.launch(kernel, rows, grid, block, &args) };
    map
}

/// What a convolution with a stride of 2 makes of images, `rows` f32 `(N, 3)` of their pixels: the map `(B, C', H / 2, W / 2)`; at
/// visible pixels or, without cells, at all of them, in the order (B, H, W). `None` where it is another convolution.
///
/// Of 2 × 2 pixels one position is made, which has four times the channels, and of k × k weights ½ (k + 1) a side: the same products,
/// as tensor cores like them.
pub(crate) fn conv_of_images(
    rows: &Tensor,
    conv: &Conv2d,
    cells: Option<&Cells>,
    (batch, (height, width)): (i64, Size),
) -> Option<Tensor> {
    let channels = rows.size()[1];
    let even = height % 2 == 0 && width % 2 == 0;
    if !even || rows.kind() != Kind::Float || autograd::is_recorded(rows) {
        return None;
    }
    let kind = autograd::autocast_kind(&conv.weight);
    let name = of_kind(kind, ["deepen_f32", "deepen_bf16"]).filter(|name| KERNELS.runs(name, rows))?;
    let taps = (conv.kernel() + 1) / 2;
    let border = (conv.padding + 1) / 2;
    let [high, wide] = [height, width].map(|side| side / 2 + taps - 1);
    let count = batch * high * wide;
    let rows = rows.detach().contiguous();
    let deep = Tensor::empty([batch, high, wide, 16], (kind, rows.device()));
    let [lines, columns] = cells.map_or([1, 1], |cells| cells.grid);
    let args = [
        Arg::from(&rows),
        Arg::Tensor(cells.map(|cells| &cells.numbers)),
        int(height),
        int(width),
        int(lines),
        int(columns),
        int(channels),
        int(border),
        int(high),
        int(wide),
        int(count),
        Arg::from(&deep),
    ];
    // SAFETY: a kernel of kernels.cu: a row for each visible pixel of a map of this size, and room for so many positions.
    unsafe { KERNELS.launch(name, &rows, [(count as usize).div_ceil(THREADS), 1], [THREADS, 1], &args) };

    Some(deep.permute([0, 3, 1, 2]).conv2d(
        &deep_weight(&conv.weight),
        conv.bias.as_ref(),
        [1, 1],
        [0, 0],
        [1, 1],
        1,
    ))
}

/// Whether a convolution may be one of [`conv_of_images`].
pub(crate) fn sees_images(conv: &Conv2d) -> bool {
    let kernel = conv.kernel();
    // With an odd padding, the first of a window's pixels, and one more before it, make a position.
    conv.stride == 2
        && conv.groups == 1
        && conv.weight.size()[1] <= 4
        && kernel % 4 == 3
        && conv.padding == kernel / 2
}

/// `(C', C, k, k)` to `(C', 16, ½ (k + 1), ½ (k + 1))`: a zero before each line and column of weights, and of 2 × 2 of them one, of
/// four times the channels.
fn deep_weight(weight: &Tensor) -> Tensor {
    let size = weight.size();
    let (outputs, channels, taps) = (size[0], size[1], (size[3] + 1) / 2);
    let weight = weight.constant_pad_nd([1, 0, 1, 0]).view([outputs, channels, taps, 2, taps, 2]);
    let weight = weight.permute([0, 3, 5, 1, 2, 4]).reshape([outputs, 4 * channels, taps, taps]);
    weight.constant_pad_nd([0, 0, 0, 0, 0, 16 - 4 * channels])
}

/// What a max-pool goes from and to.
#[derive(Clone, Copy)]
pub(crate) struct Sides {
    pub from: Size,
    pub to: Size,
    /// Rows of the one and of the other.
    pub rows: [i64; 2],
}

/// Max-pool of rows `(N, C)`, at visible positions or, without cells, at all of them, in the order (B, H, W): to `(N', C)`.
pub(crate) fn max_pool(rows: &Tensor, window: Window, cells: Option<Cells>, sides: Sides) -> Tensor {
    let x = aligned(&rows.detach());
    let channels = x.size()[1];
    let y = Tensor::empty([sides.rows[1], channels], (x.kind(), x.device()));
    let taps = Tensor::empty([sides.rows[1], channels], (Kind::Uint8, x.device()));
    let run = move |names: [&'static str; 2], first: [Arg; 2], count: i64, last: &[Arg]| {
        let Arg::Tensor(Some(on)) = first[0] else { unreachable!("the first argument is a tensor") };
        let name = of_kind(on.kind(), names).expect("rows of f32 or bf16");
        let [grid, block] = dealt(channels as usize * on.kind().elt_size_in_bytes() / 16, count);
        let cells = cells.as_ref();
        let [lines, columns] = cells.map_or([1, 1], |cells| cells.grid);
        let args = [
            Arg::Tensor(cells.map(|cells| &cells.visible)),
            Arg::Tensor(cells.map(|cells| &cells.numbers)),
            int(lines),
            int(columns),
            int(sides.from.0),
            int(sides.from.1),
            int(sides.to.0),
            int(sides.to.1),
            int(window.kernel as i64),
            int(window.stride as i64),
            int(window.padding as i64),
            int(count),
            int(channels),
        ];
        let of_first = if let Arg::Tensor(None) = first[1] { 1 } else { 2 };
        let args = [&first[..of_first], &args, last].concat();
        // SAFETY: a kernel of kernels.cu: rows and taps of both sides have the shapes that follow from these sizes and cells.
        unsafe { KERNELS.launch(name, on, grid, block, &args) };
    };
    let none = Arg::Tensor(None);
    run(
        ["max_pool_f32", "max_pool_bf16"],
        [Arg::from(&x), none],
        sides.rows[1],
        &[Arg::from(&y), Arg::from(&taps)],
    );
    autograd::record("MaxPool", &[rows], y, move |grad| {
        let grad = aligned(grad);
        let of_x = Tensor::empty([sides.rows[0], channels], (grad.kind(), grad.device()));
        let names = ["max_pool_gradient_f32", "max_pool_gradient_bf16"];
        run(names, [Arg::from(&grad), Arg::from(&taps)], sides.rows[0], &[Arg::from(&of_x)]);
        vec![Some(of_x)]
    })
}

#[cfg(test)]
mod tests {
    use jepa_plugin_api::Params;
    use jepa_plugin_api::nn::ConvOptions;
    use tch::Device;

    use super::*;

    #[test]
    fn deep_weights_make_the_same_of_four_pixels_at_a_time() {
        for (kernel, channels) in [(7, 3), (3, 3), (7, 1), (11, 4)] {
            let options = ConvOptions { stride: 2, padding: kernel / 2, ..ConvOptions::default() };
            let conv = Conv2d::new(&Params::new(Device::Cpu), channels, 5, kernel, options);
            assert!(sees_images(&conv));
            let x = Tensor::randn([2, channels, 12, 8], (Kind::Float, Device::Cpu));
            // As the kernel has it, by operations of libtorch.
            let taps = (kernel + 1) / 2;
            let (before, behind) = (kernel / 2 + 1, 2 * (taps - 1) - (kernel / 2 + 1));
            let padded = x.constant_pad_nd([before, behind, before, behind]);
            let (high, wide) = (padded.size()[2] / 2, padded.size()[3] / 2);
            let fours = padded.view([2, channels, high, 2, wide, 2]).permute([0, 3, 5, 1, 2, 4]);
            let deep = fours.reshape([2, 4 * channels, high, wide]);
            let deep = deep.constant_pad_nd([0, 0, 0, 0, 0, 16 - 4 * channels]);
            let y = deep.conv2d(&deep_weight(&conv.weight), conv.bias.as_ref(), [1, 1], [0, 0], [1, 1], 1);
            assert!(y.allclose(&conv.forward(&x), 1e-5, 1e-5, false), "{kernel}, {channels}");
        }
    }

    /// Compiling needs NVRTC, and no GPU. Where CUDA's libtorch is not installed, there is nothing to try.
    #[test]
    fn the_kernels_compile() {
        match KERNELS.compile_for("sm_90") {
            Err(reason) if reason.starts_with("NVRTC is not found") => eprintln!("not tried: {reason}"),
            compiled => compiled.unwrap(),
        }
    }
}
