//! The packed layout: all images of a set in one contiguous run of bytes.
//!
//! | name          | type, shape           | what                                                             |
//! |---------------|-----------------------|------------------------------------------------------------------|
//! | `bytes`       | uint8 `(total,)`      | the encoded files, one behind the other                          |
//! | `offsets`     | uint64 `(images + 1,)`| image i is `bytes[offsets[i]..offsets[i + 1]]`                   |
//! | `labels`      | int64 `(images,)`     | the class of each image, −1 without one; may be missing          |
//! | `class_names` | UTF-8 `(classes,)`    | may be missing                                                   |
//! | `checksums`   | uint32 `(images,)`    | zlib's CRC-32 of each encoded file; may be missing                |
//! | `files`       | uint8 `(length,)`     | the name of each file in the source, ended by a 0; may be missing |
//!
//! Attributes of the root: `format` = "jepa-host packed images", `format_version`, and those of a
//! [`Provenance`](super::Provenance). It opens in a millisecond per million images instead of a minute, and any HDF5 reader can
//! read it.
//!
//! Strings have a fixed length of 256 bytes. Those of variable length, as version 1 has them, are not read: they lie in a heap
//! in which the library looks for ever, where a bit of it has flipped.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use hdf5::types::{FixedAscii, FixedUnicode, TypeDescriptor};

use super::dataset::{Contents, Layout, NO_ADDRESS, Provenance, Slot};
use super::error::DataError;

pub(super) const FORMAT: &str = "jepa-host packed images";
/// Readers refuse a greater one.
pub(super) const FORMAT_VERSION: u32 = 2;
pub(super) const BYTES: &str = "bytes";
pub(super) const OFFSETS: &str = "offsets";
pub(super) const LABELS: &str = "labels";
pub(super) const CLASS_NAMES: &str = "class_names";
pub(super) const CHECKSUMS: &str = "checksums";
pub(super) const FILES: &str = "files";

/// A string as it is stored.
pub(super) type Text = FixedUnicode<256>;
/// As h5py stores bytes.
type AsciiText = FixedAscii<256>;

/// Whether the file has what a packed one has.
pub(super) fn is_packed(file: &hdf5::File) -> bool {
    has_attribute(file, "format") && has_attribute(file, "format_version") && file.link_exists(BYTES)
}

/// Reads the tables.
pub(super) fn read_contents(path: &Path, file: &hdf5::File) -> Result<Contents, DataError> {
    let provenance = provenance(path, file)?;
    let bytes = dataset(path, file, BYTES)?;
    let kind = kind(path, &bytes, BYTES)?;
    if !matches!(kind, TypeDescriptor::Unsigned(hdf5::types::IntSize::U1)) || bytes.ndim() != 1 {
        let reason = format!("`{BYTES}` is {kind} of shape {:?} and not a list of uint8", bytes.shape());
        return Err(DataError::layout(path, reason));
    }
    let total = bytes.size() as u64;
    let contiguous = matches!(bytes.layout(), hdf5::dataset::Layout::Contiguous);
    let start = bytes.offset().filter(|_| contiguous);

    let offsets: Vec<u64> = table(path, file, OFFSETS)?;
    if offsets.first() != Some(&0) || !offsets.is_sorted() || offsets.last() > Some(&total) {
        let reason = format!("`{OFFSETS}` does not climb from 0 to at most {total}, the length of `{BYTES}`");
        return Err(DataError::layout(path, reason));
    }
    let slots: Vec<Slot> = offsets
        .windows(2)
        .map(|pair| Slot {
            offset: start.map_or(NO_ADDRESS, |start| start + pair[0]),
            len: pair[1] - pair[0],
        })
        .collect();

    let labels = file.link_exists(LABELS).then(|| table(path, file, LABELS)).transpose()?;
    let class_names = file.link_exists(CLASS_NAMES).then(|| class_names(path, file)).transpose()?;
    let class_names = class_names.flatten();
    let checksums: Option<Vec<u32>> =
        file.link_exists(CHECKSUMS).then(|| table(path, file, CHECKSUMS)).transpose()?;
    if let Some(checksums) = checksums.as_ref().filter(|checksums| checksums.len() != slots.len()) {
        let reason = format!("it has {} images and {} checksums", slots.len(), checksums.len());
        return Err(DataError::layout(path, reason));
    }
    let provenance = Some(provenance);
    Ok(Contents { layout: Layout::Packed, slots, labels, class_names, provenance, checksums })
}

/// The checksum of an encoded file.
pub(super) fn checksum(encoded: &[u8]) -> u32 {
    crc32fast::hash(encoded)
}

/// The names of the files that the images were packed from, where the packed file that is open has one for each of `images`.
pub(super) fn file_names(open: &File, images: usize) -> Option<Vec<String>> {
    // Another file may have its name by now.
    let path = PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd()));
    let file = hdf5::File::with_options().with_fapl(|access| access.file_locking(false)).open(&path).ok()?;
    let bytes: Vec<u8> = file.link_exists(FILES).then(|| table(&path, &file, FILES).ok()).flatten()?;
    let names = bytes.strip_suffix(&[0])?.split(|byte| *byte == 0);
    let names: Vec<String> = names.map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    (names.len() == images).then_some(names)
}

/// Reads the bytes of one image through the library, where `bytes` is not contiguous.
pub(super) fn read_image(file: &hdf5::File, index: usize) -> hdf5::Result<Vec<u8>> {
    let range = file.dataset(OFFSETS)?.read_slice_1d::<u64, _>(index..index + 2)?;
    let range = range[0] as usize..range[1] as usize;
    Ok(file.dataset(BYTES)?.read_slice_1d::<u8, _>(range)?.to_vec())
}

fn provenance(path: &Path, file: &hdf5::File) -> Result<Provenance, DataError> {
    let format_version = file
        .attr("format_version")
        .and_then(|attribute| attribute.read_scalar::<u32>())
        .map_err(DataError::hdf5(path, "read the attribute `format_version`"))?;
    if format_version > FORMAT_VERSION {
        let reason = format!(
            "it is packed in version {format_version} of the format and this jepa-host reads up to {FORMAT_VERSION}: \
             use a newer jepa-host, or pack it again with this one"
        );
        return Err(DataError::layout(path, reason));
    }
    let text = |name| string_attribute(file, name).unwrap_or_default();
    Ok(Provenance {
        format_version,
        tool: text("tool"),
        source: text("source"),
        source_kind: text("source_kind"),
        source_sha256: text("source_sha256"),
        shorter_side: number(file, "shorter_side"),
        jpeg_quality: number(file, "jpeg_quality"),
    })
}

fn dataset(path: &Path, file: &hdf5::File, name: &str) -> Result<hdf5::Dataset, DataError> {
    let dataset = file
        .dataset(name)
        .map_err(|_| DataError::layout(path, format!("it calls itself packed but has no `{name}`")))?;
    // A damaged file may claim any length. (Images may be compressed, and are not read at once.)
    if name != BYTES && dataset.size() as u64 > file.size() {
        let reason = format!("`{name}` has {} entries, more than the file has bytes", dataset.size());
        return Err(DataError::layout(path, reason));
    }
    Ok(dataset)
}

fn kind(path: &Path, dataset: &hdf5::Dataset, name: &str) -> Result<TypeDescriptor, DataError> {
    dataset
        .dtype()
        .and_then(|kind| kind.to_descriptor())
        .map_err(DataError::hdf5(path, format!("read the type of `{name}`")))
}

/// A list of integers of any width, as the one that is asked for.
fn table<T: hdf5::H5Type>(path: &Path, file: &hdf5::File, name: &str) -> Result<Vec<T>, DataError> {
    let table = dataset(path, file, name)?;
    let kind = kind(path, &table, name)?;
    if !matches!(kind, TypeDescriptor::Integer(_) | TypeDescriptor::Unsigned(_)) || table.ndim() != 1 {
        let reason = format!("`{name}` is {kind} of shape {:?} and not a list of integers", table.shape());
        return Err(DataError::layout(path, reason));
    }
    table.read_raw().map_err(DataError::hdf5(path, format!("read `{name}`")))
}

/// `None` for names of variable length.
fn class_names(path: &Path, file: &hdf5::File) -> Result<Option<Vec<String>>, DataError> {
    let names = dataset(path, file, CLASS_NAMES)?;
    let action = || format!("read `{CLASS_NAMES}`");
    let names: Vec<Vec<u8>> = match kind(path, &names, CLASS_NAMES)? {
        TypeDescriptor::FixedUnicode(_) => {
            let names = names.read_raw::<Text>().map_err(DataError::hdf5(path, action()))?;
            names.iter().map(|name| name.as_bytes().to_vec()).collect()
        }
        TypeDescriptor::FixedAscii(_) => {
            let names = names.read_raw::<AsciiText>().map_err(DataError::hdf5(path, action()))?;
            names.iter().map(|name| name.as_bytes().to_vec()).collect()
        }
        _ => {
            tracing::warn!(
                "{}: names of classes are not read from a file that an early version packed: pack the original again, \
                 or give --class-names",
                path.display()
            );
            return Ok(None);
        }
    };
    // The library believes what the file says, and it says that this is UTF-8.
    let names: Result<Vec<String>, _> = names.into_iter().map(String::from_utf8).collect();
    names
        .map(Some)
        .map_err(|_| DataError::layout(path, format!("`{CLASS_NAMES}` is damaged: it is not UTF-8")))
}

fn has_attribute(file: &hdf5::File, name: &str) -> bool {
    file.attr_names().is_ok_and(|names| names.iter().any(|known| known == name))
}

fn string_attribute(file: &hdf5::File, name: &str) -> Option<String> {
    let attribute = has_attribute(file, name).then(|| file.attr(name).ok()).flatten()?;
    let bytes = match attribute.dtype().and_then(|kind| kind.to_descriptor()).ok()? {
        TypeDescriptor::FixedUnicode(_) => attribute.read_scalar::<Text>().ok()?.as_bytes().to_vec(),
        TypeDescriptor::FixedAscii(_) => attribute.read_scalar::<AsciiText>().ok()?.as_bytes().to_vec(),
        _ => return None,
    };
    String::from_utf8(bytes).ok()
}

fn number(file: &hdf5::File, name: &str) -> Option<u32> {
    let attribute = has_attribute(file, name).then(|| file.attr(name).ok()).flatten()?;
    attribute.read_scalar().ok()
}

/// Text as it is stored, where it ends at the first NUL.
///
/// # Errors
/// When it is longer than that.
pub(super) fn text(value: &str) -> Result<Text, DataError> {
    let until_nul = value.split('\0').next().unwrap_or_default();
    Text::from_str(until_nul).map_err(|_| {
        DataError::Options(format!("`{value}` is longer than 256 bytes, and cannot be stored as a name"))
    })
}
