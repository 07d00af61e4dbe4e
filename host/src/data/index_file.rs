//! The addresses and labels of a large reference-layout file, kept beside it.
//!
//! Asking the HDF5 library for a million addresses takes a minute. `FILE.h5.index` keeps the answer; it is used only
//! while length and modification time of the file are those it was made from, and any doubt makes it again. It is a
//! convenience: where it cannot be written, nothing is lost but time.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::dataset::{Contents, Layout, NO_ADDRESS, Slot};

/// Below this many images, asking again is as fast.
const WORTHWHILE: usize = 20_000;
const MAGIC: [u8; 8] = *b"JEPAIDX1";

fn index_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".index");
    PathBuf::from(name)
}

fn header(metadata: &Metadata) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend(metadata.len().to_le_bytes());
    header.extend(metadata.mtime().to_le_bytes());
    header.extend(metadata.mtime_nsec().to_le_bytes());
    header
}

/// The contents as they were when the index was written, if the file is still that one.
pub(super) fn load(path: &Path, metadata: &Metadata) -> Option<Contents> {
    let index = fs::read(index_path(path)).ok()?;
    let (body, checksum) = index.split_at_checked(index.len().checked_sub(32)?)?;
    let body = body.strip_prefix(header(metadata).as_slice())?;
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
    Some(Contents { layout: Layout::Reference, slots, labels, class_names: None, provenance: None })
}

/// Keeps the contents where that is worth a file and every image has an address.
pub(super) fn save(path: &Path, metadata: &Metadata, contents: &Contents) {
    let slots = &contents.slots;
    if slots.len() < WORTHWHILE || slots.iter().any(|slot| slot.offset == NO_ADDRESS) {
        return;
    }
    let mut index = header(metadata);
    index.push(u8::from(contents.labels.is_some()));
    index.extend(slots.iter().flat_map(|slot| slot.offset.to_le_bytes()));
    index.extend(slots.iter().flat_map(|slot| slot.len.to_le_bytes()));
    index.extend(contents.labels.iter().flatten().flat_map(|label| label.to_le_bytes()));
    let checksum = Sha256::digest(&index);
    index.extend(checksum);

    let target = index_path(path);
    let temporary = target.with_extension(format!("index.{}", std::process::id()));
    if let Err(error) = fs::write(&temporary, index).and_then(|()| fs::rename(&temporary, &target)) {
        let _ = fs::remove_file(&temporary);
        tracing::debug!("addresses are not kept in {}: {error}", target.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(labels: bool) -> Contents {
        let slots = (0..WORTHWHILE as u64).map(|i| Slot { offset: 100 + 3 * i, len: 3 }).collect();
        let labels = labels.then(|| (0..WORTHWHILE as i64).map(|i| i % 7).collect());
        Contents { layout: Layout::Reference, slots, labels, class_names: None, provenance: None }
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
        let whole = fs::read(index_path(&file)).unwrap();
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 1;
        for damaged in [&flipped[..], &whole[..whole.len() - 8], &whole[..10], b""] {
            fs::write(index_path(&file), damaged).unwrap();
            assert!(load(&file, &metadata).is_none());
        }
    }
}
