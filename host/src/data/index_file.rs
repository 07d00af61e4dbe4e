//! The addresses and labels of a large reference-layout file, kept beside it.
//!
//! Asking the HDF5 library for a million addresses takes a while. `FILE.h5.index` keeps the answer, or where that folder
//! cannot be written, a file in the user's cache directory does. It is used only while the file's length, modification time
//! and some of its bytes are those it was made from, and any doubt makes it again. It is a convenience: where it cannot be
//! written, nothing is lost but time.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::dataset::{Contents, NO_ADDRESS, Slot};
use crate::hex::hex;

/// Below this many images, asking again is as fast.
pub(super) const WORTHWHILE: usize = 20_000;
const MAGIC: [u8; 8] = *b"JEPAIDX2";

/// Where the index of a file may be: beside it, and in the user's cache directory.
fn places(path: &Path) -> impl Iterator<Item = PathBuf> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".index");
    // One that is empty or relative does not count.
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|cache| cache.is_absolute());
    let cache = cache.or_else(|| std::env::home_dir().map(|home| home.join(".cache")));
    let of_user = cache.zip(path.canonicalize().ok()).map(|(cache, path)| {
        let name = hex(&Sha256::digest(path.as_os_str().as_encoded_bytes()));
        cache.join("jepa-host").join(format!("{name}.index"))
    });
    [PathBuf::from(beside)].into_iter().chain(of_user)
}

/// What an index begins with: which file it was made from. Of its bytes, 64 blocks spread evenly go into a hash.
fn header(path: &Path, metadata: &Metadata) -> io::Result<Vec<u8>> {
    const BLOCKS: u64 = 64;
    const BLOCK: u64 = 4096;
    let (file, mut hash, mut block) = (File::open(path)?, Sha256::new(), [0; BLOCK as usize]);
    let room = metadata.len().saturating_sub(BLOCK);
    for i in 0..BLOCKS {
        let at = (u128::from(room) * u128::from(i) / u128::from(BLOCKS - 1)) as u64;
        let block = &mut block[..BLOCK.min(metadata.len()) as usize];
        file.read_exact_at(block, at)?;
        hash.update(block);
    }
    let mut header = MAGIC.to_vec();
    header.extend(metadata.len().to_le_bytes());
    header.extend(metadata.mtime().to_le_bytes());
    header.extend(metadata.mtime_nsec().to_le_bytes());
    header.extend(hash.finalize());
    Ok(header)
}

/// The contents as they were when the index was written, if the file is still that one.
pub(super) fn load(path: &Path, metadata: &Metadata) -> Option<Contents> {
    let mut found = places(path).filter_map(|place| fs::read(place).ok()).peekable();
    found.peek()?;
    let header = header(path, metadata).ok()?;
    found.find_map(|index| read(&index, &header))
}

fn read(index: &[u8], header: &[u8]) -> Option<Contents> {
    let (body, checksum) = index.split_at_checked(index.len().checked_sub(32)?)?;
    let body = body.strip_prefix(header)?;
    if Sha256::digest(&index[..index.len() - 32]).as_slice() != checksum {
        return None;
    }
    let (&labelled, body) = body.split_first()?;
    let (numbers, rest) = body.as_chunks::<8>();
    let columns = if labelled == 1 { 3 } else { 2 };
    let count = numbers.len() / columns;
    if !rest.is_empty() || count == 0 || count * columns != numbers.len() {
        return None;
    }
    let (offsets, numbers) = numbers.split_at(count);
    let (lengths, labels) = numbers.split_at(count);
    let slots = offsets
        .iter()
        .zip(lengths)
        .map(|(&offset, &len)| Slot { offset: u64::from_le_bytes(offset), len: u64::from_le_bytes(len) })
        .collect();
    let labels = (labelled == 1).then(|| labels.iter().map(|&label| i64::from_le_bytes(label)).collect());
    Some(Contents::of_reference(slots, labels))
}

/// Keeps the contents where that is worth a file and every image has an address.
pub(super) fn save(path: &Path, metadata: &Metadata, contents: &Contents) {
    let slots = &contents.slots;
    if slots.len() < WORTHWHILE || slots.iter().any(|slot| slot.offset == NO_ADDRESS) {
        return;
    }
    let Ok(mut index) = header(path, metadata) else { return };
    index.push(u8::from(contents.labels.is_some()));
    index.extend(slots.iter().flat_map(|slot| slot.offset.to_le_bytes()));
    index.extend(slots.iter().flat_map(|slot| slot.len.to_le_bytes()));
    index.extend(contents.labels.iter().flatten().flat_map(|label| label.to_le_bytes()));
    let checksum = Sha256::digest(&index);
    index.extend(checksum);

    let written = places(path).try_fold(Vec::new(), |mut errors, place| match write(&place, &index) {
        Ok(()) => Err(place),
        Err(error) => {
            errors.push(format!("{}: {error}", place.display()));
            Ok(errors)
        }
    });
    match written {
        Err(place) => tracing::debug!("addresses are kept in {}", place.display()),
        Ok(errors) => tracing::debug!("addresses are not kept: {}", errors.join("; ")),
    }
}

fn write(place: &Path, index: &[u8]) -> io::Result<()> {
    if let Some(folder) = place.parent() {
        fs::create_dir_all(folder)?;
    }
    let temporary = place.with_extension(format!("index.{}", std::process::id()));
    let written = fs::write(&temporary, index).and_then(|()| fs::rename(&temporary, place));
    if written.is_err() {
        // The half of it that there may be is of no use.
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn contents(labels: bool) -> Contents {
        let slots = (0..WORTHWHILE as u64).map(|i| Slot { offset: 100 + 3 * i, len: 3 }).collect();
        let labels = labels.then(|| (0..WORTHWHILE as i64).map(|i| i % 7).collect());
        Contents::of_reference(slots, labels)
    }

    #[test]
    fn an_index_is_read_back_until_the_file_changes() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a.h5");
        fs::write(&file, "the file").unwrap();
        for labels in [false, true] {
            let written = contents(labels);
            let metadata = fs::metadata(&file).unwrap();
            save(&file, &metadata, &written);
            let read = load(&file, &metadata).unwrap();
            assert_eq!((read.slots, read.labels), (written.slots, written.labels));
        }
        // The same length, and even the same time: other bytes.
        let times = fs::FileTimes::new().set_modified(fs::metadata(&file).unwrap().modified().unwrap());
        fs::write(&file, "The file").unwrap();
        File::options().write(true).open(&file).unwrap().set_times(times).unwrap();
        assert!(load(&file, &fs::metadata(&file).unwrap()).is_none());
        fs::write(&file, "the file, longer").unwrap();
        assert!(load(&file, &fs::metadata(&file).unwrap()).is_none());
    }

    #[test]
    fn a_damaged_index_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a.h5");
        fs::write(&file, "the file").unwrap();
        let metadata = fs::metadata(&file).unwrap();
        save(&file, &metadata, &contents(true));
        let index = directory.path().join("a.h5.index");
        let whole = fs::read(&index).unwrap();
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 1;
        for damaged in [&flipped[..], &whole[..whole.len() - 8], &whole[..10], b""] {
            fs::write(&index, damaged).unwrap();
            assert!(load(&file, &metadata).is_none());
        }
    }

    /// Even one whose checksum is right. For `FUZZ_SECONDS`, as the fuzzing of `host/tests/data/fuzz.rs`.
    #[test]
    fn any_bytes_are_an_index_or_none() {
        let header = vec![7; 64];
        let seconds = std::env::var("FUZZ_SECONDS").map(|value| value.parse().expect("FUZZ_SECONDS"));
        let (time, begin) = (seconds.map(Duration::from_secs), Instant::now());
        for case in
            (0..).take_while(|case| *case < 20_000 || time.as_ref().is_ok_and(|t| begin.elapsed() < *t))
        {
            let mut rng = jepa_plugin_api::Rng::keyed(case, 0, 0, 0);
            let mut index = header.clone();
            index.extend((0..rng.below(120)).map(|_| (rng.bits() >> 8) as u8 & 3));
            let checksum = Sha256::digest(&index);
            index.extend(checksum);
            index.truncate(index.len() - rng.below(2) as usize * rng.below(40) as usize);
            if let Some(contents) = read(&index, &header) {
                assert!(contents.slots.len() * 16 < index.len());
            }
        }
    }
}
