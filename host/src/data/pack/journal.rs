//! What a pack has done so far, in a file beside the one that it makes: `OUT.packing`.
//!
//! | bytes       | what                                                                          |
//! |-------------|-------------------------------------------------------------------------------|
//! | 8, 32       | a magic number; what the pack is of: a pack of anything else begins anew       |
//! | *and for each image, in the order in which they were done:*                                 ||
//! | 8, 8        | its index in the source; the length of what will be packed                    |
//! | 32          | SHA-256 of the image in the source                                            |
//! | 1, 32       | whether it was made smaller; SHA-256 of what was made, or zeros               |
//! | 8           | the beginning of the SHA-256 of the bytes above                               |
//! | length      | what was made, if it was made smaller                                         |
//!
//! Numbers are little-endian. A process that is killed leaves half an entry at most, at the end, which is not read.

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};

use crate::data::error::DataError;

const MAGIC: [u8; 8] = *b"JEPAPCK1";
const START: u64 = 8 + 32;
const ENTRY: usize = 8 + 8 + 32 + 1 + 32 + 8;

/// An image that was read and decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packable {
    /// Its index in the source.
    pub index: usize,
    /// Length of what will be packed, in bytes.
    pub len: u64,
    /// SHA-256 of it in the source.
    pub digest: [u8; 32],
    /// Where it is in the journal, if it was made smaller, and the SHA-256 of that.
    pub smaller: Option<(u64, [u8; 32])>,
}

/// The file, locked for this process.
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    /// What an earlier pack has done.
    found: HashMap<usize, Packable>,
    end: Mutex<u64>,
}

impl Journal {
    /// Opens the journal of the pack that makes `out`, with what is in it, if it is of the same `key`.
    pub fn open(out: &Path, key: [u8; 32]) -> Result<Journal, DataError> {
        let directory = out.parent().filter(|parent| !parent.as_os_str().is_empty());
        if let Some(directory) = directory {
            fs::create_dir_all(directory).map_err(DataError::io("create", directory))?;
        }
        let mut path = out.as_os_str().to_owned();
        path.push(".packing");
        let path = PathBuf::from(path);
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(DataError::io("write", &path))?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Err(DataError::Options(format!(
                "another process is packing {}: wait for it, or give another name",
                out.display()
            )));
        }
        let start: Vec<u8> = MAGIC.into_iter().chain(key).collect();
        let (found, end) = entries(&file, &start).map_err(DataError::io("read", &path))?;
        if found.is_empty() {
            file.set_len(0).and_then(|()| file.write_all(&start)).map_err(DataError::io("write", &path))?;
        } else {
            file.set_len(end).map_err(DataError::io("write", &path))?;
            tracing::info!(
                "{}: {} images are done already, and the rest follows",
                path.display(),
                found.len()
            );
        }
        Ok(Journal { path, file, found, end: Mutex::new(end) })
    }

    /// What an earlier pack has done for an image.
    pub fn find(&self, index: usize) -> Option<Packable> {
        self.found.get(&index).copied()
    }

    /// Enters an image of `len` bytes in the source, and what was made of it.
    pub fn add(
        &self,
        index: usize,
        len: u64,
        digest: [u8; 32],
        made: Option<&[u8]>,
    ) -> Result<Packable, DataError> {
        let len = made.map_or(len, |made| made.len() as u64);
        let mut entry = Vec::with_capacity(ENTRY + made.map_or(0, <[u8]>::len));
        entry.extend((index as u64).to_le_bytes());
        entry.extend(len.to_le_bytes());
        entry.extend(digest);
        entry.push(u8::from(made.is_some()));
        let made_digest = made.map(|made| Sha256::digest(made).into());
        entry.extend(made_digest.unwrap_or([0; 32]));
        let sum = Sha256::digest(&entry);
        entry.extend(&sum[..8]);
        entry.extend(made.unwrap_or_default());

        let mut end = self.end();
        self.file.write_all_at(&entry, *end).map_err(DataError::io("write", &self.path))?;
        let smaller = made_digest.map(|digest| (*end + ENTRY as u64, digest));
        *end += entry.len() as u64;
        Ok(Packable { index, len, digest, smaller })
    }

    /// What was made of an image, from `at` on.
    pub fn read(&self, at: u64, len: u64, digest: [u8; 32]) -> Result<Vec<u8>, DataError> {
        let mut bytes = vec![0; len as usize];
        let read = self.file.read_exact_at(&mut bytes, at).and_then(|()| {
            let whole = Sha256::digest(&bytes)[..] == digest;
            if whole { Ok(()) } else { Err(io::Error::other("it is damaged: delete it, and pack again")) }
        });
        read.map_err(DataError::io("read", &self.path))?;
        Ok(bytes)
    }

    fn end(&self) -> MutexGuard<'_, u64> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Deletes it: all is done.
    pub fn remove(self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("{} can be deleted: {error}", self.path.display());
        }
    }

    /// Leaves it for the next attempt, if there is anything in it.
    pub fn keep(self) {
        if *self.end() == START {
            return self.remove();
        }
        let path = self.path.display();
        tracing::info!("what is done is kept in {path}: the same command goes on from there, or delete it");
    }
}

/// The whole entries behind `start`, and where they end.
fn entries(file: &File, start: &[u8]) -> io::Result<(HashMap<usize, Packable>, u64)> {
    let (mut found, mut end, len) = (HashMap::new(), START, file.metadata()?.len());
    let mut reader = BufReader::new(file);
    let mut begin = Vec::new();
    reader.by_ref().take(START).read_to_end(&mut begin)?;
    if begin != start {
        return Ok((found, end));
    }
    while len - end >= ENTRY as u64 {
        let mut entry = [0; ENTRY];
        reader.read_exact(&mut entry)?;
        let (of, sum) = entry.split_at(ENTRY - 8);
        if Sha256::digest(of)[..8] != *sum {
            break;
        }
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| entry[at + i]));
        let digest = |at: usize| std::array::from_fn(|i| entry[at + i]);
        let (index, packed_len) = (number(0) as usize, number(8));
        let made = entry[48] == 1;
        let at = end + ENTRY as u64;
        let body = if made { packed_len } else { 0 };
        if body > len - at {
            break;
        }
        reader.seek_relative(body as i64)?;
        end = at + body;
        let smaller = made.then(|| (at, digest(49)));
        found.insert(index, Packable { index, len: packed_len, digest: digest(16), smaller });
    }
    Ok((found, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pack_goes_on_behind_the_last_whole_entry() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("new/out.h5");
        let journal = Journal::open(&out, [1; 32]).unwrap();
        let plain = journal.add(5, 100, [7; 32], None).unwrap();
        let small = journal.add(2, 1000, [8; 32], Some(b"small")).unwrap();
        journal.add(3, 1000, [9; 32], Some(b"cut off")).unwrap();
        journal.keep();
        let path = directory.path().join("new/out.h5.packing");
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();

        let journal = Journal::open(&out, [1; 32]).unwrap();
        assert_eq!([5, 2, 3].map(|index| journal.find(index)), [Some(plain), Some(small), None]);
        let (at, digest) = small.smaller.unwrap();
        assert_eq!(journal.read(at, small.len, digest).unwrap(), b"small");
        let again = journal.add(3, 1000, [9; 32], Some(b"whole")).unwrap();
        let (at, digest) = again.smaller.unwrap();
        assert_eq!(journal.read(at, again.len, digest).unwrap(), b"whole");
        let wrong = journal.read(at, again.len, [0; 32]).unwrap_err().to_string();
        assert!(wrong.contains("damaged"), "{wrong}");
        let busy = Journal::open(&out, [1; 32]).err().unwrap().to_string();
        assert!(busy.contains("another process is packing"), "{busy}");
        drop(journal);

        let journal = Journal::open(&out, [2; 32]).unwrap();
        assert_eq!(journal.find(5), None, "of another pack");
        journal.keep();
        assert!(!path.exists(), "nothing is in it");
    }

    #[test]
    fn any_bytes_are_entries_or_none() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out.h5");
        let journal = Journal::open(&out, [1; 32]).unwrap();
        for index in 0..4 {
            journal.add(index, 10, [7; 32], (index % 2 == 0).then_some(b"some bytes")).unwrap();
        }
        let path = directory.path().join("out.h5.packing");
        let good = fs::read(&path).unwrap();
        drop(journal);
        for case in 0..2000 {
            let mut rng = jepa_plugin_api::Rng::keyed(case, 0, 0, 0);
            let mut bytes = good.clone();
            for _ in 0..1 + rng.below(3) {
                let at = rng.below(bytes.len() as u64) as usize;
                bytes[at] = rng.bits() as u8;
            }
            bytes.truncate(rng.below(2 * bytes.len() as u64) as usize);
            fs::write(&path, &bytes).unwrap();
            let journal = Journal::open(&out, [1; 32]).unwrap();
            assert!(*journal.end() <= (bytes.len() as u64).max(START));
            for image in (0..4).filter_map(|index| journal.find(index)) {
                assert!(image.smaller.is_none_or(|(at, _)| at + image.len <= bytes.len() as u64));
            }
        }
    }
}
