//! The layout of existing data sets: one HDF5 data set per image and per label.
//!
//! A group `images` holds 1-D uint8 data sets named "0", "1", …, each with one encoded file; a group `labels` holds
//! integer scalars under the same names. It is what an h5py script over an ImageFolder tree writes.

use std::path::Path;

use hdf5::types::TypeDescriptor;

use super::dataset::{Contents, NO_ADDRESS, Slot};
use super::error::DataError;
use super::index_file;

const IMAGES: &str = "images";
const LABELS: &str = "labels";

/// Collects the address of every image and every label.
pub(super) fn read_contents(path: &Path, file: &hdf5::File) -> Result<Contents, DataError> {
    if !file.link_exists(IMAGES) {
        return Err(DataError::layout(path, format!("it has no `{IMAGES}`{}", members(file))));
    }
    let images = file.group(IMAGES).map_err(|_| {
        DataError::layout(path, format!("`{IMAGES}` is not a group of one data set per image"))
    })?;
    let count = images.len() as usize;
    if count >= index_file::WORTHWHILE {
        tracing::info!("{}: asking where {count} images lie", path.display());
    }
    let slots = (0..count).map(|index| slot(path, &images, index)).collect::<Result<Vec<_>, _>>()?;
    let labels = if file.link_exists(LABELS) {
        let group = file.group(LABELS).map_err(|_| {
            DataError::layout(path, format!("`{LABELS}` is not a group of one scalar per image"))
        })?;
        let labels = group.len() as usize;
        if labels != count {
            return Err(DataError::CountMismatch { path: path.to_owned(), images: count, labels });
        }
        Some((0..count).map(|index| label(path, &group, index)).collect::<Result<Vec<_>, _>>()?)
    } else {
        None
    };
    Ok(Contents::of_reference(slots, labels))
}

/// Opens the data set of one image.
pub(super) fn image(file: &hdf5::File, index: usize) -> hdf5::Result<hdf5::Dataset> {
    file.dataset(&format!("{IMAGES}/{index}"))
}

fn slot(path: &Path, images: &hdf5::Group, index: usize) -> Result<Slot, DataError> {
    let image = member(path, images, IMAGES, index)?;
    let (kind, shape) = kind_and_shape(path, &image, IMAGES, index)?;
    if !matches!(kind, TypeDescriptor::Unsigned(hdf5::types::IntSize::U1)) || shape.len() != 1 {
        return Err(DataError::layout(
            path,
            format!(
                "{IMAGES}/{index} is {kind} of shape {shape:?} and not a list of uint8 (an encoded file)"
            ),
        ));
    }
    let contiguous = matches!(image.layout(), hdf5::dataset::Layout::Contiguous);
    let offset = image.offset().filter(|_| contiguous).unwrap_or(NO_ADDRESS);
    Ok(Slot { offset, len: shape[0] as u64 })
}

fn label(path: &Path, labels: &hdf5::Group, index: usize) -> Result<i64, DataError> {
    let label = member(path, labels, LABELS, index)?;
    let (kind, shape) = kind_and_shape(path, &label, LABELS, index)?;
    if !matches!(kind, TypeDescriptor::Integer(_) | TypeDescriptor::Unsigned(_))
        || shape.iter().product::<usize>() != 1
    {
        return Err(DataError::layout(
            path,
            format!("{LABELS}/{index} is {kind} of shape {shape:?} and not one integer"),
        ));
    }
    let value = label.read_raw::<i64>().map_err(DataError::hdf5(path, format!("read {LABELS}/{index}")))?;
    Ok(value[0])
}

fn member(path: &Path, group: &hdf5::Group, name: &str, index: usize) -> Result<hdf5::Dataset, DataError> {
    group.dataset(&index.to_string()).map_err(|_| {
        let count = group.len();
        let reason = if group.link_exists(&index.to_string()) {
            format!("{name}/{index} is not a data set")
        } else {
            format!(
                "`{name}` has {count} members but no \"{index}\": they are to be named \"0\" to \"{}\"",
                count - 1
            )
        };
        DataError::layout(path, reason)
    })
}

fn kind_and_shape(
    path: &Path,
    dataset: &hdf5::Dataset,
    name: &str,
    index: usize,
) -> Result<(TypeDescriptor, Vec<usize>), DataError> {
    let kind = dataset.dtype().and_then(|kind| kind.to_descriptor()).map_err(|_| {
        let reason = format!("{name}/{index} has a type that is not read here, such as NumPy's void");
        DataError::layout(path, reason)
    })?;
    Ok((kind, dataset.shape()))
}

fn members(file: &hdf5::File) -> String {
    match file.member_names() {
        Ok(names) if names.is_empty() => " (the file is empty)".into(),
        Ok(names) => {
            let shown: Vec<_> = names.iter().take(5).map(|name| format!("`{name}`")).collect();
            format!(" (it has {}{})", shown.join(", "), if names.len() > 5 { ", …" } else { "" })
        }
        Err(_) => String::new(),
    }
}
