//! Which positions of a batch are visible, at every resolution of a network.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use jepa_plugin_api::winograd::Tiles;
use jepa_plugin_api::{Result, ensure, ranks};
use tch::{Device, Kind, Tensor};

/// The visible cells of a batch, bool `(B, 1, f, f)`. A layer of higher resolution repeats each cell (nearest
/// neighbour); what is derived for a resolution is kept for the other layers of that resolution.
#[derive(Debug)]
pub struct Visible {
    /// On the CPU.
    mask: Tensor,
    /// Where the maps are.
    device: Device,
    /// The same for maps on another device.
    cells: Option<Cells>,
    levels: RefCell<BTreeMap<Size, Rc<Level>>>,
}

/// Visible cells on a GPU.
#[derive(Debug)]
pub(crate) struct Cells {
    /// Lines and columns of cells.
    pub grid: [i64; 2],
    /// i32 `(n)`: those that are visible, rising, in the order (B, lines, columns).
    pub visible: Tensor,
    /// i32 `(B · lines · columns)`: which of these each cell is, and −1 for hidden ones.
    pub numbers: Tensor,
}

impl Clone for Cells {
    fn clone(&self) -> Self {
        let [visible, numbers] = [&self.visible, &self.numbers].map(Tensor::shallow_clone);
        Cells { grid: self.grid, visible, numbers }
    }
}

impl Cells {
    /// Of a mask on the CPU. What the device computes is not waited for.
    fn new(mask: &Tensor, device: Device) -> Result<Self> {
        let visible = Vec::<bool>::try_from(mask.flatten(0, -1))?;
        let mut numbers = vec![-1i32; visible.len()];
        let mut list = Vec::with_capacity(visible.len());
        for (cell, number) in numbers.iter_mut().enumerate().filter(|(cell, _)| visible[*cell]) {
            *number = list.len() as i32;
            list.push(cell as i32);
        }
        let there = |list: &[i32]| Tensor::from_slice(list).to_device_(device, Kind::Int, true, false);
        let size = mask.size();
        Ok(Cells { grid: [size[2], size[3]], visible: there(&list), numbers: there(&numbers) })
    }
}

/// Height and width of a map.
pub(crate) type Size = (i64, i64);

/// The visible positions at one resolution.
#[derive(Debug)]
pub(crate) struct Level {
    /// B.
    pub batch: i64,
    /// H and W.
    pub size: Size,
    /// On the CPU.
    pub places: Arc<Places>,
    /// On another device.
    cells: Option<Cells>,
    count: i64,
    positions: OnceCell<Tensor>,
    tiles: OnceCell<Arc<Tiles>>,
}

/// Where the N visible positions of a batch of maps are; empty for maps on another device.
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
    /// Takes the mask of cells, bool `(B, 1, f, f)`, true where visible, for maps on `device`. A mask that is on the CPU saves
    /// waiting for a GPU.
    ///
    /// # Errors
    /// When it has another kind or shape, or shows no cell in the whole batch of the only rank.
    pub fn new(mask: &Tensor, device: Device) -> Result<Self> {
        let shape = mask.size();
        ensure!(
            mask.kind() == Kind::Bool && shape.len() == 4 && shape[1] == 1,
            "a mask of visible cells is bool (B, 1, f, f), not {:?} {shape:?}",
            mask.kind()
        );
        let mask = mask.to_device(Device::Cpu);
        // Another rank may show what this one does not.
        ensure!(
            ranks::size() > 1 || bool::try_from(mask.any())?,
            "the mask shows no cell of any of the {} images: lower the share of hidden cells",
            shape[0]
        );
        let cells = (device != Device::Cpu).then(|| Cells::new(&mask, device)).transpose()?;
        Ok(Visible { mask, device, cells, levels: RefCell::default() })
    }

    /// Checks that a map is where this is for and divides into its cells.
    pub(crate) fn check(&self, map: &Tensor) -> Result<()> {
        let (here, there) = (self.device, map.device());
        ensure!(
            here == there,
            "the visible cells are those of maps on {here:?}, and images or features are on {there:?}"
        );
        let (cells, map) = (self.mask.size(), map.size());
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
            let cells = self.mask.size();
            let (height, width) = size;
            assert!(
                height % cells[2] == 0 && width % cells[3] == 0,
                "a layer makes maps of {height} × {width}, which do not divide into {} × {} cells",
                cells[2],
                cells[3]
            );
            Rc::new(match &self.cells {
                Some(of_device) => Level::of_cells(of_device, cells[0], size),
                None => Level::of_mask(&self.mask, cells[0], size),
            })
        };
        Rc::clone(self.levels.borrow_mut().entry(size).or_insert_with(build))
    }
}

impl Level {
    fn of_mask(mask: &Tensor, batch: i64, size: Size) -> Self {
        let mask = mask.to_kind(Kind::Uint8).upsample_nearest2d([size.0, size.1], None, None);
        let positions = mask.flatten(0, -1).nonzero().flatten(0, -1);
        Level {
            batch,
            size,
            places: Arc::new(Places::new(&positions, batch, size)),
            cells: None,
            count: positions.size()[0],
            positions: positions.into(),
            tiles: OnceCell::new(),
        }
    }

    fn of_cells(cells: &Cells, batch: i64, size: Size) -> Self {
        let [lines, columns] = cells.grid;
        let count = cells.visible.size()[0] * (size.0 / lines) * (size.1 / columns);
        let (places, positions, tiles) = (Arc::default(), OnceCell::new(), OnceCell::new());
        Level { batch, size, places, cells: Some(cells.clone()), count, positions, tiles }
    }

    /// N.
    pub fn count(&self) -> i64 {
        self.count
    }

    /// On another device than the CPU.
    pub fn cells(&self) -> Option<Cells> {
        self.cells.clone()
    }

    /// Height and width of a cell, in positions, where rows come cell after cell.
    pub fn cell_size(&self) -> Option<[i64; 2]> {
        let [lines, columns] = self.cells.as_ref()?.grid;
        Some([self.size.0 / lines, self.size.1 / columns])
    }

    /// i64 `(N)`: the visible positions, numbered in the order (B, H, W). On the CPU they rise; on other devices they come cell
    /// after cell.
    pub fn positions(&self) -> &Tensor {
        self.positions.get_or_init(|| {
            let Cells { grid: [lines, columns], visible, .. } =
                self.cells().expect("positions on the CPU are there");
            let (height, width) = self.size;
            let [high, wide] = [height / lines, width / columns];
            let visible = visible.to_kind(Kind::Int64);
            let whole = |x: &Tensor, by: i64| x.divide_scalar_mode(by, "floor");
            // Lines of cells, of all images one after the other, are whole lines of positions.
            let first = whole(&visible, columns) * (high * width) + visible.remainder(columns) * wide;
            let along = |count: i64| Tensor::arange(count, (Kind::Int64, visible.device()));
            let within = along(high).unsqueeze(1) * width + along(wide);
            (first.view([-1, 1, 1]) + within).flatten(0, -1)
        })
    }

    /// On the CPU: the visible positions two by two.
    pub fn tiles(&self) -> Arc<Tiles> {
        let build = || {
            let Places { height, width, at, starts } = &*self.places;
            let images = starts.windows(2).map(|ends| &at[ends[0]..ends[1]]);
            Arc::new(Tiles::of_positions((*height, *width), images))
        };
        Arc::clone(self.tiles.get_or_init(build))
    }

    /// The share of all positions that is visible.
    pub fn share(&self) -> f64 {
        self.count as f64 / (self.batch * self.size.0 * self.size.1) as f64
    }

    /// i64 `(N)`: of which image of the batch each visible position is.
    pub fn images(&self) -> Tensor {
        self.positions().divide_scalar_mode(self.size.0 * self.size.1, "floor")
    }
}
