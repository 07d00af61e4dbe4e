//! Where an encoder puts images: their two principal components, and which images are nearest to which.

use std::io::Cursor;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder as _};
use jepa_plugin_api::Interpolation;
use serde::Serialize;
use tch::{Kind, Tensor};

use crate::data::Dataset;
use crate::data::decode::{Region, Rgb, decode};
use crate::data::resample::{CropBox, Resampler};
use crate::eval::Features;

/// Images that neighbours are shown of, and neighbours of each.
const QUERIES: usize = 8;
const NEIGHBOURS: usize = 6;
/// Side of an image on the page, in pixels at most.
const TILE: u32 = 48;
const COLUMNS: usize = 32;

/// Images as their encoder sees them.
#[derive(Clone, Debug, Serialize)]
pub struct FeatureMap {
    /// Two principal components of each image, each scaled to [−1, 1] by the same factor.
    pub points: Vec<[f32; 2]>,
    /// The class of each; −1 without one.
    pub labels: Vec<i64>,
    /// Names of classes 0, 1, …
    pub classes: Vec<String>,
    /// Share of the variance that each component has.
    pub shares: [f64; 2],
    /// Places of images, and of those nearest to each by cosine.
    pub neighbours: Vec<(usize, Vec<usize>)>,
    /// The step of the checkpoint.
    pub step: u64,
    /// All images in rows of [`COLUMNS`], as a data URI. Runs that show the same images share it.
    #[serde(skip)]
    pub sheet: String,
}

impl FeatureMap {
    /// Describes `features` of the images `indices` of `set`.
    ///
    /// # Errors
    /// Images that do not decode, or those of libtorch.
    pub fn new(features: &Features, indices: &[u64], set: &Dataset, step: u64) -> anyhow::Result<Self> {
        let unit = {
            let norms = features.x.f_norm_scalaropt_dim(2.0, [1i64].as_slice(), true)?.f_clamp_min(1e-12)?;
            features.x.f_div(&norms)?
        };
        let (points, shares) = principal_components(&unit)?;
        let labels = Vec::<i64>::try_from(&features.y)?;
        let classes = match set.class_names() {
            Some(names) => names.to_vec(),
            None => (0..set.classes()).map(|class| class.to_string()).collect(),
        };
        Ok(FeatureMap {
            points,
            neighbours: nearest(&unit, &labels)?,
            labels,
            classes,
            shares,
            step,
            sheet: sheet(indices, set)?,
        })
    }
}

/// The first two principal components of x (N, D), and the share of the variance that each has. A component's sign is
/// that with which its greatest entry is positive, so that equal features give equal maps.
fn principal_components(x: &Tensor) -> anyhow::Result<(Vec<[f32; 2]>, [f64; 2])> {
    let centred = x.f_sub(&x.f_mean_dim([0i64].as_slice(), true, Kind::Float)?)?.f_to_kind(Kind::Double)?;
    let (u, s, _) = centred.f_svd(true, true)?;
    let variance = s.f_square()?;
    let total = variance.f_sum(Kind::Double)?.f_double_value(&[])?.max(1e-300);
    let (rows, rank) = (x.size()[0] as usize, s.size()[0]);
    let mut points = vec![[0.0f32; 2]; rows];
    let mut shares = [0.0; 2];
    for component in 0..rank.min(2) {
        let column = u.f_select(1, component)?.f_mul(&s.f_select(0, component)?)?;
        let values = Vec::<f64>::try_from(&column.f_contiguous()?)?;
        let greatest = values.iter().copied().fold(0.0, |a: f64, b| if b.abs() > a.abs() { b } else { a });
        for (point, value) in points.iter_mut().zip(values) {
            point[component as usize] = (value * greatest.signum()) as f32;
        }
        shares[component as usize] = variance.f_double_value(&[component])? / total;
    }
    let scale = points.iter().flatten().fold(1e-12f32, |most, value| most.max(value.abs()));
    for value in points.iter_mut().flatten() {
        *value = (*value / scale * 1e4).round() / 1e4;
    }
    Ok((points, shares))
}

/// The nearest others of some images, by cosine: of the first image of each class, and of the first without a class.
fn nearest(unit: &Tensor, labels: &[i64]) -> anyhow::Result<Vec<(usize, Vec<usize>)>> {
    let mut queries: Vec<usize> = Vec::new();
    for (place, label) in labels.iter().enumerate() {
        if queries.len() < QUERIES && !queries.iter().any(|query| labels[*query] == *label) {
            queries.push(place);
        }
    }
    queries.sort_by_key(|query| labels[*query]);
    let count = (NEIGHBOURS as i64 + 1).min(unit.size()[0]);
    queries
        .into_iter()
        .map(|query| {
            let similarity = unit.f_matmul(&unit.f_select(0, query as i64)?)?;
            let (_, places) = similarity.f_topk(count, 0, true, true)?;
            let places = Vec::<i64>::try_from(&places)?.into_iter().map(|place| place as usize);
            Ok((query, places.filter(|place| *place != query).take(NEIGHBOURS).collect()))
        })
        .collect()
}

/// All images on one sheet, each cut to a square of [`TILE`] pixels.
fn sheet(indices: &[u64], set: &Dataset) -> anyhow::Result<String> {
    let rows = indices.len().div_ceil(COLUMNS);
    let (width, side) = (COLUMNS * TILE as usize, TILE as usize);
    let mut pixels = vec![0u8; rows * side * width * 3];
    let (mut resampler, mut tile) = (Resampler::default(), Rgb::default());
    for (place, index) in indices.iter().enumerate() {
        let bytes = set.read(*index as usize)?;
        let image = decode(&bytes).map_err(anyhow::Error::msg).with_context(|| format!("image {index}"))?;
        let square = image.width.min(image.height);
        let crop = CropBox {
            top: (image.height - square) / 2,
            left: (image.width - square) / 2,
            height: square,
            width: square,
        };
        resampler.resize(&Region::whole(&image), crop, (TILE, TILE), Interpolation::Bicubic, &mut tile);
        let (left, top) = (place % COLUMNS * side, place / COLUMNS * side);
        for (y, row) in tile.pixels.chunks(side * 3).enumerate() {
            let start = ((top + y) * width + left) * 3;
            pixels[start..start + side * 3].copy_from_slice(row);
        }
    }
    let mut jpeg = Cursor::new(Vec::new());
    JpegEncoder::new_with_quality(&mut jpeg, 80)
        .write_image(&pixels, width as u32, (rows * side) as u32, ExtendedColorType::Rgb8)
        .context("the sheet of images")?;
    Ok(format!("data:image/jpeg;base64,{}", STANDARD.encode(jpeg.into_inner())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_component_is_the_longest_direction() {
        // Four points on a line, and a little to its side.
        let x = Tensor::from_slice(&[-3.0f32, 0.1, -1.0, -0.1, 1.0, -0.1, 3.0, 0.1]).view([4, 2]);
        let (points, shares) = principal_components(&x).unwrap();
        assert!(shares[0] > 0.99 && (shares[0] + shares[1] - 1.0).abs() < 1e-9, "{shares:?}");
        let along: Vec<f32> = points.iter().map(|point| point[0]).collect();
        assert!(along.is_sorted() || along.iter().rev().is_sorted(), "{along:?}");
        // All the same: no direction, and no NaN.
        let (points, shares) =
            principal_components(&Tensor::ones([3, 2], (Kind::Float, tch::Device::Cpu))).unwrap();
        assert_eq!((points, shares), (vec![[0.0; 2]; 3], [0.0; 2]));
    }

    #[test]
    fn neighbours_are_those_of_the_same_direction() {
        let unit = Tensor::from_slice(&[1.0f32, 0.0, 0.0, 1.0, 0.9, 0.1, 0.1, 0.9]).view([4, 2]);
        let found = nearest(&unit, &[0, 1, 0, 1]).unwrap();
        assert_eq!(found[0].0, 0);
        assert_eq!(found[0].1[0], 2);
        assert_eq!((found[1].0, found[1].1[0]), (1, 3));
    }
}
