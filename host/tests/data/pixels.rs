//! Decoding equals Pillow's, and crops, flips and normalisation equal torchvision's.

use jepa_host::data::augment::{Augmenter, Scratch, random_crop};
use jepa_host::data::decode::{Encoded, Region, Rgb, decode};
use jepa_host::data::resample::{CropBox, Resampler};
use jepa_plugin_api::{Interpolation, Rng, ViewSpec};
use libjpeg_turbo_rs::{Encoder, PixelFormat, Subsampling};

use crate::fixtures::{Tensors, picture};

const MODES: [(&str, Interpolation); 2] =
    [("bilinear", Interpolation::Bilinear), ("bicubic", Interpolation::Bicubic)];

/// Mean and greatest difference in levels of 255.
fn difference(ours: &[u8], theirs: &[u8]) -> (f64, u8) {
    assert_eq!(ours.len(), theirs.len());
    let differences = || ours.iter().zip(theirs).map(|(a, b)| a.abs_diff(*b));
    let mean = differences().map(f64::from).sum::<f64>() / ours.len() as f64;
    (mean, differences().max().unwrap_or(0))
}

fn box_from(values: &[i64]) -> CropBox {
    let [top, left, height, width] = std::array::from_fn(|i| values[i] as u32);
    CropBox { top, left, height, width }
}

fn view_of(image: &Rgb, view: ViewSpec, size: u32) -> Vec<f32> {
    let augmenter = Augmenter::new(&view, size).unwrap();
    let mut out = vec![f32::NAN; augmenter.len()];
    augmenter.apply(image, &mut Rng::keyed(0, 0, 0, 0), &mut Scratch::default(), &mut out);
    out
}

/// `(3, S, S)` in [0, 1] back to `(S, S, 3)` bytes.
fn to_bytes(view: &[f32]) -> Vec<u8> {
    let plane = view.len() / 3;
    (0..plane).flat_map(|i| (0..3).map(move |c| (view[c * plane + i] * 255.0).round() as u8)).collect()
}

#[test]
fn decoding_equals_pillow() {
    let tensors = Tensors::read("transforms.safetensors");
    let whole = tensors
        .names("input.", ".rgb")
        .into_iter()
        .map(|name| (format!("input.{name}.encoded"), format!("input.{name}.rgb")));
    let decode_only = tensors
        .names("output.decode.", ".rgb")
        .into_iter()
        .map(|name| (format!("input.decode.{name}.encoded"), format!("output.decode.{name}.rgb")));
    for (encoded, rgb) in whole.chain(decode_only) {
        let ours = decode(tensors.bytes(&encoded).1).unwrap();
        let theirs = tensors.rgb(&rgb);
        assert_eq!((ours.width, ours.height), (theirs.width, theirs.height), "{rgb}");
        let (mean, max) = difference(&ours.pixels, &theirs.pixels);
        println!("{encoded}: mean {mean:.3}, max {max}");
        // libjpeg has no way from four colours to three: Pillow goes its own.
        let bound = if encoded.contains("cmyk") { 1.0 } else { 0.0 };
        assert!(mean <= bound, "{encoded} differs from Pillow by {mean} levels in the mean, {max} at most");
    }
}

/// JPEGs as cameras and programs write them: with colours at several resolutions, progressive, with restarts, and grey.
fn jpegs(image: &Rgb) -> Vec<(String, Vec<u8>)> {
    let (width, height) = (image.width as usize, image.height as usize);
    let grey: Vec<u8> = image.pixels.chunks_exact(3).map(|pixel| pixel[0]).collect();
    let color = |subsampling| {
        Encoder::new(&image.pixels, width, height, PixelFormat::Rgb).quality(90).subsampling(subsampling)
    };
    let mut encoders: Vec<_> = [Subsampling::S444, Subsampling::S422, Subsampling::S420, Subsampling::S440]
        .map(|subsampling| (format!("{subsampling:?}"), color(subsampling)))
        .into();
    encoders.push(("progressive".to_owned(), color(Subsampling::S420).progressive(true)));
    encoders.push(("restarts".to_owned(), color(Subsampling::S420).restart_blocks(2)));
    encoders
        .push(("grey".to_owned(), Encoder::new(&grey, width, height, PixelFormat::Grayscale).quality(90)));
    encoders.into_iter().map(|(name, encoder)| (name, encoder.encode().unwrap())).collect()
}

#[test]
fn a_part_is_what_the_whole_has_there() {
    let (mut part, mut whole) = (Rgb::default(), Rgb::default());
    let (mut resampler, mut of_part, mut of_whole) = (Resampler::default(), Rgb::default(), Rgb::default());
    let mut narrower = 0;
    for (width, height) in [(200, 150), (333, 97), (64, 64), (17, 40), (1, 9)] {
        for (encoding, encoded) in jpegs(&picture(width, height, 3)) {
            for case in 0..40 {
                let mut rng = Rng::keyed(case, u64::from(width), 0, 0);
                let crop = random_crop(width, height, (0.02, 1.0), (0.3, 3.0), &mut rng);
                let shrink = 1 << rng.below(3);
                let open = || Encoded::open(&encoded).unwrap();
                let all = CropBox { top: 0, left: 0, width, height };
                let whole = open().decode(all, shrink, &mut whole).unwrap();
                let part = open().decode(crop, shrink, &mut part).unwrap();
                assert_eq!((whole.origin, whole.pixels.width), ((0, 0), width.div_ceil(shrink)));
                narrower += u32::from(part.pixels.width < whole.pixels.width);
                for (region, view) in [(&part, &mut of_part), (&whole, &mut of_whole)] {
                    resampler.resize(region, crop, (16, 16), Interpolation::Bicubic, view);
                }
                assert!(of_part == of_whole, "{encoding}, {width} × {height}, {crop:?} over {shrink}");
                // What a resampler looks at: the crop, and of an image made smaller, a pixel that is partly in it.
                let columns = crop.left / shrink..(crop.left + crop.width).div_ceil(shrink);
                for y in crop.top / shrink..(crop.top + crop.height).div_ceil(shrink) {
                    let row = |region: &Region| {
                        let (left, top) = region.origin;
                        let begin = (y - top) * region.pixels.width + columns.start - left;
                        region.pixels.pixels[begin as usize * 3..][..columns.len() * 3].to_vec()
                    };
                    assert_eq!(
                        row(&part),
                        row(&whole),
                        "{encoding}, {width} × {height}, {crop:?} over {shrink}: row {y}"
                    );
                }
            }
        }
    }
    assert!(narrower > 100, "{narrower} were decoded in part");
}

#[test]
fn what_is_decoded_smaller_looks_the_same() {
    // As photos are: smooth, but for sharp edges and a sensor's noise.
    let photo = |x: u32, y: u32, c: u32| {
        let (across, down, turn) = (f64::from(x), f64::from(y), f64::from(c));
        let smooth = 110.0 + 60.0 * (across / 97.0 + turn).sin() * (down / 79.0 - turn).cos();
        let edge = if (across * 0.9 + down * 0.4) % 180.0 < 60.0 { 70.0 } else { 0.0 };
        let noise = ((x * 7919 + y * 104_729 + c * 31).wrapping_mul(2_654_435_761) >> 29) as f64;
        (smooth + edge + noise) as u8
    };
    let pixels = (0..900).flat_map(|y| (0..1200).flat_map(move |x| [0, 1, 2].map(|c| photo(x, y, c))));
    let image = Rgb { width: 1200, height: 900, pixels: pixels.collect() };
    for (encoding, encoded) in jpegs(&image) {
        for (case, shrink) in [1, 2, 4].into_iter().enumerate() {
            let rng = || Rng::keyed(case as u64, 0, 0, 0);
            let crop = random_crop(image.width, image.height, (0.3, 0.9), (0.75, 4.0 / 3.0), &mut rng());
            let view = ViewSpec::new("v").random_resized_crop((0.3, 0.9), Interpolation::Bicubic);
            let augmenter = Augmenter::new(&view, crop.width.min(crop.height) / shrink).unwrap();
            let make = |exact: bool| {
                let mut rng = rng();
                let encoded = Encoded::open(&encoded).unwrap();
                let plan = augmenter.draw(encoded.width, encoded.height, &mut rng);
                assert_eq!(augmenter.shrink(plan.crop), shrink);
                let (mut image, mut out) = (Rgb::default(), vec![0.0; augmenter.len()]);
                let region = encoded.decode(plan.crop, if exact { 1 } else { shrink }, &mut image).unwrap();
                augmenter.make(&region, &plan, &mut Scratch::default(), &mut out);
                to_bytes(&out)
            };
            let (mean, max) = difference(&make(false), &make(true));
            println!("{encoding} over {shrink}: mean {mean:.3}, max {max}");
            assert!(mean < 1.5 && max <= 60, "{encoding} over {shrink}: mean {mean}, max {max}");
            assert!(shrink > 1 || max == 0);
        }
    }
}

#[test]
fn crops_equal_torchvision() {
    let tensors = Tensors::read("transforms.safetensors");
    let mut resampler = Resampler::default();
    let mut crop = Rgb::default();
    for image_name in tensors.names("input.", ".boxes") {
        let image = tensors.rgb(&format!("input.{image_name}.rgb"));
        let boxes = tensors.i64(&format!("input.{image_name}.boxes"));
        for (mode, interpolation) in MODES {
            for size in [16_u32, 32] {
                let name = format!("output.{image_name}.crop.{mode}.{size}");
                let theirs = tensors.bytes(&name).1.chunks_exact((size * size * 3) as usize);
                for (values, theirs) in boxes.chunks_exact(4).zip(theirs) {
                    resampler.resize(
                        &Region::whole(&image),
                        box_from(values),
                        (size, size),
                        interpolation,
                        &mut crop,
                    );
                    let (mean, max) = difference(&crop.pixels, theirs);
                    assert!(mean <= 0.5 && max <= 2, "{name} of {values:?}: mean {mean}, max {max}");
                }
            }
        }
    }
}

#[test]
fn center_crops_equal_torchvision() {
    let tensors = Tensors::read("transforms.safetensors");
    for image_name in tensors.names("output.", ".center.bicubic") {
        let image = tensors.rgb(&format!("input.{image_name}.rgb"));
        for (mode, interpolation) in MODES {
            let name = format!("output.{image_name}.center.{mode}");
            // The shorter side becomes 37.
            let view = ViewSpec::new("center").resize_center_crop(32.0 / 37.5, interpolation);
            let (mean, max) = difference(&to_bytes(&view_of(&image, view, 32)), tensors.bytes(&name).1);
            assert!(mean <= 0.5 && max <= 2, "{name}: mean {mean}, max {max}");
        }
    }
}

#[test]
fn of_a_strip_the_middle_is_seen_and_nothing_else_is_made() {
    let pixels =
        (0..65_500u32).flat_map(|y| [if (30_000..35_500).contains(&y) { 77 } else { 0 }; 3]).collect();
    let strip = Rgb { width: 1, height: 65_500, pixels };
    let view = ViewSpec::new("center").resize_center_crop(0.875, Interpolation::Bicubic);
    assert!(to_bytes(&view_of(&strip, view, 224)).iter().all(|&value| value == 77));
}

#[test]
fn flip_and_normalise_equal_torchvision() {
    let tensors = Tensors::read("transforms.safetensors");
    let name = "output.rgb_jpeg.crop.bicubic.32";
    let crops = tensors.bytes(name).1.chunks_exact(32 * 32 * 3);
    let flipped = format!("{name}.flipped");
    let normalised = tensors.f32(&format!("{name}.normalised"));
    let expected =
        tensors.bytes(&flipped).1.chunks_exact(32 * 32 * 3).zip(normalised.chunks_exact(32 * 32 * 3));
    for (crop, (flipped, normalised)) in crops.zip(expected) {
        let crop = Rgb { width: 32, height: 32, pixels: crop.to_vec() };
        // At the size that the image has, this crop is the image.
        let whole = || ViewSpec::new("whole").resize_center_crop(1.0, Interpolation::Bicubic);
        assert_eq!(to_bytes(&view_of(&crop, whole().horizontal_flip(1.0), 32)), flipped);
        for (ours, theirs) in view_of(&crop, whole().normalize_imagenet(), 32).iter().zip(normalised) {
            assert!((ours - theirs).abs() <= 1e-6, "{ours} and {theirs}");
        }
    }
}
