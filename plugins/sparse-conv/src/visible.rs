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
    count: i64,
    levels: RefCell<BTreeMap<(i64, i64), Rc<Level>>>,
}

/// The visible positions at one resolution.
#[derive(Debug)]
pub(crate) struct Level {
    /// f32 `(B, 1, H, W)`: 1 where visible, 0 where hidden.
    pub mask: Tensor,
    /// Visible positions N in the batch.
    pub count: i64,
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
        let count = i64::try_from(cells.sum(Kind::Int64))?;
        ensure!(
            count > 0,
            "the mask shows no cell of any of the {} images: lower the share of hidden cells",
            shape[0]
        );
        Ok(Visible { cells: cells.shallow_clone(), count, levels: RefCell::default() })
    }

    /// Visible cells in the whole batch, at least 1.
    pub fn count(&self) -> i64 {
        self.count
    }

    /// Checks that a map of this size divides into the mask's cells.
    pub(crate) fn check_size(&self, map: &[i64]) -> Result<()> {
        let cells = self.cells.size();
        let fits = map.len() == 4 && map[0] == cells[0] && map[2] % cells[2] == 0 && map[3] % cells[3] == 0;
        ensure!(fits, "a mask of {cells:?} cells does not fit images or features of shape {map:?}");
        Ok(())
    }

    /// The visible positions of a map of `height` × `width`.
    pub(crate) fn at(&self, height: i64, width: i64) -> Rc<Level> {
        let build = || {
            let (rows, columns) = (height / self.cells.size()[2], width / self.cells.size()[3]);
            let mask = self.cells.to_kind(Kind::Float).upsample_nearest2d([height, width], None, None);
            Rc::new(Level { mask, count: self.count * rows * columns })
        };
        Rc::clone(self.levels.borrow_mut().entry((height, width)).or_insert_with(build))
    }
}
