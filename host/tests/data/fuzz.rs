//! Bytes that nobody meant: whatever they are, an error comes of it, or an image, and in bounded time and memory.
//!
//! Each test changes good files at random for `FUZZ_SECONDS` (default 2) seconds. A case is made from its number, and the number
//! is printed where one fails: `FUZZ_CASE` runs that one alone.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use jepa_host::data::augment::random_crop;
use jepa_host::data::decode::{Encoded, Rgb};
use jepa_host::data::{self, Dataset, PackOptions, inspect};
use jepa_plugin_api::Rng;
use libjpeg_turbo_rs::{PixelFormat, Subsampling, compress, compress_progressive};

use crate::fixtures::{Tensors, path, picture, png, small_set};

/// One image of the size that is refused just not, at the most bytes that a pixel has, and what a decoder needs beside it.
const MOST_MEMORY: u64 = 2 << 30;

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect(name))
}

/// Calls `of` with the generators of cases, until the time is over.
fn fuzz(what: &str, mut of: impl FnMut(&mut Rng)) {
    const LONGEST: Duration = Duration::from_secs(10);
    let time = Duration::from_secs(from_environment("FUZZ_SECONDS").unwrap_or(2));
    let (begin, only) = (Instant::now(), from_environment("FUZZ_CASE"));
    let (mut case, mut longest) = (only.unwrap_or(0), Duration::ZERO);
    loop {
        // What crashes takes the process with it: its number is the last.
        if from_environment("FUZZ_SECONDS").is_some() {
            fs::write(std::env::temp_dir().join(format!("fuzz-{what}.case")), case.to_string()).unwrap();
        }
        let started = Instant::now();
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            of(&mut Rng::keyed(case, 0, 0, 0));
        }));
        assert!(ended.is_ok(), "{what}: case {case} panics");
        longest = longest.max(started.elapsed());
        assert!(longest < LONGEST, "{what}: case {case} takes {longest:?}");
        case += 1;
        if only.is_some() || begin.elapsed() > time {
            break;
        }
    }
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak = peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10;
    println!("{what}: {case} cases, the longest {longest:?}, peak memory {} MB", peak >> 20);
    assert!(peak < MOST_MEMORY, "{what}: {peak} bytes of memory");
}

/// A good file with some changes: bits, bytes, ends, and pieces of it or of another in other places.
fn changed(good: &[Vec<u8>], rng: &mut Rng) -> Vec<u8> {
    let mut pick = |below: usize| rng.below(below.max(1) as u64) as usize;
    let mut bytes = good[pick(good.len())].clone();
    for _ in 0..1 + pick(6) {
        let (at, len) = (pick(bytes.len()), 1 + pick(32));
        match pick(6) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << pick(8),
            1 if !bytes.is_empty() => bytes[at] = pick(256) as u8,
            2 if !bytes.is_empty() => bytes[at] = [0, 0xFF, 0x7F, 0x80][pick(4)],
            3 => bytes.truncate(at),
            4 => {
                let other = &good[pick(good.len())];
                let from = pick(other.len());
                let piece = other[from..other.len().min(from + len)].to_vec();
                let end = bytes.len().min(at + piece.len());
                bytes.splice(at..end, piece);
            }
            _ => {
                let end = bytes.len().min(at + len);
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
        }
    }
    bytes
}

#[test]
fn decoders_take_any_bytes() {
    let image = picture(67, 45, 1);
    let rgb = |subsampling| compress(&image.pixels, 67, 45, PixelFormat::Rgb, 85, subsampling).unwrap();
    let mut good = vec![
        rgb(Subsampling::S420),
        rgb(Subsampling::S422),
        rgb(Subsampling::S444),
        compress_progressive(&image.pixels, 67, 45, PixelFormat::Rgb, 85, Subsampling::S420).unwrap(),
        png(&image),
    ];
    let tensors = Tensors::read("transforms.safetensors");
    for name in tensors.names("input.", ".encoded") {
        good.push(tensors.bytes(&format!("input.{name}.encoded")).1.to_vec());
    }
    let mut out = Rgb::default();
    fuzz("decoders", |rng| {
        let bytes = changed(&good, rng);
        let Ok(encoded) = Encoded::open(&bytes) else { return };
        let (width, height) = (encoded.width, encoded.height);
        let crop = random_crop(width, height, (0.05, 1.0), (0.5, 2.0), rng);
        if let Ok(region) = encoded.decode(crop, 1 << rng.below(3), &mut out) {
            let (region, (left, top)) = (region.pixels, region.origin);
            assert_eq!(region.pixels.len(), region.width as usize * region.height as usize * 3);
            assert!(
                left + region.width <= width && top + region.height <= height,
                "{width} × {height}, {crop:?}"
            );
        }
    });
}

/// Reads all that a data set has.
fn read_all(file: &Path) {
    let Ok(dataset) = Dataset::open(file) else { return };
    for index in 0..dataset.len().min(50) {
        let _ = dataset.read(index);
    }
    let _ = (dataset.fingerprint(), inspect(&dataset));
}

#[test]
fn hdf5_readers_take_any_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let small = small_set(directory.path(), 12, &[]);
    let packed = directory.path().join("packed.h5");
    data::pack(&small, &packed, &PackOptions::default(), &|_| {}).unwrap();
    let good: Vec<Vec<u8>> = [small, packed, path("reference_layout.h5"), path("chunked.h5")]
        .iter()
        .map(|path| fs::read(path).unwrap())
        .collect();
    let file = directory.path().join("changed.h5");
    fuzz("hdf5", |rng| {
        fs::write(&file, changed(&good, rng)).unwrap();
        read_all(&file);
    });
}

/// A packed file of version 1 with a flipped bit, which this fuzzing found: the library never came back from its strings.
#[test]
fn a_heap_that_has_no_end_is_not_read() {
    let dataset = Dataset::open(path("bad_heap.h5")).unwrap();
    assert_eq!((dataset.len(), dataset.class_names()), (12, None));
}
