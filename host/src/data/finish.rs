//! The second half of a view, on the run's device: flip, colour, blur and normalisation of a whole batch.
//!
//! What [`color`](super::color) does to 8-bit values one image after the other is done here to tensors that hold the same
//! whole numbers as f32, with the same steps in the same order and precision. So the views are the same to the bit, as far as the
//! device rounds as IEEE 754 says.
//!
//! Each image has operations of its own in an order of its own. All images go through their lists together: of each place in
//! the lists, those that have the same kind of operation there are gathered, worked on, and put back.

use std::mem;

use tch::{Device, Kind, TchError, Tensor};

use super::augment::Operation;
use super::color::{half_gaussian, hue_turn, mirror};

/// Finishes a view of a batch: from u8 `(B, 3, S, S)` on any device to f32 of that shape.
///
/// # Errors
/// Whatever libtorch reports.
pub fn finish(
    pixels: &Tensor,
    operations: &[&[Operation]],
    (mean, std): ([f32; 3], [f32; 3]),
) -> Result<Tensor, TchError> {
    let device = pixels.device();
    let mut values = pixels.f_to_kind(Kind::Float)?;
    for place in 0..operations.iter().map(|operations| operations.len()).max().unwrap_or(0) {
        // The images that have the same kind of operation at this place, by their places in the batch.
        let mut groups: Vec<(Vec<i64>, Vec<Operation>)> = Vec::new();
        for (image, operations) in operations.iter().enumerate() {
            let Some(operation) = operations.get(place) else { continue };
            let same = |(_, others): &&mut (_, Vec<Operation>)| {
                mem::discriminant(&others[0]) == mem::discriminant(operation)
            };
            match groups.iter_mut().find(same) {
                Some((images, operations)) => {
                    images.push(image as i64);
                    operations.push(*operation);
                }
                None => groups.push((vec![image as i64], vec![*operation])),
            }
        }
        for (images, operations) in groups {
            let images = to(device, &Tensor::from_slice(&images))?;
            let changed = operate(&values.f_index_select(0, &images)?, &operations)?;
            values = values.f_index_copy_(0, &images, &changed)?;
        }
    }
    // By tensors: to divide by a number is to multiply by its inverse, on some devices.
    let each = |of: [f32; 3]| to(device, &Tensor::from_slice(&of).f_view([1, 3, 1, 1])?);
    let all = to(device, &Tensor::from(255.0f32))?;
    values.f_div(&all)?.f_sub(&each(mean)?)?.f_div(&each(std)?)
}

/// Copies what has just been made, without waiting for the device.
fn to(device: Device, tensor: &Tensor) -> Result<Tensor, TchError> {
    tensor.f_to_device_(device, tensor.kind(), true, false)
}

/// The operations of one kind on `values`, f32 `(N, 3, H, W)`, one for each image.
fn operate(values: &Tensor, operations: &[Operation]) -> Result<Tensor, TchError> {
    let each = |parameter: fn(&Operation) -> f64| {
        let parameters: Vec<f64> = operations.iter().map(parameter).collect();
        to(values.device(), &Tensor::from_slice(&parameters).f_view([-1, 1, 1, 1])?)
    };
    let factor = || {
        let factors = each(|operation| match *operation {
            Operation::Brightness(factor) | Operation::Contrast(factor) | Operation::Saturation(factor) => {
                factor.into()
            }
            _ => f64::NAN,
        });
        factors?.f_to_kind(Kind::Float)
    };
    match operations[0] {
        Operation::Flip => values.f_flip([3]),
        Operation::Brightness(_) => blend(&values.f_zeros_like()?, values, &factor()?),
        Operation::Contrast(_) => blend(&mean_luma(values)?, values, &factor()?),
        Operation::Saturation(_) => blend(&luma(values)?, values, &factor()?),
        Operation::Hue(_) => {
            let turns = each(|operation| match *operation {
                Operation::Hue(share) => hue_turn(share).into(),
                _ => f64::NAN,
            });
            turn_hue(values, &turns?)
        }
        Operation::Grayscale => luma(values)?.f_expand_as(values),
        Operation::Blur(_) => {
            let sigma = |operation: &Operation| match *operation {
                Operation::Blur(sigma) => Some(sigma),
                _ => None,
            };
            blur(values, &operations.iter().filter_map(sigma).collect::<Vec<_>>())
        }
        Operation::Solarize(_) => {
            let thresholds = each(|operation| match *operation {
                Operation::Solarize(threshold) => threshold.into(),
                _ => f64::NAN,
            });
            let below = values.f_lt_tensor(&thresholds?.f_to_kind(Kind::Float)?)?;
            values.f_where_self(&below, &from(255.0, values)?)
        }
    }
}

/// `number` − `values`.
fn from(number: f64, values: &Tensor) -> Result<Tensor, TchError> {
    values.f_neg()?.f_add_scalar(number)
}

/// Pillow's luma, `(N, 1, H, W)`: in 16-bit fixed point, whose sums an f32 holds in full.
fn luma(values: &Tensor) -> Result<Tensor, TchError> {
    let channel = |channel| values.f_narrow(1, channel, 1);
    let (red, green, blue) = (channel(0)?, channel(1)?, channel(2)?);
    let sum = red.f_mul_scalar(19595.0)?.f_add(&green.f_mul_scalar(38470.0)?)?;
    let sum = sum.f_add(&blue.f_mul_scalar(7471.0)?)?.f_add_scalar(32768.0)?;
    sum.f_mul_scalar(1.0 / 65536.0)?.f_floor()
}

/// The mean luma of each image, `(N, 1, 1, 1)`, rounded.
fn mean_luma(values: &Tensor) -> Result<Tensor, TchError> {
    let luma = luma(values)?;
    let pixels = luma.size()[2..].iter().product::<i64>() as f64;
    let sum = luma.f_sum_dim_intlist([1i64, 2, 3].as_slice(), true, Kind::Double)?;
    let mean = sum.f_div(&to(values.device(), &Tensor::from(pixels))?)?;
    mean.f_add_scalar(0.5)?.f_floor()?.f_to_kind(Kind::Float)
}

/// Pillow's `Image.blend`.
fn blend(base: &Tensor, values: &Tensor, factor: &Tensor) -> Result<Tensor, TchError> {
    values.f_sub(base)?.f_mul(factor)?.f_add(base)?.f_clamp(0.0, 255.0)?.f_floor()
}

/// Through Pillow's 8-bit HSV, where `turn` is added to the hue.
fn turn_hue(values: &Tensor, turn: &Tensor) -> Result<Tensor, TchError> {
    let value = values.f_amax([1i64].as_slice(), true)?;
    let range = value.f_sub(&values.f_amin([1i64].as_slice(), true)?)?;
    // To hue and saturation.
    let below = value.f_sub(values)?.f_div(&range.f_clamp_min(1.0)?)?;
    let channel = |channel| below.f_narrow(1, channel, 1);
    let (red, green, blue) = (channel(0)?, channel(1)?, channel(2)?);
    let double = |tensor: &Tensor| tensor.f_to_kind(Kind::Double);
    let (of_red, of_green) = (
        blue.f_sub(&green)?,
        double(&red)?.f_add_scalar(2.0)?.f_sub(&double(&blue)?)?.f_to_kind(Kind::Float)?,
    );
    let of_blue = double(&green)?.f_add_scalar(4.0)?.f_sub(&double(&red)?)?.f_to_kind(Kind::Float)?;
    let other = of_green.f_where_self(&green.f_eq(0.0)?, &of_blue)?;
    let sixths = of_red.f_where_self(&red.f_eq(0.0)?, &other)?;
    let six = to(values.device(), &Tensor::from(6.0f64))?;
    let turned = double(&sixths)?.f_div(&six)?.f_add_scalar(1.0)?;
    let turned = turned.f_sub_scalar(1.0)?.f_where_self(&turned.f_ge(1.0)?, &turned)?;
    let to_byte = |share: &Tensor| double(&share.f_to_kind(Kind::Float)?)?.f_mul_scalar(255.0)?.f_floor();
    let hue = to_byte(&turned)?.f_add(turn)?.f_remainder(256.0)?;
    let saturation = to_byte(&range.f_div(&value.f_clamp_min(1.0)?)?)?;
    // And back.
    let most = to(values.device(), &Tensor::from(255.0f64))?;
    let sixths = hue.f_mul_scalar(6.0)?.f_div(&most)?;
    let sector = sixths.f_floor()?;
    let rounded = |share: Tensor| double(&share.f_to_kind(Kind::Float)?);
    let within = rounded(sixths.f_sub(&sector)?)?;
    let saturation = rounded(saturation.f_div(&most)?)?;
    let value = double(&value)?;
    // Halves are rounded up.
    let byte = |less: &Tensor| value.f_mul(&from(1.0, less)?)?.f_add_scalar(0.5)?.f_floor();
    let p = byte(&saturation)?;
    let q = byte(&saturation.f_mul(&within)?)?;
    let t = byte(&saturation.f_mul(&from(1.0, &within)?)?)?;
    let choices = Tensor::f_cat(&[&value, &q, &p, &t], 1)?;
    // Which of them red, green and blue are, in each sector; 6 is 0 again.
    const CHOICES: [[i64; 3]; 7] =
        [[0, 3, 2], [1, 0, 2], [2, 0, 3], [2, 1, 0], [3, 2, 0], [0, 2, 1], [0, 3, 2]];
    let table = to(values.device(), &Tensor::from_slice2(&CHOICES))?;
    let size = sector.size();
    let which = table.f_index_select(0, &sector.f_to_kind(Kind::Int64)?.f_flatten(0, -1)?)?;
    let which = which.f_view([size[0], size[2], size[3], 3])?.f_permute([0, 3, 1, 2])?;
    choices.f_gather(1, &which, false)?.f_to_kind(Kind::Float)
}

/// Gaussians of these standard deviations: rows, then columns.
fn blur(values: &Tensor, sigmas: &[f64]) -> Result<Tensor, TchError> {
    let halves: Vec<Vec<f32>> = sigmas.iter().map(|sigma| half_gaussian(*sigma)).collect();
    let most = halves.iter().map(Vec::len).max().unwrap_or(1);
    // Beyond its own radius, a weight is 0.
    let weights: Vec<f32> = (0..most)
        .flat_map(|place| halves.iter().map(move |half| half.get(place).map_or(0.0, |w| *w)))
        .collect();
    let weights = Tensor::from_slice(&weights).f_view([most as i64, -1, 1, 1, 1])?;
    let weights = to(values.device(), &weights)?;
    let radius = most as i64 - 1;
    let pass = |values: &Tensor, dim: i64| {
        let length = values.size()[dim as usize];
        let places: Vec<i64> =
            (-radius..length + radius).map(|at| mirror(at as isize, length as usize) as i64).collect();
        let padded = values.f_index_select(dim, &to(values.device(), &Tensor::from_slice(&places))?)?;
        let at = |shift: i64| padded.f_narrow(dim, radius + shift, length);
        let mut sum = at(0)?.f_mul(&weights.f_get(0)?)?;
        for shift in 1..=radius {
            sum = sum.f_add(&at(-shift)?.f_add(&at(shift)?)?.f_mul(&weights.f_get(shift)?)?)?;
        }
        Ok::<Tensor, TchError>(sum)
    };
    // To the next whole number, halves to the even one.
    pass(&pass(values, 3)?, 2)?.f_round()
}
