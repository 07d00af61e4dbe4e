//! What can be wrong with a data set, each as one sentence: what, where, why, and what to do about it.

use std::path::{Path, PathBuf};

/// Anything that goes wrong with images, labels, their file, or the pipeline. The command line exits with code 4, where a variant
/// does not say another.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file or directory cannot be opened, read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as in "cannot *read*".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file cannot be written, on a full disk for one. Exit code 1.
    #[error("cannot write {}: {reason}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// A directory where a data set belongs.
    #[error("{0} is a directory; `jepa-host data pack {0} OUT.h5` makes a data set of its images", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
    },
    /// The file does not start like HDF5.
    #[error(
        "{} is not an HDF5 file; pack images into one with `jepa-host data pack SOURCE OUT.h5`",
        path.display()
    )]
    NotHdf5 {
        /// The file.
        path: PathBuf,
    },
    /// The file is shorter than its own contents.
    #[error("{} is truncated: {reason}; copy or pack it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Which part is missing.
        reason: String,
    },
    /// The HDF5 library refuses the file or a part of it.
    #[error("{}: HDF5 cannot {action}: {reason}", path.display())]
    Hdf5 {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: String,
        /// What the library says.
        reason: String,
    },
    /// It is HDF5, but neither of the two layouts.
    #[error(
        "{} is not laid out as a data set: {reason}; expected a group `images` with data sets \"0\", \"1\", … of \
         encoded files (and `labels` likewise), or a file written by `jepa-host data pack`",
        path.display()
    )]
    Layout {
        /// The file.
        path: PathBuf,
        /// What differs.
        reason: String,
    },
    /// There is no image in it.
    #[error("{} holds no images; pack it again from a source that has some", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// As many labels as images are needed.
    #[error("{} holds {images} images but {labels} labels; pack it again from its source", path.display())]
    CountMismatch {
        /// The file.
        path: PathBuf,
        /// Number of images.
        images: usize,
        /// Number of labels.
        labels: usize,
    },
    /// Labels are needed, and there are none.
    #[error(
        "{} has {what}, and {needed_by} needs one for each image; add a group `labels` with one integer per image, or \
         pack it from class folders (`jepa-host data pack DIR OUT.h5`)",
        path.display()
    )]
    NoLabels {
        /// The file.
        path: PathBuf,
        /// "no labels", or which image has none.
        what: String,
        /// Who asked.
        needed_by: String,
    },
    /// A label that is no class.
    #[error(
        "{}: image {index} has label {label}, and the {classes} classes of {of} are 0 to {}; correct the label, or pack \
         the images again from class folders",
        path.display(), classes.saturating_sub(1)
    )]
    Label {
        /// The file.
        path: PathBuf,
        /// The first such image.
        index: usize,
        /// Its label.
        label: i64,
        /// How many classes there are.
        classes: usize,
        /// Who says so.
        of: &'static str,
    },
    /// The same label is another class in another data set.
    #[error(
        "{0}: class {label} is `{name}`, and in {of} it is `{name_there}`, so the same label means another class. Pack it again from its \
         class folders, by the classes of the other: `jepa-host data pack DIR OUT.h5 --classes-of {1}`; or, where they are but \
         spelt in another way, with the names of the other: `jepa-host data pack {0} OUT.h5 --class-names …`",
        path.display(), there.display()
    )]
    Classes {
        /// The file.
        path: PathBuf,
        /// The first such label.
        label: usize,
        /// Its name.
        name: String,
        /// What the other data set is there for.
        of: &'static str,
        /// The other file.
        there: PathBuf,
        /// Its name there.
        name_there: String,
    },
    /// Images that would have to be enlarged.
    #[error(
        "{}: most images are smaller than data.size = {size}; half of them have a side of {side} px or less. Lower \
         data.size, or enlarge them with data.upscale=true",
        path.display()
    )]
    Small {
        /// The file.
        path: PathBuf,
        /// The median of the images' shorter sides, in pixels.
        side: u32,
        /// Configured.
        size: usize,
    },
    /// An index beyond the last image.
    #[error("{} has {len} images, so there is no image {index}", path.display())]
    OutOfRange {
        /// The file.
        path: PathBuf,
        /// The index.
        index: u64,
        /// Number of images.
        len: usize,
    },
    /// One image does not decode, and the policy is to stop.
    #[error(
        "{}: {image} is corrupt: {reason}; `jepa-host data verify --deep` lists all that are, and \
         data.on_error=\"replace\" trains on another one instead",
        path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What to call it.
        image: String,
        /// Its number.
        index: u64,
        /// Why it does not decode.
        reason: String,
    },
    /// Replacing corrupt images found only more corrupt images.
    #[error(
        "{}: {image} is corrupt ({reason}), and so are the {tries} others drawn to replace it; run \
         `jepa-host data verify --deep` on the file",
        path.display()
    )]
    TooManyCorrupt {
        /// The file.
        path: PathBuf,
        /// The first image of the chain.
        image: String,
        /// Why that one does not decode.
        reason: String,
        /// How many others were tried.
        tries: u32,
    },
    /// A view that cannot be made.
    #[error("view `{view}`: {reason}")]
    View {
        /// The view's name.
        view: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Loader options that fit neither each other nor the data.
    #[error("{0}")]
    Options(String),
    /// A worker thread panicked: a fault of this program.
    #[error(
        "the loader panicked on {image} of {}: {message}; this is a fault of jepa-host, please report it",
        path.display()
    )]
    Panic {
        /// The file.
        path: PathBuf,
        /// The image.
        image: String,
        /// The panic's message.
        message: String,
    },
    /// Something to pack cannot be packed.
    #[error("cannot pack {}: {reason}", path.display())]
    Source {
        /// The directory or file.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// Some images to pack do not decode.
    #[error(
        "cannot pack {}: {} unreadable:{examples}repair or remove {}, or leave {2} out with --skip-bad",
        path.display(), of_images(*count), if *count == 1 { "it" } else { "them" }
    )]
    BadSource {
        /// The directory or file.
        path: PathBuf,
        /// How many.
        count: usize,
        /// The first of them, with reasons, and what stands between them and the advice.
        examples: String,
    },
    /// A check of all images found damaged ones, which have been listed.
    #[error(
        "{0}: {bad} of {images} images are damaged{1}; train with data.on_error=\"replace\", or pack the file again \
         without them: `jepa-host data pack {0} OUT.h5 --skip-bad`",
        path.display(), if *deep { "" } else { " (--deep decodes them too)" }
    )]
    BadImages {
        /// The file.
        path: PathBuf,
        /// How many.
        bad: usize,
        /// Of how many.
        images: usize,
        /// Whether they were decoded.
        deep: bool,
    },
    /// Somebody asked for the end.
    #[error("packing was interrupted")]
    Interrupted,
    /// The output is there already.
    #[error("{} exists already; choose another name, or overwrite it with --force", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
}

/// As in "2 of its images are".
fn of_images(count: usize) -> String {
    format!("{count} of its images {}", if count == 1 { "is" } else { "are" })
}

impl DataError {
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> DataError {
        let path = path.to_owned();
        move |source| DataError::Io { action, path, source }
    }

    pub(super) fn write(path: &Path) -> impl FnOnce(std::io::Error) -> DataError {
        let path = path.to_owned();
        move |error| DataError::Write { path, reason: error.to_string() }
    }

    /// Of a file that the HDF5 library writes, whose words are the system's and many more.
    pub(super) fn write_hdf5(path: &Path) -> impl FnOnce(hdf5::Error) -> DataError {
        let path = path.to_owned();
        move |error| {
            let all = error.to_string();
            let of_system = all.split_once("error message = '").and_then(|(_, rest)| rest.split_once('\''));
            let reason = of_system.map_or(all.as_str(), |(reason, _)| reason).to_owned();
            DataError::Write { path, reason }
        }
    }

    pub(super) fn hdf5(path: &Path, action: impl Into<String>) -> impl FnOnce(hdf5::Error) -> DataError {
        let (path, action) = (path.to_owned(), action.into());
        move |error| DataError::Hdf5 { path, action, reason: error.to_string() }
    }

    pub(super) fn layout(path: &Path, reason: impl Into<String>) -> DataError {
        DataError::Layout { path: path.to_owned(), reason: reason.into() }
    }
}
