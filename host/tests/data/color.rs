//! Colour operations equal torchvision's on Pillow images, and are drawn as torchvision draws them.

use jepa_host::data::augment::{Augmenter, Scratch};
use jepa_host::data::color::{
    BlurScratch, Planes, adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation, gaussian_blur,
    grayscale, solarize,
};
use jepa_host::data::decode::Rgb;
use jepa_plugin_api::{Interpolation, Rng, Transform, ViewSpec};

use crate::fixtures::{Tensors, picture};

/// What the operation makes of `image`, as pixels `(H, W, 3)`.
fn apply(operation: &str, image: &Rgb, value: f64) -> Vec<u8> {
    let mut planes = Planes::default();
    planes.set(image);
    match operation {
        "brightness" => adjust_brightness(&mut planes, value as f32),
        "contrast" => adjust_contrast(&mut planes, value as f32),
        "saturation" => adjust_saturation(&mut planes, value as f32),
        "hue" => adjust_hue(&mut planes, value),
        "solarize" => solarize(&mut planes, value as u8),
        "grayscale" => grayscale(&mut planes),
        "blur" => gaussian_blur(&mut planes, value, &mut BlurScratch::default()),
        other => panic!("no operation {other}"),
    }
    assert_eq!((planes.width, planes.height), (image.width, image.height));
    let [red, green, blue] = planes.channels();
    red.iter().zip(green).zip(blue).flat_map(|((red, green), blue)| [*red, *green, *blue]).collect()
}

#[test]
fn every_operation_gives_torchvision_s_bytes() {
    let tensors = Tensors::read("color.safetensors");
    let parameters = Tensors::config("color.safetensors")["parameters"].clone();
    let mut compared = 0;
    for name in tensors.names("output.", "") {
        let (picture, operation) = name.split_once('.').unwrap();
        let image = tensors.rgb(&format!("input.{picture}"));
        let values = parameters[operation].as_array().unwrap();
        let outputs = tensors.bytes(&format!("output.{name}")).1.chunks_exact(image.pixels.len());
        assert_eq!(outputs.len(), values.len());
        for (value, theirs) in values.iter().map(|value| value.as_f64().unwrap()).zip(outputs) {
            let ours = apply(operation, &image, value);
            let differences: Vec<u8> = ours.iter().zip(theirs).map(|(a, b)| a.abs_diff(*b)).collect();
            let different = differences.iter().filter(|difference| **difference > 0).count();
            // A sum of a blur in another order may round to the other side.
            let allowed = if operation == "blur" { ours.len() / 100 } else { 0 };
            assert!(
                different <= allowed && differences.iter().all(|difference| *difference <= 1),
                "{name} by {value}: {different} of {} values differ",
                differences.len()
            );
            compared += 1;
        }
    }
    assert!(compared > 100, "{compared} cases");
}

fn crop() -> ViewSpec {
    ViewSpec::new("v").resize_center_crop(1.0, Interpolation::Bilinear)
}

/// What a view makes of `image`, as bytes `(S, S, 3)`.
fn view_of(image: &Rgb, view: &ViewSpec, size: u32, sample: u64) -> Vec<u8> {
    let augmenter = Augmenter::new(view, size).unwrap();
    let mut out = vec![f32::NAN; augmenter.len()];
    augmenter.apply(image, &mut Rng::keyed(1, 0, sample, 0), &mut Scratch::default(), &mut out);
    let plane = out.len() / 3;
    (0..plane).flat_map(|i| [0, 1, 2].map(|c| (out[c * plane + i] * 255.0).round() as u8)).collect()
}

#[test]
fn steps_happen_as_often_as_they_should_and_by_their_key_alone() {
    let image = picture(16, 16, 3);
    let plain = view_of(&image, &crop(), 16, 0);
    for (view, p) in [
        (crop().color_jitter(0.8, 0.4, 0.4, 0.2, 0.1), 0.8),
        (crop().grayscale(0.2), 0.2),
        (crop().gaussian_blur(0.5), 0.5),
        (crop().solarize(0.1), 0.1),
    ] {
        let made: Vec<Vec<u8>> = (0..2000).map(|sample| view_of(&image, &view, 16, sample)).collect();
        let changed = made.iter().filter(|pixels| **pixels != plain).count() as f64 / 2000.0;
        // A jitter or a blur may be too weak to be seen: at most in one case of 20.
        let deviation = (p * (1.0 - p) / 2000.0f64).sqrt();
        assert!((p * 0.95 - 4.0 * deviation..=p + 4.0 * deviation).contains(&changed), "{view:?}: {changed}");
        assert_eq!(view_of(&image, &view, 16, 7), made[7]);
    }
}

#[test]
fn the_order_of_the_parts_is_random() {
    // At these strengths the result of contrast and brightness depends on which comes first.
    let image = picture(8, 8, 5);
    let view = crop().color_jitter(1.0, 0.8, 0.8, 0.0, 0.0);
    let mut first = [0, 0];
    for sample in 0..400 {
        let mut rng = Rng::keyed(1, 0, sample, 0);
        assert!(rng.chance(1.0));
        let mut order = [0, 1, 2, 3];
        rng.shuffle(&mut order);
        let brightness_first =
            order.iter().position(|part| *part == 0) < order.iter().position(|part| *part == 1);
        let (a, b) = (rng.uniform(0.2, 1.8) as f32, rng.uniform(0.2, 1.8) as f32);
        let order = if brightness_first { ["brightness", "contrast"] } else { ["contrast", "brightness"] };
        let half = Rgb { pixels: apply(order[0], &image, f64::from(a)), ..image.clone() };
        assert_eq!(view_of(&image, &view, 8, sample), apply(order[1], &half, f64::from(b)));
        first[usize::from(brightness_first)] += 1;
    }
    assert!(first.iter().all(|count| (150..250).contains(count)), "{first:?}");
}

#[test]
fn tiny_pictures_are_blurred_too() {
    for (width, height) in [(1, 1), (1, 5), (2, 3)] {
        let blurred = apply("blur", &picture(width, height, 1), 2.0);
        assert_eq!(blurred.len() as u32, width * height * 3);
    }
    let flat = Rgb { width: 5, height: 4, pixels: vec![77; 60] };
    assert_eq!(apply("blur", &flat, 1.3), flat.pixels, "what is flat stays flat");
}

#[test]
fn parameters_out_of_range_are_refused_by_the_view_s_name() {
    let refusal = |view: ViewSpec| Augmenter::new(&view, 8).unwrap_err().to_string();
    for (view, says) in [
        (crop().color_jitter(1.2, 0.4, 0.4, 0.2, 0.1), "jitter probability 1.2"),
        (crop().color_jitter(0.5, -0.4, 0.4, 0.2, 0.1), "jitter strengths [-0.4, 0.4, 0.2]"),
        (crop().color_jitter(0.5, 0.4, 0.4, 0.2, 0.6), "hue by 0.6"),
        (crop().grayscale(-0.1), "grey probability -0.1"),
        (crop().gaussian_blur(f64::NAN), "blur probability NaN"),
        (crop().then(Transform::GaussianBlur { p: 1.0, sigma: (0.0, 1.0) }), "blur sigma (0.0, 1.0)"),
        (crop().solarize(2.0), "solarise probability 2"),
    ] {
        let message = refusal(view);
        assert!(message.contains(says), "{message}");
    }
}
