//! An image data set in one HDF5 file: who its images are, where their bytes lie, and how to fetch them.
//!
//! The HDF5 library opens the file, and tells the layout, the labels and the byte address of every image, once.
//! From then on images are read with `pread` by any number of threads, without a lock and without the library. Only
//! what has no plain address (chunked, compressed, or stored in the object header) needs the library at every read,
//! one thread at a time. What the two layouts look like is in [`reference`](super::reference) and
//! [`packed`](super::packed).

use std::fs::File;
use std::io::ErrorKind;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::fs::Advice;
use sha2::{Digest, Sha256};

use super::chunked::Chunks;
use super::error::DataError;
use super::{decode, index_file, packed, reference};
use crate::hex::hex;

/// No encoded image is longer, in bytes: all pixels of the largest, of 16-bit colours with alpha, fit.
pub(super) const MAX_ENCODED: u64 = 1 << 30;

/// How a file is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// One data set per image, in a group `images`, and one per label in `labels`.
    Reference,
    /// All images in one data set with an offset table: what `jepa-host data pack` writes.
    Packed,
}

/// Where a packed file comes from, as its attributes say.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Provenance {
    /// Version of the packed layout.
    pub format_version: u32,
    /// What wrote it, as in `jepa-host 0.1.0`.
    pub tool: String,
    /// Name of the directory or file that it was packed from.
    pub source: String,
    /// `image folder`, `idx`, or `hdf5`.
    pub source_kind: String,
    /// SHA-256, in hex, of the images' own SHA-256 as they were in the source, in the order of this file.
    pub source_sha256: String,
    /// Images whose shorter side was longer were made smaller to this, in pixels, and are JPEGs of [this
    /// quality](Self::jpeg_quality).
    pub shorter_side: Option<u32>,
    /// 1 to 100.
    pub jpeg_quality: Option<u32>,
}

/// Where the encoded bytes of one image lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// Byte address in the file, or `NO_ADDRESS`.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// Says that an image has to be read through the library.
pub(super) const NO_ADDRESS: u64 = u64::MAX;

/// What opening a file of either layout finds out.
pub(super) struct Contents {
    pub layout: Layout,
    pub slots: Vec<Slot>,
    pub labels: Option<Vec<i64>>,
    pub class_names: Option<Vec<String>>,
    pub provenance: Option<Provenance>,
    pub checksums: Option<Vec<u32>>,
}

impl Contents {
    /// Those of the reference layout, which has nothing else.
    pub fn of_reference(slots: Vec<Slot>, labels: Option<Vec<i64>>) -> Self {
        let layout = Layout::Reference;
        Contents { layout, slots, labels, class_names: None, provenance: None, checksums: None }
    }
}

/// An open data set. Shared between threads in an `Arc`; every method takes `&self`.
#[derive(Debug)]
pub struct Dataset {
    path: PathBuf,
    file: File,
    layout: Layout,
    slots: Vec<Slot>,
    labels: Option<Vec<i64>>,
    class_names: Option<Vec<String>>,
    provenance: Option<Provenance>,
    /// Of each image.
    checksums: Option<Vec<u32>>,
    /// Of each image, once somebody has asked.
    file_names: OnceLock<Option<Vec<String>>>,
    /// Kept open only where some image has no address.
    library: Option<Mutex<hdf5::File>>,
}

impl Dataset {
    /// Opens a file of either layout and checks that it is whole.
    ///
    /// A file without labels opens; see [`require_labels`](Self::require_labels).
    ///
    /// # Errors
    /// When it cannot be read, is not HDF5, is truncated, has another layout, other shapes or types than expected, no
    /// image, another number of labels than of images, or a label beyond the names of the classes.
    pub fn open(path: impl AsRef<Path>) -> Result<Dataset, DataError> {
        let path = path.as_ref();
        let file = File::open(path).map_err(DataError::io("open", path))?;
        let metadata = file.metadata().map_err(DataError::io("open", path))?;
        if metadata.is_dir() {
            return Err(DataError::Directory { path: path.to_owned() });
        }
        check_signature(path, &file)?;
        // Nothing is written, so no lock is needed; on cluster file systems asking for one can fail.
        let library = hdf5::File::with_options()
            .with_fapl(|access| access.file_locking(false))
            .open(path)
            .map_err(|error| open_error(path, &error))?;

        let contents = if packed::is_packed(&library) {
            packed::read_contents(path, &library)?
        } else if let Some(contents) = index_file::load(path, &metadata) {
            contents
        } else {
            let contents = reference::read_contents(path, &library)?;
            index_file::save(path, &metadata, &contents);
            contents
        };
        let Contents { layout, slots, labels, class_names, provenance, checksums } = contents;
        if slots.is_empty() {
            return Err(DataError::Empty { path: path.to_owned() });
        }
        if let Some(labels) = labels.as_ref().filter(|labels| labels.len() != slots.len()) {
            let (images, labels) = (slots.len(), labels.len());
            return Err(DataError::CountMismatch { path: path.to_owned(), images, labels });
        }
        if let (Some(labels), Some(names)) = (&labels, &class_names) {
            check_labels(path, labels, names.len(), "its class_names")?;
        }
        check_slots(path, &slots, metadata.len())?;

        let unaddressed = slots.iter().filter(|slot| slot.offset == NO_ADDRESS).count();
        if unaddressed > 0 {
            tracing::warn!(
                "{}: {unaddressed} of {} images are chunked, compressed or otherwise not contiguous, which reads \
                 slowly; `jepa-host data pack` makes a file of them that reads fast",
                path.display(),
                slots.len()
            );
        }
        let library = (unaddressed > 0).then(|| Mutex::new(library));
        Ok(Dataset {
            path: path.to_owned(),
            file,
            layout,
            slots,
            labels,
            class_names,
            provenance,
            checksums,
            file_names: OnceLock::new(),
            library,
        })
    }

    /// Number of images, at least 1.
    #[expect(clippy::len_without_is_empty, reason = "an empty data set does not open")]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How the file is laid out.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Where it comes from, for a packed file.
    pub fn provenance(&self) -> Option<&Provenance> {
        self.provenance.as_ref()
    }

    /// One label per image, −1 for an image without one; `None` when the file has no labels.
    pub fn labels(&self) -> Option<&[i64]> {
        self.labels.as_deref()
    }

    /// The labels, for those who cannot do without.
    ///
    /// # Errors
    /// [`DataError::NoLabels`], which names `needed_by`, when any image has none.
    pub fn require_labels(&self, needed_by: &str) -> Result<&[i64], DataError> {
        let missing = |what: String| DataError::NoLabels {
            path: self.path.clone(),
            what,
            needed_by: needed_by.to_owned(),
        };
        let labels = self.labels().ok_or_else(|| missing("no labels".into()))?;
        match labels.iter().position(|&label| label < 0) {
            Some(index) => Err(missing(format!("no label for image {index}"))),
            None => Ok(labels),
        }
    }

    /// Refuses labels that are none of the `classes` of data set `of`.
    ///
    /// # Errors
    /// [`DataError::Label`].
    pub fn require_classes(&self, classes: usize, of: &'static str) -> Result<(), DataError> {
        check_labels(&self.path, self.labels().unwrap_or_default(), classes, of)
    }

    /// Refuses a data set whose classes have other names than those of `other`, which is there for `of`: where both have names, one
    /// list begins with the other.
    ///
    /// # Errors
    /// [`DataError::Classes`].
    pub fn require_same_classes(&self, other: &Dataset, of: &'static str) -> Result<(), DataError> {
        let (names, there) =
            (self.class_names().unwrap_or_default(), other.class_names().unwrap_or_default());
        match names.iter().zip(there).enumerate().find(|(_, (name, name_there))| name != name_there) {
            None => Ok(()),
            Some((label, (name, name_there))) => Err(DataError::Classes {
                path: self.path.clone(),
                label,
                name: name.clone(),
                of,
                there: other.path.clone(),
                name_there: name_there.clone(),
            }),
        }
    }

    /// Refuses images that would have to be enlarged to `size` pixels: when the shorter side of most is less, by the
    /// headers of a few dozen, evenly spread. Some are in any collection of photos, and are enlarged.
    ///
    /// # Errors
    /// [`DataError::Small`], and when the file cannot be read.
    pub fn require_size(&self, size: usize) -> Result<(), DataError> {
        const SAMPLES: usize = 65;
        let samples = SAMPLES.min(self.len());
        let (mut sides, mut bytes) = (Vec::new(), Vec::new());
        for sample in 0..samples {
            // What to do about an image that is corrupt is for the loader to say.
            match self.read_into(sample * self.len() / samples, &mut bytes) {
                Err(DataError::Corrupt { .. }) => continue,
                read => read?,
            }
            sides.extend(decode::header(&bytes).map(|header| header.width.min(header.height)));
        }
        sides.sort_unstable();
        match sides.get(sides.len() / 2) {
            Some(&side) if (side as usize) < size => {
                Err(DataError::Small { path: self.path.clone(), side, size })
            }
            _ => Ok(()),
        }
    }

    /// Names of the classes, where the file has them.
    pub fn class_names(&self) -> Option<&[String]> {
        self.class_names.as_deref()
    }

    /// Images without a label.
    pub fn unlabelled(&self) -> usize {
        self.labels().map_or(self.len(), |labels| labels.iter().filter(|&&label| label < 0).count())
    }

    /// Number of classes: of names, or the largest label plus one; 0 without labels.
    pub fn classes(&self) -> usize {
        let largest = self.labels().and_then(|labels| labels.iter().max()).map_or(0, |&label| label + 1);
        usize::try_from(largest).unwrap_or(0).max(self.class_names().map_or(0, <[_]>::len))
    }

    /// Number of bytes of an encoded image.
    ///
    /// # Panics
    /// When `index` is not below [`len`](Self::len).
    pub fn encoded_len(&self, index: usize) -> u64 {
        self.slots[index].len
    }

    /// Whether each image has a checksum, which is compared whenever it is read.
    pub fn has_checksums(&self) -> bool {
        self.checksums.is_some()
    }

    /// The file that an image was packed from, relative to what was packed, where that is kept.
    pub fn file_name(&self, index: usize) -> Option<&str> {
        let read = || match self.layout {
            Layout::Packed => packed::file_names(&self.file, self.len()),
            Layout::Reference => None,
        };
        self.file_names.get_or_init(read).as_ref()?.get(index).map(String::as_str)
    }

    /// What to call an image in a message: its number, and its file, where that is known.
    pub fn image_name(&self, index: usize) -> String {
        match self.file_name(index) {
            Some(file) => format!("image {index} ({file})"),
            None => format!("image {index}"),
        }
    }

    /// The error for an image that is no good.
    pub(super) fn corrupt(&self, index: u64, reason: String) -> DataError {
        let image = self.image_name(index as usize);
        DataError::Corrupt { path: self.path.clone(), image, index, reason }
    }

    /// The encoded bytes of one image.
    ///
    /// # Errors
    /// When there is no such image, the file cannot be read, or the image is not what was packed.
    pub fn read(&self, index: usize) -> Result<Vec<u8>, DataError> {
        let mut bytes = Vec::new();
        self.read_into(index, &mut bytes)?;
        Ok(bytes)
    }

    /// As [`read`](Self::read), into memory that is used again.
    pub fn read_into(&self, index: usize, bytes: &mut Vec<u8>) -> Result<(), DataError> {
        let slot = *self.slots.get(index).ok_or_else(|| DataError::OutOfRange {
            path: self.path.clone(),
            index: index as u64,
            len: self.len(),
        })?;
        if slot.offset == NO_ADDRESS {
            *bytes = self.read_through_library(index)?;
        } else {
            bytes.resize(slot.len as usize, 0);
            self.file.read_exact_at(bytes, slot.offset).map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof => {
                    let reason = "it has become shorter since it was opened".to_owned();
                    DataError::Truncated { path: self.path.clone(), reason }
                }
                _ => DataError::io("read", &self.path)(error),
            })?;
        }
        match &self.checksums {
            Some(checksums) if checksums[index] != packed::checksum(bytes) => {
                Err(self.corrupt(index as u64, "it is not what was packed: its checksum differs".to_owned()))
            }
            _ => Ok(()),
        }
    }

    /// Tells the system that this image is going to be read, so that it comes from the disk meanwhile.
    pub fn will_need(&self, index: usize) {
        let has_address = |slot: &&Slot| slot.offset != NO_ADDRESS;
        let Some(slot) = self.slots.get(index).filter(has_address) else { return };
        let Some(len) = NonZeroU64::new(slot.len) else { return };
        // A system that cannot do it says so, and nothing is lost but time.
        let _ = rustix::fs::fadvise(&self.file, slot.offset, Some(len), Advice::WillNeed);
    }

    fn read_through_library(&self, index: usize) -> Result<Vec<u8>, DataError> {
        let Some(library) = &self.library else { return Ok(Vec::new()) };
        let refuse = DataError::hdf5(&self.path, format!("read image {index}"));
        let library = library.lock().unwrap_or_else(PoisonError::into_inner);
        match self.layout {
            Layout::Packed => packed::read_image(&library, index).map_err(refuse),
            Layout::Reference => {
                let image = match reference::image(&library, index) {
                    Ok(image) => image,
                    Err(error) => return Err(refuse(error)),
                };
                let Some(chunks) = Chunks::locate(&image) else { return image.read_raw().map_err(refuse) };
                drop((image, library));
                chunks.read(&self.file).map_err(|error| match error.raw_os_error() {
                    Some(_) => DataError::io("read", &self.path)(error),
                    // It can be read, and is not what was written.
                    None => self.corrupt(index as u64, error.to_string()),
                })
            }
        }
    }

    /// SHA-256, in hex, over the labels, the length of every image, and the bytes of a few hundred of them.
    ///
    /// It says whether two runs saw the same data: cheap (under a megabyte is read), the same for both layouts of the
    /// same images, and different once an image is added, removed, resized or relabelled, or one of those that are
    /// read (256, spread evenly) is another.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn fingerprint(&self) -> Result<String, DataError> {
        const SAMPLES: usize = 256;
        const BYTES_PER_SAMPLE: usize = 4096;
        let mut hash = Sha256::new();
        hash.update((self.len() as u64).to_le_bytes());
        for slot in &self.slots {
            hash.update(slot.len.to_le_bytes());
        }
        hash.update([u8::from(self.labels.is_some())]);
        for label in self.labels().unwrap_or_default() {
            hash.update(label.to_le_bytes());
        }
        let samples = SAMPLES.min(self.len());
        let mut bytes = Vec::new();
        for sample in 0..samples {
            match self.read_into(sample * self.len() / samples, &mut bytes) {
                Err(DataError::Corrupt { .. }) => bytes.clear(),
                read => read?,
            }
            hash.update(&bytes[..bytes.len().min(BYTES_PER_SAMPLE)]);
        }
        Ok(hex(&hash.finalize()))
    }
}

/// HDF5's signature lies at the start of the file or, behind a user block, at 512, 1024, 2048, …
fn check_signature(path: &Path, file: &File) -> Result<(), DataError> {
    const SIGNATURE: [u8; 8] = *b"\x89HDF\r\n\x1a\n";
    let mut start = [0; 8];
    let mut at = 0;
    while file.read_exact_at(&mut start, at).is_ok() {
        if start == SIGNATURE {
            return Ok(());
        }
        at = if at == 0 { 512 } else { at * 2 };
    }
    Err(DataError::NotHdf5 { path: path.to_owned() })
}

fn open_error(path: &Path, error: &hdf5::Error) -> DataError {
    let reason = error.stack().map_or_else(
        || error.to_string(),
        |stack| stack.iter().last().map_or_else(|| error.to_string(), |frame| frame.desc().to_owned()),
    );
    if error.contains_minor(hdf5::MinorErrorCode::Truncated) {
        return DataError::Truncated { path: path.to_owned(), reason };
    }
    DataError::Hdf5 { path: path.to_owned(), action: "open it".into(), reason }
}

/// Images without a label, −1, are left alone.
fn check_labels(path: &Path, labels: &[i64], classes: usize, of: &'static str) -> Result<(), DataError> {
    match labels.iter().position(|&label| label >= 0 && label as usize >= classes) {
        None => Ok(()),
        Some(index) => {
            Err(DataError::Label { path: path.to_owned(), index, label: labels[index], classes, of })
        }
    }
}

fn check_slots(path: &Path, slots: &[Slot], file_len: u64) -> Result<(), DataError> {
    for (index, slot) in slots.iter().enumerate() {
        if slot.len > MAX_ENCODED {
            let reason = format!("image {index} has {} bytes, more than any image that is read", slot.len);
            return Err(DataError::layout(path, reason));
        }
        if slot.offset != NO_ADDRESS && slot.offset.checked_add(slot.len).is_none_or(|end| end > file_len) {
            let reason = format!(
                "image {index} lies at {} with {} bytes, and the file ends at {file_len}",
                slot.offset, slot.len
            );
            return Err(DataError::Truncated { path: path.to_owned(), reason });
        }
    }
    Ok(())
}
