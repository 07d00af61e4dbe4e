//! Images that h5py wrote with `chunks=` or `compression="gzip"`, read without the library's help.
//!
//! The HDF5 library that is linked here has no zlib, so it says where the chunks are and no more. They are read and
//! inflated outside its lock. Filters that do not change bytes (shuffling single bytes) or only append to them (the
//! Fletcher checksum) are undone as well; anything else is left to the library.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use flate2::read::ZlibDecoder;
use hdf5::dataset::ChunkInfo;
use hdf5::filters::Filter;

use super::dataset::MAX_ENCODED;

/// Where the pieces of one image lie, and what has been done to them.
pub(super) struct Chunks {
    len: usize,
    chunk_len: usize,
    filters: Vec<Filter>,
    chunks: Vec<ChunkInfo>,
}

impl Chunks {
    /// The chunks of a 1-D uint8 data set; `None` if it is not chunked, or filtered in another way.
    pub fn locate(dataset: &hdf5::Dataset) -> Option<Chunks> {
        let filters = dataset.filters();
        if !filters
            .iter()
            .all(|filter| matches!(filter, Filter::Deflate(_) | Filter::Shuffle | Filter::Fletcher32))
        {
            return None;
        }
        let &[chunk_len] = dataset.chunk()?.as_slice() else { return None };
        let chunks =
            (0..dataset.num_chunks()?).map(|chunk| dataset.chunk_info(chunk)).collect::<Option<_>>()?;
        Some(Chunks { len: dataset.size(), chunk_len, filters, chunks })
    }

    /// Reads, inflates and joins the chunks. One that was never written is zeros, as HDF5 has it.
    pub fn read(&self, file: &File) -> io::Result<Vec<u8>> {
        // A damaged file may claim any length; that of the image was checked when the file was opened.
        let stored_len = |chunk: &ChunkInfo| chunk.size.max(self.chunk_len as u64);
        if self.chunks.iter().any(|chunk| stored_len(chunk) > MAX_ENCODED) {
            return Err(io::Error::other("a chunk is longer than any image"));
        }
        let mut bytes = vec![0; self.len];
        let mut stored = Vec::new();
        for chunk in &self.chunks {
            stored.resize(chunk.size as usize, 0);
            file.read_exact_at(&mut stored, chunk.addr)?;
            let plain = self.undo_filters(&stored, chunk.filter_mask)?;
            let start = chunk.offset[0] as usize;
            let Some(target) = bytes.get_mut(start..self.len.min(start + self.chunk_len)) else { continue };
            let plain = plain.get(..target.len()).ok_or_else(|| io::Error::other("a chunk is too short"))?;
            target.copy_from_slice(plain);
        }
        Ok(bytes)
    }

    fn undo_filters(&self, stored: &[u8], skipped: u32) -> io::Result<Vec<u8>> {
        const CHECKSUM: usize = 4;
        let mut bytes = stored.to_vec();
        for (position, filter) in self.filters.iter().enumerate().rev() {
            match filter {
                _ if skipped & (1 << position) != 0 => {}
                Filter::Deflate(_) => {
                    let mut plain = Vec::with_capacity(self.chunk_len + CHECKSUM);
                    ZlibDecoder::new(bytes.as_slice())
                        .take((self.chunk_len + CHECKSUM) as u64)
                        .read_to_end(&mut plain)?;
                    bytes = plain;
                }
                Filter::Fletcher32 => bytes.truncate(bytes.len().saturating_sub(CHECKSUM)),
                _ => {}
            }
        }
        Ok(bytes)
    }
}
