//! Colour operations on 8-bit RGB, in place, as Pillow and torchvision do them with the same parameters.
//!
//! Everything but the blur gives Pillow's bytes: so its roundings and its cuts to 8 bits are copied.

use super::decode::Rgb;

/// Pillow's luma (ITU-R 601-2) in 16-bit fixed point.
fn luma([red, green, blue]: [u8; 3]) -> u8 {
    let sum = u32::from(red) * 19595 + u32::from(green) * 38470 + u32::from(blue) * 7471 + 0x8000;
    (sum >> 16) as u8
}

/// Pillow's `Image.blend`: from `base` towards `value`, and beyond for factors above 1.
fn blend(base: u8, value: u8, factor: f32) -> u8 {
    let base = f32::from(base);
    (base + factor * (f32::from(value) - base)).clamp(0.0, 255.0) as u8
}

fn look_up(pixels: &mut [u8], table: &[u8; 256]) {
    for value in pixels {
        *value = table[usize::from(*value)];
    }
}

fn table(of: impl Fn(u8) -> u8) -> [u8; 256] {
    std::array::from_fn(|value| of(value as u8))
}

/// Multiplies every value by `factor`.
pub fn adjust_brightness(pixels: &mut [u8], factor: f32) {
    look_up(pixels, &table(|value| blend(0, value, factor)));
}

/// Moves every value away from the mean luma, or towards it for factors below 1.
pub fn adjust_contrast(pixels: &mut [u8], factor: f32) {
    let (triples, _) = pixels.as_chunks::<3>();
    let sum: u64 = triples.iter().map(|&pixel| u64::from(luma(pixel))).sum();
    let mean = (sum as f64 / triples.len().max(1) as f64 + 0.5) as u8;
    look_up(pixels, &table(|value| blend(mean, value, factor)));
}

/// Moves every pixel away from its luma, or towards it for factors below 1.
pub fn adjust_saturation(pixels: &mut [u8], factor: f32) {
    for pixel in pixels.as_chunks_mut::<3>().0 {
        let grey = luma(*pixel);
        *pixel = pixel.map(|value| blend(grey, value, factor));
    }
}

/// Turns every hue by `turn`, a share of the circle in [−0.5, 0.5]. Through Pillow's 8-bit HSV.
pub fn adjust_hue(pixels: &mut [u8], turn: f64) {
    let turn = (turn * 255.0) as i32 as u8;
    for pixel in pixels.as_chunks_mut::<3>().0 {
        let [hue, saturation, value] = hsv(*pixel);
        *pixel = rgb([hue.wrapping_add(turn), saturation, value]);
    }
}

fn hsv([red, green, blue]: [u8; 3]) -> [u8; 3] {
    let (most, least) = (red.max(green).max(blue), red.min(green).min(blue));
    if most == least {
        return [0, 0, most];
    }
    let range = f32::from(most - least);
    let below = |channel: u8| f32::from(most - channel) / range;
    let (r, g, b) = (below(red), below(green), below(blue));
    let sixths = if red == most {
        b - g
    } else if green == most {
        (2.0 + f64::from(r) - f64::from(b)) as f32
    } else {
        (4.0 + f64::from(g) - f64::from(r)) as f32
    };
    let hue = ((f64::from(sixths) / 6.0 + 1.0) % 1.0) as f32;
    let saturation = range / f32::from(most);
    let byte = |share: f32| (f64::from(share) * 255.0) as u8;
    [byte(hue), byte(saturation), most]
}

fn rgb([hue, saturation, value]: [u8; 3]) -> [u8; 3] {
    if saturation == 0 {
        return [value; 3];
    }
    let sixths = f64::from(hue) * 6.0 / 255.0;
    let sector = sixths.floor();
    let within = f64::from((sixths - sector) as f32);
    let saturation = f64::from((f64::from(saturation) / 255.0) as f32);
    let byte = |share: f64| (f64::from(value) * share).round() as u8;
    let (p, q, t) =
        (byte(1.0 - saturation), byte(1.0 - saturation * within), byte(1.0 - saturation * (1.0 - within)));
    match sector as u8 % 6 {
        0 => [value, t, p],
        1 => [q, value, p],
        2 => [p, value, t],
        3 => [p, q, value],
        4 => [t, p, value],
        _ => [value, p, q],
    }
}

/// Gives all three channels the pixel's luma.
pub fn grayscale(pixels: &mut [u8]) {
    for pixel in pixels.as_chunks_mut::<3>().0 {
        *pixel = [luma(*pixel); 3];
    }
}

/// Inverts the values from `threshold` on.
pub fn solarize(pixels: &mut [u8], threshold: u8) {
    look_up(pixels, &table(|value| if value < threshold { value } else { 255 - value }));
}

/// Memory for [`gaussian_blur`].
#[derive(Debug, Default)]
pub struct BlurScratch {
    padded: Vec<f32>,
    rows: Vec<f32>,
    sums: Vec<f32>,
}

/// Blurs with a Gaussian of standard deviation `sigma` > 0, in pixels: torchvision's `gaussian_blur`, with a kernel that
/// reaches to 4 σ and a border that mirrors without its edge.
pub fn gaussian_blur(image: &mut Rgb, sigma: f64, scratch: &mut BlurScratch) {
    let (width, height) = (image.width as usize, image.height as usize);
    let radius = ((4.0 * sigma).ceil() as usize).max(1);
    let half: Vec<f64> = (0..=radius).map(|x| (-0.5 * (x as f64 / sigma).powi(2)).exp()).collect();
    let total = half[0] + 2.0 * half[1..].iter().sum::<f64>();
    let half: Vec<f32> = half.iter().map(|weight| (weight / total) as f32).collect();

    // Along each row, into a row that is longer by the mirrored border on both sides.
    let BlurScratch { padded, rows, sums } = scratch;
    padded.resize(3 * (width + 2 * radius), 0.0);
    rows.resize(3 * width * height, 0.0);
    for (row, out) in image.pixels.chunks_exact(3 * width).zip(rows.chunks_exact_mut(3 * width)) {
        for x in 0..width + 2 * radius {
            let from = 3 * mirror(x as isize - radius as isize, width);
            for channel in 0..3 {
                padded[3 * x + channel] = f32::from(row[from + channel]);
            }
        }
        let at = |offset: usize| &padded[3 * offset..][..3 * width];
        for (out, centre) in out.iter_mut().zip(at(radius)) {
            *out = half[0] * centre;
        }
        for (distance, weight) in half.iter().enumerate().skip(1) {
            let sides = at(radius - distance).iter().zip(at(radius + distance));
            for (out, (left, right)) in out.iter_mut().zip(sides) {
                *out += weight * (left + right);
            }
        }
    }
    // Then along the columns: whole rows are added.
    sums.resize(3 * width, 0.0);
    let row = |y: isize| &rows[3 * width * mirror(y, height)..][..3 * width];
    for (y, out) in image.pixels.chunks_exact_mut(3 * width).enumerate() {
        let y = y as isize;
        for (sum, centre) in sums.iter_mut().zip(row(y)) {
            *sum = half[0] * centre;
        }
        for (distance, weight) in half.iter().enumerate().skip(1) {
            let distance = distance as isize;
            for (sum, (above, below)) in sums.iter_mut().zip(row(y - distance).iter().zip(row(y + distance)))
            {
                *sum += weight * (above + below);
            }
        }
        for (out, sum) in out.iter_mut().zip(sums.iter()) {
            *out = sum.round_ties_even() as u8;
        }
    }
}

/// The position inside `0..length` that is seen at `position`, when the ends are mirrors that show no edge twice.
fn mirror(position: isize, length: usize) -> usize {
    let period = 2 * (length as isize - 1).max(1);
    let position = position.rem_euclid(period);
    let position = if position < length as isize { position } else { period - position };
    (position as usize).min(length - 1)
}
