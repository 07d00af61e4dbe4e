//! Why an evaluation has no result.

use tch::TchError;

/// Asked now and then whether to go on: an error ends the evaluation.
pub type GoOn<'a> = &'a dyn Fn() -> anyhow::Result<()>;

/// Features or labels that cannot be evaluated.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// A set without images, or features without dimensions.
    #[error("there are no features to evaluate: the data set is empty")]
    Empty,
    /// Features and labels that are not one row and one number per image.
    #[error(
        "features must be (N, D) floating point and labels (N) integers, but are {features} and {labels}"
    )]
    Shape {
        /// What the features are.
        features: String,
        /// What the labels are.
        labels: String,
    },
    /// An encoder that gives NaN or infinity.
    #[error("the features of image {image} are not finite: the encoder has diverged")]
    NotFinite {
        /// The first such image, counted from 0 in the order of evaluation.
        image: i64,
    },
    /// An image whose label is no class.
    #[error("image {image} has label {label}, and the {classes} classes are 0 to {}: the labels do not belong to these images, or are missing", classes - 1)]
    Label {
        /// The first such image, counted from 0 in the order of evaluation.
        image: i64,
        /// Its label.
        label: i64,
        /// The number of classes.
        classes: i64,
    },
    /// Two sets of features from different encoders.
    #[error("training features have {train} dimensions and held-out features {val}")]
    Dimensions {
        /// Of the training features.
        train: i64,
        /// Of the held-out features.
        val: i64,
    },
    /// An option of no use.
    #[error("{0}")]
    Option(&'static str),
    /// A linear probe that diverged on features that are finite.
    #[error(
        "the linear probe diverged in epoch {epoch}: the features are huge, or eval.linear.lr is too high"
    )]
    Diverged {
        /// Counted from 0.
        epoch: u64,
    },
    /// Images that cannot be read, or an encoder that fails.
    #[error("cannot compute features")]
    Encode(#[source] anyhow::Error),
    /// The caller wants it to end.
    #[error("the evaluation is stopped")]
    Stopped(#[source] anyhow::Error),
    /// libtorch refused a computation.
    #[error(transparent)]
    Torch(#[from] TchError),
}
