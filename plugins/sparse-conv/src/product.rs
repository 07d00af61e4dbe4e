//! Products of windows on a canvas with weights.

use std::ops::Range;

use jepa_plugin_api::matmul::{self, Layout, Packed, Rows};
use jepa_plugin_api::memory::{Element, bf16, values, values_mut};
use jepa_plugin_api::parallel;
use tch::{Device, Kind, Tensor};

/// What the rows of a product see of a canvas: each some lines of numbers.
pub(crate) struct Windows {
    /// Where each begins.
    pub starts: Vec<usize>,
    pub lines: usize,
    /// Numbers in a line.
    pub line: usize,
    /// From the beginning of a line to that of the next.
    pub pitch: usize,
}

/// A type of numbers that canvases are multiplied in.
pub(crate) trait Product: Element {
    /// `(M, N)`: windows times the matrix that lies in `weights`.
    fn product(canvas: &[Self], windows: &Windows, weights: &[Self], layout: &Layout) -> Tensor;

    /// The gradient of the weights, from that of the product `(M, N)`.
    fn gradient(canvas: &[Self], windows: &Windows, grad: &Tensor, layout: &Layout, weights: &mut [Self]);
}

impl Product for f32 {
    fn product(canvas: &[f32], windows: &Windows, weights: &[f32], layout: &Layout) -> Tensor {
        matmul::product(windows.rows(canvas), &Packed::new(weights, layout), None)
    }

    fn gradient(canvas: &[f32], windows: &Windows, grad: &Tensor, layout: &Layout, weights: &mut [f32]) {
        matmul::gradient(windows.rows(canvas), values(grad), layout, weights);
    }
}

impl Windows {
    fn rows<'a>(&'a self, canvas: &'a [f32]) -> Rows<'a> {
        let Windows { starts, lines, line, pitch } = self;
        Rows { values: canvas, starts, pieces: *lines, length: *line, pitch: *pitch }
    }
}

impl Product for bf16 {
    fn product(canvas: &[bf16], windows: &Windows, weights: &[bf16], layout: &Layout) -> Tensor {
        let matrix = layout.matrix(weights);
        let [columns, channels] = matrix.size()[..] else { unreachable!("a matrix has two dimensions") };
        let outputs = windows.starts.len();
        let mut panel = panel(outputs, columns as usize);
        let y = Tensor::empty([outputs as i64, channels], (Kind::BFloat16, Device::Cpu));
        for range in panels(outputs, columns as usize) {
            let seen = fill(&mut panel, canvas, windows, &range);
            let _ = seen.mm_out(&part(&y, &range), &matrix);
        }
        y
    }

    fn gradient(canvas: &[bf16], windows: &Windows, grad: &Tensor, layout: &Layout, weights: &mut [bf16]) {
        let (outputs, columns) = (windows.starts.len(), windows.lines * windows.line);
        let mut panel = panel(outputs, columns);
        // Sums of many bf16 products would lose their last ones.
        let sum = Tensor::zeros([columns as i64, grad.size()[1]], (Kind::Float, Device::Cpu));
        for range in panels(outputs, columns) {
            let seen = fill(&mut panel, canvas, windows, &range);
            let _ = sum.shallow_clone().g_add_(&seen.tr().mm(&part(grad, &range)));
        }
        layout.write(values(&sum), weights);
    }
}

/// Numbers in a panel, unless that are too few rows for an efficient product.
const PANEL: usize = 1 << 19;
const LEAST_ROWS: usize = 512;

/// The outputs of a panel of K columns each, one after the other.
fn panels(outputs: usize, columns: usize) -> impl Iterator<Item = Range<usize>> {
    let rows = (PANEL / columns).max(LEAST_ROWS);
    (0..outputs).step_by(rows).map(move |first| first..(first + rows).min(outputs))
}

/// An empty panel for [`panels`].
fn panel(outputs: usize, columns: usize) -> Tensor {
    let rows = panels(outputs, columns).next().map_or(0, |first| first.len());
    Tensor::empty([rows as i64, columns as i64], (Kind::BFloat16, Device::Cpu))
}

fn part(x: &Tensor, range: &Range<usize>) -> Tensor {
    x.narrow(0, range.start as i64, range.len() as i64)
}

/// Copies some windows into the panel's first rows.
fn fill(panel: &mut Tensor, canvas: &[bf16], windows: &Windows, range: &Range<usize>) -> Tensor {
    let Windows { starts, lines, line, pitch } = windows;
    let columns = lines * line;
    // A few rows for each thread at a time.
    const ROWS: usize = 32;
    let rows = values_mut::<bf16>(panel)[..range.len() * columns].chunks_mut(ROWS * columns);
    parallel::for_each(starts[range.clone()].chunks(ROWS).zip(rows), |(starts, rows)| {
        for (start, row) in starts.iter().zip(rows.chunks_exact_mut(columns)) {
            for (i, to) in row.chunks_exact_mut(*line).enumerate() {
                to.copy_from_slice(&canvas[start + i * pitch..][..*line]);
            }
        }
    });
    panel.narrow(0, 0, range.len() as i64)
}
