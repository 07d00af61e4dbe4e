//! Colour operations on 8-bit RGB, in place, as Pillow and torchvision do them with the same parameters.
//!
//! Everything but the blur gives Pillow's bytes: so its roundings and its cuts to 8 bits are copied. Red, green and blue lie in
//! planes of their own, and loops go over blocks without branches, so that compilers make vector instructions of them.

use jepa_plugin_api::memory::vectorized;
use pulp::{Arch, Simd, WithSimd};

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

    /// Calls `of` with blocks of red, green and blue; the last is filled up with zeros. Loops over whole blocks are what
    /// compilers vectorise best.
    fn each_block(&mut self, of: impl Fn([&mut Block; 3])) {
        let [red, green, blue] = self.channels();
        vectorized(
            #[inline(always)]
            || {
                let (red, rest_red) = red.as_chunks_mut();
                let (green, rest_green) = green.as_chunks_mut();
                let (blue, rest_blue) = blue.as_chunks_mut();
                for ((red, green), blue) in red.iter_mut().zip(green).zip(blue) {
                    of([red, green, blue]);
                }
                let rest = [rest_red, rest_green, rest_blue];
                let mut filled = [[0; BLOCK]; 3];
                filled
                    .iter_mut()
                    .zip(&rest)
                    .for_each(|(block, rest)| block[..rest.len()].copy_from_slice(rest));
                of(filled.each_mut());
                rest.into_iter()
                    .zip(&filled)
                    .for_each(|(rest, block)| rest.copy_from_slice(&block[..rest.len()]));
            },
        );
    }
}

/// Pixels that are worked on at once.
const BLOCK: usize = 256;
type Block = [u8; BLOCK];

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
    floor_f32((base + factor * (f32::from(value) - base)).clamp(0.0, 255.0))
}

/// The whole part of a number in [0, 256): `as u8`, which also thinks of all others, is not vectorised.
#[inline(always)]
fn floor_f32(x: f32) -> u8 {
    // From 2²³ on, the last bit of an f32 stands for 1.
    (x.floor() + 8_388_608.0).to_bits() as u8
}

/// The same of an f64, where that is 2⁵².
#[inline(always)]
fn floor_f64(x: f64) -> u8 {
    (x.floor() + 4_503_599_627_370_496.0).to_bits() as u8
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
    image.each_block(
        #[inline(always)]
        |[red, green, blue]| {
            let mut grey = [0; BLOCK];
            for i in 0..BLOCK {
                grey[i] = luma([red[i], green[i], blue[i]]);
            }
            for channel in [red, green, blue] {
                for i in 0..BLOCK {
                    channel[i] = blend(grey[i], channel[i], factor);
                }
            }
        },
    );
}

/// Gives all three channels the pixel's luma.
pub fn grayscale(image: &mut Planes) {
    image.each_block(
        #[inline(always)]
        |[red, green, blue]| {
            for i in 0..BLOCK {
                red[i] = luma([red[i], green[i], blue[i]]);
            }
            (*green, *blue) = (*red, *red);
        },
    );
}

/// What is added to a hue of 8 bits, which wraps around, to turn it by a share of the circle in [−0.5, 0.5].
pub(super) fn hue_turn(share: f64) -> u8 {
    (share * 255.0) as i32 as u8
}

/// Turns every hue by `turn`, a share of the circle in [−0.5, 0.5]. Through Pillow's 8-bit HSV.
pub fn adjust_hue(image: &mut Planes, turn: f64) {
    let turn = hue_turn(turn);
    image.each_block(
        #[inline(always)]
        |[red, green, blue]| {
            let [mut hue, mut saturation, mut value] = [[0; BLOCK]; 3];
            to_hsv([red, green, blue], [&mut hue, &mut saturation, &mut value]);
            hue.iter_mut().for_each(|hue| *hue = hue.wrapping_add(turn));
            to_rgb([&hue, &saturation, &value], [red, green, blue]);
        },
    );
}

/// Hue is without meaning where the saturation is 0, as it is for grey.
#[inline(always)]
fn to_hsv([red, green, blue]: [&Block; 3], [hue, saturation, value]: [&mut Block; 3]) {
    let mut range = [0.0f32; BLOCK];
    for i in 0..BLOCK {
        let (most, least) = (red[i].max(green[i]).max(blue[i]), red[i].min(green[i]).min(blue[i]));
        value[i] = most;
        range[i] = f32::from(most - least);
    }
    let mut below = [[0.0f32; BLOCK]; 3];
    for (below, channel) in below.iter_mut().zip([red, green, blue]) {
        for i in 0..BLOCK {
            // Of grey, nothing is below.
            below[i] = f32::from(value[i] - channel[i]) / range[i].max(1.0);
        }
    }
    let [r, g, b] = below;
    let mut sixths = [0.0f32; BLOCK];
    for i in 0..BLOCK {
        let of_green = (2.0 + f64::from(r[i]) - f64::from(b[i])) as f32;
        let of_blue = (4.0 + f64::from(g[i]) - f64::from(r[i])) as f32;
        // What is nothing below the most is the most.
        let other = if g[i] == 0.0 { of_green } else { of_blue };
        sixths[i] = if r[i] == 0.0 { b[i] - g[i] } else { other };
    }
    for i in 0..BLOCK {
        // In [5/6, 11/6].
        let turned = f64::from(sixths[i]) / 6.0 + 1.0;
        let share = (if turned >= 1.0 { turned - 1.0 } else { turned }) as f32;
        hue[i] = floor_f64(f64::from(share) * 255.0);
    }
    for i in 0..BLOCK {
        // Black has none.
        let share = range[i] / f32::from(value[i]).max(1.0);
        saturation[i] = floor_f64(f64::from(share) * 255.0);
    }
}

#[inline(always)]
fn to_rgb([hue, saturation, value]: [&Block; 3], [red, green, blue]: [&mut Block; 3]) {
    let [mut p, mut q, mut t] = [[0; BLOCK]; 3];
    let mut sector = [0; BLOCK];
    for i in 0..BLOCK {
        let sixths = f64::from(hue[i]) * 6.0 / 255.0;
        let whole = sixths.floor();
        let within = f64::from((sixths - whole) as f32);
        let saturation = f64::from((f64::from(saturation[i]) / 255.0) as f32);
        let value = f64::from(value[i]);
        // Halves are rounded up.
        let byte = |share: f64| floor_f64((value * share).round());
        p[i] = byte(1.0 - saturation);
        q[i] = byte(1.0 - saturation * within);
        t[i] = byte(1.0 - saturation * (1.0 - within));
        sector[i] = floor_f64(whole);
    }
    for i in 0..BLOCK {
        let (v, p, q, t) = (value[i], p[i], q[i], t[i]);
        // A sector each from 0 on; 6 is 0 again.
        let at = |channel: [u8; 6]| {
            let [zero, one, two, three, four, five] = channel;
            let x = if sector[i] == 1 { one } else { zero };
            let x = if sector[i] == 2 { two } else { x };
            let x = if sector[i] == 3 { three } else { x };
            let x = if sector[i] == 4 { four } else { x };
            if sector[i] == 5 { five } else { x }
        };
        red[i] = at([v, q, p, p, t, v]);
        green[i] = at([t, v, v, q, p, p]);
        blue[i] = at([p, p, t, v, v, q]);
    }
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
    sums: Vec<f32>,
}

/// Weights of a Gaussian from its centre outwards, at least two.
pub(super) fn half_gaussian(sigma: f64) -> Vec<f32> {
    let radius = ((4.0 * sigma).ceil() as usize).max(1);
    let half: Vec<f64> = (0..=radius).map(|x| (-0.5 * (x as f64 / sigma).powi(2)).exp()).collect();
    let total = half[0] + 2.0 * half[1..].iter().sum::<f64>();
    half.iter().map(|weight| (weight / total) as f32).collect()
}

/// Blurs with a Gaussian of standard deviation `sigma` > 0, in pixels: torchvision's `gaussian_blur`, with a kernel that
/// reaches to 4 σ and a border that mirrors without its edge.
pub fn gaussian_blur(image: &mut Planes, sigma: f64, scratch: &mut BlurScratch) {
    let half = half_gaussian(sigma);
    let radius = half.len() - 1;
    let (width, height) = (image.width as usize, image.height as usize);
    let BlurScratch { padded, rows, sums } = scratch;
    // Whole vectors, the last of which reach over the end.
    let pitch = width.next_multiple_of(MOST_LANES);
    padded.resize(pitch + 2 * radius, 0.0);
    rows.resize(pitch * height, 0.0);
    sums.resize(pitch, 0.0);
    // What stands at each place of a line that is longer by the radius on both sides.
    let mirrored = |place: usize, length: usize| mirror(place as isize - radius as isize, length);
    let lines: Vec<usize> = (0..height + 2 * radius).map(|place| mirrored(place, height) * pitch).collect();
    let columns: Vec<usize> = (0..2 * radius + 1).collect();
    let arch = Arch::new();
    for plane in image.channels() {
        for (row, out) in plane.chunks_exact(width).zip(rows.chunks_exact_mut(pitch)) {
            vectorized(
                #[inline(always)]
                || {
                    padded[radius..]
                        .iter_mut()
                        .zip(row)
                        .for_each(|(padded, value)| *padded = f32::from(*value))
                },
            );
            for place in (0..radius).chain(radius + width..width + 2 * radius) {
                padded[place] = f32::from(row[mirrored(place, width)]);
            }
            arch.dispatch(WeightedSum { half: &half, values: padded, starts: &columns, out });
        }
        for (out, lines) in plane.chunks_exact_mut(width).zip(lines.windows(2 * radius + 1)) {
            arch.dispatch(WeightedSum { half: &half, values: rows, starts: lines, out: sums });
            vectorized(
                #[inline(always)]
                || out.iter_mut().zip(&*sums).for_each(|(out, sum)| *out = floor_f32(sum.round_ties_even())),
            );
        }
    }
}

/// Lanes of the longest vectors that there are.
const MOST_LANES: usize = 16;

/// Adds up lines of `values`, each times its weight: those that begin at `starts`, as many as the kernel has places.
struct WeightedSum<'a> {
    /// The weights from the centre outwards.
    half: &'a [f32],
    values: &'a [f32],
    starts: &'a [usize],
    out: &'a mut [f32],
}

impl WithSimd for WeightedSum<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let WeightedSum { half, values, starts, out } = self;
        let (blocks, rest) = S::as_mut_simd_f32s(out).0.as_chunks_mut::<4>();
        let mut x = 0;
        for out in blocks {
            *out = weighted_sum(simd, half, values, starts, x);
            x += 4 * S::F32_LANES;
        }
        for out in rest {
            [*out] = weighted_sum(simd, half, values, starts, x);
            x += S::F32_LANES;
        }
    }
}

/// V vectors of the sum, from column `x` on.
#[inline(always)]
fn weighted_sum<S: Simd, const V: usize>(
    simd: S,
    half: &[f32],
    values: &[f32],
    starts: &[usize],
    x: usize,
) -> [S::f32s; V] {
    let at = |start: usize| -> &[S::f32s; V] {
        S::as_simd_f32s(&values[start + x..][..V * S::F32_LANES]).0.first_chunk().expect("so many vectors")
    };
    let (before, after) = starts.split_at(half.len() - 1);
    let weight = simd.splat_f32s(half[0]);
    let mut sums = at(after[0]).map(|centre| simd.mul_f32s(weight, centre));
    for ((before, after), weight) in before.iter().rev().zip(&after[1..]).zip(&half[1..]) {
        let (before, after, weight) = (at(*before), at(*after), simd.splat_f32s(*weight));
        for (sum, (before, after)) in sums.iter_mut().zip(before.iter().zip(after)) {
            *sum = simd.add_f32s(*sum, simd.mul_f32s(weight, simd.add_f32s(*before, *after)));
        }
    }
    sums
}

/// The position inside `0..length` that is seen at `position`, when the ends are mirrors that show no edge twice.
pub(super) fn mirror(position: isize, length: usize) -> usize {
    let period = 2 * (length as isize - 1).max(1);
    let position = position.rem_euclid(period);
    let position = if position < length as isize { position } else { period - position };
    (position as usize).min(length - 1)
}
