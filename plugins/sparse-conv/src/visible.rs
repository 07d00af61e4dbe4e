//! Which positions of a batch are visible, at every resolution of a network.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use jepa_plugin_api::{Result, ensure};
use tch::{Device, Kind, Tensor};

/// The visible cells of a batch, bool `(B, 1, f, f)`. A layer of higher resolution repeats each cell (nearest
/// neighbour); what is derived for a resolution is kept for the other layers of that resolution.
#[derive(Debug)]
pub struct Visible {
    cells: Tensor,
    levels: RefCell<BTreeMap<Size, Rc<Level>>>,
}

/// Height and width of a map.
pub(crate) type Size = (i64, i64);

/// The visible positions at one resolution.
#[derive(Debug)]
pub(crate) struct Level {
    /// i64 `(N)`: the visible positions, rising, in the order (B, H, W).
    pub positions: Tensor,
    /// B.
    pub batch: i64,
    /// H and W.
    pub size: Size,
    /// The same for kernels on the CPU.
    pub places: Arc<Places>,
}

/// Where the N visible positions of a batch of maps are; empty for a mask on another device.
#[derive(Debug, Default)]
pub(crate) struct Places {
    pub height: usize,
    pub width: usize,
    /// Row and column in its image for each position, in the order (B, H, W).
    pub at: Vec<(u32, u32)>,
    /// The number of the first position of each image, and N: B + 1 numbers.
    pub starts: Vec<usize>,
}

impl Places {
    fn new(positions: &Tensor, batch: i64, size: Size) -> Self {
        let (height, width) = (size.0 as usize, size.1 as usize);
        let positions = Vec::<i64>::try_from(positions).expect("positions are a vector of i64");
        let area = height * width;
        let at = positions.iter().map(|position| {
            let within = *position as usize % area;
            ((within / width) as u32, (within % width) as u32)
        });
        let start = |image: i64| positions.partition_point(|position| *position < image * area as i64);
        Places { height, width, at: at.collect(), starts: (0..=batch).map(start).collect() }
    }

    /// B.
    pub fn images(&self) -> usize {
        self.starts.len() - 1
    }
}

impl Visible {
    /// Takes the mask of cells, bool `(B, 1, f, f)`, true where visible.
    ///
    /// # Errors
    /// When it has another kind or shape, or shows no cell in the whole batch.
    pub fn new(cells: &Tensor) -> Result<Self> {
        let shape = cells.size();
        ensure!(
            cells.kind() == Kind::Bool && shape.len() == 4 && shape[1] == 1,
            "a mask of visible cells is bool (B, 1, f, f), not {:?} {shape:?}",
            cells.kind()
        );
        ensure!(
            bool::try_from(cells.any())?,
            "the mask shows no cell of any of the {} images: lower the share of hidden cells",
            shape[0]
        );
        Ok(Visible { cells: cells.shallow_clone(), levels: RefCell::default() })
    }

    /// Checks that a map is where the mask is and divides into its cells.
    pub(crate) fn check(&self, map: &Tensor) -> Result<()> {
        let (here, there) = (self.cells.device(), map.device());
        ensure!(
            here == there,
            "the mask of visible cells is on {here:?}, and images or features are on {there:?}"
        );
        let (cells, map) = (self.cells.size(), map.size());
        let fits = map.len() == 4 && map[0] == cells[0] && map[2] % cells[2] == 0 && map[3] % cells[3] == 0;
        ensure!(fits, "a mask of {cells:?} cells does not fit images or features of shape {map:?}");
        Ok(())
    }

    /// The visible positions of a map of this size.
    ///
    /// # Panics
    /// When it does not divide into the mask's cells.
    pub(crate) fn at(&self, size: Size) -> Rc<Level> {
        let build = || {
            let cells = self.cells.size();
            let (height, width) = size;
            assert!(
                height % cells[2] == 0 && width % cells[3] == 0,
                "a layer makes maps of {height} × {width}, which do not divide into {} × {} cells",
                cells[2],
                cells[3]
            );
            let mask = self.cells.to_kind(Kind::Uint8).upsample_nearest2d([height, width], None, None);
            let positions = mask.flatten(0, -1).nonzero().flatten(0, -1);
            let places = match positions.device() {
                Device::Cpu => Places::new(&positions, cells[0], size),
                _ => Places::default(),
            };
            Rc::new(Level { positions, batch: cells[0], size, places: Arc::new(places) })
        };
        Rc::clone(self.levels.borrow_mut().entry(size).or_insert_with(build))
    }
}

impl Level {
    /// The share of all positions that is visible.
    pub fn share(&self) -> f64 {
        self.positions.size()[0] as f64 / (self.batch * self.size.0 * self.size.1) as f64
    }

    /// i64 `(N)`: of which image of the batch each visible position is.
    pub fn images(&self) -> Tensor {
        self.positions.divide_scalar_mode(self.size.0 * self.size.1, "floor")
    }
}
