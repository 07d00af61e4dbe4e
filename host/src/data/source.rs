//! What can be packed: class folders of image files, an existing HDF5 file, or IDX files.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::dataset::Dataset;
use super::error::DataError;
use super::idx::{self, Idx};
use super::pack::Split;
use crate::nearest::nearest;

/// Folders that hold the class folders of one part of a data set, and are no classes.
const PARTS: [&str; 5] = ["train", "val", "valid", "validation", "test"];

/// Images to pack, in the order in which they will lie in the file.
pub(super) struct Source {
    kind: Kind,
    /// The directory or file that was read.
    pub path: PathBuf,
    pub labels: Option<Vec<i64>>,
    pub class_names: Option<Vec<String>>,
    /// Files that are not JPEG or PNG by their names: how many of each extension.
    pub ignored: Ignored,
    /// Of the file that has them all, if one has.
    stamp: String,
}

/// How many files have each extension, in lower case and with its point; none is empty.
pub(super) type Ignored = BTreeMap<String, usize>;

/// Extensions of images that are not packed.
const OTHER_IMAGES: [&str; 9] = [".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".jp2", ".ppm"];

#[expect(clippy::large_enum_variant, reason = "there is one source")]
enum Kind {
    Folder(Vec<PathBuf>),
    Hdf5(Dataset),
    Idx(Idx),
}

impl Source {
    /// Finds out what `path` is.
    pub fn open(path: &Path, split: Option<Split>) -> Result<Source, DataError> {
        let refuse = |reason: &str| DataError::Source { path: path.to_owned(), reason: reason.to_owned() };
        let metadata = fs::metadata(path).map_err(DataError::io("open", path))?;
        if metadata.is_dir() {
            return match idx::find_images(path, split)? {
                Some(images) => Source::idx(&images),
                None if split.is_some() => Err(DataError::Options(format!(
                    "--split chooses between IDX files, and {} holds none",
                    path.display()
                ))),
                None => Source::folder(path),
            };
        }
        if split.is_some() {
            return Err(DataError::Options(format!(
                "--split chooses between the IDX files of a directory, and {} is a file",
                path.display()
            )));
        }
        if idx::is_idx(path) {
            return Source::idx(path);
        }
        let mut start = [0; 8];
        let is_hdf5 = File::open(path).is_ok_and(|mut file| file.read_exact(&mut start).is_ok())
            && start == *b"\x89HDF\r\n\x1a\n";
        if !is_hdf5 {
            return Err(refuse("it is neither a directory of class folders nor an HDF5 or IDX file"));
        }
        let dataset = Dataset::open(path)?;
        Ok(Source {
            path: path.to_owned(),
            labels: dataset.labels().map(<[_]>::to_vec),
            class_names: dataset.class_names().map(<[_]>::to_vec),
            ignored: Ignored::new(),
            stamp: file_stamp(path)?,
            kind: Kind::Hdf5(dataset),
        })
    }

    fn idx(path: &Path) -> Result<Source, DataError> {
        let mut idx = Idx::open(path)?;
        let labels = idx.labels.take();
        let stamp = file_stamp(path)?;
        Ok(Source {
            kind: Kind::Idx(idx),
            path: path.to_owned(),
            labels,
            class_names: None,
            ignored: Ignored::new(),
            stamp,
        })
    }

    /// Class folders, sorted by name; in each the files of all levels, sorted by path. A directory that holds images
    /// and no folders is a set without labels.
    fn folder(path: &Path) -> Result<Source, DataError> {
        let (mut folders, loose) = list(path)?;
        folders.retain(|folder| !is_hidden(folder));
        let mut ignored = Ignored::new();
        let mut files = Vec::new();
        if folders.is_empty() {
            keep_images(loose, &mut files, &mut ignored);
            warn_of_other_images(path, &ignored);
            return Ok(Source {
                kind: Kind::Folder(files),
                path: path.to_owned(),
                labels: None,
                class_names: None,
                ignored,
                stamp: String::new(),
            });
        }
        let names = folders.iter().filter_map(|folder| folder.file_name()?.to_str());
        let parts: Vec<&str> = names.filter(|name| PARTS.contains(name)).collect();
        if let [first, ..] = parts[..] {
            return Err(DataError::Source {
                path: path.to_owned(),
                reason: format!(
                    "{} would become a class; pack each part of the data set by itself: {}, …",
                    parts.join(" and "),
                    path.join(first).display()
                ),
            });
        }
        if let [only] = &folders[..] {
            let (within, own) = list(only)?;
            if !within.is_empty() && own.is_empty() {
                tracing::warn!(
                    "all images will be of one class, {}, which has folders of its own: if those are the classes, pack {}",
                    only.file_name().unwrap_or_default().display(),
                    only.display()
                );
            }
        }
        let (mut beside, path_of) = (Vec::new(), |file: &PathBuf| {
            file.file_name().unwrap_or_default().to_string_lossy().into_owned()
        });
        keep_images(loose, &mut beside, &mut ignored);
        if !beside.is_empty() {
            let names: Vec<String> = beside.iter().take(3).map(path_of).collect();
            let more = if beside.len() > names.len() { ", …" } else { "" };
            tracing::warn!(
                "{}: {} lie beside the class folders, have no class, and are left out ({}{more})",
                path.display(),
                beside.len(),
                names.join(", ")
            );
        }
        let mut labels = Vec::new();
        let mut class_names = Vec::new();
        for (label, folder) in folders.iter().enumerate() {
            let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let before = files.len();
            walk(folder, &mut files, &mut ignored)?;
            if files.len() == before {
                tracing::warn!(
                    "class folder {} has no images; its label {label} stays unused",
                    folder.display()
                );
            }
            labels.resize(files.len(), label as i64);
            class_names.push(name);
        }
        warn_of_other_images(path, &ignored);
        Ok(Source {
            kind: Kind::Folder(files),
            path: path.to_owned(),
            labels: Some(labels),
            class_names: Some(class_names),
            ignored,
            stamp: String::new(),
        })
    }

    /// Gives classes the labels that they have in the list `names`.
    ///
    /// # Errors
    /// When the source names no classes, or one that is not in the list.
    pub fn relabel(&mut self, names: Vec<String>) -> Result<(), DataError> {
        let (Some(own), Some(labels)) = (&self.class_names, &mut self.labels) else {
            let reason = "its classes have no names, so --classes-of cannot find them".to_owned();
            return Err(DataError::Source { path: self.path.clone(), reason });
        };
        let place = |name: &String| {
            names.iter().position(|other| other == name).ok_or_else(|| {
                let close = nearest(name, names.iter().map(String::as_str));
                let close = close.map(|close| format!(" (did you mean `{close}`?)")).unwrap_or_default();
                let reason = format!(
                    "its class `{name}` is none of the {} that --classes-of gives{close}",
                    names.len()
                );
                DataError::Source { path: self.path.clone(), reason }
            })
        };
        // Only of classes that have images.
        let mut places = BTreeMap::new();
        for label in labels.iter_mut().filter(|label| **label >= 0) {
            let there = match places.get(label) {
                Some(there) => *there,
                None => place(&own[*label as usize])? as i64,
            };
            places.insert(*label, there);
            *label = there;
        }
        self.class_names = Some(names);
        Ok(())
    }

    /// What the file's `source_kind` will say.
    pub fn kind(&self) -> &'static str {
        match self.kind {
            Kind::Folder(_) => "image folder",
            Kind::Hdf5(_) => "hdf5",
            Kind::Idx(_) => "idx",
        }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        match &self.kind {
            Kind::Folder(files) => files.len(),
            Kind::Hdf5(dataset) => dataset.len(),
            Kind::Idx(idx) => idx.len(),
        }
    }

    /// What to call an image in a message.
    pub fn name(&self, index: usize) -> String {
        match &self.kind {
            Kind::Folder(_) | Kind::Idx(_) => self.file(index).unwrap_or_else(|| format!("image {index}")),
            Kind::Hdf5(dataset) => dataset.image_name(index),
        }
    }

    /// The file of an image, relative to the directory that is packed, where it has one of its own.
    pub fn file(&self, index: usize) -> Option<String> {
        match &self.kind {
            Kind::Folder(files) => {
                Some(files[index].strip_prefix(&self.path).unwrap_or(&files[index]).display().to_string())
            }
            Kind::Hdf5(dataset) => dataset.file_name(index).map(str::to_owned),
            Kind::Idx(_) => None,
        }
    }

    /// Another for every image, and another when the image changes, as far as the file system tells.
    pub fn stamp(&self, index: usize) -> Result<String, DataError> {
        match &self.kind {
            Kind::Folder(files) => file_stamp(&files[index]),
            Kind::Hdf5(_) | Kind::Idx(_) => Ok(format!("{index} {}", self.stamp)),
        }
    }

    /// The encoded bytes of an image; the same at every call.
    pub fn read(&self, index: usize) -> Result<Vec<u8>, DataError> {
        match &self.kind {
            Kind::Folder(files) => fs::read(&files[index]).map_err(DataError::io("read", &files[index])),
            Kind::Hdf5(dataset) => dataset.read(index),
            Kind::Idx(idx) => Ok(idx.encode(index)),
        }
    }
}

/// The file, its length, and when it was written.
fn file_stamp(path: &Path) -> Result<String, DataError> {
    let metadata = path.metadata().map_err(DataError::io("open", path))?;
    let absolute = std::path::absolute(path).map_err(DataError::io("open", path))?;
    Ok(format!("{absolute:?} {} {}.{}", metadata.len(), metadata.mtime(), metadata.mtime_nsec()))
}

/// The folders and the files of a directory, each sorted by name. Links are followed.
fn list(directory: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>), DataError> {
    let mut paths = fs::read_dir(directory)
        .and_then(|entries| {
            entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>()
        })
        .map_err(DataError::io("list", directory))?;
    paths.sort();
    Ok(paths.into_iter().partition(|path| path.is_dir()))
}

/// Adds the images of a folder: its own first, then those of its folders.
fn walk(folder: &Path, files: &mut Vec<PathBuf>, ignored: &mut Ignored) -> Result<(), DataError> {
    let (folders, own) = list(folder)?;
    keep_images(own, files, ignored);
    folders.iter().filter(|folder| !is_hidden(folder)).try_for_each(|folder| walk(folder, files, ignored))
}

fn keep_images(candidates: Vec<PathBuf>, files: &mut Vec<PathBuf>, ignored: &mut Ignored) {
    for path in candidates {
        let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default().to_ascii_lowercase();
        if matches!(extension.as_str(), "jpg" | "jpeg" | "png") && !is_hidden(&path) {
            files.push(path);
        } else {
            let extension = if extension.is_empty() { extension } else { format!(".{extension}") };
            *ignored.entry(extension).or_default() += 1;
        }
    }
}

/// Somebody may think that they are packed.
fn warn_of_other_images(path: &Path, ignored: &Ignored) {
    let other = ignored.iter().filter(|(extension, _)| OTHER_IMAGES.contains(&extension.as_str()));
    let counts: Vec<String> = other.map(|(extension, count)| format!("{count} {extension}")).collect();
    if !counts.is_empty() {
        tracing::warn!(
            "{}: images that are neither JPEG nor PNG are left out ({}): convert them first",
            path.display(),
            counts.join(", ")
        );
    }
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}
