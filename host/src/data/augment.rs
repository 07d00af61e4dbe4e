//! Makes the views of an image that a method declared, as torchvision's transforms on 8-bit RGB would.
//!
//! [`check_views`] turns [`ViewSpec`]s into [`Augmenter`]s and refuses what makes no sense, before the first batch.
//! An augmenter first [draws](Augmenter::draw) all that is random about a view, from the generator that it is given and from
//! nowhere else, and then [makes](Augmenter::make) it.

use jepa_plugin_api::memory::vectorized;
use jepa_plugin_api::{Interpolation, Rng, Transform, ViewSpec};

use super::color::{self, BlurScratch, Planes};
use super::decode::{Region, Rgb};
use super::error::DataError;
use super::resample::{CropBox, Resampler};

/// A checked view, ready to be made at one size.
#[derive(Clone, Debug)]
pub struct Augmenter {
    size: u32,
    crop: Crop,
    steps: Vec<Step>,
    mean: [f32; 3],
    std: [f32; 3],
}

/// How the view's pixels are cut out of the image.
#[derive(Clone, Copy, Debug)]
enum Crop {
    Random {
        scale: (f64, f64),
        ratio: (f64, f64),
        interpolation: Interpolation,
    },
    /// `shorter` is the shorter side before the centre is cut out.
    Center {
        shorter: u32,
        interpolation: Interpolation,
    },
}

/// What may happen to the cut-out pixels.
#[derive(Clone, Copy, Debug)]
enum Step {
    Flip { p: f64 },
    Jitter { p: f64, brightness: f64, contrast: f64, saturation: f64, hue: f64 },
    Grayscale { p: f64 },
    Blur { p: f64, sigma: (f64, f64) },
    Solarize { p: f64, threshold: u8 },
}

/// What was drawn for one view of one image.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What it sees of the image.
    pub crop: CropBox,
    /// What happens to that, at the size of the view.
    pub operations: Vec<Operation>,
}

/// A step that happens, on 8-bit RGB: see [`color`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operation {
    /// Left and right change places.
    Flip,
    /// [`color::adjust_brightness`] by a factor.
    Brightness(f32),
    /// [`color::adjust_contrast`] by a factor.
    Contrast(f32),
    /// [`color::adjust_saturation`] by a factor.
    Saturation(f32),
    /// [`color::adjust_hue`] by a share of the circle.
    Hue(f64),
    /// [`color::grayscale`].
    Grayscale,
    /// [`color::gaussian_blur`] of so many pixels.
    Blur(f64),
    /// [`color::solarize`] from a value on.
    Solarize(u8),
}

/// Memory that one thread needs to make views; used again from image to image.
#[derive(Debug, Default)]
pub struct Scratch {
    resampler: Resampler,
    pixels: Rgb,
    planes: Planes,
    blur: BlurScratch,
}

/// Checks every view and prepares it for `size × size` pixels.
///
/// # Errors
/// [`DataError::View`] with the view's name when a parameter is out of range or the steps are not: one crop, then
/// anything, then at most one `normalize`.
pub fn check_views(views: &[ViewSpec], size: u32) -> Result<Vec<Augmenter>, DataError> {
    if views.is_empty() {
        return Err(DataError::Options("a method has to declare at least one view".into()));
    }
    if size == 0 {
        return Err(DataError::Options("data.size is 0; views need at least one pixel".into()));
    }
    views.iter().map(|view| Augmenter::new(view, size)).collect()
}

impl Augmenter {
    /// Checks one view and prepares it.
    ///
    /// # Errors
    /// As [`check_views`].
    pub fn new(view: &ViewSpec, size: u32) -> Result<Augmenter, DataError> {
        let refuse = |reason: String| DataError::View { view: view.name.clone(), reason };
        let Some((first, rest)) = view.transforms.split_first() else {
            return Err(refuse(
                "it has no steps; start with random_resized_crop or resize_center_crop".into(),
            ));
        };
        let crop = match *first {
            Transform::RandomResizedCrop { scale, ratio, interpolation } => {
                if !(0.0 < scale.0 && scale.0 <= scale.1 && scale.1 <= 1.0) {
                    return Err(refuse(format!("crop scale {scale:?} is not a range within (0, 1]")));
                }
                if !(0.0 < ratio.0 && ratio.0 <= ratio.1 && ratio.1.is_finite()) {
                    return Err(refuse(format!("crop ratio {ratio:?} is not a range of positive numbers")));
                }
                Crop::Random { scale, ratio, interpolation }
            }
            Transform::ResizeCenterCrop { crop_ratio, interpolation } => {
                if !(0.0 < crop_ratio && crop_ratio <= 1.0) {
                    return Err(refuse(format!("crop_ratio {crop_ratio} is not in (0, 1]")));
                }
                // timm rounds down.
                let shorter = (f64::from(size) / crop_ratio).floor();
                if shorter > f64::from(u16::MAX) {
                    return Err(refuse(format!(
                        "crop_ratio {crop_ratio} asks for images of {shorter} pixels"
                    )));
                }
                Crop::Center { shorter: shorter as u32, interpolation }
            }
            _ => return Err(refuse("its first step is not a crop, so its size is unknown".into())),
        };
        let probability = |what: &str, p: f64| match p {
            0.0..=1.0 => Ok(p),
            _ => Err(refuse(format!("{what} probability {p} is not in [0, 1]"))),
        };
        let mut steps = Vec::new();
        let mut normalize = None;
        for step in rest {
            if normalize.is_some() {
                return Err(refuse("a step follows normalize, which has to be the last".into()));
            }
            match *step {
                Transform::RandomResizedCrop { .. } | Transform::ResizeCenterCrop { .. } => {
                    return Err(refuse("it crops twice; only its first step can be a crop".into()));
                }
                Transform::HorizontalFlip { p } => {
                    steps.push(Step::Flip { p: probability("flip", p)? });
                }
                Transform::ColorJitter { p, brightness, contrast, saturation, hue } => {
                    let strengths = [brightness, contrast, saturation];
                    if !strengths.iter().all(|strength| strength.is_finite() && *strength >= 0.0) {
                        return Err(refuse(format!("jitter strengths {strengths:?} are not all at least 0")));
                    }
                    if !(0.0..=0.5).contains(&hue) {
                        return Err(refuse(format!("jitter of the hue by {hue} is not in [0, 0.5]")));
                    }
                    let p = probability("jitter", p)?;
                    steps.push(Step::Jitter { p, brightness, contrast, saturation, hue });
                }
                Transform::Grayscale { p } => {
                    steps.push(Step::Grayscale { p: probability("grey", p)? });
                }
                Transform::GaussianBlur { p, sigma } => {
                    if !(0.0 < sigma.0 && sigma.0 <= sigma.1 && sigma.1 <= 100.0) {
                        return Err(refuse(format!("blur sigma {sigma:?} is not a range within (0, 100]")));
                    }
                    steps.push(Step::Blur { p: probability("blur", p)?, sigma });
                }
                Transform::Solarize { p, threshold } => {
                    steps.push(Step::Solarize { p: probability("solarise", p)?, threshold });
                }
                Transform::Normalize { mean, std } => {
                    if !mean.iter().all(|value| value.is_finite())
                        || !std.iter().all(|&value| value.is_finite() && value > 0.0)
                    {
                        return Err(refuse(format!(
                            "normalize needs finite means and positive deviations, not {mean:?} and {std:?}"
                        )));
                    }
                    normalize = Some((mean, std));
                }
            }
        }
        let (mean, std) = normalize.unwrap_or(([0.0; 3], [1.0; 3]));
        Ok(Augmenter { size, crop, steps, mean, std })
    }

    /// Number of f32 in a view: `3 × size × size`.
    pub fn len(&self) -> usize {
        3 * self.size as usize * self.size as usize
    }

    /// Whether a view holds nothing, which [`check_views`] rules out.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Draws all that is random about the view of an image of this size.
    pub fn draw(&self, width: u32, height: u32, rng: &mut Rng) -> Plan {
        let crop = match self.crop {
            Crop::Random { scale, ratio, .. } => random_crop(width, height, scale, ratio, rng),
            Crop::Center { .. } => CropBox { top: 0, left: 0, height, width },
        };
        let mut operations = Vec::new();
        for step in &self.steps {
            match *step {
                Step::Flip { p } if rng.chance(p) => operations.push(Operation::Flip),
                Step::Jitter { p, brightness, contrast, saturation, hue } if rng.chance(p) => {
                    draw_jitter([brightness, contrast, saturation, hue], rng, &mut operations);
                }
                Step::Grayscale { p } if rng.chance(p) => operations.push(Operation::Grayscale),
                Step::Blur { p, sigma } if rng.chance(p) => {
                    operations.push(Operation::Blur(rng.uniform(sigma.0, sigma.1)));
                }
                Step::Solarize { p, threshold } if rng.chance(p) => {
                    operations.push(Operation::Solarize(threshold));
                }
                _ => {}
            }
        }
        Plan { crop, operations }
    }

    /// How many times smaller the image may be made before `crop` is cut out of it: 1, 2 or 4, so that what is cut out is
    /// still as large as the view. (At 8, libjpeg no longer interpolates colours.)
    pub fn shrink(&self, crop: CropBox) -> u32 {
        match self.crop {
            Crop::Random { .. } => {
                let times = crop.width.min(crop.height) / self.size;
                if times == 0 { 1 } else { (1 << times.ilog2()).min(4) }
            }
            Crop::Center { .. } => 1,
        }
    }

    /// Makes a view of `image` and writes it to `out` as `(3, size, size)`.
    ///
    /// # Panics
    /// When `out` does not have [`len`](Self::len) elements or the image is empty.
    pub fn apply(&self, image: &Rgb, rng: &mut Rng, scratch: &mut Scratch, out: &mut [f32]) {
        let plan = self.draw(image.width, image.height, rng);
        self.make(&Region::whole(image), &plan, scratch, out);
    }

    /// Makes the view that was drawn from a part of the image that has its crop, and writes it as [`apply`](Self::apply) does.
    ///
    /// # Panics
    /// As [`apply`](Self::apply), and when the part does not have the crop.
    pub fn make(&self, image: &Region, plan: &Plan, scratch: &mut Scratch, out: &mut [f32]) {
        assert_eq!(out.len(), self.len(), "a view's place in the batch has its size");
        self.cut_planes(image, plan.crop, scratch);
        let Scratch { planes, blur, .. } = scratch;
        for operation in &plan.operations {
            match *operation {
                Operation::Flip => planes.flip(),
                Operation::Brightness(factor) => color::adjust_brightness(planes, factor),
                Operation::Contrast(factor) => color::adjust_contrast(planes, factor),
                Operation::Saturation(factor) => color::adjust_saturation(planes, factor),
                Operation::Hue(turn) => color::adjust_hue(planes, turn),
                Operation::Grayscale => color::grayscale(planes),
                Operation::Blur(sigma) => color::gaussian_blur(planes, sigma, blur),
                Operation::Solarize(threshold) => color::solarize(planes, threshold),
            }
        }
        let channels = planes.channels().into_iter().zip(self.mean.iter().zip(&self.std));
        for (out, (plane, (mean, std))) in out.chunks_exact_mut(self.len() / 3).zip(channels) {
            normalize(plane, *mean, *std, out);
        }
    }

    /// Makes a view up to its operations, which are left to [`finish`](super::finish): writes `(3, size, size)` bytes.
    ///
    /// # Panics
    /// As [`make`](Self::make).
    pub fn make_pixels(&self, image: &Region, plan: &Plan, scratch: &mut Scratch, out: &mut [u8]) {
        self.cut_planes(image, plan.crop, scratch);
        out.copy_from_slice(&scratch.planes.values);
    }

    /// Mean and standard deviation that are subtracted and divided by, per channel.
    pub fn normalization(&self) -> ([f32; 3], [f32; 3]) {
        (self.mean, self.std)
    }

    /// Pixels in a row of a view, and in a column.
    pub(super) fn size(&self) -> u32 {
        self.size
    }

    /// What a random crop is resized with; `None` for a centre crop.
    pub(super) fn filter(&self) -> Option<Interpolation> {
        match self.crop {
            Crop::Random { interpolation, .. } => Some(interpolation),
            Crop::Center { .. } => None,
        }
    }

    /// Cuts a view out of the image, before any operation.
    pub(super) fn cut<'s>(&self, image: &Region, crop: CropBox, scratch: &'s mut Scratch) -> &'s Rgb {
        let Scratch { resampler, pixels, .. } = scratch;
        match self.crop {
            Crop::Random { interpolation, .. } => {
                resampler.resize(image, crop, (self.size, self.size), interpolation, pixels);
            }
            Crop::Center { shorter, interpolation } => {
                let crop = not_longer_than(LONGEST, crop);
                let size = shorter_side_to(shorter, crop.width, crop.height);
                resampler.resize(image, crop, size, interpolation, pixels);
                cut_center(pixels, self.size);
            }
        }
        pixels
    }

    fn cut_planes(&self, image: &Region, crop: CropBox, scratch: &mut Scratch) {
        self.cut(image, crop, scratch);
        scratch.planes.set(&scratch.pixels);
    }
}

/// torchvision's `ToTensor` and `Normalize`, in the same f32 steps.
fn normalize(plane: &[u8], mean: f32, std: f32, out: &mut [f32]) {
    vectorized(
        #[inline(always)]
        || {
            for (value, byte) in out.iter_mut().zip(plane) {
                *value = (f32::from(*byte) / 255.0 - mean) / std;
            }
        },
    );
}

/// torchvision's `ColorJitter`: the parts with a strength above 0, in a random order, each with a factor of its own.
fn draw_jitter(strengths: [f64; 4], rng: &mut Rng, operations: &mut Vec<Operation>) {
    let mut order = [0, 1, 2, 3];
    rng.shuffle(&mut order);
    for part in order {
        let strength = strengths[part];
        if strength == 0.0 {
            continue;
        }
        if part == 3 {
            operations.push(Operation::Hue(rng.uniform(-strength, strength)));
            continue;
        }
        let factor = rng.uniform((1.0 - strength).max(0.0), 1.0 + strength) as f32;
        operations.push(match part {
            0 => Operation::Brightness(factor),
            1 => Operation::Contrast(factor),
            _ => Operation::Saturation(factor),
        });
    }
}

/// Draws the box of torchvision's `RandomResizedCrop.get_params`: ten tries at a random area and aspect ratio, then
/// the largest centred box of an allowed ratio.
pub fn random_crop(width: u32, height: u32, scale: (f64, f64), ratio: (f64, f64), rng: &mut Rng) -> CropBox {
    let (image_width, image_height) = (f64::from(width), f64::from(height));
    for _ in 0..10 {
        let area = image_width * image_height * rng.uniform(scale.0, scale.1);
        let aspect = rng.uniform(ratio.0.ln(), ratio.1.ln()).exp();
        // Python's round: halves go to the even neighbour.
        let crop_width = (area * aspect).sqrt().round_ties_even();
        let crop_height = (area / aspect).sqrt().round_ties_even();
        if 0.0 < crop_width && crop_width <= image_width && 0.0 < crop_height && crop_height <= image_height {
            let (crop_width, crop_height) = (crop_width as u32, crop_height as u32);
            let top = rng.below(u64::from(height - crop_height) + 1) as u32;
            let left = rng.below(u64::from(width - crop_width) + 1) as u32;
            return CropBox { top, left, height: crop_height, width: crop_width };
        }
    }
    let image_ratio = image_width / image_height;
    let (crop_width, crop_height) = if image_ratio < ratio.0 {
        (width, (image_width / ratio.0).round_ties_even() as u32)
    } else if image_ratio > ratio.1 {
        ((image_height * ratio.1).round_ties_even() as u32, height)
    } else {
        (width, height)
    };
    // An image one pixel wide can round to nothing.
    let (crop_width, crop_height) = (crop_width.clamp(1, width), crop_height.clamp(1, height));
    CropBox {
        top: (height - crop_height) / 2,
        left: (width - crop_width) / 2,
        height: crop_height,
        width: crop_width,
    }
}

/// The size to which torchvision's `Resize(shorter)` brings an image: the longer side is rounded down.
pub(super) fn shorter_side_to(shorter: u32, width: u32, height: u32) -> (u32, u32) {
    let longer = |long: u32, short: u32| (u64::from(shorter) * u64::from(long) / u64::from(short)) as u32;
    if width <= height { (shorter, longer(height, width)) } else { (longer(width, height), shorter) }
}

/// Times its shorter side that the longer side of an image may have before it is resized for a centre crop: more would only
/// be made to be cut off, and of a strip of pixels it would be gigabytes.
const LONGEST: u32 = 16;

/// The middle of a box, of a longer side that is at most so many times the shorter one.
fn not_longer_than(times: u32, whole: CropBox) -> CropBox {
    let CropBox { top, left, height, width } = whole;
    let longest = width.min(height).saturating_mul(times);
    let (width, height) = (width.min(longest), height.min(longest));
    CropBox { top: top + (whole.height - height) / 2, left: left + (whole.width - width) / 2, height, width }
}

/// Keeps the centred square of an image, in place. torchvision rounds its corner half to even.
fn cut_center(image: &mut Rgb, size: u32) {
    let corner = |side: u32| (f64::from(side - size) / 2.0).round_ties_even() as usize;
    let (top, left) = (corner(image.height), corner(image.width));
    let (from_stride, to_stride) = (image.width as usize * 3, size as usize * 3);
    for row in 0..size as usize {
        let from = (top + row) * from_stride + left * 3;
        image.pixels.copy_within(from..from + to_stride, row * to_stride);
    }
    image.pixels.truncate(size as usize * to_stride);
    image.width = size;
    image.height = size;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradient(width: u32, height: u32) -> Rgb {
        let pixels = (0..height)
            .flat_map(|y| (0..width).flat_map(move |x| [x as u8, y as u8, (x + y) as u8]))
            .collect();
        Rgb { width, height, pixels }
    }

    fn apply(view: ViewSpec, size: u32, image: &Rgb) -> Vec<f32> {
        let augmenter = Augmenter::new(&view, size).unwrap();
        let mut out = vec![f32::NAN; augmenter.len()];
        augmenter.apply(image, &mut Rng::keyed(1, 2, 3, 4), &mut Scratch::default(), &mut out);
        out
    }

    fn refusal(view: ViewSpec) -> String {
        Augmenter::new(&view, 8).unwrap_err().to_string()
    }

    #[test]
    fn a_center_crop_at_full_size_takes_the_middle() {
        let image = gradient(10, 8);
        let out = apply(ViewSpec::new("v").resize_center_crop(1.0, Interpolation::Bilinear), 8, &image);
        let expected: Vec<f32> = (0..8).flat_map(|_| (1..9).map(|x| x as f32 / 255.0)).collect();
        assert_eq!(out[..64], expected);
    }

    #[test]
    fn a_certain_flip_mirrors_left_and_right() {
        let image = gradient(8, 8);
        let plain = apply(ViewSpec::new("v").resize_center_crop(1.0, Interpolation::Bilinear), 8, &image);
        let spec = ViewSpec::new("v").resize_center_crop(1.0, Interpolation::Bilinear).horizontal_flip(1.0);
        let mirrored: Vec<f32> = apply(spec, 8, &image)
            .chunks_exact(8)
            .flat_map(|row| row.iter().rev().copied().collect::<Vec<_>>())
            .collect();
        assert_eq!(plain, mirrored);
    }

    #[test]
    fn one_pixel_wide_images_can_be_cropped() {
        let mut rng = Rng::keyed(0, 0, 0, 0);
        for (width, height) in [(1, 1), (1, 500), (500, 1), (2, 3)] {
            for _ in 0..100 {
                let crop = random_crop(width, height, (0.08, 1.0), (0.75, 4.0 / 3.0), &mut rng);
                assert!(crop.width > 0 && crop.left + crop.width <= width, "{crop:?} in {width} × {height}");
                assert!(
                    crop.height > 0 && crop.top + crop.height <= height,
                    "{crop:?} in {width} × {height}"
                );
            }
        }
    }

    #[test]
    fn extreme_shapes_fall_back_to_the_centre_with_the_nearest_allowed_ratio() {
        let mut rng = Rng::keyed(0, 0, 0, 0);
        let crop = random_crop(1000, 100, (1.0, 1.0), (0.75, 4.0 / 3.0), &mut rng);
        assert_eq!(crop, CropBox { top: 0, left: 433, height: 100, width: 133 });
        let crop = random_crop(90, 1000, (1.0, 1.0), (0.75, 4.0 / 3.0), &mut rng);
        assert_eq!(crop, CropBox { top: 440, left: 0, height: 120, width: 90 });
    }

    #[test]
    fn views_that_make_no_sense_are_refused_by_name() {
        let crop = || ViewSpec::new("left").random_resized_crop((0.2, 1.0), Interpolation::Bicubic);
        assert_eq!(
            refusal(ViewSpec::new("left")),
            "view `left`: it has no steps; start with random_resized_crop or resize_center_crop"
        );
        assert!(refusal(ViewSpec::new("left").normalize_imagenet()).contains("first step is not a crop"));
        assert!(refusal(crop().resize_center_crop(1.0, Interpolation::Bilinear)).contains("crops twice"));
        assert!(
            refusal(crop().normalize_imagenet().horizontal_flip(0.5)).contains("a step follows normalize")
        );
        assert!(
            refusal(crop().normalize_imagenet().normalize_imagenet()).contains("a step follows normalize")
        );
        assert!(refusal(crop().horizontal_flip(1.5)).contains("flip probability 1.5"));
        let scale = ViewSpec::new("left").random_resized_crop((0.0, 1.0), Interpolation::Bicubic);
        assert!(refusal(scale).contains("crop scale (0.0, 1.0)"));
        let zero = Transform::Normalize { mean: [0.0; 3], std: [1.0, 0.0, 1.0] };
        assert!(refusal(crop().then(zero)).contains("positive deviations"));
        assert!(
            refusal(ViewSpec::new("v").resize_center_crop(0.0, Interpolation::Bilinear))
                .contains("crop_ratio 0")
        );
    }
}
