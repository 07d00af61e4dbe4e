//! Colour operations on 8-bit RGB, in place, as Pillow and torchvision do them with the same parameters.
//!
//! Everything but the blur gives Pillow's bytes: so its roundings and its cuts to 8 bits are copied. Red, green and blue lie in
//! planes of their own and the kernels have no branches, so that compilers make vector instructions of them.

use jepa_plugin_api::memory::vectorized;

use super::decode::Rgb;

/// An 8-bit picture in three planes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Planes {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `3 × height × width` bytes.
    pub values: Vec<u8>,
}

impl Planes {
    /// Takes over the pixels of `image`.
    pub fn set(&mut self, image: &Rgb) {
        (self.width, self.height) = (image.width, image.height);
        self.values.resize(image.pixels.len(), 0);
        let (pixels, _) = image.pixels.as_chunks::<3>();
        let [red, green, blue] = self.channels();
        vectorized(
            #[inline(always)]
            || {
                for ((([r, g, b], red), green), blue) in pixels.iter().zip(red).zip(green).zip(blue) {
                    (*red, *green, *blue) = (*r, *g, *b);
                }
            },
        );
    }

    /// Red, green and blue.
    pub fn channels(&mut self) -> [&mut [u8]; 3] {
        let plane = self.values.len() / 3;
        let (red, others) = self.values.split_at_mut(plane);
        let (green, blue) = others.split_at_mut(plane);
        [red, green, blue]
    }

    /// Mirrors every row.
    pub fn flip(&mut self) {
        self.values.chunks_exact_mut(self.width.max(1) as usize).for_each(<[u8]>::reverse);
    }

    fn each(&mut self, of: impl Fn(u8) -> u8) {
        vectorized(
            #[inline(always)]
            || self.values.iter_mut().for_each(|value| *value = of(*value)),
        );
    }

    fn each_pixel(&mut self, of: impl Fn([u8; 3]) -> [u8; 3]) {
        let [red, green, blue] = self.channels();
        vectorized(
            #[inline(always)]
            || {
                for ((red, green), blue) in red.iter_mut().zip(green).zip(blue) {
                    [*red, *green, *blue] = of([*red, *green, *blue]);
                }
            },
        );
    }
}

/// Pillow's luma (ITU-R 601-2) in 16-bit fixed point.
#[inline(always)]
fn luma([red, green, blue]: [u8; 3]) -> u8 {
    let sum = u32::from(red) * 19595 + u32::from(green) * 38470 + u32::from(blue) * 7471 + 0x8000;
    (sum >> 16) as u8
}

/// Pillow's `Image.blend`: from `base` towards `value`, and beyond for factors above 1.
#[inline(always)]
fn blend(base: u8, value: u8, factor: f32) -> u8 {
    let base = f32::from(base);
    (base + factor * (f32::from(value) - base)).clamp(0.0, 255.0) as u8
}

/// Multiplies every value by `factor`.
pub fn adjust_brightness(image: &mut Planes, factor: f32) {
    image.each(
        #[inline(always)]
        |value| blend(0, value, factor),
    );
}

/// Moves every value away from the mean luma, or towards it for factors below 1.
pub fn adjust_contrast(image: &mut Planes, factor: f32) {
    let [red, green, blue] = image.channels();
    let (count, mut sum) = (red.len(), 0);
    // So many lumas add up to less than 2³².
    const PIXELS: usize = 1 << 16;
    vectorized(
        #[inline(always)]
        || {
            for ((red, green), blue) in red.chunks(PIXELS).zip(green.chunks(PIXELS)).zip(blue.chunks(PIXELS))
            {
                let lumas = red.iter().zip(green).zip(blue).map(|((r, g), b)| u32::from(luma([*r, *g, *b])));
                sum += u64::from(lumas.sum::<u32>());
            }
        },
    );
    let mean = (sum as f64 / count.max(1) as f64 + 0.5) as u8;
    image.each(
        #[inline(always)]
        |value| blend(mean, value, factor),
    );
}

/// Moves every pixel away from its luma, or towards it for factors below 1.
pub fn adjust_saturation(image: &mut Planes, factor: f32) {
    image.each_pixel(
        #[inline(always)]
        |pixel| {
            let grey = luma(pixel);
            pixel.map(|value| blend(grey, value, factor))
        },
    );
}

/// Turns every hue by `turn`, a share of the circle in [−0.5, 0.5]. Through Pillow's 8-bit HSV.
pub fn adjust_hue(image: &mut Planes, turn: f64) {
    let turn = (turn * 255.0) as i32 as u8;
    image.each_pixel(
        #[inline(always)]
        |pixel| {
            let [hue, saturation, value] = hsv(pixel);
            rgb([hue.wrapping_add(turn), saturation, value])
        },
    );
}

/// Hue is without meaning where the saturation is 0, as it is for grey.
#[inline(always)]
fn hsv([red, green, blue]: [u8; 3]) -> [u8; 3] {
    let (most, least) = (red.max(green).max(blue), red.min(green).min(blue));
    let range = f32::from(most - least);
    let below = |channel: u8| f32::from(most - channel) / range;
    let (r, g, b) = (below(red), below(green), below(blue));
    let of_green = (2.0 + f64::from(r) - f64::from(b)) as f32;
    let of_blue = (4.0 + f64::from(g) - f64::from(r)) as f32;
    let sixths = if green == most { of_green } else { of_blue };
    let sixths = if red == most { b - g } else { sixths };
    // In [5/6, 11/6].
    let turned = f64::from(sixths) / 6.0 + 1.0;
    let hue = (if turned >= 1.0 { turned - 1.0 } else { turned }) as f32;
    let saturation = range / f32::from(most);
    let byte = |share: f32| (f64::from(share) * 255.0) as u8;
    [byte(hue), if range == 0.0 { 0 } else { byte(saturation) }, most]
}

#[inline(always)]
fn rgb([hue, saturation, value]: [u8; 3]) -> [u8; 3] {
    let sixths = f64::from(hue) * 6.0 / 255.0;
    let sector = sixths.floor();
    let within = f64::from((sixths - sector) as f32);
    let grey = saturation == 0;
    let saturation = f64::from((f64::from(saturation) / 255.0) as f32);
    let byte = |share: f64| (f64::from(value) * share).round() as u8;
    let (p, q, t) =
        (byte(1.0 - saturation), byte(1.0 - saturation * within), byte(1.0 - saturation * (1.0 - within)));
    // 0 and 6 are the same sector.
    let sector = sector as u8;
    let at = |channel: [u8; 6]| {
        let [zero, one, two, three, four, five] = channel;
        let low = if sector == 1 { one } else { zero };
        let low = if sector == 2 { two } else { low };
        let low = if sector == 3 { three } else { low };
        let low = if sector == 4 { four } else { low };
        let of_sector = if sector == 5 { five } else { low };
        if grey { value } else { of_sector }
    };
    [at([value, q, p, p, t, value]), at([t, value, value, q, p, p]), at([p, p, t, value, value, q])]
}

/// Gives all three channels the pixel's luma.
pub fn grayscale(image: &mut Planes) {
    image.each_pixel(
        #[inline(always)]
        |pixel| [luma(pixel); 3],
    );
}

/// Inverts the values from `threshold` on.
pub fn solarize(image: &mut Planes, threshold: u8) {
    image.each(
        #[inline(always)]
        |value| if value < threshold { value } else { 255 - value },
    );
}

/// Memory for [`gaussian_blur`].
#[derive(Debug, Default)]
pub struct BlurScratch {
    padded: Vec<f32>,
    rows: Vec<f32>,
}

/// Blurs with a Gaussian of standard deviation `sigma` > 0, in pixels: torchvision's `gaussian_blur`, with a kernel that
/// reaches to 4 σ and a border that mirrors without its edge.
pub fn gaussian_blur(image: &mut Planes, sigma: f64, scratch: &mut BlurScratch) {
    let radius = ((4.0 * sigma).ceil() as usize).max(1);
    let half: Vec<f64> = (0..=radius).map(|x| (-0.5 * (x as f64 / sigma).powi(2)).exp()).collect();
    let total = half[0] + 2.0 * half[1..].iter().sum::<f64>();
    let half: Vec<f32> = half.iter().map(|weight| (weight / total) as f32).collect();
    let (width, height) = (image.width as usize, image.height as usize);
    for plane in image.channels() {
        vectorized(
            #[inline(always)]
            || blur_plane(plane, (width, height), &half, scratch),
        );
    }
}

#[inline(always)]
fn blur_plane(plane: &mut [u8], (width, height): (usize, usize), half: &[f32], scratch: &mut BlurScratch) {
    let radius = half.len() - 1;
    let BlurScratch { padded, rows } = scratch;
    padded.resize(width + 2 * radius, 0.0);
    rows.resize(width * height, 0.0);
    // Along each row, in one that is longer by the mirrored border on both sides.
    for (row, out) in plane.chunks_exact(width).zip(rows.chunks_exact_mut(width)) {
        for (padded, value) in padded[radius..].iter_mut().zip(row) {
            *padded = f32::from(*value);
        }
        for x in 0..radius {
            let (before, after) = (x as isize - radius as isize, (width + x) as isize);
            padded[x] = f32::from(row[mirror(before, width)]);
            padded[radius + width + x] = f32::from(row[mirror(after, width)]);
        }
        weighted_sum(
            half,
            |offset| &padded[offset..][..width],
            |x, sums| {
                out[x..][..sums.len()].copy_from_slice(sums);
            },
        );
    }
    // Then along the columns: whole rows are added.
    for (y, out) in plane.chunks_exact_mut(width).enumerate() {
        let row =
            |offset: usize| &rows[width * mirror((y + offset) as isize - radius as isize, height)..][..width];
        weighted_sum(half, row, |x, sums| {
            for (out, sum) in out[x..].iter_mut().zip(sums) {
                *out = sum.round_ties_even() as u8;
            }
        });
    }
}

/// The sum of what `shifted` gives for 0 to 2 · radius, each times its weight, some columns at a time: so that they stay in
/// registers.
#[inline(always)]
fn weighted_sum<'a>(half: &[f32], shifted: impl Fn(usize) -> &'a [f32], mut done: impl FnMut(usize, &[f32])) {
    const COLUMNS: usize = 64;
    let radius = half.len() - 1;
    let centre = shifted(radius);
    let mut sums = [0.0; COLUMNS];
    let mut x = 0;
    while x + COLUMNS <= centre.len() {
        let at = |offset: usize| {
            shifted(offset)[x..].first_chunk::<COLUMNS>().expect("a row is as long as the centre")
        };
        sums.iter_mut().zip(at(radius)).for_each(|(sum, centre)| *sum = half[0] * centre);
        for (distance, weight) in half.iter().enumerate().skip(1) {
            let sides = at(radius - distance).iter().zip(at(radius + distance));
            sums.iter_mut().zip(sides).for_each(|(sum, (before, after))| *sum += weight * (before + after));
        }
        done(x, &sums);
        x += COLUMNS;
    }
    let rest = &mut sums[..centre.len() - x];
    rest.iter_mut().zip(&centre[x..]).for_each(|(sum, centre)| *sum = half[0] * centre);
    for (distance, weight) in half.iter().enumerate().skip(1) {
        let sides = shifted(radius - distance)[x..].iter().zip(&shifted(radius + distance)[x..]);
        rest.iter_mut().zip(sides).for_each(|(sum, (before, after))| *sum += weight * (before + after));
    }
    done(x, rest);
}

/// The position inside `0..length` that is seen at `position`, when the ends are mirrors that show no edge twice.
#[inline(always)]
fn mirror(position: isize, length: usize) -> usize {
    let period = 2 * (length as isize - 1).max(1);
    let position = position.rem_euclid(period);
    let position = if position < length as isize { position } else { period - position };
    (position as usize).min(length - 1)
}
