//! Which positions of a batch are visible, at every resolution of a network.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use jepa_plugin_api::{Result, ensure};
use tch::{Kind, Tensor};

/// The visible cells of a batch, bool `(B, 1, f, f)`. A layer of higher resolution repeats each cell (nearest
/// neighbour); what is derived for a resolution is kept for the other layers of that resolution.
#[derive(Debug)]
pub struct Visible {
    cells: Tensor,
    levels: RefCell<BTreeMap<Size, Rc<Level>>>,
    strides: RefCell<BTreeMap<(Size, i64), Rc<Tensor>>>,
}

/// Height and width of a map.
pub(crate) type Size = (i64, i64);

/// The visible positions at one resolution.
#[derive(Debug)]
pub(crate) struct Level {
    /// Bool `(B, 1, H, W)`: true where visible.
    pub mask: Tensor,
    /// i64 `(N)`: the visible positions, rising, in the order (B, H, W).
    pub positions: Tensor,
    /// B.
    pub batch: i64,
    /// H and W.
    pub size: Size,
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
        let (levels, strides) = Default::default();
        Ok(Visible { cells: cells.shallow_clone(), levels, strides })
    }

    /// Checks that a map of this shape divides into the mask's cells.
    pub(crate) fn check_shape(&self, map: &[i64]) -> Result<()> {
        let cells = self.cells.size();
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
            Rc::new(Level { mask: mask.to_kind(Kind::Bool), positions, batch: cells[0], size })
        };
        Rc::clone(self.levels.borrow_mut().entry(size).or_insert_with(build))
    }

    /// i64 `(N')`: for each visible position of the map that has every `stride`-th row and column of one of `size`,
    /// its number among the visible positions of the latter.
    pub(crate) fn every(&self, stride: i64, size: Size) -> Rc<Tensor> {
        let build = || {
            let fine = self.at(size);
            let (height, width) = size;
            let number = fine.mask.flatten(0, -1).cumsum(0, Kind::Int64) - 1;
            let map = number.view([fine.batch, height, width]);
            let map = map.slice(1, None, None, stride).slice(2, None, None, stride);
            let coarse = self.at((map.size()[1], map.size()[2]));
            Rc::new(map.flatten(0, -1).index_select(0, &coarse.positions))
        };
        Rc::clone(self.strides.borrow_mut().entry((size, stride)).or_insert_with(build))
    }
}

impl Level {
    /// The values `(N, C)` at visible positions of a map `(B, C, H, W)`.
    pub fn gather(&self, map: &Tensor) -> Tensor {
        let channels = map.size()[1];
        map.permute([0, 2, 3, 1]).reshape([-1, channels]).index_select(0, &self.positions)
    }

    /// i64 `(N)`: of which image of the batch each visible position is.
    pub fn images(&self) -> Tensor {
        self.positions.divide_scalar_mode(self.size.0 * self.size.1, "floor")
    }

    /// The map `(B, C, H, W)`, channels last in memory, with `rows` `(N, C)` at visible positions and zero elsewhere.
    pub fn scatter(&self, rows: &Tensor) -> Tensor {
        let (height, width) = self.size;
        let channels = rows.size()[1];
        let zeros = Tensor::zeros([self.batch * height * width, channels], (rows.kind(), rows.device()));
        let map = zeros.index_copy(0, &self.positions, rows);
        map.view([self.batch, height, width, channels]).permute([0, 3, 1, 2])
    }
}
