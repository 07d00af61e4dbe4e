//! Image data sets: read, decode, augment, and deliver as batches; and the tools that make and check their files.
//!
//! [`Dataset`] opens an HDF5 file of either layout. [`Loader`] turns it into batches of the views that a method
//! declared. [`pack`], [`inspect`] and [`verify`] are what `jepa-host data …` runs. Nothing here knows about
//! methods, training or the command line.

pub mod augment;
mod batch;
mod chunked;
mod clock;
pub mod color;
mod cut;
mod dataset;
pub mod decode;
mod error;
mod features;
mod finish;
mod idx;
mod index_file;
mod inspect;
mod loader;
mod order;
mod pack;
mod packed;
mod parallel;
mod reference;
pub mod resample;
mod source;
mod verify;

pub use augment::check_views;
pub use clock::{Clock, Work};
pub use cut::cuts_on;
pub use dataset::{Dataset, Layout, Provenance};
pub use error::DataError;
pub use features::FeatureFile;
pub use finish::finish;
pub use inspect::{ClassCount, Sample, Summary, inspect};
pub use loader::{Augment, Batches, Decode, LoadedBatch, Loader, LoaderOptions, OnError, RawBatch, Share};
pub use order::Order;
pub use pack::{BadImage, PackOptions, PackProgress, PackReport, Progress, Smaller, Split, pack};
pub use verify::{VerifyReport, verify};

/// The version of the HDF5 library that is linked in.
pub fn hdf5_version() -> String {
    let (major, minor, patch) = hdf5::library_version();
    format!("{major}.{minor}.{patch}")
}
