//! Writes a packed data set: all images of a source in one contiguous run, with labels, names and provenance.
//!
//! Every image is decoded once before anything is written, so a file that exists is a file that trains. It is
//! written under another name, synced and renamed: a broken-off pack leaves no half file behind its real name.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use hdf5::dataset::{AllocTime, FillTime};
use jepa_plugin_api::Rng;

use super::error::DataError;
use super::packed::{self, text};
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

    let total = chosen.len();
    let checked = parallel::map(
        total,
        options.threads,
        &|done| progress(PackProgress::Checked(done, total)),
        |position| check(&source, chosen[position]),
    );
    let mut images = Vec::with_capacity(total);
    let mut bad = Vec::new();
    for (&index, result) in chosen.iter().zip(checked) {
        match result {
            Ok(len) => images.push(Image { index, len }),
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
    write(&temporary.path, &source, &images, labels.as_deref(), class_names.as_deref(), progress)?;
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
        skipped: bad,
        ignored_files: source.ignored,
    })
}

/// An image that will be written.
struct Image {
    index: usize,
    len: u64,
}

fn check(source: &Source, index: usize) -> Result<u64, String> {
    let encoded = source.read(index).map_err(|error| error.to_string())?;
    decode::decode(&encoded)?;
    Ok(encoded.len() as u64)
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

fn write(
    path: &Path,
    source: &Source,
    images: &[Image],
    labels: Option<&[i64]>,
    class_names: Option<&[String]>,
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
    let bytes = write_tables(&file, source, total, &offsets, labels, class_names)
        .map_err(DataError::hdf5(path, "write its tables"))?;

    const BLOCK: usize = 8 << 20;
    let mut block = Vec::with_capacity(BLOCK);
    let mut written = 0;
    for (position, image) in images.iter().enumerate() {
        let encoded = source.read(image.index)?;
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
    source: &Source,
    total: usize,
    offsets: &[u64],
    labels: Option<&[i64]>,
    class_names: Option<&[String]>,
) -> hdf5::Result<hdf5::Dataset> {
    let source_name = source.path.file_name().unwrap_or_default().to_string_lossy();
    let attributes = [
        ("format", packed::FORMAT),
        ("tool", concat!("jepa-host ", env!("CARGO_PKG_VERSION"))),
        ("source", &source_name),
        ("source_kind", source.kind()),
    ];
    for (name, value) in attributes {
        file.new_attr::<hdf5::types::VarLenUnicode>().create(name)?.write_scalar(&text(value))?;
    }
    file.new_attr::<u32>().create("format_version")?.write_scalar(&packed::FORMAT_VERSION)?;
    // No times are kept, so that the same images give the same file.
    let build = || file.new_dataset_builder().obj_track_times(false);
    build().with_data(offsets).create(packed::OFFSETS)?;
    if let Some(labels) = labels {
        build().with_data(labels).create(packed::LABELS)?;
    }
    if let Some(names) = class_names {
        let names: Vec<_> = names.iter().map(|name| text(name)).collect();
        build().with_data(&names).create(packed::CLASS_NAMES)?;
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
