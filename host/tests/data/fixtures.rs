//! The fixtures that `tests/fixtures/generate.py` wrote, and small data sets made on the spot.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use image::{ExtendedColorType, ImageEncoder};
use jepa_host::data::decode::Rgb;
use safetensors::{Dtype, SafeTensors};

pub fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// The tensors of a fixture as shapes and bytes.
pub struct Tensors(HashMap<String, (Dtype, Vec<usize>, Vec<u8>)>);

impl Tensors {
    pub fn read(name: &str) -> Tensors {
        let bytes = std::fs::read(path(name)).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let entry = |(name, view): (String, safetensors::tensor::TensorView)| {
            (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        };
        Tensors(tensors.tensors().into_iter().map(entry).collect())
    }

    /// The `config` of a fixture.
    pub fn config(name: &str) -> serde_json::Value {
        let bytes = std::fs::read(path(name)).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        serde_json::from_str(&header.metadata().as_ref().unwrap()["config"]).unwrap()
    }

    /// Names that match `{prefix}NAME{suffix}`, without both.
    pub fn names(&self, prefix: &str, suffix: &str) -> Vec<String> {
        let mut names: Vec<_> = self
            .0
            .keys()
            .filter_map(|key| Some(key.strip_prefix(prefix)?.strip_suffix(suffix)?.to_owned()))
            .collect();
        names.sort();
        assert!(!names.is_empty(), "no tensor is named {prefix}…{suffix}");
        names
    }

    pub fn bytes(&self, name: &str) -> (&[usize], &[u8]) {
        let (dtype, shape, bytes) = &self.0[name];
        assert_eq!(*dtype, Dtype::U8, "{name}");
        (shape, bytes)
    }

    pub fn rgb(&self, name: &str) -> Rgb {
        let (shape, bytes) = self.bytes(name);
        let &[height, width, 3] = shape else { panic!("{name} has shape {shape:?}") };
        Rgb { width: width as u32, height: height as u32, pixels: bytes.to_vec() }
    }

    pub fn i64(&self, name: &str) -> Vec<i64> {
        let (dtype, _, bytes) = &self.0[name];
        assert_eq!(*dtype, Dtype::I64, "{name}");
        bytes.as_chunks().0.iter().map(|&value| i64::from_le_bytes(value)).collect()
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        let (dtype, _, bytes) = &self.0[name];
        assert_eq!(*dtype, Dtype::F32, "{name}");
        bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect()
    }
}

/// A small picture with an edge, a gradient and some noise, different for every seed.
pub fn picture(width: u32, height: u32, seed: u32) -> Rgb {
    let pixels = (0..height)
        .flat_map(|y| (0..width).map(move |x| (x, y)))
        .flat_map(|(x, y)| {
            let noise = (x * 7919 + y * 104_729 + seed * 1_299_709).wrapping_mul(2_654_435_761) >> 28;
            let edge = if x + seed % 7 > width / 2 { 120 } else { 20 };
            [edge + noise as u8, (y * 160 / height) as u8 + noise as u8, (seed % 200) as u8]
        })
        .collect();
    Rgb { width, height, pixels }
}

pub fn png(image: &Rgb) -> Vec<u8> {
    let mut out = Vec::new();
    image::codecs::png::PngEncoder::new(&mut out)
        .write_image(&image.pixels, image.width, image.height, ExtendedColorType::Rgb8)
        .unwrap();
    out
}

pub fn jpeg(image: &Rgb) -> Vec<u8> {
    let mut out = Vec::new();
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut out, 90)
        .write_image(&image.pixels, image.width, image.height, ExtendedColorType::Rgb8)
        .unwrap();
    out
}

/// Writes the reference layout: `images/<i>` and, if there are labels, `labels/<i>`.
pub fn write_reference(path: &Path, images: &[Vec<u8>], labels: Option<&[i64]>) {
    let file = hdf5::File::create(path).unwrap();
    let group = file.create_group("images").unwrap();
    for (index, image) in images.iter().enumerate() {
        group.new_dataset_builder().with_data(image).create(index.to_string().as_str()).unwrap();
    }
    if let Some(labels) = labels {
        let group = file.create_group("labels").unwrap();
        for (index, label) in labels.iter().enumerate() {
            let scalar = group.new_dataset::<i64>().create(index.to_string().as_str()).unwrap();
            scalar.write_scalar(label).unwrap();
        }
    }
}

/// A data set of `count` small PNGs in four classes; those in `corrupt` do not decode.
pub fn small_set(directory: &Path, count: u32, corrupt: &[u32]) -> PathBuf {
    let path = directory.join("small.h5");
    let images: Vec<_> = (0..count)
        .map(|index| match corrupt.contains(&index) {
            true => b"\x89PNG\r\n\x1a\nand no more".to_vec(),
            false => png(&picture(9 + index % 5, 8 + index % 3, index)),
        })
        .collect();
    let labels: Vec<_> = (0..i64::from(count)).map(|index| index % 4).collect();
    write_reference(&path, &images, Some(&labels));
    path
}
