//! Which cells of each image are context, and which are targets.
//!
//! Masks are maps, so the images of a batch need not show equally many cells. Every image has at least one context
//! cell and one target cell, and no cell is both. Random numbers are keyed by (seed, step) for what a batch shares
//! and by (seed, step, sample) for what an image has of its own, so that an image's masks do not depend on its place
//! in the batch.

use jepa_plugin_api::{Batch, Result, Rng, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

/// The keys under `method.mask.`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MaskOptions {
    /// `random` cells, `multi_block`, or `mixed`: one of the two for each batch.
    pub strategy: Strategy,
    /// Where blocks may lie: `uniform` is everywhere; `reference` never reaches the last row and the last column, as
    /// in the published code.
    pub sampling: Sampling,
    /// Share of cells that random masks hide, in (0, 1).
    pub ratio: f64,
    /// Probability that a batch gets multi-block masks where the strategy is `mixed`.
    pub multi_block_probability: f64,
    /// Target blocks in an image; they may overlap.
    pub num_targets: usize,
    /// Least and greatest share of the cells that a target block takes.
    pub target_scale: (f64, f64),
    /// Least and greatest height / width of a target block.
    pub target_aspect: (f64, f64),
    /// Least and greatest share of the cells that the context block takes, before targets are taken out of it.
    pub context_scale: (f64, f64),
    /// Least and greatest height / width of the context block.
    pub context_aspect: (f64, f64),
    /// A context block must keep more cells than this once the targets are taken out.
    pub min_keep: i64,
}

impl Default for MaskOptions {
    fn default() -> Self {
        MaskOptions {
            strategy: Strategy::Mixed,
            sampling: Sampling::Uniform,
            ratio: 0.6,
            multi_block_probability: 0.75,
            num_targets: 4,
            target_scale: (0.15, 0.2),
            target_aspect: (0.75, 1.5),
            context_scale: (1.0, 1.0),
            context_aspect: (1.0, 1.0),
            min_keep: 5,
        }
    }
}

/// How masks are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// A share of the cells, each as likely as the others, is context; the rest are targets.
    Random,
    /// Some blocks are targets; one large block without them is context.
    MultiBlock,
    /// One of the two for each batch.
    Mixed,
}

/// Where blocks may lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sampling {
    /// Every position inside the map.
    Uniform,
    /// Never at the last position, so that the last row and the last column are no targets.
    Reference,
}

/// The masks of a batch.
#[derive(Debug)]
pub struct Masks {
    /// Bool `(B, 1, f, f)`: cells that the context encoder sees.
    pub context: Tensor,
    /// Bool `(B, 1, f, f)`: cells whose features are to be predicted.
    pub target: Tensor,
}

impl Masks {
    /// The same on another device, which is not waited for.
    pub fn to_device(&self, device: Device) -> Masks {
        Masks { context: on_device(&self.context, device), target: on_device(&self.target, device) }
    }
}

/// A mask on another device, which is not waited for.
pub(crate) fn on_device(mask: &Tensor, device: Device) -> Tensor {
    mask.to_device_(device, mask.kind(), true, false)
}

/// Draws masks for maps of f × f cells.
#[derive(Clone, Debug)]
pub struct MaskSampler {
    options: MaskOptions,
    /// Cells a side.
    f: i64,
}

/// Draws of a context block before one target block is given up.
const TRIES: usize = 20;

/// What random numbers are for: no two uses share a stream.
mod purpose {
    pub const BATCH: u64 = 1;
    pub const IMAGE: u64 = 2;
}

impl MaskSampler {
    /// Checks the options against maps of `f` × `f` cells.
    ///
    /// # Errors
    /// Names the key that is out of its range, or with which such a map has no room for both context and targets.
    pub fn new(options: &MaskOptions, f: i64) -> Result<Self> {
        let sampler = MaskSampler { options: options.clone(), f };
        sampler.check()?;
        Ok(sampler)
    }

    /// The masks of a batch, on the CPU.
    pub fn draw(&self, batch: &Batch) -> Masks {
        let mut rng = batch.rng(purpose::BATCH);
        let multi_block = match self.options.strategy {
            Strategy::Random => false,
            Strategy::MultiBlock => true,
            Strategy::Mixed => rng.chance(self.options.multi_block_probability),
        };
        let sizes = multi_block.then(|| self.draw_sizes(&mut rng));
        let mut context = Vec::with_capacity(batch.len() * self.cells());
        let mut target = Vec::with_capacity(context.capacity());
        for i in 0..batch.len() {
            let mut rng = batch.sample_rng(i, purpose::IMAGE);
            let image = match sizes {
                None => self.random(&mut rng),
                Some(sizes) => self.multi_block(sizes, &mut rng),
            };
            context.extend(image.context);
            target.extend(image.target);
        }
        let tensor = |cells: Vec<bool>| Tensor::from_slice(&cells).view([-1, 1, self.f, self.f]);
        Masks { context: tensor(context), target: tensor(target) }
    }

    /// A fixed number of random cells is context, all others are targets.
    fn random(&self, rng: &mut Rng) -> ImageMasks {
        let mut order: Vec<usize> = (0..self.cells()).collect();
        rng.shuffle(&mut order);
        let mut context = vec![false; self.cells()];
        for &cell in &order[..self.random_context_cells()] {
            context[cell] = true;
        }
        let target = context.iter().map(|visible| !visible).collect();
        ImageMasks { context, target }
    }

    /// The union of some blocks is the target; one block without them is the context.
    ///
    /// Where the context block keeps too few cells in 20 draws, the last target block is given up (it is then neither
    /// target nor forbidden), and so on; beside the last one that is left, the context is the whole map.
    fn multi_block(&self, sizes: BlockSizes, rng: &mut Rng) -> ImageMasks {
        let mut blocks: Vec<BlockAt> =
            (0..self.options.num_targets).map(|_| self.place(sizes.target, rng)).collect();
        loop {
            let target = self.union(&blocks);
            let kept = |block: BlockAt| -> Vec<bool> {
                let block = self.union(&[block]);
                block.into_iter().zip(&target).map(|(inside, is_target)| inside && !is_target).collect()
            };
            for _ in 0..TRIES {
                let context = kept(self.place(sizes.context, rng));
                if count(&context) > self.options.min_keep {
                    return ImageMasks { context, target };
                }
            }
            if blocks.len() == 1 {
                let whole = BlockAt { size: (self.f, self.f), top: 0, left: 0 };
                return ImageMasks { context: kept(whole), target };
            }
            blocks.pop();
        }
    }

    fn draw_sizes(&self, rng: &mut Rng) -> BlockSizes {
        let MaskOptions { target_scale, target_aspect, context_scale, context_aspect, .. } = self.options;
        let target = self.block_size(rng.unit(), target_scale, target_aspect);
        let context = self.block_size(rng.unit(), context_scale, context_aspect);
        BlockSizes { target, context }
    }

    /// Height and width of a block, both from one number u in [0, 1): the larger, the taller.
    fn block_size(&self, u: f64, scale: (f64, f64), aspect: (f64, f64)) -> (i64, i64) {
        let between = |(low, high): (f64, f64)| low + u * (high - low);
        let area = (self.cells() as f64 * between(scale)).floor();
        let side = |square: f64| (square.sqrt().round_ties_even() as i64).clamp(1, self.f);
        (side(area * between(aspect)), side(area / between(aspect)))
    }

    fn place(&self, size: (i64, i64), rng: &mut Rng) -> BlockAt {
        let mut corner = |side: i64| {
            let room = self.f - side;
            let positions = match self.options.sampling {
                Sampling::Uniform => room + 1,
                Sampling::Reference => room.max(1),
            };
            rng.below(positions as u64) as i64
        };
        BlockAt { size, top: corner(size.0), left: corner(size.1) }
    }

    fn union(&self, blocks: &[BlockAt]) -> Vec<bool> {
        let inside = |row: i64, column: i64| {
            blocks.iter().any(|&BlockAt { size, top, left }| {
                (top..top + size.0).contains(&row) && (left..left + size.1).contains(&column)
            })
        };
        (0..self.f * self.f).map(|cell| inside(cell / self.f, cell % self.f)).collect()
    }

    fn cells(&self) -> usize {
        (self.f * self.f) as usize
    }

    fn random_context_cells(&self) -> usize {
        (self.cells() as f64 * (1.0 - self.options.ratio)).round_ties_even() as usize
    }

    fn check(&self) -> Result<()> {
        let MaskOptions { ratio, multi_block_probability, num_targets, min_keep, strategy, .. } =
            self.options;
        let f = self.f;
        ensure!(f > 0, "a map of {f} × {f} cells has none to mask: raise data.size");
        if strategy == Strategy::Mixed {
            ensure!(
                (0.0..=1.0).contains(&multi_block_probability),
                "method.mask.multi_block_probability is {multi_block_probability}, but must lie in [0, 1]"
            );
        }
        if strategy != Strategy::MultiBlock {
            ensure!(0.0 < ratio && ratio < 1.0, "method.mask.ratio is {ratio}, but must lie in (0, 1)");
            let context = self.random_context_cells();
            ensure!(
                0 < context && context < self.cells(),
                "method.mask.ratio = {ratio} leaves {context} of {f} × {f} cells as context, but there must be context \
                 and targets: change it, or raise data.size for more cells"
            );
        }
        if strategy != Strategy::Random {
            ensure!(
                (1..=1000).contains(&num_targets),
                "method.mask.num_targets is {num_targets}, but must lie in 1..=1000"
            );
            ensure!(min_keep >= 0, "method.mask.min_keep is {min_keep}, but must not be negative");
            let MaskOptions { target_scale, target_aspect, context_scale, context_aspect, .. } = self.options;
            for (key, (low, high)) in [("target_scale", target_scale), ("context_scale", context_scale)] {
                ensure!(
                    0.0 < low && low <= high && high <= 1.0,
                    "method.mask.{key} is [{low}, {high}], but must be two rising shares in (0, 1]"
                );
            }
            for (key, (low, high)) in [("target_aspect", target_aspect), ("context_aspect", context_aspect)] {
                ensure!(
                    0.0 < low && low <= high && high.is_finite(),
                    "method.mask.{key} is [{low}, {high}], but must be two rising positive numbers"
                );
            }
            let context = self.largest_block(context_scale, context_aspect);
            ensure!(
                context > min_keep,
                "a context block of at most {context} cells (method.mask.context_scale) can never keep more than \
                 {min_keep} (method.mask.min_keep): raise the one, lower the other, or raise data.size for more cells"
            );
            let (largest, total) = (self.largest_block(target_scale, target_aspect), f * f);
            ensure!(
                total - largest > min_keep,
                "a target block of up to {largest} cells (method.mask.target_scale) leaves {} of {f} × {f} cells, but \
                 the context must keep more than {min_keep} (method.mask.min_keep): lower one of the two, or raise \
                 data.size for more cells",
                total - largest
            );
        }
        Ok(())
    }

    /// Cells of the largest block that may be drawn. Sizes change by steps as u grows, so look closely.
    fn largest_block(&self, scale: (f64, f64), aspect: (f64, f64)) -> i64 {
        let area = |i: i32| {
            let (height, width) = self.block_size(f64::from(i) / 4096.0, scale, aspect);
            height * width
        };
        (0..=4096).map(area).max().unwrap_or(0)
    }
}

/// The masks of one image, row by row.
struct ImageMasks {
    context: Vec<bool>,
    target: Vec<bool>,
}

/// Height and width in cells of the blocks of a batch.
#[derive(Clone, Copy)]
struct BlockSizes {
    target: (i64, i64),
    context: (i64, i64),
}

#[derive(Clone, Copy)]
struct BlockAt {
    size: (i64, i64),
    top: i64,
    left: i64,
}

fn count(cells: &[bool]) -> i64 {
    cells.iter().filter(|inside| **inside).count() as i64
}
