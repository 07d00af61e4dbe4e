//! What is in a data set, at a glance: counts, classes, sizes and formats, provenance.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::dataset::{Dataset, Layout, Provenance};
use super::decode;
use super::error::DataError;

/// Headers of so many images, evenly spread, are looked at.
const SAMPLE: usize = 1000;

/// What [`inspect`] finds.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Summary {
    /// The file.
    pub path: PathBuf,
    /// How it is laid out.
    pub layout: Layout,
    /// Number of images.
    pub images: usize,
    /// Bytes of all encoded images.
    pub image_bytes: u64,
    /// Each label with its name and number of images; `None` without labels.
    pub classes: Option<Vec<ClassCount>>,
    /// Images whose label is negative.
    pub unlabelled: usize,
    /// Formats and sizes in a sample.
    pub sample: Sample,
    /// Says whether two files hold the same data; see [`Dataset::fingerprint`].
    pub fingerprint: String,
    /// Where a packed file comes from.
    pub provenance: Option<Provenance>,
}

/// One class.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ClassCount {
    /// Its number.
    pub label: i64,
    /// Its name, where the file has it.
    pub name: Option<String>,
    /// Its images.
    pub images: usize,
}

/// What the headers of some images say.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Sample {
    /// Images looked at.
    pub images: usize,
    /// How many of each format.
    pub formats: BTreeMap<&'static str, usize>,
    /// Least and greatest number of columns.
    pub width: (u32, u32),
    /// Least and greatest number of rows.
    pub height: (u32, u32),
    /// Images whose header cannot be read.
    pub unreadable: usize,
}

/// Looks at labels, lengths, and the headers of up to a thousand images.
///
/// # Errors
/// When the file cannot be read.
pub fn inspect(dataset: &Dataset) -> Result<Summary, DataError> {
    let names = dataset.class_names().unwrap_or_default();
    let classes = dataset.labels().map(|labels| {
        // Classes that have a name are shown even where they have no image.
        let mut counts: BTreeMap<i64, usize> =
            names.iter().enumerate().map(|(label, _)| (label as i64, 0)).collect();
        for &label in labels.iter().filter(|&&label| label >= 0) {
            *counts.entry(label).or_default() += 1;
        }
        let name = |label: i64| names.get(usize::try_from(label).ok()?).cloned();
        counts.into_iter().map(|(label, images)| ClassCount { label, name: name(label), images }).collect()
    });
    Ok(Summary {
        path: dataset.path().to_owned(),
        layout: dataset.layout(),
        images: dataset.len(),
        image_bytes: (0..dataset.len()).map(|index| dataset.encoded_len(index)).sum(),
        classes,
        unlabelled: dataset.labels().map_or(0, |_| dataset.unlabelled()),
        sample: sample(dataset)?,
        fingerprint: dataset.fingerprint()?,
        provenance: dataset.provenance().cloned(),
    })
}

fn sample(dataset: &Dataset) -> Result<Sample, DataError> {
    let count = SAMPLE.min(dataset.len());
    let mut sample =
        Sample { images: count, width: (u32::MAX, 0), height: (u32::MAX, 0), ..Sample::default() };
    let mut encoded = Vec::new();
    for number in 0..count {
        dataset.read_into(number * dataset.len() / count, &mut encoded)?;
        let Ok(header) = decode::header(&encoded) else {
            sample.unreadable += 1;
            continue;
        };
        *sample.formats.entry(header.format).or_default() += 1;
        sample.width = (sample.width.0.min(header.width), sample.width.1.max(header.width));
        sample.height = (sample.height.0.min(header.height), sample.height.1.max(header.height));
    }
    if sample.unreadable == count {
        (sample.width, sample.height) = ((0, 0), (0, 0));
    }
    Ok(sample)
}
