//! Files of features: what `jepa-host embed` writes.
//!
//! | name       | type, shape     | what                                        |
//! |------------|-----------------|---------------------------------------------|
//! | `features` | float32 `(N, D)`| one row per image                           |
//! | `labels`   | int64 `(N,)`    | its class, −1 without one                   |
//! | `indices`  | int64 `(N,)`    | its number in the data set                  |

use std::fs;
use std::path::{Path, PathBuf};

use super::error::DataError;
use crate::files::{put_in_place, temporary_beside};

/// A file that is being written, block by block, under another name until it is complete.
#[derive(Debug)]
pub struct FeatureFile {
    out: PathBuf,
    temporary: PathBuf,
    file: hdf5::File,
    columns: usize,
    rows: usize,
}

impl FeatureFile {
    /// Begins a file for `rows` images of `columns` features.
    ///
    /// # Errors
    /// When `out` exists and is not to be replaced (`force`), or cannot be written.
    pub fn create(out: &Path, rows: usize, columns: usize, force: bool) -> Result<Self, DataError> {
        if out.exists() && !force {
            return Err(DataError::Exists { path: out.to_owned() });
        }
        let temporary = temporary_beside(out);
        let failed = DataError::hdf5(out, "write the features");
        let make = || -> hdf5::Result<hdf5::File> {
            let file = hdf5::File::create(&temporary)?;
            file.new_dataset::<f32>().shape((rows, columns)).create("features")?;
            file.new_dataset::<i64>().shape(rows).create("labels")?;
            file.new_dataset::<i64>().shape(rows).create("indices")?;
            Ok(file)
        };
        let file = make().map_err(failed)?;
        Ok(FeatureFile { out: out.to_owned(), temporary, file, columns, rows: 0 })
    }

    /// Appends images: `features` row by row, and as many labels and numbers.
    ///
    /// # Errors
    /// When they cannot be written.
    ///
    /// # Panics
    /// When there are not as many rows as labels and numbers.
    pub fn append(&mut self, features: &[f32], labels: &[i64], indices: &[u64]) -> Result<(), DataError> {
        assert!(features.len() == labels.len() * self.columns && labels.len() == indices.len());
        let (from, to) = (self.rows, self.rows + labels.len());
        let indices: Vec<i64> = indices.iter().map(|&index| index as i64).collect();
        let write = || -> hdf5::Result<()> {
            let rows = ndarray::ArrayView2::from_shape((labels.len(), self.columns), features)
                .map_err(|error| hdf5::Error::from(error.to_string()))?;
            self.file.dataset("features")?.write_slice(rows, (from..to, ..))?;
            self.file.dataset("labels")?.write_slice(labels, from..to)?;
            self.file.dataset("indices")?.write_slice(&indices, from..to)
        };
        write().map_err(DataError::write_hdf5(&self.out))?;
        self.rows = to;
        Ok(())
    }

    /// Gives the file its name. Returns D.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn finish(self) -> Result<usize, DataError> {
        self.file.close().map_err(DataError::write_hdf5(&self.out))?;
        fs::File::open(&self.temporary)
            .and_then(|file| file.sync_all())
            .and_then(|()| put_in_place(&self.temporary, &self.out))
            .map_err(DataError::write(&self.out))?;
        Ok(self.columns)
    }
}
