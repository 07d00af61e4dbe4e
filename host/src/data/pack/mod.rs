//! Writes a packed data set: all images of a source in one contiguous run, with labels, names and provenance.
//!
//! First every image is read, decoded and, if that is wanted, made smaller, by many threads; so a file that exists is a
//! file that trains. What is done is kept in a [`Journal`], from which a pack that was killed goes on. Then the file is
//! [written](write): under another name, synced and renamed, so nothing less than all of it ever has the real name.

mod journal;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use jepa_plugin_api::{Interpolation, Rng};
use libjpeg_turbo_rs::{PixelFormat, Subsampling};
use sha2::{Digest, Sha256};

use self::journal::{Journal, Packable, Stamp};
use self::write::{Tables, write};
use super::augment::shorter_side_to;
use super::decode::{Region, Rgb};
use super::error::DataError;
use super::packed::{Text, text};
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
    /// Classes by whose places in this list the source's are labelled, as in another data set.
    pub label_by: Option<Vec<String>>,
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

/// Is told how far it is, and says whether to go on.
pub type Progress<'a> = dyn Fn(PackProgress) -> ControlFlow<()> + Sync + 'a;

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
    /// Files in the source that are neither JPEG nor PNG by their names.
    pub ignored_files: usize,
    /// How many of these have each extension, in lower case and with its point.
    pub ignored_by_extension: BTreeMap<String, usize>,
}

/// Packs `source` (a tree of class folders, a data set in HDF5, or IDX) into `out`.
///
/// The same source gives the same bytes. When it fails or is killed, or `progress` breaks it off, `OUT.packing` stays, and the same
/// call goes on from there.
///
/// # Errors
/// When the source is none of these or has no image, when images are unreadable and not to be skipped, when `out`
/// exists and is not to be overwritten, or when reading or writing fails; [`DataError::Interrupted`].
pub fn pack(
    source: &Path,
    out: &Path,
    options: &PackOptions,
    progress: &Progress,
) -> Result<PackReport, DataError> {
    // A link is not replaced, but what it leads to.
    let led_to =
        out.is_symlink().then(|| out.canonicalize()).transpose().map_err(DataError::io("follow", out))?;
    let out = led_to.as_deref().unwrap_or(out);
    let exists = || match out.metadata() {
        Ok(metadata) if !metadata.is_file() => Err(DataError::Options(format!(
            "{} is {}, and cannot become a data set: give another name",
            out.display(),
            if metadata.is_dir() { "a directory" } else { "no file" }
        ))),
        Ok(_) if !options.force => Err(DataError::Exists { path: out.to_owned() }),
        _ => Ok(()),
    };
    exists()?;
    if let Some(Smaller { shorter_side, quality }) = options.smaller
        && (shorter_side == 0 || !(1..=100).contains(&quality))
    {
        return Err(DataError::Options(format!(
            "images cannot be stored with a shorter side of {shorter_side} and a quality of {quality}: give at least 1, and 1 to 100"
        )));
    }
    let mut source = Source::open(source, options.split)?;
    if let Some(names) = &options.label_by {
        source.relabel(names.clone())?;
    }
    if source.len() == 0 {
        return Err(DataError::Source {
            path: source.path.clone(),
            reason: "it has no JPEG or PNG files; put them into one folder per class".into(),
        });
    }
    let class_names = class_names(&source, options)?;
    let chosen = choose(source.len(), source.labels.as_deref(), options.limit);
    let journal = Journal::open(out)?;
    // Again, for another process may have made it before this one could.
    let packed = exists()
        .and_then(|()| pack_with(&journal, &source, &chosen, class_names.as_deref(), out, options, progress));
    match &packed {
        Ok(_) => journal.remove(),
        Err(_) => journal.keep(),
    }
    packed
}

fn pack_with(
    journal: &Journal,
    source: &Source,
    chosen: &[usize],
    class_names: Option<&[Text]>,
    out: &Path,
    options: &PackOptions,
    progress: &Progress,
) -> Result<PackReport, DataError> {
    let total = chosen.len();
    let interrupted = AtomicBool::new(false);
    let checked = parallel::try_map(
        total,
        options.threads,
        &|done| {
            interrupted.fetch_or(progress(PackProgress::Checked(done, total)).is_break(), Ordering::Relaxed);
        },
        |position| match interrupted.load(Ordering::Relaxed) {
            false => check(source, chosen[position], options.smaller, journal),
            true => Err(DataError::Interrupted),
        },
    )?;
    let mut images = Vec::with_capacity(total);
    let mut bad = Vec::new();
    for (&index, result) in chosen.iter().zip(checked) {
        match result {
            Ok(image) => images.push((index, image)),
            Err(reason) => bad.push(BadImage { index, name: source.name(index), reason }),
        }
    }
    if !bad.is_empty() && (!options.skip_bad || images.is_empty()) {
        let (path, examples) = (source.path.clone(), listed(&bad));
        if options.skip_bad {
            let reason = format!("none of its images can be read:{examples}see whether it is the right one");
            return Err(DataError::Source { path, reason });
        }
        return Err(DataError::BadSource { path, count: bad.len(), examples });
    }
    warn_of_lost_classes(source, class_names, chosen, &bad);

    let labels: Option<Vec<i64>> =
        source.labels.as_ref().map(|labels| images.iter().map(|(index, _)| labels[*index]).collect());
    let tables = Tables { labels: labels.as_deref(), class_names, smaller: options.smaller };
    write(out, source, journal, &images, &tables, progress)?;

    let mut classes = labels.unwrap_or_default();
    classes.retain(|&label| label >= 0);
    classes.sort_unstable();
    classes.dedup();
    Ok(PackReport {
        path: out.to_owned(),
        source_kind: source.kind(),
        images: images.len(),
        classes: classes.len(),
        image_bytes: images.iter().map(|(_, image)| image.packed_len).sum(),
        made_smaller: images.iter().filter(|(_, image)| image.smaller.is_some()).count(),
        skipped: bad,
        ignored_files: source.ignored.values().sum(),
        ignored_by_extension: source.ignored.clone(),
    })
}

/// Images with what is wrong with them, to stand behind a colon and before advice: one in the same line, several in lines of their own.
fn listed(bad: &[BadImage]) -> String {
    const MOST: usize = 20;
    let one = |bad: &BadImage| format!("{} ({})", bad.name, bad.reason);
    if let [only] = bad {
        return format!(" {}; ", one(only));
    }
    let lines = bad
        .iter()
        .take(MOST)
        .map(one)
        .chain((bad.len() > MOST).then(|| format!("and {} more", bad.len() - MOST)));
    lines.map(|line| format!("\n  {line}")).collect::<String>() + "\n"
}

/// Says which classes have no image left.
fn warn_of_lost_classes(source: &Source, names: Option<&[Text]>, chosen: &[usize], bad: &[BadImage]) {
    let Some(labels) = &source.labels else { return };
    let left_out: BTreeSet<usize> = bad.iter().map(|bad| bad.index).collect();
    let left: BTreeSet<i64> =
        chosen.iter().filter(|index| !left_out.contains(index)).map(|index| labels[*index]).collect();
    let lost: BTreeSet<i64> =
        left_out.iter().map(|index| labels[*index]).filter(|label| !left.contains(label)).collect();
    for label in lost {
        let name =
            names.and_then(|names| names.get(label as usize)).map(|name| format!(", {}", name.as_str()));
        tracing::warn!(
            "class {label}{}: none of its images can be read, and none is packed",
            name.unwrap_or_default()
        );
    }
}

/// Raised when something else is made of the same image.
const MADE: u32 = 1;

/// Of an image as it is now, as far as the file system tells, and what is to be made of it.
fn stamp(source: &Source, index: usize, smaller: Option<Smaller>) -> Result<Stamp, DataError> {
    Ok(Sha256::digest(format!("{MADE} {smaller:?} {}", source.stamp(index)?)).into())
}

/// Decodes an image, and makes it smaller if that is asked for and needed. The inner error says why it does not decode.
fn check(
    source: &Source,
    index: usize,
    smaller: Option<Smaller>,
    journal: &Journal,
) -> Result<Result<Packable, String>, DataError> {
    let unreadable = |error: DataError| match error {
        DataError::Corrupt { reason, .. } => Ok(Err(reason)),
        DataError::Io { ref source, .. }
            if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) =>
        {
            Ok(Err(source.to_string()))
        }
        // On another day it may be read.
        error => Err(error),
    };
    let stamp = match stamp(source, index, smaller) {
        Ok(stamp) => stamp,
        Err(error) => return unreadable(error),
    };
    if let Some(image) = journal.find(&stamp) {
        return Ok(Ok(image));
    }
    let encoded = match source.read(index) {
        Ok(encoded) => encoded,
        Err(error) => return unreadable(error),
    };
    let digest = Sha256::digest(&encoded).into();
    let made = decode::decode(&encoded).and_then(|image| match smaller {
        Some(smaller) if image.width.min(image.height) > smaller.shorter_side => {
            make_smaller(&image, smaller).map(Some)
        }
        _ => Ok(None),
    });
    match made {
        Ok(made) => journal.add(&stamp, digest, encoded.len() as u64, made.as_deref()).map(Ok),
        Err(reason) => Ok(Err(reason)),
    }
}

/// Resized as torchvision's `Resize` does it, and encoded as a JPEG with colours at half the resolution.
fn make_smaller(image: &Rgb, Smaller { shorter_side, quality }: Smaller) -> Result<Vec<u8>, String> {
    let size = shorter_side_to(shorter_side, image.width, image.height);
    let whole = CropBox { top: 0, left: 0, height: image.height, width: image.width };
    let mut out = Rgb::default();
    Resampler::default().resize(&Region::whole(image), whole, size, Interpolation::Bicubic, &mut out);
    let (width, height) = (out.width as usize, out.height as usize);
    libjpeg_turbo_rs::compress(&out.pixels, width, height, PixelFormat::Rgb, quality, Subsampling::S420)
        .map_err(|error| format!("it cannot be encoded: {error}"))
}

/// The images of a subset, in source order: each class gets its equal share, and what a small class leaves over goes
/// to the others. Drawn by a fixed seed, since files sorted by name may be sorted by looks too.
fn choose(count: usize, labels: Option<&[i64]>, limit: Option<usize>) -> Vec<usize> {
    const PURPOSE: u64 = 0x6461_7461_0004_0000;
    let Some(limit) = limit.filter(|&limit| limit < count) else { return (0..count).collect() };
    let mut classes = BTreeMap::<i64, Vec<usize>>::new();
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

fn class_names(source: &Source, options: &PackOptions) -> Result<Option<Vec<Text>>, DataError> {
    let names = match (&options.class_names, &source.class_names) {
        (Some(names), _) => {
            let largest =
                source.labels.as_ref().and_then(|labels| labels.iter().max()).copied().unwrap_or(-1);
            if (names.len() as i64) <= largest {
                return Err(DataError::Options(format!(
                    "the labels of {} go up to {largest}, and --class-names gives {}: give one for each class",
                    source.path.display(),
                    names.len()
                )));
            }
            names
        }
        (None, Some(names)) => names,
        (None, None) => return Ok(None),
    };
    names.iter().map(|name| text(name)).collect::<Result<_, _>>().map(Some)
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
