//! The packed file itself, of which [`packed`] says what is in it.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use hdf5::dataset::{AllocTime, FillTime};
use sha2::{Digest, Sha256};

use super::journal::{Journal, Packable};
use super::{PackProgress, Progress, Smaller};
use crate::data::error::DataError;
use crate::data::packed::{self, Text, text};
use crate::data::source::Source;
use crate::files;
use crate::hex::hex;

/// What stands beside the images.
pub(super) struct Tables<'a> {
    pub labels: Option<&'a [i64]>,
    pub class_names: Option<&'a [Text]>,
    pub smaller: Option<Smaller>,
}

/// Writes `images`, from the source or, where they were made smaller, from the journal.
pub(super) fn write(
    out: &Path,
    source: &Source,
    journal: &Journal,
    images: &[(usize, Packable)],
    tables: &Tables,
    progress: &Progress,
) -> Result<(), DataError> {
    let mut offsets = vec![0];
    offsets.extend(images.iter().scan(0, |end, (_, image)| {
        *end += image.packed_len;
        Some(*end)
    }));
    let source_name = source.path.file_name().unwrap_or_default().to_string_lossy();
    let mut source_hash = Sha256::new();
    images.iter().for_each(|(_, image)| source_hash.update(image.source_digest));
    let attributes = [
        ("format", text(packed::FORMAT)?),
        ("tool", text(concat!("jepa-host ", env!("CARGO_PKG_VERSION")))?),
        ("source", text(&source_name)?),
        ("source_kind", text(source.kind())?),
        ("source_sha256", text(&hex(&source_hash.finalize()))?),
    ];

    require_space(out, offsets.last().copied().unwrap_or_default())?;
    let temporary = Temporary { path: files::temporary_beside(out) };
    let path = &temporary.path;
    // The journal is locked, so nobody else writes there. No times are kept in it, so that the same images give the same
    // bytes.
    let file = hdf5::File::with_options()
        .with_fapl(|access| access.file_locking(false))
        .with_fcpl(|create| create.obj_track_times(false))
        .create(path)
        .map_err(DataError::write_hdf5(out))?;
    let bytes = write_tables(&file, &attributes, &offsets, tables).map_err(DataError::write_hdf5(out))?;

    let mut checksums: Vec<u32> = Vec::with_capacity(images.len());
    const BLOCK: usize = 8 << 20;
    let mut block = Vec::with_capacity(BLOCK);
    let mut written = 0;
    for (position, (index, image)) in images.iter().enumerate() {
        let encoded = match image.smaller {
            Some((at, digest)) => journal.read(at, image.packed_len, digest)?,
            None => read_again(source, *index, image)?,
        };
        checksums.push(packed::checksum(&encoded));
        block.extend(encoded);
        if block.len() >= BLOCK || position + 1 == images.len() {
            bytes.write_slice(&block, written..written + block.len()).map_err(DataError::write_hdf5(out))?;
            written += block.len();
            block.clear();
        }
        if progress(PackProgress::Written(position + 1, images.len())).is_break() {
            return Err(DataError::Interrupted);
        }
    }
    drop(bytes);
    write_about_files(&file, &checksums, source, images).map_err(DataError::write_hdf5(out))?;
    file.close().map_err(DataError::write_hdf5(out))?;
    temporary.rename(out)
}

/// Refuses to begin on a disk that is too small for it.
fn require_space(out: &Path, needed: u64) -> Result<(), DataError> {
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Where it cannot be asked, or has no answer, writing tells.
    let Some(disk) = rustix::fs::statvfs(folder).ok().filter(|disk| disk.f_blocks > 0) else { return Ok(()) };
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if free > needed {
        return Ok(());
    }
    let [needed, free] = [needed, free].map(|bytes| bytes.div_ceil(1 << 20));
    let full = format!("{needed} MiB are needed and {free} MiB are free: make room, or give another folder");
    Err(DataError::write(out)(io::Error::new(ErrorKind::StorageFull, full)))
}

/// An image of the source, which has to be the one that was decoded.
fn read_again(source: &Source, index: usize, image: &Packable) -> Result<Vec<u8>, DataError> {
    let encoded = source.read(index)?;
    if Sha256::digest(&encoded)[..] == image.source_digest {
        return Ok(encoded);
    }
    let name = source.name(index);
    let reason = format!("{name} changed while it was being packed; pack it again");
    Err(DataError::Source { path: source.path.clone(), reason })
}

/// Writes what belongs to each image: its checksum, and the name of its file, where all have one.
fn write_about_files(
    file: &hdf5::File,
    checksums: &[u32],
    source: &Source,
    images: &[(usize, Packable)],
) -> hdf5::Result<()> {
    let build = || file.new_dataset_builder().obj_track_times(false);
    build().with_data(checksums).create(packed::CHECKSUMS)?;
    let mut names = Vec::new();
    for (index, _) in images {
        let Some(name) = source.file(*index) else { return Ok(()) };
        names.extend(name.bytes().chain([0]));
    }
    build().with_data(&names).create(packed::FILES).map(drop)
}

/// Writes everything but that and the images, and makes the data set that they go to.
fn write_tables(
    file: &hdf5::File,
    attributes: &[(&str, Text)],
    offsets: &[u64],
    Tables { labels, class_names, smaller }: &Tables,
) -> hdf5::Result<hdf5::Dataset> {
    for (name, value) in attributes {
        file.new_attr::<Text>().create(*name)?.write_scalar(value)?;
    }
    file.new_attr::<u32>().create("format_version")?.write_scalar(&packed::FORMAT_VERSION)?;
    if let Some(Smaller { shorter_side, quality }) = smaller {
        file.new_attr::<u32>().create("shorter_side")?.write_scalar(shorter_side)?;
        file.new_attr::<u8>().create("jpeg_quality")?.write_scalar(quality)?;
    }
    let build = || file.new_dataset_builder().obj_track_times(false);
    build().with_data(offsets).create(packed::OFFSETS)?;
    if let Some(labels) = labels {
        build().with_data(*labels).create(packed::LABELS)?;
    }
    if let Some(names) = class_names {
        build().with_data(*names).create(packed::CLASS_NAMES)?;
    }
    build()
        .alloc_time(Some(AllocTime::Early))
        .fill_time(FillTime::Never)
        .empty::<u8>()
        .shape([offsets.last().copied().unwrap_or(0) as usize])
        .create(packed::BYTES)
}

/// A file that is deleted unless it is given its real name.
struct Temporary {
    path: PathBuf,
}

impl Temporary {
    fn rename(self, out: &Path) -> Result<(), DataError> {
        let synced = File::open(&self.path).and_then(|file| file.sync_all());
        synced.map_err(DataError::write(&self.path))?;
        fs::rename(&self.path, out).map_err(DataError::write(out))?;
        // It is there now, whatever follows.
        if let Err(error) = files::sync_folder(out.parent().unwrap_or(Path::new(""))) {
            tracing::warn!(
                "{} may be gone after a power cut: its folder cannot be synced: {error}",
                out.display()
            );
        }
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Gone already, once it has its real name.
        let _ = fs::remove_file(&self.path);
    }
}
