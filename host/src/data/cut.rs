//! The first half of a view, on the run's device: boxes of a whole batch of decoded images, resized to one size at once.
//!
//! The loader's threads put into each image's slot of the batch the decoded pixels that its views see, and say how each
//! view is [cut](Cut) out of them. The weights are those of the [`Resampler`](super::resample::Resampler), in the same fixed point, and
//! sums of whole numbers are the same everywhere; so the views are the same to the bit.

use std::iter;

use jepa_plugin_api::Interpolation;
use jepa_plugin_api::cuda::{Arg, Program};
use tch::{Device, Kind, TchError, Tensor};

use super::augment::{Augmenter, Plan, Scratch};
use super::decode::{Region, Rgb};
use super::resample::CropBox;
use crate::device::{DeviceError, pinned, to_device};

static KERNELS: Program = Program::new("the loader's cropping", include_str!("cut.cu"));

/// A box may be so many times larger than the view that is made of it here.
const LARGEST: f64 = 4.0;

/// How a view is made of the pixels in a slot.
#[derive(Clone, Debug)]
pub(super) struct Cut {
    /// Where the box begins, in bytes.
    start: usize,
    /// Pixels that lie in a row of the slot.
    stride: usize,
    rows: Axis,
    columns: Axis,
}

/// Of which pixels each pixel of a view is made, in one direction: pixel i of the `taps` pixels from `starts[i]` on, times the weights
/// from `weights[i * taps]` on.
#[derive(Clone, Debug)]
struct Axis {
    /// How many pixels the box has.
    length: u32,
    starts: Vec<u32>,
    /// Times 2 to the power of `precision`, they add up to 1; 0 stands for a pixel that may not exist.
    weights: Vec<i16>,
    taps: usize,
    /// How many bits of the weights are behind the point.
    precision: u32,
}

/// More images than a grid of blocks has lines are not cut at once.
pub(super) const MOST_IMAGES: usize = 65_535;

/// Side of a slot, as a picture: room for what views of this size are usually made of, or for the views.
pub(super) fn slot_side(size: u32, views: usize) -> u32 {
    size * 2.max((views as f64).sqrt().ceil() as u32)
}

/// Puts what the views see of an image into its slot, and says how they are cut out of it. Where it has no room for that, or
/// a view is not a random crop, the views are cut here, and put there instead.
///
/// # Panics
/// As [`Augmenter::make`].
pub(super) fn fill(
    slot: &mut [u8],
    image: &Region,
    views: &[Augmenter],
    plans: &[Plan],
    scratch: &mut Scratch,
) -> Vec<Cut> {
    let cuts = views.iter().zip(plans).map(|(view, plan)| {
        let (pixels, [left, top, width, height]) = image.place(plan.crop).split();
        let (size, filter) = (view.size(), view.filter()?);
        if width.max(height) > LARGEST * f64::from(size) {
            return None;
        }
        let columns = Axis::new(pixels.width, (left, width), size, filter);
        let rows = Axis::new(pixels.height, (top, height), size, filter);
        Some((pixels, Cut { start: 0, stride: 0, rows, columns }))
    });
    let cuts: Option<Vec<(CropBox, Cut)>> = cuts.collect();
    let seen = cuts.iter().flatten().map(|(pixels, _)| *pixels).reduce(CropBox::around);
    if let (Some(mut cuts), Some(seen)) = (cuts, seen)
        && seen.width as usize * seen.height as usize * 3 <= slot.len()
    {
        copy(image.pixels, seen, slot);
        for (pixels, cut) in &mut cuts {
            cut.stride = seen.width as usize;
            let (down, right) = ((pixels.top - seen.top) as usize, (pixels.left - seen.left) as usize);
            cut.start = 3 * (down * cut.stride + right);
        }
        return cuts.into_iter().map(|(_, cut)| cut).collect();
    }
    let mut at = 0;
    let cut = views.iter().zip(plans).map(|(view, plan)| {
        let made = view.cut(image, plan.crop, scratch);
        slot[at..][..made.pixels.len()].copy_from_slice(&made.pixels);
        let axis = Axis::new(made.width, (0.0, made.width.into()), made.width, Interpolation::Bilinear);
        let cut = Cut { start: at, stride: made.width as usize, rows: axis.clone(), columns: axis };
        at += made.pixels.len();
        cut
    });
    cut.collect()
}

/// Copies a box of an image to the beginning of a slot.
fn copy(image: &Rgb, part: CropBox, slot: &mut [u8]) {
    let (from, to) = (image.width as usize * 3, part.width as usize * 3);
    let rows = image.pixels.chunks_exact(from).skip(part.top as usize).take(part.height as usize);
    for (row, out) in rows.zip(slot.chunks_exact_mut(to)) {
        out.copy_from_slice(&row[part.left as usize * 3..][..to]);
    }
}

impl Axis {
    /// Of a box with so many pixels, of which the part counts that begins at `from` and is `wide`.
    fn new(length: u32, (from, wide): (f64, f64), size: u32, filter: Interpolation) -> Axis {
        let (of, support): (fn(f64) -> f64, f64) = match filter {
            Interpolation::Bilinear => (triangle, 1.0),
            Interpolation::Bicubic => (catmull_rom, 2.0),
        };
        let scale = wide / f64::from(size);
        let radius = support * scale.max(1.0);
        let narrower = 1.0 / scale.max(1.0);
        let taps = radius.ceil() as usize * 2 + 1;
        let mut starts = Vec::with_capacity(size as usize);
        let mut shares = Vec::with_capacity(size as usize * taps);
        for place in 0..size {
            let center = from + (f64::from(place) + 0.5) * scale;
            let first = (center - radius).floor().max(0.0) as u32;
            let end = (center + radius).ceil().min(length.into()) as u32;
            let begin = shares.len();
            shares.extend((first..end).map(|pixel| of((f64::from(pixel) - (center - 0.5)) * narrower)));
            let sum: f64 = shares[begin..].iter().sum();
            if sum != 0.0 {
                shares[begin..].iter_mut().for_each(|share| *share /= sum);
            }
            shares.resize(begin + taps, 0.0);
            starts.push(first);
        }
        // The most bits with which the greatest weight is still an i16.
        let most = shares.iter().copied().fold(0.0, f64::max);
        let fits = |bits: &u32| (most * f64::from(1 << (bits + 1))).round() < f64::from(1 << 15);
        let precision = (0..21).find(|bits| !fits(bits)).unwrap_or(21);
        let unit = f64::from(1 << precision);
        let weights = shares.iter().map(|share| (share * unit).round() as i16).collect();
        Axis { length, starts, weights, taps, precision }
    }

    /// Adds up the pixels of each place: `at(pixel)` tells one of them.
    fn weigh(&self, place: usize, at: impl Fn(usize) -> u8) -> u8 {
        let weights =
            self.weights[place * self.taps..][..self.taps].iter().zip(self.starts[place] as usize..);
        let of_something = weights.filter(|(weight, _)| **weight != 0);
        let products = of_something.map(|(weight, pixel)| i32::from(*weight) * i32::from(at(pixel)));
        let sum = products.sum::<i32>() + (1 << (self.precision - 1));
        (sum >> self.precision).clamp(0, 255) as u8
    }
}

fn triangle(x: f64) -> f64 {
    (1.0 - x.abs()).max(0.0)
}

/// The cubic of Catmull and Rom, which Pillow's bicubic filter is.
fn catmull_rom(x: f64) -> f64 {
    const A: f64 = -0.5;
    match x.abs() {
        x if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
        x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
        _ => 0.0,
    }
}

/// Cuts one view out of each slot: from u8 `(B, …)`, B up to [`MOST_IMAGES`], to u8 `(B, 3, S, S)`, where the slots are.
///
/// # Errors
/// Whatever libtorch reports.
///
/// # Panics
/// When the kernels do not start on a GPU, of which [`cuts_on`] tells.
pub(super) fn cut(slots: &Tensor, cuts: &[&Cut], size: u32) -> Result<Tensor, DeviceError> {
    let (torch, size) = (|error: TchError| DeviceError::Torch(error.to_string()), size as usize);
    if slots.device() == Device::Cpu || cuts.is_empty() {
        let views = cut_on_cpu(slots, cuts, size).and_then(|views| views.f_to_device(slots.device()));
        return views.map_err(torch);
    }
    let tables = Tables::new(slots, cuts, size)?;
    let (rows, views) = (tables.rows().map_err(torch)?, tables.views().map_err(torch)?);
    let (grid, block, args) = tables.launch_rows(slots, &rows);
    // SAFETY: a kernel of cut.cu, with slots that have what the cuts see, tables of them, and room for the rows.
    unsafe { KERNELS.launch("cut_rows", slots, grid, block, &args) };
    let (grid, block, args) = tables.launch_columns(&rows, &views);
    // SAFETY: the same, with these rows and room for the views.
    unsafe { KERNELS.launch("cut_columns", slots, grid, block, &args) };
    Ok(views)
}

/// The same without kernels: what they are held against.
fn cut_on_cpu(slots: &Tensor, cuts: &[&Cut], size: usize) -> Result<Tensor, TchError> {
    let slot = slots.numel() / cuts.len().max(1);
    let pixels: Vec<u8> = slots.f_flatten(0, -1)?.try_into()?;
    let mut views = Vec::with_capacity(cuts.len() * 3 * size * size);
    for (cut, slot) in cuts.iter().zip(pixels.chunks_exact(slot.max(1))) {
        let wide = cut.columns.length as usize;
        for channel in 0..3 {
            let pixel = |x: usize, y: usize| slot[cut.start + 3 * (y * cut.stride + x) + channel];
            for y in 0..size {
                let row: Vec<u8> = (0..wide).map(|x| cut.rows.weigh(y, |y| pixel(x, y))).collect();
                views.extend((0..size).map(|x| cut.columns.weigh(x, |x| row[x])));
            }
        }
    }
    Tensor::from_slice(&views).f_view([cuts.len() as i64, 3, size as i64, size as i64])
}

/// Threads in a block.
const THREADS: usize = 256;

type Launch<'a> = ([usize; 2], [usize; 2], Vec<Arg<'a>>);

/// What the kernels read, where the slots are.
struct Tables {
    images: usize,
    size: usize,
    /// Bytes of a slot.
    slot: usize,
    /// Columns of the widest box.
    widest: usize,
    places: Tensor,
    rows: AxisTables,
    columns: AxisTables,
}

struct AxisTables {
    taps: usize,
    starts: Tensor,
    weights: Tensor,
}

impl Tables {
    fn new(slots: &Tensor, cuts: &[&Cut], size: usize) -> Result<Tables, DeviceError> {
        let places = cuts.iter().flat_map(|cut| {
            let Cut { start, stride, rows, columns } = cut;
            let axes = [columns.length, rows.precision, columns.precision].map(|number| number as usize);
            [*start, *stride, axes[0], axes[1], axes[2]].map(int)
        });
        let places = Tensor::from_slice(&places.collect::<Vec<i32>>());
        let rows = AxisTables::new(cuts.iter().map(|cut| &cut.rows));
        let columns = AxisTables::new(cuts.iter().map(|cut| &cut.columns));
        let all = [&places, &rows.starts, &rows.weights, &columns.starts, &columns.weights];
        let [places, row_starts, row_weights, column_starts, column_weights] = at_once(slots.device(), all)?;
        Ok(Tables {
            images: cuts.len(),
            size,
            slot: slots.numel() / cuts.len(),
            widest: cuts.iter().map(|cut| cut.columns.length as usize).max().unwrap_or(0),
            places,
            rows: AxisTables { starts: row_starts, weights: row_weights, ..rows },
            columns: AxisTables { starts: column_starts, weights: column_weights, ..columns },
        })
    }

    /// Room for the rows of the views.
    fn rows(&self) -> Result<Tensor, TchError> {
        let shape = [self.images, self.size, self.widest, 3].map(|side| side as i64);
        Tensor::f_empty(shape, (Kind::Uint8, self.places.device()))
    }

    /// Room for the views.
    fn views(&self) -> Result<Tensor, TchError> {
        let shape = [self.images, 3, self.size, self.size].map(|side| side as i64);
        Tensor::f_empty(shape, (Kind::Uint8, self.places.device()))
    }

    fn launch_rows<'a>(&'a self, slots: &'a Tensor, rows: &'a Tensor) -> Launch<'a> {
        let AxisTables { taps, starts, weights } = &self.rows;
        let numbers = [self.slot, self.size, self.widest, *taps].map(|number| Arg::Int(int(number)));
        let tensors = [slots, &self.places, starts, weights].map(Arg::from);
        let args = tensors.into_iter().chain(numbers).chain([Arg::from(rows)]).collect();
        ([(self.size * self.widest).div_ceil(THREADS), self.images], [THREADS, 1], args)
    }

    fn launch_columns<'a>(&'a self, rows: &'a Tensor, views: &'a Tensor) -> Launch<'a> {
        let AxisTables { taps, starts, weights } = &self.columns;
        let numbers = [self.size, self.widest, *taps].map(|number| Arg::Int(int(number)));
        let tensors = [rows, &self.places, starts, weights].map(Arg::from);
        let args = tensors.into_iter().chain(numbers).chain([Arg::from(views)]).collect();
        ([(self.size * self.size).div_ceil(THREADS), self.images], [THREADS, 1], args)
    }
}

impl AxisTables {
    /// Of all axes, with as many taps as the one that has most.
    fn new<'a>(axes: impl Iterator<Item = &'a Axis> + Clone) -> AxisTables {
        let taps = axes.clone().map(|axis| axis.taps).max().unwrap_or(1);
        let starts: Vec<i32> =
            axes.clone().flat_map(|axis| &axis.starts).map(|start| *start as i32).collect();
        let mut weights: Vec<i16> = Vec::with_capacity(starts.len() * taps);
        for axis in axes {
            for place in axis.weights.chunks_exact(axis.taps) {
                weights.extend(place);
                weights.extend(iter::repeat_n(0, taps - axis.taps));
            }
        }
        AxisTables { taps, starts: Tensor::from_slice(&starts), weights: Tensor::from_slice(&weights) }
    }
}

/// A number for a kernel.
fn int(number: usize) -> i32 {
    i32::try_from(number).expect("a slot of less than 2³¹ bytes")
}

/// Copies on a device. A GPU is not waited for: from memory that it does not read by itself, more than 64 kB would be copied
/// behind what is computed there, and this thread would wait for that.
fn at_once<const N: usize>(device: Device, tensors: [&Tensor; N]) -> Result<[Tensor; N], DeviceError> {
    if device == Device::Cpu {
        return Ok(tensors.map(Tensor::shallow_clone));
    }
    let readable = tensors.iter().map(|tensor| {
        let copy = pinned(&tensor.size(), tensor.kind())?;
        copy.shallow_clone().f_copy_(tensor).map_err(|error| DeviceError::Torch(error.to_string()))?;
        Ok(copy)
    });
    let readable = readable.collect::<Result<Vec<Tensor>, DeviceError>>()?;
    let there = to_device(&readable.iter().collect::<Vec<_>>(), device)?;
    Ok(there.try_into().expect("as many as there were"))
}

/// Whether views can be cut on that device: on a GPU that gives the same bytes for pictures that are tried. If it does not, a
/// warning says so.
pub fn cuts_on(device: Device) -> bool {
    if !device.is_cuda() {
        return false;
    }
    let reason = match tried(device) {
        Ok(true) => return true,
        Ok(false) => "this GPU does not give their bytes".to_owned(),
        Err(error) => error.to_string(),
    };
    tracing::warn!("views are cropped in the loader's threads: {reason}");
    false
}

/// Whether views are there what they are here.
fn tried(device: Device) -> Result<bool, DeviceError> {
    let (slots, cuts, size) = trial();
    let cuts = cuts.each_ref();
    let expected = cut(&slots, &cuts, size)?;
    let there = &to_device(&[&slots], device)?[0];
    if !KERNELS.runs("cut_rows", there) || !KERNELS.runs("cut_columns", there) {
        return Err(DeviceError::Torch("its kernels do not run".to_owned()));
    }
    let made = cut(there, &cuts, size)?;
    Ok(to_device(&[&made], Device::Cpu)?[0].equal(&expected))
}

/// Two slots, a cut of each, and the side of their views.
fn trial() -> (Tensor, [Cut; 2], u32) {
    const SIZE: u32 = 40;
    let cuts = [(6, 130, 90, 50, Interpolation::Bicubic), (33, 125, 30, 120, Interpolation::Bilinear)];
    let cuts = cuts.map(|(start, stride, high, wide, filter)| {
        let axis = |length| Axis::new(length, (0.3, f64::from(length) - 1.1), SIZE, filter);
        Cut { start, stride, rows: axis(high), columns: axis(wide) }
    });
    let pixels: Vec<u8> = (0..2 * 40_000_u64).map(|i| (i * i / 97) as u8).collect();
    (Tensor::from_slice(&pixels).view([2, -1]), cuts, SIZE)
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;
    use std::path::Path;
    use std::process::Command;

    use jepa_plugin_api::{Rng, ViewSpec};
    use libloading::{Library, Symbol};

    use super::super::resample::Resampler;
    use super::*;

    fn picture(width: u32, height: u32, rng: &mut Rng) -> Rgb {
        let pixels = (0..width * height * 3).map(|_| rng.below(256) as u8).collect();
        Rgb { width, height, pixels }
    }

    /// Boxes of random sizes and places, whole pixels or not, with their slots, and the views that fast_image_resize makes of them.
    fn random_cuts(size: u32, count: usize, rng: &mut Rng) -> (Tensor, Vec<Cut>, Tensor) {
        let (mut slots, mut cuts, mut views) = (Vec::new(), Vec::new(), Vec::new());
        let slot = 3 * (4 * size as usize).pow(2);
        for number in 0..count {
            let mut side = || 1 + rng.below(4 * u64::from(size)) as u32;
            let (width, height) = (side(), side());
            let image = picture(width, height, rng);
            let filter = [Interpolation::Bicubic, Interpolation::Bilinear][number % 2];
            let mut within = |length: u32| {
                let from = rng.below(length.into()) as u32;
                (from, 1 + rng.below((length - from).into()) as u32)
            };
            let ((left, wide), (top, high)) = (within(width), within(height));
            let crop = CropBox { top, left, height: high, width: wide };
            // As of an image that was made smaller: a part of a pixel less on each side.
            let part = match number % 3 {
                0 => [0.0, 0.0, wide.into(), high.into()],
                _ => [0.25, 0.5, f64::from(wide) - 0.5, f64::from(high) - 0.75],
            };
            let mut view = Rgb::default();
            Resampler::default().convolve(&image, crop, part, (size, size), filter, &mut view);
            let planes = (0..3).flat_map(|channel| view.pixels.iter().skip(channel).step_by(3));
            views.extend(planes.copied().collect::<Vec<u8>>());
            cuts.push(Cut {
                start: 3 * (top * width + left) as usize,
                stride: width as usize,
                rows: Axis::new(high, (part[1], part[3]), size, filter),
                columns: Axis::new(wide, (part[0], part[2]), size, filter),
            });
            slots.extend(&image.pixels);
            slots.resize(slot * cuts.len(), 0);
        }
        let views = Tensor::from_slice(&views).view([count as i64, 3, size.into(), size.into()]);
        (Tensor::from_slice(&slots).view([count as i64, -1]), cuts, views)
    }

    #[test]
    fn views_are_those_of_the_resampler() {
        for (size, seed) in [(7, 1), (16, 2), (33, 3)] {
            let (slots, cuts, views) = random_cuts(size, 120, &mut Rng::keyed(seed, 0, 0, 0));
            assert!(cut(&slots, &cuts.iter().collect::<Vec<_>>(), size).unwrap().equal(&views), "{size} px");
        }
    }

    #[test]
    fn the_trial_has_something_to_see() {
        let (slots, cuts, size) = trial();
        let views = cut(&slots, &cuts.each_ref(), size).unwrap();
        assert_eq!(views.size(), [2, 3, 40, 40]);
        assert!(f64::try_from(views.to_kind(Kind::Float).std(false)).unwrap() > 20.0);
        assert!(!cuts_on(Device::Cpu));
        assert_eq!(cut(&slots.narrow(0, 0, 0), &[], 9).unwrap().size(), [0, 3, 9, 9]);
    }

    /// Where a slot has no room for what is seen, or a view is not cut at random, it has the views; otherwise, what is seen.
    #[test]
    fn a_slot_has_what_its_views_are_made_of() {
        const SIZE: u32 = 16;
        let mut rng = Rng::keyed(9, 0, 0, 0);
        let crop = |name| ViewSpec::new(name).random_resized_crop((0.1, 1.0), Interpolation::Bicubic);
        let center = ViewSpec::new("center").resize_center_crop(0.875, Interpolation::Bilinear);
        let (crops, mixed) = ([crop("a"), crop("b")], [crop("a"), center]);
        let a_box = |top, left, height, width| CropBox { top, left, height, width };
        // Their boxes in an image of so many pixels, how many times smaller it was made, and the row of the slot.
        let (near, far) =
            ([a_box(2, 4, 20, 24), a_box(10, 0, 21, 24)], [a_box(0, 0, 8, 64), a_box(60, 0, 8, 64)]);
        let halved = [a_box(3, 5, 40, 42), a_box(9, 7, 44, 50)];
        let cases = [
            (&crops, near, (40, 40), 1, 28),
            (&crops, halved, (80, 80), 2, 27),
            // Together they see 64 × 68 pixels.
            (&crops, far, (64, 68), 1, 16),
            // More than four times as wide as a view.
            (&crops, [a_box(0, 0, 5, 70), a_box(0, 0, 5, 9)], (70, 5), 1, 16),
            (&mixed, [a_box(2, 4, 20, 24), a_box(0, 0, 40, 40)], (40, 40), 1, 16),
        ];
        for (number, (specs, boxes, (width, height), shrink, stride)) in cases.into_iter().enumerate() {
            let views = specs.each_ref().map(|spec| Augmenter::new(spec, SIZE).unwrap());
            let pixels = picture(width / shrink, height / shrink, &mut rng);
            let region = Region { shrink, ..Region::whole(&pixels) };
            let plans = boxes.map(|crop| Plan { crop, operations: Vec::new() });
            let side = slot_side(SIZE, views.len()) as usize;
            let (mut slot, mut scratch) = (vec![0; 3 * side * side], Scratch::default());
            let cuts = fill(&mut slot, &region, &views, &plans, &mut scratch);
            let slot = Tensor::from_slice(&slot).view([1, -1]);
            for ((view, plan), made) in views.iter().zip(&plans).zip(&cuts) {
                assert_eq!(made.stride, stride, "case {number}");
                let mut expected = vec![0; view.len()];
                view.make_pixels(&region, plan, &mut scratch, &mut expected);
                let made: Vec<u8> = cut(&slot, &[made], SIZE).unwrap().flatten(0, -1).try_into().unwrap();
                assert!(made == expected, "case {number}");
            }
        }
    }

    /// What CUDA's words mean on a CPU, and a loop in place of a grid.
    const SHIM: &str = r#"
        typedef unsigned char u8;
        typedef long long i64;
        struct Dim { unsigned x, y; };
        static Dim blockIdx, blockDim, threadIdx;
        #define __device__
        #define __global__
        #define __forceinline__ inline
        #include "cut.cu"
        template <class T> T as(void* value) { return *static_cast<T*>(value); }
        template <class Body> void grid(unsigned wide, unsigned high, unsigned threads, Body body) {
            blockDim = {threads, 1};
            for (blockIdx.y = 0; blockIdx.y < high; ++blockIdx.y)
                for (blockIdx.x = 0; blockIdx.x < wide; ++blockIdx.x)
                    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) body();
        }
        using In = const u8*; using Ints = const int*; using Shorts = const short*;
        extern "C" void run_cut_rows(unsigned wide, unsigned high, unsigned threads, void** a) {
            grid(wide, high, threads, [=] {
                cut_rows(as<In>(a[0]), as<Ints>(a[1]), as<Ints>(a[2]), as<Shorts>(a[3]), as<int>(a[4]), as<int>(a[5]),
                         as<int>(a[6]), as<int>(a[7]), as<u8*>(a[8]));
            });
        }
        extern "C" void run_cut_columns(unsigned wide, unsigned high, unsigned threads, void** a) {
            grid(wide, high, threads, [=] {
                cut_columns(as<In>(a[0]), as<Ints>(a[1]), as<Ints>(a[2]), as<Shorts>(a[3]), as<int>(a[4]), as<int>(a[5]),
                            as<int>(a[6]), as<u8*>(a[7]));
            });
        }
    "#;

    type Run = unsafe extern "C" fn(u32, u32, u32, *mut *mut c_void);

    fn run(library: &Library, kernel: &str, (grid, block, args): Launch) {
        let mut values: Vec<u64> = args.iter().map(|arg| arg.to_bits()).collect();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        // SAFETY: the function has this type, and takes what the kernel does.
        unsafe {
            let run: Symbol<Run> = library.get(format!("run_{kernel}").as_bytes()).unwrap();
            run(grid[0] as u32, grid[1] as u32, block[0] as u32, pointers.as_mut_ptr());
        }
    }

    /// The very text that GPUs get, compiled for this CPU.
    #[test]
    fn the_kernels_make_the_same_views() {
        let folder = tempfile::tempdir().unwrap();
        let (shim, library) = (folder.path().join("shim.cpp"), folder.path().join("libshim.so"));
        std::fs::write(&shim, SHIM).unwrap();
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/data");
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
        let made = Command::new(&compiler)
            .args(["-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-fsanitize=undefined"])
            .args(["-fno-sanitize-recover=all", "-x", "c++", "-I"])
            .args([&sources, &shim])
            .arg("-o")
            .arg(&library)
            .output()
            .unwrap();
        assert!(made.status.success(), "{compiler}: {}", String::from_utf8_lossy(&made.stderr));
        // SAFETY: it does nothing when it is loaded.
        let library = unsafe { Library::new(&library) }.unwrap();
        for (size, seed) in [(7, 4), (33, 5)] {
            let (slots, cuts, views) = random_cuts(size, 60, &mut Rng::keyed(seed, 0, 0, 0));
            let tables = Tables::new(&slots, &cuts.iter().collect::<Vec<_>>(), size as usize).unwrap();
            let (rows, made) = (tables.rows().unwrap(), tables.views().unwrap());
            run(&library, "cut_rows", tables.launch_rows(&slots, &rows));
            run(&library, "cut_columns", tables.launch_columns(&rows, &made));
            assert!(made.equal(&views), "{size} px");
        }
    }

    /// Compiling needs NVRTC, and no GPU. Where CUDA's libtorch is not installed, there is nothing to try.
    #[test]
    fn the_kernels_compile_for_a_gpu() {
        match KERNELS.compile_for("sm_90") {
            Err(reason) if reason.starts_with("NVRTC is not found") => eprintln!("not tried: {reason}"),
            compiled => compiled.unwrap(),
        }
    }
}
