//! Writes a packed data set: all images of a source in one contiguous run, with labels, names and provenance.
//!
//! Every image is decoded once before anything is written, so a file that exists is a file that trains; images may be made
//! smaller on that occasion. It is
//! written under another name, synced and renamed: a broken-off pack leaves no half file behind its real name.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use hdf5::dataset::{AllocTime, FillTime};
use jepa_plugin_api::{Interpolation, Rng};
use libjpeg_turbo_rs::{PixelFormat, Subsampling};

use super::augment::shorter_side_to;
use super::decode::{Region, Rgb};
use super::error::DataError;
use super::packed::{self, Text, text};
use super::resample::{CropBox, Resampler};
use super::source::Source;
use super::{decode, parallel};

/// Which half of a directory of IDX files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// `train-images-idx3-ubyte`.
    Train,
    /// `t10k-images-idx3-ubyte`.
    Test,
}

/// How to pack.
#[derive(Clone, Debug, Default)]
pub struct PackOptions {
    /// Which IDX files of a directory.
    pub split: Option<Split>,
    /// Take only so many images: as even over the classes as they allow, drawn by a fixed seed, in source order.
    pub limit: Option<usize>,
    /// Names of the classes, where the source has none or others are wanted.
    pub class_names: Option<Vec<String>>,
    /// Leave unreadable images out instead of refusing the source.
    pub skip_bad: bool,
    /// Overwrite an existing file.
    pub force: bool,
    /// Threads for the check; 0 for one per core.
    pub threads: usize,
    /// Make images smaller whose shorter side is longer than this, and store them as JPEGs.
    pub smaller: Option<Smaller>,
}

/// How images are made smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Smaller {
    /// What their shorter side becomes, in pixels, at least 1.
    pub shorter_side: u32,
    /// Of the JPEG, 1 to 100.
    pub quality: u8,
}

/// How far packing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackProgress {
    /// So many of so many images decode.
    Checked(usize, usize),
    /// So many of so many images are written.
    Written(usize, usize),
}

/// An image that does not decode.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct BadImage {
    /// Its index in the source or data set.
    pub index: usize,
    /// Its file's name, where it has one.
    pub name: String,
    /// Why it does not decode.
    pub reason: String,
}

/// What was packed.
#[derive(Clone, Debug, serde::Serialize)]
pub struct PackReport {
    /// The file that was written.
    pub path: PathBuf,
    /// `image folder`, `idx`, or `hdf5`.
    pub source_kind: &'static str,
    /// Images in it.
    pub images: usize,
    /// Classes in it, 0 without labels.
    pub classes: usize,
    /// Bytes of all encoded images.
    pub image_bytes: u64,
    /// Of these, images that were made smaller.
    pub made_smaller: usize,
    /// Images that were left out because they are unreadable.
    pub skipped: Vec<BadImage>,
    /// Files in the source that are neither JPEG nor PNG.
    pub ignored_files: usize,
}

/// Packs `source` (a tree of class folders, a data set in HDF5, or IDX) into `out`.
///
/// The same source gives the same bytes.
///
/// # Errors
/// When the source is none of these or has no image, when images are unreadable and not to be skipped, when `out`
/// exists and is not to be overwritten, or when reading or writing fails.
pub fn pack(
    source: &Path,
    out: &Path,
    options: &PackOptions,
    progress: &(dyn Fn(PackProgress) + Sync),
) -> Result<PackReport, DataError> {
    if out.exists() && !options.force {
        return Err(DataError::Exists { path: out.to_owned() });
    }
    let source = Source::open(source, options.split)?;
    if source.len() == 0 {
        return Err(DataError::Source {
            path: source.path.clone(),
            reason: "it has no JPEG or PNG files; put them into one folder per class".into(),
        });
    }
    let chosen = choose(source.len(), source.labels.as_deref(), options.limit);
    let smaller = match options.smaller {
        None => None,
        Some(Smaller { shorter_side, quality }) if shorter_side == 0 || !(1..=100).contains(&quality) => {
            return Err(DataError::Options(format!(
                "images cannot be stored with a shorter side of {shorter_side} and a quality of {quality}: give at least 1, and 1 to 100"
            )));
        }
        Some(smaller) => Some((smaller, Spool::beside(out)?)),
    };

    let total = chosen.len();
    let checked = parallel::map(
        total,
        options.threads,
        &|done| progress(PackProgress::Checked(done, total)),
        |position| check(&source, chosen[position], smaller.as_ref()),
    );
    let mut images = Vec::with_capacity(total);
    let mut bad = Vec::new();
    for (&index, result) in chosen.iter().zip(checked) {
        match result {
            Ok((len, spooled)) => images.push(Image { index, len, spooled }),
            Err(reason) => bad.push(BadImage { index, name: source.name(index), reason }),
        }
    }
    if !bad.is_empty() && (!options.skip_bad || images.is_empty()) {
        let examples: Vec<_> =
            bad.iter().take(3).map(|bad| format!("{} ({})", bad.name, bad.reason)).collect();
        let more = if bad.len() > examples.len() { ", …" } else { "" };
        return Err(DataError::BadSource {
            path: source.path.clone(),
            count: bad.len(),
            examples: examples.join(", ") + more,
        });
    }

    let labels: Option<Vec<i64>> =
        source.labels.as_ref().map(|labels| images.iter().map(|image| labels[image.index]).collect());
    let class_names = class_names(&source, options)?;
    let temporary = Temporary::beside(out)?;
    let tables =
        Tables { labels: labels.as_deref(), class_names: class_names.as_deref(), smaller: options.smaller };
    let spool = smaller.as_ref().map(|(_, spool)| spool);
    write(&temporary.path, (&source, spool), &images, tables, progress)?;
    temporary.rename(out)?;

    let mut classes = labels.unwrap_or_default();
    classes.retain(|&label| label >= 0);
    classes.sort_unstable();
    classes.dedup();
    Ok(PackReport {
        path: out.to_owned(),
        source_kind: source.kind(),
        images: images.len(),
        classes: classes.len(),
        image_bytes: images.iter().map(|image| image.len).sum(),
        made_smaller: images.iter().filter(|image| image.spooled.is_some()).count(),
        skipped: bad,
        ignored_files: source.ignored,
    })
}

/// An image that will be written.
struct Image {
    index: usize,
    len: u64,
    /// Where its bytes are in the spool, if it was made smaller.
    spooled: Option<u64>,
}

/// Smaller images, as they come from many threads, until they are written in their order. Gone when this is dropped.
struct Spool {
    file: File,
    path: PathBuf,
    end: AtomicU64,
}

impl Spool {
    fn beside(out: &Path) -> Result<Spool, DataError> {
        let directory = parent(out);
        fs::create_dir_all(directory).map_err(DataError::io("create", directory))?;
        let file = tempfile::tempfile_in(directory).map_err(DataError::io("write into", directory))?;
        Ok(Spool { file, path: directory.to_owned(), end: AtomicU64::new(0) })
    }

    fn add(&self, bytes: &[u8]) -> std::io::Result<u64> {
        let offset = self.end.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.file.write_all_at(bytes, offset).map(|()| offset)
    }

    fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, DataError> {
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, offset).map_err(DataError::io("read back from", &self.path))?;
        Ok(bytes)
    }
}

/// Decodes an image, and makes it smaller if that is asked for and needed: its length, and where it is spooled.
fn check(
    source: &Source,
    index: usize,
    smaller: Option<&(Smaller, Spool)>,
) -> Result<(u64, Option<u64>), String> {
    let encoded = source.read(index).map_err(|error| error.to_string())?;
    let image = decode::decode(&encoded)?;
    let large =
        |(Smaller { shorter_side, .. }, _): &&(Smaller, Spool)| image.width.min(image.height) > *shorter_side;
    let Some((Smaller { shorter_side, quality }, spool)) = smaller.filter(large) else {
        return Ok((encoded.len() as u64, None));
    };
    let size = shorter_side_to(*shorter_side, image.width, image.height);
    let whole = CropBox { top: 0, left: 0, height: image.height, width: image.width };
    let mut out = Rgb::default();
    Resampler::default().resize(&Region::whole(&image), whole, size, Interpolation::Bicubic, &mut out);
    let (width, height) = (out.width as usize, out.height as usize);
    let encoded =
        libjpeg_turbo_rs::compress(&out.pixels, width, height, PixelFormat::Rgb, *quality, Subsampling::S420)
            .map_err(|error| format!("it cannot be encoded: {error}"))?;
    let offset = spool.add(&encoded).map_err(|error| format!("it cannot be spooled: {error}"))?;
    Ok((encoded.len() as u64, Some(offset)))
}

/// The images of a subset, in source order: each class gets its equal share, and what a small class leaves over goes
/// to the others. Drawn by a fixed seed, since files sorted by name may be sorted by looks too.
fn choose(count: usize, labels: Option<&[i64]>, limit: Option<usize>) -> Vec<usize> {
    const PURPOSE: u64 = 0x6461_7461_0004_0000;
    let Some(limit) = limit.filter(|&limit| limit < count) else { return (0..count).collect() };
    let mut classes = std::collections::BTreeMap::<i64, Vec<usize>>::new();
    for index in 0..count {
        classes.entry(labels.map_or(0, |labels| labels[index])).or_default().push(index);
    }
    for (&label, members) in &mut classes {
        Rng::keyed(0, 0, label as u64, PURPOSE).shuffle(members);
    }
    // One from each class in turn, until there are enough.
    let mut chosen: Vec<usize> = (0..)
        .flat_map(|turn| classes.values().filter_map(move |members| members.get(turn)))
        .copied()
        .take(limit)
        .collect();
    chosen.sort_unstable();
    chosen
}

fn class_names(source: &Source, options: &PackOptions) -> Result<Option<Vec<String>>, DataError> {
    let Some(names) = &options.class_names else { return Ok(source.class_names.clone()) };
    let largest = source.labels.as_ref().and_then(|labels| labels.iter().max()).copied().unwrap_or(-1);
    if (names.len() as i64) <= largest {
        return Err(DataError::Options(format!(
            "the labels of {} go up to {largest}, and --class-names gives {}: give one for each class",
            source.path.display(),
            names.len()
        )));
    }
    Ok(Some(names.clone()))
}

/// What stands beside the images.
struct Tables<'a> {
    labels: Option<&'a [i64]>,
    class_names: Option<&'a [String]>,
    smaller: Option<Smaller>,
}

fn write(
    path: &Path,
    (source, spool): (&Source, Option<&Spool>),
    images: &[Image],
    tables: Tables,
    progress: &(dyn Fn(PackProgress) + Sync),
) -> Result<(), DataError> {
    let mut offsets = vec![0];
    offsets.extend(images.iter().scan(0, |end, image| {
        *end += image.len;
        Some(*end)
    }));
    let total = offsets[images.len()] as usize;
    // Nobody else knows this file's name yet.
    let file = hdf5::File::with_options()
        .with_fapl(|access| access.file_locking(false))
        .create(path)
        .map_err(DataError::hdf5(path, "create it"))?;
    let source_name = source.path.file_name().unwrap_or_default().to_string_lossy();
    let attributes = [
        ("format", text(packed::FORMAT)?),
        ("tool", text(concat!("jepa-host ", env!("CARGO_PKG_VERSION")))?),
        ("source", text(&source_name)?),
        ("source_kind", text(source.kind())?),
    ];
    let class_names = tables.class_names.map(|names| names.iter().map(|name| text(name)).collect());
    let class_names: Option<Vec<Text>> = class_names.transpose()?;
    let bytes = write_tables(&file, &attributes, total, &offsets, class_names.as_deref(), &tables)
        .map_err(DataError::hdf5(path, "write its tables"))?;

    const BLOCK: usize = 8 << 20;
    let mut block = Vec::with_capacity(BLOCK);
    let mut written = 0;
    for (position, image) in images.iter().enumerate() {
        let encoded = match (image.spooled, spool) {
            (Some(offset), Some(spool)) => spool.read(offset, image.len)?,
            _ => source.read(image.index)?,
        };
        if encoded.len() as u64 != image.len {
            let name = source.name(image.index);
            let reason = format!("{name} changed while it was being packed; pack it again");
            return Err(DataError::Source { path: source.path.clone(), reason });
        }
        block.extend(encoded);
        if block.len() >= BLOCK || position + 1 == images.len() {
            bytes
                .write_slice(&block, written..written + block.len())
                .map_err(DataError::hdf5(path, "write images"))?;
            written += block.len();
            block.clear();
        }
        progress(PackProgress::Written(position + 1, images.len()));
    }
    drop(bytes);
    file.close().map_err(DataError::hdf5(path, "close it"))
}

/// Writes everything but the images, and makes the data set that they go to.
fn write_tables(
    file: &hdf5::File,
    attributes: &[(&str, Text)],
    total: usize,
    offsets: &[u64],
    class_names: Option<&[Text]>,
    Tables { labels, smaller, .. }: &Tables,
) -> hdf5::Result<hdf5::Dataset> {
    for (name, value) in attributes {
        file.new_attr::<Text>().create(*name)?.write_scalar(value)?;
    }
    file.new_attr::<u32>().create("format_version")?.write_scalar(&packed::FORMAT_VERSION)?;
    if let Some(Smaller { shorter_side, quality }) = smaller {
        file.new_attr::<u32>().create("shorter_side")?.write_scalar(shorter_side)?;
        file.new_attr::<u8>().create("jpeg_quality")?.write_scalar(quality)?;
    }
    // No times are kept, so that the same images give the same file.
    let build = || file.new_dataset_builder().obj_track_times(false);
    build().with_data(offsets).create(packed::OFFSETS)?;
    if let Some(labels) = labels {
        build().with_data(*labels).create(packed::LABELS)?;
    }
    if let Some(names) = class_names {
        build().with_data(names).create(packed::CLASS_NAMES)?;
    }
    build()
        .alloc_time(Some(AllocTime::Early))
        .fill_time(FillTime::Never)
        .empty::<u8>()
        .shape([total])
        .create(packed::BYTES)
}

/// A file that is deleted unless it is given its real name.
struct Temporary {
    path: PathBuf,
}

impl Temporary {
    fn beside(out: &Path) -> Result<Temporary, DataError> {
        let directory = parent(out);
        fs::create_dir_all(directory).map_err(DataError::io("create", directory))?;
        let mut name = out.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.part", std::process::id()));
        Ok(Temporary { path: out.with_file_name(name) })
    }

    fn rename(self, out: &Path) -> Result<(), DataError> {
        let sync = |path: &Path| File::open(path).and_then(|file| file.sync_all());
        sync(&self.path).map_err(DataError::io("sync", &self.path))?;
        fs::rename(&self.path, out).map_err(DataError::io("write", out))?;
        let directory = parent(out);
        sync(directory).map_err(DataError::io("sync", directory))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Gone already, once it has its real name.
        let _ = fs::remove_file(&self.path);
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subset_is_even_over_the_classes_as_far_as_they_reach() {
        let labels: Vec<i64> = [0; 50].into_iter().chain([1; 3]).chain([2; 50]).collect();
        let chosen = choose(labels.len(), Some(&labels), Some(23));
        assert!(chosen.is_sorted());
        let count = |class| chosen.iter().filter(|&&index| labels[index] == class).count();
        assert_eq!((count(0), count(1), count(2)), (10, 3, 10));
        assert_eq!(chosen, choose(labels.len(), Some(&labels), Some(23)));
    }

    #[test]
    fn a_limit_beyond_the_source_takes_all_of_it() {
        assert_eq!(choose(4, None, Some(9)), [0, 1, 2, 3]);
        assert_eq!(choose(4, None, Some(2)).len(), 2);
    }
}
