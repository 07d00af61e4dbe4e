//! Bytes that nobody meant: whatever they are, an error comes of it, or an image, and in bounded time and memory.
//!
//! Each test changes good files at random, some thousand times, or for `FUZZ_SECONDS`. A case is made from its number, and the
//! number is printed where one fails: `FUZZ_CASE` runs that one alone, and of a decoder leaves its bytes in the
//! folder of temporary files.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use jepa_host::data::augment::{Augmenter, Scratch};
use jepa_host::data::decode::{Encoded, Rgb, decode};
use jepa_host::data::{self, Dataset, PackOptions, inspect};
use jepa_plugin_api::{Interpolation, Rng, ViewSpec};
use libjpeg_turbo_rs::{PixelFormat, Subsampling, compress, compress_progressive};

use crate::fixtures::{Tensors, path, picture, png, small_set};

/// One image of the size that is refused just not, at the most bytes that a pixel has while it is decoded, and what else the
/// tests of this process have.
const MOST_MEMORY: u64 = 2 << 30;

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect(name))
}

/// Calls `of` with the generators of cases: so many, or as many as there is time for. It says whether what it got was good
/// enough to be read; some of it has to be.
fn fuzz(what: &'static str, cases: u64, mut of: impl FnMut(&mut Rng) -> bool) {
    let time = from_environment("FUZZ_SECONDS").map(Duration::from_secs);
    let only = from_environment("FUZZ_CASE");
    let watchdog = Watchdog::start(what);
    let (begin, first) = (Instant::now(), only.unwrap_or(0));
    let (mut case, mut longest, mut read) = (first, Duration::ZERO, 0);
    loop {
        watchdog.case.store(case, Ordering::Relaxed);
        let started = Instant::now();
        let ended =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| of(&mut Rng::keyed(case, 0, 0, 0))));
        let Ok(was_read) = ended else { panic!("{what}: case {case} panics") };
        longest = longest.max(started.elapsed());
        read += u64::from(was_read);
        case += 1;
        let enough = time.map_or(case >= cases, |time| begin.elapsed() > time);
        if only.is_some() || enough {
            break;
        }
    }
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak = peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10;
    println!("{what}: {case} cases, {read} read, the longest {longest:?}, peak memory {} MB", peak >> 20);
    assert!(peak < MOST_MEMORY, "{what}: {peak} bytes of memory");
    assert!(
        only.is_some() || (case / 20..case - case / 20).contains(&read),
        "{what}: {read} of {case} were read"
    );
}

/// Ends the process where a case does not end: code in C cannot be stopped in another way.
struct Watchdog {
    case: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
}

impl Watchdog {
    const LONGEST: Duration = Duration::from_secs(30);

    fn start(what: &'static str) -> Watchdog {
        let (case, is_over) = (Arc::new(AtomicU64::new(u64::MAX)), Arc::new(AtomicBool::new(false)));
        let watchdog = Watchdog { case: case.clone(), is_over: is_over.clone() };
        thread::spawn(move || {
            let (mut seen, mut since) = (u64::MAX, Instant::now());
            while !is_over.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(100));
                let now = case.load(Ordering::Relaxed);
                if now != seen {
                    (seen, since) = (now, Instant::now());
                }
                if since.elapsed() > Watchdog::LONGEST {
                    eprintln!("{what}: case {now} does not end");
                    process::abort();
                }
            }
        });
        watchdog
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
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

/// Most changes of a PNG are found by its checksums, and what is behind them would see none.
fn repair_checksums(png: &mut [u8]) {
    let mut at = 8;
    while let Some(len) = png.get(at..at + 4) {
        let len = u32::from_be_bytes(std::array::from_fn(|i| len[i])) as usize;
        let Some(end) = (at + 8).checked_add(len).filter(|end| end + 4 <= png.len()) else { return };
        let mut crc = flate2::Crc::new();
        crc.update(&png[at + 4..end]);
        png[end..end + 4].copy_from_slice(&crc.sum().to_be_bytes());
        at = end + 4;
    }
}

/// What is read. A decoder's panic is an error like any other, but a new one is worth a look.
fn sound<T>(result: Result<T, String>) -> Option<T> {
    // In png 0.18.1, of a palette that is cut within a colour.
    const KNOWN: [&str; 1] = ["range end index 3 out of range for slice of length"];
    result
        .inspect_err(|reason| {
            let is_new = reason.contains("panics") && !KNOWN.iter().any(|known| reason.contains(known));
            assert!(!is_new, "{reason}");
        })
        .ok()
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
    let crop = ViewSpec::new("crop").random_resized_crop((0.05, 1.0), Interpolation::Bicubic);
    let center = ViewSpec::new("center").resize_center_crop(0.875, Interpolation::Bicubic);
    let views = [crop, center].map(|view| Augmenter::new(&view, 16).unwrap());
    let (mut image, mut scratch, mut out) = (Rgb::default(), Scratch::default(), vec![0.0; 3 * 16 * 16]);
    fuzz("decoders", 40_000, |rng| {
        let mut bytes = changed(&good, rng);
        if bytes.starts_with(b"\x89PNG") {
            repair_checksums(&mut bytes);
        }
        if from_environment("FUZZ_CASE").is_some() {
            fs::write(std::env::temp_dir().join("fuzz-decoders"), &bytes).unwrap();
        }
        let Some(encoded) = sound(Encoded::open(&bytes)) else { return false };
        let (width, height) = (encoded.width, encoded.height);
        let plan = views[0].draw(width, height, rng);
        let crop = plan.crop;
        let Some(region) = sound(encoded.decode(crop, 1 << rng.below(3), &mut image)) else { return false };
        let (pixels, (left, top)) = (region.pixels, region.origin);
        assert_eq!(pixels.pixels.len(), pixels.width as usize * pixels.height as usize * 3);
        assert!(
            left + pixels.width <= width && top + pixels.height <= height,
            "{width} × {height}, {crop:?}"
        );
        views[0].make(&region, &plan, &mut scratch, &mut out);
        if region.origin == (0, 0) && region.shrink == 1 {
            views[1].apply(pixels, rng, &mut scratch, &mut out);
        }
        true
    });
}

/// Reads all that a data set has, if it is one.
fn read_all(file: &Path) -> bool {
    let Ok(dataset) = Dataset::open(file) else { return false };
    for index in 0..dataset.len().min(50) {
        let _ = dataset.read(index);
    }
    let _ = (dataset.fingerprint(), inspect(&dataset));
    let texts = dataset.class_names().into_iter().flatten();
    let texts = texts.chain(dataset.provenance().into_iter().flat_map(|from| [&from.tool, &from.source]));
    texts.for_each(|text| assert!(std::str::from_utf8(text.as_bytes()).is_ok()));
    true
}

#[test]
fn hdf5_readers_take_any_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let small = small_set(directory.path(), 12, &[]);
    let packed = directory.path().join("packed.h5");
    data::pack(&small, &packed, &PackOptions::default(), &|_| ControlFlow::Continue(())).unwrap();
    let good: Vec<Vec<u8>> = [small, packed, path("reference_layout.h5"), path("chunked.h5")]
        .iter()
        .map(|path| fs::read(path).unwrap())
        .collect();
    let file = directory.path().join("changed.h5");
    fuzz("hdf5", 4000, |rng| {
        fs::write(&file, changed(&good, rng)).unwrap();
        read_all(&file)
    });
}

/// A packed file of version 1 with a flipped bit, which this fuzzing found: the library never came back from its strings.
#[test]
fn a_heap_that_has_no_end_is_not_read() {
    let _watchdog = Watchdog::start("a damaged heap");
    let dataset = Dataset::open(path("bad_heap.h5")).unwrap();
    assert_eq!((dataset.len(), dataset.class_names()), (12, None));
}

/// Whose palette is cut within a colour, which this fuzzing found: a panic in a decoder.
#[test]
fn an_image_whose_decoder_panics_is_a_bad_image() {
    let error = decode(&fs::read(path("bad_palette.png")).unwrap()).unwrap_err();
    assert!(error.contains("its decoder panics: range end index 3"), "{error}");
}
