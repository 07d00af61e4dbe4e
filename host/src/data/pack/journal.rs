//! What a pack has done so far, in a file beside the one that it makes: `OUT.packing`.
//!
//! | bytes  | what                                                                                |
//! |--------|-------------------------------------------------------------------------------------|
//! | 8      | a magic number                                                                      |
//! | *and for each image, in the order in which they were done:*                                  ||
//! | 32     | its [`Stamp`]: of which image it is, and what was to be made of it                  |
//! | 32     | SHA-256 of the image in the source                                                  |
//! | 8      | length of what will be packed                                                       |
//! | 1, 32  | whether it was made smaller; SHA-256 of what was made, or zeros                     |
//! | 8      | the beginning of the SHA-256 of the bytes above                                     |
//! | length | what was made, if it was made smaller                                               |
//!
//! Numbers are little-endian. A process that is killed leaves half an entry at most, at the end, which is not read. An image that
//! has changed since has another stamp: its entry is not found, and all others are.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};

use crate::data::error::DataError;
use crate::files;

const MAGIC: [u8; 8] = *b"JEPAPCK1";
const START: u64 = MAGIC.len() as u64;
const ENTRY: usize = 32 + 32 + 8 + 1 + 32 + 8;

/// Of which image an entry is.
pub(super) type Stamp = [u8; 32];

/// An image that was read and decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packable {
    /// SHA-256 of it in the source.
    pub source_digest: [u8; 32],
    /// Length of what will be packed, in bytes.
    pub packed_len: u64,
    /// Where it is in the journal, if it was made smaller, and the SHA-256 of that.
    pub smaller: Option<(u64, [u8; 32])>,
}

/// The file, locked for this process.
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    /// What an earlier pack has done.
    found: HashMap<Stamp, Packable>,
    end: Mutex<u64>,
}

impl Journal {
    /// Opens the journal of the pack that makes `out`, with what is in it.
    ///
    /// # Errors
    /// When it cannot be read and written, another process has it, or there is a file of that name that is no journal.
    pub fn open(out: &Path) -> Result<Journal, DataError> {
        let directory = out.parent().filter(|parent| !parent.as_os_str().is_empty());
        if let Some(directory) = directory {
            fs::create_dir_all(directory).map_err(DataError::write(directory))?;
        }
        let mut path = out.as_os_str().to_owned();
        path.push(".packing");
        let path = PathBuf::from(path);
        let file = hold(&path).map_err(DataError::write(&path))?.ok_or_else(|| {
            DataError::Options(format!(
                "another process is packing {}: wait for it, or give another name",
                out.display()
            ))
        })?;
        let (found, end) = entries(&file).map_err(DataError::io("read", &path))?.ok_or_else(|| {
            DataError::Options(format!(
                "{} is no journal of a pack, and would be overwritten: move it away",
                path.display()
            ))
        })?;
        file.set_len(end).and_then(|()| file.write_all_at(&MAGIC, 0)).map_err(DataError::write(&path))?;
        if !found.is_empty() {
            tracing::info!("{}: going on, {} images are done already", path.display(), found.len());
        }
        Ok(Journal { path, file, found, end: Mutex::new(end.max(START)) })
    }

    /// What an earlier pack has done for an image, if all of it is there.
    pub fn find(&self, stamp: &Stamp) -> Option<Packable> {
        let found = *self.found.get(stamp)?;
        match found.smaller {
            Some((at, digest)) => self.read(at, found.packed_len, digest).is_ok().then_some(found),
            None => Some(found),
        }
    }

    /// Enters an image of `len` bytes in the source, and what was made of it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn add(
        &self,
        stamp: &Stamp,
        source_digest: [u8; 32],
        len: u64,
        made: Option<&[u8]>,
    ) -> Result<Packable, DataError> {
        let packed_len = made.map_or(len, |made| made.len() as u64);
        let mut entry = Vec::with_capacity(ENTRY + made.map_or(0, <[u8]>::len));
        entry.extend(stamp);
        entry.extend(source_digest);
        entry.extend(packed_len.to_le_bytes());
        entry.push(u8::from(made.is_some()));
        let made_digest = made.map(|made| Sha256::digest(made).into());
        entry.extend(made_digest.unwrap_or([0; 32]));
        let sum = Sha256::digest(&entry);
        entry.extend(&sum[..8]);
        entry.extend(made.unwrap_or_default());

        let mut end = self.end();
        self.file.write_all_at(&entry, *end).map_err(DataError::write(&self.path))?;
        let smaller = made_digest.map(|digest| (*end + ENTRY as u64, digest));
        *end += entry.len() as u64;
        Ok(Packable { source_digest, packed_len, smaller })
    }

    /// What was made of an image, from `at` on.
    ///
    /// # Errors
    /// When it cannot be read, or is another.
    pub fn read(&self, at: u64, len: u64, digest: [u8; 32]) -> Result<Vec<u8>, DataError> {
        let mut bytes = vec![0; len as usize];
        let read = self.file.read_exact_at(&mut bytes, at).and_then(|()| {
            let whole = Sha256::digest(&bytes)[..] == digest;
            if whole { Ok(()) } else { Err(io::Error::other("it is damaged: pack again")) }
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

/// Opens and locks the journal that has this name now: another process may have deleted the one that was waited for.
fn hold(path: &Path) -> io::Result<Option<File>> {
    loop {
        let Some(file) = files::hold(path)? else { return Ok(None) };
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        if fs::metadata(path).map(identity).ok() == Some(identity(file.metadata()?)) {
            return Ok(Some(file));
        }
    }
}

/// The whole entries, and where they end; `None` for a file that is none of ours.
fn entries(file: &File) -> io::Result<Option<(HashMap<Stamp, Packable>, u64)>> {
    let (mut found, mut end, len) = (HashMap::new(), START, file.metadata()?.len());
    let mut reader = BufReader::new(file);
    let mut begin = Vec::new();
    reader.by_ref().take(START).read_to_end(&mut begin)?;
    if !MAGIC.starts_with(&begin) {
        return Ok(None);
    }
    while len.saturating_sub(end) >= ENTRY as u64 {
        let mut entry = [0; ENTRY];
        reader.read_exact(&mut entry)?;
        let (of, sum) = entry.split_at(ENTRY - 8);
        if Sha256::digest(of)[..8] != *sum {
            break;
        }
        let digest = |at: usize| std::array::from_fn(|i| entry[at + i]);
        let packed_len = u64::from_le_bytes(std::array::from_fn(|i| entry[64 + i]));
        let made = entry[72] == 1;
        let at = end + ENTRY as u64;
        let body = if made { packed_len } else { 0 };
        if body > len - at {
            break;
        }
        reader.seek_relative(body as i64)?;
        end = at + body;
        let smaller = made.then(|| (at, digest(73)));
        found.insert(digest(0), Packable { source_digest: digest(32), packed_len, smaller });
    }
    Ok(Some((found, end.min(len))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pack_goes_on_behind_the_last_whole_entry() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("new/out.h5");
        let journal = Journal::open(&out).unwrap();
        let plain = journal.add(&[5; 32], [7; 32], 100, None).unwrap();
        let small = journal.add(&[2; 32], [8; 32], 1000, Some(b"small")).unwrap();
        journal.add(&[3; 32], [9; 32], 1000, Some(b"cut off")).unwrap();
        journal.keep();
        let path = directory.path().join("new/out.h5.packing");
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();

        // As often as it takes.
        let mut done = vec![([5; 32], plain), ([2; 32], small)];
        for attempt in 10..13 {
            let journal = Journal::open(&out).unwrap();
            assert_eq!(journal.find(&[3; 32]), None);
            for (stamp, image) in &done {
                assert_eq!(journal.find(stamp), Some(*image));
            }
            let (at, digest) = small.smaller.unwrap();
            assert_eq!(journal.read(at, small.packed_len, digest).unwrap(), b"small");
            assert!(journal.read(at, small.packed_len, [0; 32]).unwrap_err().to_string().contains("damaged"));
            let stamp = [attempt; 32];
            done.push((stamp, journal.add(&stamp, [9; 32], 1000, Some(&[attempt; 50])).unwrap()));
            let busy = Journal::open(&out).err().unwrap().to_string();
            assert!(busy.contains("another process is packing"), "{busy}");
        }
    }

    #[test]
    fn what_a_power_cut_leaves_is_done_again() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out.h5");
        let path = directory.path().join("out.h5.packing");
        for cut in [&b""[..], &MAGIC[..5]] {
            fs::write(&path, cut).unwrap();
            let journal = Journal::open(&out).unwrap();
            journal.add(&[1; 32], [2; 32], 9, Some(b"the bytes")).unwrap();
            drop(journal);
            assert!(Journal::open(&out).unwrap().find(&[1; 32]).is_some());
        }
        // The head has come to the disk, and the rest has not.
        let mut bytes = fs::read(&path).unwrap();
        let len = bytes.len();
        bytes[len - 9..].fill(0);
        fs::write(&path, &bytes).unwrap();
        let journal = Journal::open(&out).unwrap();
        assert_eq!(journal.find(&[1; 32]), None);
        let again = journal.add(&[1; 32], [2; 32], 9, Some(b"the bytes")).unwrap();
        drop(journal);
        let journal = Journal::open(&out).unwrap();
        assert_eq!(journal.find(&[1; 32]), Some(again));
        journal.remove();
        Journal::open(&out).unwrap().keep();
        assert!(!path.exists(), "nothing was in it");
    }

    #[test]
    fn any_bytes_are_entries_or_none() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out.h5");
        let journal = Journal::open(&out).unwrap();
        for index in 0..4 {
            journal.add(&[index; 32], [7; 32], 10, (index % 2 == 0).then_some(b"some bytes")).unwrap();
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
            match Journal::open(&out) {
                Ok(journal) => {
                    assert!(*journal.end() <= (bytes.len() as u64).max(START));
                    for index in 0..4 {
                        let found = journal.find(&[index; 32]).and_then(|image| image.smaller);
                        assert!(found.is_none_or(|(at, _)| at + 10 <= bytes.len() as u64));
                    }
                }
                Err(error) => {
                    assert!(error.to_string().contains("is no journal"), "{error}");
                    assert!(fs::read(&path).unwrap() == bytes, "what is not ours is left alone");
                }
            }
        }
    }
}
