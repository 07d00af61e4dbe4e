//! Which positions of a batch are computed together, and what they see.

use std::array;
use std::ops::Range;

use super::transform::{AREA, SIDE};

/// No position: zeros are seen there, and nothing is made.
pub(super) const NOWHERE: u32 = u32::MAX;
/// Where the outputs of a window are among what it sees.
pub(super) const INNER: [usize; 4] = [SIDE + 1, SIDE + 2, 2 * SIDE + 1, 2 * SIDE + 2];

/// Squares of 2 × 2 positions that cover all N positions of a batch, and what is around them.
#[derive(Debug)]
pub struct Tiles {
    /// The number of each row that a window sees, or [`NOWHERE`].
    windows: Vec<[u32; AREA]>,
    /// Behind each line of tiles side by side: how many tiles and rows there are. A line makes rows that lie together.
    lines: Vec<(usize, usize)>,
    /// How many images share these windows, each with its rows behind those of the last.
    times: usize,
}

impl Tiles {
    /// Of whole maps: rows are numbered in the order (B, H, W).
    pub fn of_maps(size: (usize, usize), images: usize) -> Self {
        let positions = (0..size.0 as u32).flat_map(|y| (0..size.1 as u32).map(move |x| (y, x)));
        let mut tiles = Tiles { windows: Vec::new(), lines: Vec::new(), times: images };
        tiles.push(size, positions);
        tiles
    }

    /// Of some positions (line, column) of each image, in the order (H, W): rows are numbered as they come.
    ///
    /// # Panics
    /// When a position is not on the map, or does not come behind the one before.
    pub fn of_positions<'a>(
        size: (usize, usize),
        images: impl IntoIterator<Item = &'a [(u32, u32)]>,
    ) -> Self {
        let mut tiles = Tiles { windows: Vec::new(), lines: Vec::new(), times: 1 };
        images.into_iter().for_each(|image| tiles.push(size, image.iter().copied()));
        tiles
    }

    /// N.
    pub fn rows(&self) -> usize {
        self.times * self.rows_at_a_time()
    }

    /// How many tiles there are: a quarter of N or more.
    pub fn count(&self) -> usize {
        self.times * self.windows.len()
    }

    /// Whether a convolution of so many channels takes less time by these tiles than by one product for each position: not where
    /// positions are few, or scattered, or channels are few. By a model of what `cargo bench -p jepa-tests --bench sparse_conv`
    /// has measured, so that a run makes the same choices when it is resumed.
    pub fn pay(&self, inputs: usize, outputs: usize) -> bool {
        // In products of a pair of channels, by figures of machines with AVX-512: of a tile, with its transforms; and of kernels.
        let of_tile = AREA as f64 + 160.0 / inputs as f64 + 160.0 / outputs as f64;
        1.2 * (self.count() as f64 * of_tile + 1500.0) < 9.0 * self.rows() as f64
    }

    fn rows_at_a_time(&self) -> usize {
        self.lines.last().map_or(0, |(_, rows)| *rows)
    }

    /// One more image.
    fn push(&mut self, (height, width): (usize, usize), positions: impl Iterator<Item = (u32, u32)>) {
        // With a border, and whole tiles.
        let (lines, pitch) = (height.next_multiple_of(2) + 2, width.next_multiple_of(2) + 2);
        let mut grid = vec![NOWHERE; lines * pitch];
        let (mut next, mut last) = (self.rows_at_a_time(), None);
        for at in positions {
            let (y, x) = (at.0 as usize, at.1 as usize);
            assert!(y < height && x < width, "a position is not on its map");
            assert!(last.replace(at) < Some(at), "positions come line by line, each once");
            grid[(y + 1) * pitch + x + 1] = u32::try_from(next).expect("rows are counted in 32 bits");
            next += 1;
        }
        let mut rows = self.rows_at_a_time();
        for y in (0..height).step_by(2) {
            let before = rows;
            for x in (0..width).step_by(2) {
                let seen = |i: usize| grid[(y + i / SIDE) * pitch + x + i % SIDE];
                let window: [u32; AREA] = array::from_fn(seen);
                let made = INNER.into_iter().filter(|inner| window[*inner] != NOWHERE).count();
                if made > 0 {
                    self.windows.push(window);
                    rows += made;
                }
            }
            if rows > before {
                self.lines.push((self.windows.len(), rows));
            }
        }
    }

    /// What a tile sees: the numbers of rows, and what is added to them.
    #[inline(always)]
    pub(super) fn window(&self, tile: usize) -> (&[u32; AREA], usize) {
        let (time, tile) = (tile / self.windows.len(), tile % self.windows.len());
        (&self.windows[tile], time * self.rows_at_a_time())
    }

    /// Lines of tiles in groups of about so many tiles, with the rows that they make.
    pub(super) fn groups(&self, tiles: usize) -> Vec<(Range<usize>, Range<usize>)> {
        let ends = (0..self.times).flat_map(|time| {
            let (tiles, rows) = (time * self.windows.len(), time * self.rows_at_a_time());
            self.lines.iter().map(move |line| (tiles + line.0, rows + line.1))
        });
        let mut groups: Vec<(Range<usize>, Range<usize>)> = Vec::new();
        for (tile, row) in ends {
            match groups.last_mut() {
                Some((of_tiles, of_rows)) if tile - of_tiles.start <= tiles => {
                    (of_tiles.end, of_rows.end) = (tile, row);
                }
                last => {
                    let (tiles, rows) = last.map_or((0, 0), |(tiles, rows)| (tiles.end, rows.end));
                    groups.push((tiles..tile, rows..row));
                }
            }
        }
        groups
    }
}
