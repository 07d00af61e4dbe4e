//! Decodes every image of a data set and lists those that do not.

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
    /// Those that do not decode, by index.
    pub bad: Vec<BadImage>,
}

/// Decodes all images with `threads` threads (0: one per core); `progress` is told how many are done, of how many.
pub fn verify(dataset: &Dataset, threads: usize, progress: &(dyn Fn(usize, usize) + Sync)) -> VerifyReport {
    let images = dataset.len();
    let check = |index: usize| {
        let encoded = dataset.read(index).map_err(|error| match error {
            DataError::Corrupt { reason, .. } => reason,
            error => error.to_string(),
        });
        Ok::<_, Infallible>(encoded.and_then(|encoded| decode::decode(&encoded)).map(drop))
    };
    let Ok(results) = parallel::try_map(images, threads, &|done| progress(done, images), check);
    let bad = results
        .into_iter()
        .enumerate()
        .filter_map(|(index, result)| {
            let reason = result.err()?;
            Some(BadImage { index, name: format!("image {index}"), reason })
        })
        .collect();
    VerifyReport { path: dataset.path().to_owned(), images, bad }
}
