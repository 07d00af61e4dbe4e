//! Reads every image of a data set, or decodes it, and lists those where that fails.

use std::convert::Infallible;
use std::path::PathBuf;

use super::dataset::Dataset;
use super::error::DataError;
use super::pack::BadImage;
use super::{decode, parallel};

/// What [`verify`] finds.
#[derive(Clone, Debug, serde::Serialize)]
pub struct VerifyReport {
    /// The file.
    pub path: PathBuf,
    /// Images looked at: all of them.
    pub images: usize,
    /// Whether they were decoded, and not only read with their headers.
    pub deep: bool,
    /// Whether each has the checksum that it was packed with; an older file has none to compare.
    pub checksums: bool,
    /// Those that are damaged, by index.
    pub bad: Vec<BadImage>,
}

/// Reads all images and their headers, and if it is to go deep, decodes them, with `threads` threads (0: one per core); `progress`
/// is told how many are done, of how many.
pub fn verify(
    dataset: &Dataset,
    deep: bool,
    threads: usize,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> VerifyReport {
    let images = dataset.len();
    let check = |index: usize| {
        let encoded = dataset.read(index).map_err(|error| match error {
            DataError::Corrupt { reason, .. } => reason,
            error => error.to_string(),
        });
        let look = |encoded: Vec<u8>| match deep {
            true => decode::decode(&encoded).map(drop),
            false => decode::header(&encoded).map(drop),
        };
        Ok::<_, Infallible>(encoded.and_then(look))
    };
    let Ok(results) = parallel::try_map(images, threads, &|done| progress(done, images), check);
    let bad = results
        .into_iter()
        .enumerate()
        .filter_map(|(index, result)| {
            let reason = result.err()?;
            Some(BadImage { index, name: dataset.image_name(index), reason })
        })
        .collect();
    VerifyReport { path: dataset.path().to_owned(), images, deep, checksums: dataset.has_checksums(), bad }
}
