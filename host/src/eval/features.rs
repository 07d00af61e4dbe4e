//! Features of a whole set of images, computed once and then used by every probe.

use anyhow::Context as _;
use tch::{Device, Kind, TchError, Tensor};

use super::error::EvalError;
use crate::dist::Comm;

/// The pooled features of a set of images and their labels, in the same order, on one device.
#[derive(Debug)]
pub struct Features {
    /// (N, D), f32.
    pub x: Tensor,
    /// (N), i64: class numbers from 0.
    pub y: Tensor,
}

impl Features {
    /// Takes features in any floating-point type and labels in any integer type; both end on the features' device.
    ///
    /// # Errors
    /// No images, other shapes, NaN or infinity.
    pub fn new(x: &Tensor, y: &Tensor) -> Result<Self, EvalError> {
        let describe = |tensor: &Tensor| format!("{:?} of {:?}", tensor.size(), tensor.kind());
        let (rows, columns) = match (x.size().as_slice(), y.size().as_slice()) {
            ([rows, columns], [labels]) if rows == labels => (*rows, *columns),
            _ => return Err(EvalError::Shape { features: describe(x), labels: describe(y) }),
        };
        if rows == 0 || columns == 0 {
            return Err(EvalError::Empty);
        }
        let integers = matches!(y.kind(), Kind::Uint8 | Kind::Int8 | Kind::Int16 | Kind::Int | Kind::Int64);
        if !x.is_floating_point() || !integers {
            return Err(EvalError::Shape { features: describe(x), labels: describe(y) });
        }
        let x = x.detach().f_to_kind(Kind::Float)?.f_contiguous()?;
        let y = y.f_to_device(x.device())?.f_to_kind(Kind::Int64)?.f_contiguous()?;
        if let Some(image) = first(&x.f_isfinite()?.f_logical_not()?.f_any_dim(1, false)?)? {
            return Err(EvalError::NotFinite { image });
        }
        Ok(Features { x, y })
    }

    /// The number of images, N.
    pub fn images(&self) -> i64 {
        self.x.size()[0]
    }

    /// The number of dimensions, D.
    pub fn dimensions(&self) -> i64 {
        self.x.size()[1]
    }

    /// These and `other` on `device`; or both where they are, when they do not fit there together.
    ///
    /// # Errors
    /// Whatever else libtorch reports.
    pub fn near(self, other: Self, device: Device) -> Result<(Self, Self), EvalError> {
        let moved = |set: &Self| -> Result<Self, TchError> {
            Ok(Features { x: set.x.f_to_device(device)?, y: set.y.f_to_device(device)? })
        };
        match moved(&self).and_then(|first| Ok((first, moved(&other)?))) {
            Err(error) if error.to_string().contains("out of memory") => {
                let images = self.images() + other.images();
                tracing::warn!("the features of {images} images do not fit on {device:?}: the CPU evaluates");
                Ok((self, other))
            }
            pair => Ok(pair?),
        }
    }

    /// The first `count` images, or all where there are fewer.
    pub fn first(self, count: i64) -> Self {
        let count = count.clamp(0, self.images());
        Features { x: self.x.narrow(0, 0, count), y: self.y.narrow(0, 0, count) }
    }

    /// Refuses labels that are no class.
    fn check_labels(&self, classes: i64) -> Result<(), EvalError> {
        let low = self.y.f_lt(0)?;
        let wrong = low.f_logical_or(&self.y.f_ge(classes)?)?;
        match first(&wrong)? {
            Some(image) => {
                let label = self.y.f_int64_value(&[image])?;
                Err(EvalError::Label { image, label, classes })
            }
            None => Ok(()),
        }
    }

    /// Refuses a pair of sets that no probe can learn from and be judged on.
    pub(super) fn check_pair(train: &Features, val: &Features, classes: i64) -> Result<(), EvalError> {
        if train.dimensions() != val.dimensions() {
            return Err(EvalError::Dimensions { train: train.dimensions(), val: val.dimensions() });
        }
        if train.images() == 0 || val.images() == 0 {
            return Err(EvalError::Empty);
        }
        train.check_labels(classes)?;
        val.check_labels(classes)
    }
}

/// The place of the first true value of a bool (N).
fn first(marks: &Tensor) -> Result<Option<i64>, EvalError> {
    let places = marks.f_nonzero()?;
    Ok(if places.size()[0] == 0 { None } else { Some(places.f_int64_value(&[0, 0])?) })
}

/// Runs `encode`, images (B, 3, H, W) to features (B, D), over all batches of (images, labels), without gradients. The
/// result lies on the CPU, so that a large set needs no room on the device.
///
/// # Errors
/// Those of the batches and of `encode`; no images; NaN or infinity, at the first batch that has one.
pub fn extract(
    batches: impl IntoIterator<Item = anyhow::Result<(Tensor, Tensor)>>,
    encode: &mut dyn FnMut(&Tensor) -> anyhow::Result<Tensor>,
) -> Result<Features, EvalError> {
    let rounds = batches.into_iter().map(|batch| batch.map(Some));
    Ok(extract_together(rounds, encode, None)?.expect("alone, one has all"))
}

/// The same with other ranks: in each round, every rank has a batch, in their order, but for the last round, where some may
/// have none. The first rank gets all features, and the others nothing.
pub(super) fn extract_together(
    rounds: impl IntoIterator<Item = anyhow::Result<Option<(Tensor, Tensor)>>>,
    encode: &mut dyn FnMut(&Tensor) -> anyhow::Result<Tensor>,
    comm: Option<&Comm>,
) -> Result<Option<Features>, EvalError> {
    let _no_grad = tch::no_grad_guard();
    let first = comm.is_none_or(|comm| comm.rank() == 0);
    let (mut xs, mut ys, mut done) = (Vec::new(), Vec::new(), 0);
    for round in rounds {
        let mut own = None;
        if let Some((images, labels)) = round.map_err(EvalError::Encode)? {
            let x = encode(&images)
                .with_context(|| {
                    format!("images {done} to {}", done + images.size().first().unwrap_or(&0) - 1)
                })
                .map_err(EvalError::Encode)?;
            own = Some((x.f_to_device(Device::Cpu)?, labels.f_to_device(Device::Cpu)?));
        }
        let (x, y) = match (comm, own) {
            (None, Some(own)) => own,
            (None, None) => break,
            (Some(comm), own) => rows_of_all(comm, own).map_err(EvalError::Encode)?,
        };
        let features = Features::new(&x, &y).map_err(|error| match error {
            EvalError::NotFinite { image } => EvalError::NotFinite { image: done + image },
            error => error,
        })?;
        done += features.images();
        if first {
            xs.push(features.x);
            ys.push(features.y);
        }
    }
    if done == 0 {
        return Err(EvalError::Empty);
    }
    Ok(match first {
        true => Some(Features { x: Tensor::f_cat(&xs, 0)?, y: Tensor::f_cat(&ys, 0)? }),
        false => None,
    })
}

/// Features and labels of all ranks, in their order; some may have none.
fn rows_of_all(comm: &Comm, own: Option<(Tensor, Tensor)>) -> anyhow::Result<(Tensor, Tensor)> {
    let own = own
        .map(|(x, y)| -> Result<_, TchError> { Ok((x.f_to_kind(Kind::Float)?, y.f_to_kind(Kind::Int64)?)) });
    let own = own.transpose()?;
    let (rows, columns) =
        own.as_ref().map_or((0, 0), |(x, _)| (x.size()[0], x.size().get(1).copied().unwrap_or(0)));
    let shapes = Vec::<i64>::try_from(comm.all_gather(&Tensor::from_slice(&[rows, columns]))?)?;
    let most = |at: usize| shapes.iter().skip(at).step_by(2).copied().max().unwrap_or(0);
    let (most_rows, most_columns) = (most(0), most(1));
    let x = Tensor::zeros([most_rows, most_columns], (Kind::Float, Device::Cpu));
    let y = Tensor::zeros([most_rows], (Kind::Int64, Device::Cpu));
    if let Some((own_x, own_y)) = own {
        anyhow::ensure!(
            columns == most_columns,
            "features have {columns} dimensions here, {most_columns} elsewhere"
        );
        x.narrow(0, 0, rows).f_copy_(&own_x)?;
        y.narrow(0, 0, rows).f_copy_(&own_y)?;
    }
    let (x, y) = (comm.all_gather(&x)?, comm.all_gather(&y)?);
    let of_rank = |all: &Tensor| -> Result<Tensor, TchError> {
        let parts = (0..).zip(shapes.iter().step_by(2));
        Tensor::f_cat(
            &parts.map(|(rank, rows)| all.narrow(0, rank * most_rows, *rows)).collect::<Vec<_>>(),
            0,
        )
    };
    Ok((of_rank(&x)?, of_rank(&y)?))
}
