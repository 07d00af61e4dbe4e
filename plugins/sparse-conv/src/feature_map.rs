//! The operations of a network, dense or over visible positions.

use std::rc::Rc;

use jepa_plugin_api::nn::{BatchNorm, Conv2d, LayerNorm2d, Norm};
use jepa_plugin_api::{Result, bail, ensure, ranks};
use tch::Tensor;

use crate::canvas::{gather, has_kernels, scatter};
use crate::conv::{self, Window};
use crate::cuda::{self, Sides};
use crate::visible::{Cells, Level, Size};
use crate::way::Way;
use crate::{Visible, pool};

/// The features `(B, C, H, W)` of a batch, all of them or those at visible cells.
///
/// There is no second derivative, and what an operation was given or has made must not be changed in place before the backward
/// pass.
#[derive(Debug)]
pub struct FeatureMap(Values);

#[derive(Debug)]
enum Values {
    /// `(B, C, H, W)`, channels last in memory.
    Dense(Tensor),
    /// `(N, C)` at the visible positions of a map of this size: all others are zero.
    Sparse(Tensor, Size, Rc<Visible>),
}
use Values::{Dense, Sparse};

impl FeatureMap {
    /// The features `map` `(B, C, H, W)`: all of them without a mask; with one, bool `(B, 1, f, f)` and true where
    /// visible, what is visible of them. The rest then counts as zero, whatever is there.
    ///
    /// # Errors
    /// When the mask does not fit, or shows nothing.
    pub fn new(map: &Tensor, mask: Option<&Tensor>) -> Result<Self> {
        match mask {
            None => Ok(Self::dense(map)),
            Some(mask) => Self::sparse(map, &Rc::new(Visible::new(mask, map.device())?)),
        }
    }

    /// The pixels of `images` `(B, 3, S, S)` at the entrance of a network with downsample ratio r; the mask, if any, is
    /// bool `(B, 1, S / r, S / r)`. Without one, S is any number of pixels that the network takes.
    ///
    /// # Errors
    /// When masked images do not divide into cells of r pixels, and those of [`new`](Self::new).
    pub fn images(images: &Tensor, mask: Option<&Tensor>, downsample: i64) -> Result<Self> {
        let (shape, r) = (images.size(), downsample);
        let &[batch, 3, height, width] = shape.as_slice() else {
            bail!("a backbone takes images (B, 3, S, S), not {shape:?}");
        };
        if let Some(mask) = mask {
            ensure!(
                height > 0 && width > 0 && height % r == 0 && width % r == 0,
                "images of {height} × {width} px do not divide into this backbone's cells of {r} px: set data.size to \
                 a multiple of {r}, or change backbone.stem or backbone.depths"
            );
            let (wanted, given) = ([batch, 1, height / r, width / r], mask.size());
            ensure!(
                given == wanted,
                "the mask of visible cells has shape {given:?}, but must have {wanted:?}"
            );
        }
        Self::new(images, mask)
    }

    /// All of `map` `(B, C, H, W)`.
    pub fn dense(map: &Tensor) -> Self {
        FeatureMap(Dense(channels_last(map)))
    }

    /// What is visible of `map` `(B, C, H, W)`.
    ///
    /// # Errors
    /// When H × W does not divide into the mask's cells, or the batches differ.
    pub fn sparse(map: &Tensor, visible: &Rc<Visible>) -> Result<Self> {
        visible.check(map)?;
        let size = size_of(map);
        let rows = gather(&channels_last(map), &visible.at(size));
        Ok(FeatureMap(Sparse(rows, size, Rc::clone(visible))))
    }

    /// The map `(B, C, H, W)`, exactly zero at hidden positions.
    pub fn into_map(self) -> Tensor {
        match self.0 {
            Dense(map) => map,
            Sparse(rows, size, visible) => scatter(&rows, &visible.at(size)),
        }
    }

    /// Convolution. In sparse mode a kernel sees zeros at hidden positions, and its output is kept at visible ones.
    ///
    /// # Panics
    /// When the features have other channels than the convolution takes, or are smaller than its kernel, or the new H and W
    /// do not divide into the mask's cells.
    pub fn conv(&self, conv: &Conv2d) -> Self {
        self.conv_by(conv, None)
    }

    /// The same in one of the ways if it takes this convolution, or else in the cheapest: for tests and benchmarks, as the
    /// results are equal but for rounding. A 1×1 convolution and a dense map have one way only, and so has a device without
    /// kernels.
    ///
    /// # Panics
    /// As [`conv`](Self::conv).
    pub fn conv_by(&self, conv: &Conv2d, way: Option<Way>) -> Self {
        let (rows, size, visible) = match &self.0 {
            Dense(map) => {
                let of_images = || {
                    let rows = map.permute([0, 2, 3, 1]).reshape([-1, map.size()[1]]);
                    cuda::conv_of_images(&rows, conv, None, (map.size()[0], size_of(map)))
                };
                let y = cuda::sees_images(conv).then(of_images).flatten();
                return Self::dense(&y.unwrap_or_else(|| conv.forward(map)));
            }
            Sparse(rows, size, visible) => (rows, *size, visible),
        };
        if conv.is_pointwise() && conv.stride == 1 {
            return self.with(conv.pointwise(rows));
        }
        let (channels, wanted) = (rows.size()[1], conv.weight.size()[1] * conv.groups);
        assert!(channels == wanted, "features of {channels} channels met a convolution that takes {wanted}");
        let window = Window::of(conv);
        let next = window.map_size(size);
        let (from, to) = (visible.at(size), visible.at(next));
        if let Some(rows) = strided(rows, conv, &from) {
            return FeatureMap(Sparse(conv.pointwise(&rows), next, Rc::clone(visible)));
        }
        let of_images = |cells: Cells| cuda::conv_of_images(rows, conv, Some(&cells), (from.batch, size));
        if let Some(map) = from.cells().filter(|_| cuda::sees_images(conv)).and_then(of_images) {
            return FeatureMap(Sparse(gather(&channels_last(&map), &to), next, Rc::clone(visible)));
        }
        let way = way.filter(|way| way.takes(rows, conv)).unwrap_or_else(|| Way::cheaper(rows, conv, &to));
        let rows = match way {
            Way::Tiled => conv.by_tiles(rows, &to.tiles()),
            Way::Gathered => conv::conv(rows, conv, &from, &to),
            Way::WholeMap => gather(&conv.forward(&scatter(rows, &from)), &to),
        };
        FeatureMap(Sparse(rows, next, Rc::clone(visible)))
    }

    /// Max-pool. In sparse mode a window sees zeros at hidden positions, and its output is kept at visible ones.
    ///
    /// # Panics
    /// When the padding is over half the kernel, or the map is smaller than the kernel, or the new H and W do not divide
    /// into the mask's cells.
    pub fn max_pool(&self, kernel: i64, stride: i64, padding: i64) -> Self {
        let pool = |map: &Tensor| map.max_pool2d([kernel; 2], [stride; 2], [padding; 2], [1, 1], false);
        let [kernel, stride, padding] = [kernel, stride, padding].map(|x| x as usize);
        let window = Window { kernel, stride, padding };
        match &self.0 {
            Dense(map) if pool::takes(window) && cuda::pools(map, map.size()[1]) => {
                let (size, batch, channels) = (size_of(map), map.size()[0], map.size()[1]);
                let to = window.map_size(size);
                let sides = Sides { from: size, to, rows: [size, to].map(|(h, w)| batch * h * w) };
                let rows = map.permute([0, 2, 3, 1]).reshape([-1, channels]);
                let pooled = cuda::max_pool(&rows, window, None, sides).view([batch, to.0, to.1, channels]);
                Self::dense(&pooled.permute([0, 3, 1, 2]))
            }
            Dense(map) => Self::dense(&pool(map)),
            Sparse(rows, size, visible) => {
                let (from, next) = (visible.at(*size), window.map_size(*size));
                let to = visible.at(next);
                let rows = match pool::takes(window) {
                    true if has_kernels(rows) => pool::max_pool(rows, window, &from, &to),
                    true if cuda::pools(rows, rows.size()[1]) => {
                        let sides =
                            Sides { from: *size, to: next, rows: [&from, &to].map(|level| level.count()) };
                        cuda::max_pool(rows, window, from.cells(), sides)
                    }
                    _ => gather(&pool(&scatter(rows, &from)), &to),
                };
                FeatureMap(Sparse(rows, next, Rc::clone(visible)))
            }
        }
    }

    /// Batch norm or layer norm, see [`batch_norm`](Self::batch_norm) and [`layer_norm`](Self::layer_norm).
    ///
    /// # Errors
    /// Those of [`batch_norm`](Self::batch_norm).
    pub fn norm(&self, norm: &Norm, train: bool) -> Result<Self> {
        match norm {
            Norm::Batch(norm) => self.batch_norm(norm, train),
            Norm::Layer(norm) => Ok(self.layer_norm(norm)),
        }
    }

    /// Batch norm over (B, H, W), in sparse mode over the visible positions among them: they alone make the batch's
    /// statistics and the running ones.
    ///
    /// # Errors
    /// When there is a single position to take the variance of.
    pub fn batch_norm(&self, norm: &BatchNorm, train: bool) -> Result<Self> {
        self.check_positions(train)?;
        Ok(self.with(norm.forward(self.values(), train)))
    }

    /// ReLU of [`batch_norm`](Self::batch_norm), in one pass over memory.
    ///
    /// # Errors
    /// Those of [`batch_norm`](Self::batch_norm).
    pub fn batch_norm_relu(&self, norm: &BatchNorm, train: bool) -> Result<Self> {
        self.check_positions(train)?;
        Ok(self.with(norm.forward_relu(self.values(), train)))
    }

    /// ReLU of the sum of [`batch_norm`](Self::batch_norm) and a shortcut of the same shape and the same visible cells, in
    /// one pass over memory: the end of a residual block.
    ///
    /// # Errors
    /// Those of [`batch_norm`](Self::batch_norm).
    pub fn batch_norm_add_relu(&self, norm: &BatchNorm, shortcut: &Self, train: bool) -> Result<Self> {
        self.check_positions(train)?;
        Ok(self.with(norm.forward_add_relu(self.values(), shortcut.values(), train)))
    }

    fn check_positions(&self, train: bool) -> Result<()> {
        let positions = match &self.0 {
            Dense(map) => map.numel() as i64 / map.size()[1].max(1),
            Sparse(rows, ..) => rows.size()[0],
        };
        // Over several ranks the count of all matters, which batch norm adds up itself.
        if train && positions < 2 && ranks::size() == 1 {
            match self.0 {
                Dense(_) => bail!(
                    "batch norm cannot train on a single position: raise optimizer.batch_size or data.size"
                ),
                Sparse(..) => bail!(
                    "batch norm cannot train on a single visible position: raise optimizer.batch_size or show more cells"
                ),
            }
        }
        Ok(())
    }

    /// Layer norm over the channels of each position.
    pub fn layer_norm(&self, norm: &LayerNorm2d) -> Self {
        self.each_position(|x| norm.last_dimension(x))
    }

    /// What `operation` makes of the channels of each position: it takes `(…, C)` to `(…, C')`, and mixes no positions.
    pub fn each_position(&self, operation: impl FnOnce(&Tensor) -> Tensor) -> Self {
        match &self.0 {
            Dense(map) => self.with(operation(&map.permute([0, 2, 3, 1])).permute([0, 3, 1, 2])),
            Sparse(rows, ..) => self.with(operation(rows)),
        }
    }

    /// Stochastic depth (Huang et al., arXiv 1603.09382) for the branch of a residual block: with probability `rate`,
    /// in [0, 1), an image's features are zero, else they are divided by 1 − `rate`. One draw for each image, from
    /// torch's global generator.
    pub fn drop_path(&self, rate: f64) -> Self {
        let keep = 1.0 - rate;
        let factors = |batch: i64, x: &Tensor| {
            Tensor::empty([batch], (x.kind(), x.device())).bernoulli_float_(keep) / keep
        };
        self.with(match &self.0 {
            Sparse(rows, size, visible) => {
                let level = visible.at(*size);
                let of_rows = factors(level.batch, rows).index_select(0, &level.images());
                rows * of_rows.unsqueeze(-1)
            }
            Dense(map) => map * factors(map.size()[0], map).view([-1, 1, 1, 1]),
        })
    }

    /// max(x, 0).
    pub fn relu(&self) -> Self {
        self.with(self.values().relu())
    }

    /// The sum of two maps of the same shape and the same visible cells.
    pub fn add(&self, other: &Self) -> Self {
        self.with(self.values() + other.values())
    }

    /// The stored numbers: two maps of the same shape and the same visible cells have theirs in the same layout.
    fn values(&self) -> &Tensor {
        match &self.0 {
            Dense(values) | Sparse(values, ..) => values,
        }
    }

    /// Other numbers at the same positions.
    fn with(&self, values: Tensor) -> Self {
        FeatureMap(match &self.0 {
            Dense(_) => Dense(values),
            Sparse(_, size, visible) => Sparse(values, *size, Rc::clone(visible)),
        })
    }
}

/// The rows that a 1×1 convolution with a stride looks at, where rows come cell after cell: every so many of a cell, both ways.
fn strided(rows: &Tensor, conv: &Conv2d, from: &Level) -> Option<Tensor> {
    let [high, wide] = from.cell_size()?;
    if !conv.is_pointwise() || high % conv.stride != 0 || wide % conv.stride != 0 {
        return None;
    }
    let channels = rows.size()[1];
    let cells = rows.view([-1, high, wide, channels]);
    let every = cells.slice(1, 0, high, conv.stride).slice(2, 0, wide, conv.stride);
    Some(every.reshape([-1, channels]))
}

fn size_of(map: &Tensor) -> Size {
    let shape = map.size();
    (shape[2], shape[3])
}

/// The same numbers, ordered in memory as (B, H, W, C): convolutions and norms are faster so, and positions are rows.
fn channels_last(map: &Tensor) -> Tensor {
    map.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
}
