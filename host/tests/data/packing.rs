//! What is packed is what was there, in a file that the HDF5 library and h5py read.

use std::fs;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use jepa_host::data::decode::Region;
use jepa_host::data::resample::{CropBox, Resampler};
use jepa_host::data::{
    self, DataError, Dataset, FeatureFile, Layout, Loader, LoaderOptions, OnError, PackOptions, PackProgress,
    PackReport, Smaller, Split, decode,
};
use jepa_plugin_api::tch::Device;
use jepa_plugin_api::{Interpolation, ViewSpec};

use crate::fixtures::{jpeg, path, picture, png, small_set, write_reference};

fn pack(source: &Path, out: &Path, options: &PackOptions) -> Result<PackReport, DataError> {
    data::pack(source, out, options, &|_| ControlFlow::Continue(()))
}

/// `cats` with three images, one of them a level deeper, `dogs` with two, and files that are no images.
fn class_folders(directory: &Path) -> PathBuf {
    let root = directory.join("photos");
    let files: [(&str, Vec<u8>); 7] = [
        ("dogs/b.JPG", jpeg(&picture(30, 20, 3))),
        ("dogs/a.png", png(&picture(12, 14, 4))),
        ("cats/2.jpeg", jpeg(&picture(31, 20, 1))),
        ("cats/1.jpg", jpeg(&picture(32, 20, 0))),
        ("cats/more/0.png", png(&picture(10, 10, 2))),
        ("cats/notes.txt", b"tabby".to_vec()),
        ("README", b"photos".to_vec()),
    ];
    for (name, content) in files {
        let file = root.join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, content).unwrap();
    }
    root
}

fn write_idx(directory: &Path, split: &str, images: &[[u8; 6]], labels: &[u8], gzip: bool) {
    let mut bytes = vec![0, 0, 8, 3];
    for size in [images.len() as u32, 2, 3] {
        bytes.extend(size.to_be_bytes());
    }
    bytes.extend(images.as_flattened());
    let mut label_bytes = vec![0, 0, 8, 1];
    label_bytes.extend((labels.len() as u32).to_be_bytes());
    label_bytes.extend(labels);
    for (name, bytes) in [("images-idx3-ubyte", bytes), ("labels-idx1-ubyte", label_bytes)] {
        if gzip {
            let file = fs::File::create(directory.join(format!("{split}-{name}.gz"))).unwrap();
            let mut encoder = GzEncoder::new(file, Compression::default());
            encoder.write_all(&bytes).unwrap();
            encoder.finish().unwrap();
        } else {
            fs::write(directory.join(format!("{split}-{name}")), bytes).unwrap();
        }
    }
}

#[test]
fn class_folders_are_packed_sorted_with_the_files_bytes_as_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let root = class_folders(directory.path());
    let out = directory.path().join("new/photos.h5");
    let report = pack(&root, &out, &PackOptions::default()).unwrap();
    assert_eq!((report.images, report.classes, report.ignored_files), (5, 2, 2));

    let dataset = Dataset::open(&out).unwrap();
    assert_eq!(dataset.layout(), Layout::Packed);
    assert_eq!(dataset.class_names().unwrap(), ["cats", "dogs"]);
    assert_eq!(dataset.labels().unwrap(), [0, 0, 0, 1, 1]);
    for (index, name) in
        ["cats/1.jpg", "cats/2.jpeg", "cats/more/0.png", "dogs/a.png", "dogs/b.JPG"].iter().enumerate()
    {
        assert_eq!(dataset.read(index).unwrap(), fs::read(root.join(name)).unwrap(), "{name}");
    }
    let provenance = dataset.provenance().unwrap();
    assert_eq!((provenance.source.as_str(), provenance.source_kind.as_str()), ("photos", "image folder"));
    assert!(provenance.tool.starts_with("jepa-host "));
    assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 1, "nothing else is left behind");
}

#[test]
fn a_packed_file_is_plain_hdf5() {
    let directory = tempfile::tempdir().unwrap();
    let root = class_folders(directory.path());
    let out = directory.path().join("photos.h5");
    pack(&root, &out, &PackOptions::default()).unwrap();

    let file = hdf5::File::open(&out).unwrap();
    let bytes = file.dataset("bytes").unwrap();
    assert!(bytes.offset().is_some(), "contiguous");
    let offsets: Vec<u64> = file.dataset("offsets").unwrap().read_raw().unwrap();
    let all: Vec<u8> = bytes.read_raw().unwrap();
    assert_eq!(offsets.len(), 6);
    assert_eq!(offsets[5] as usize, all.len());
    let third = &all[offsets[3] as usize..offsets[4] as usize];
    assert_eq!(third, fs::read(root.join("dogs/a.png")).unwrap());
    let labels: Vec<i64> = file.dataset("labels").unwrap().read_raw().unwrap();
    assert_eq!(labels, [0, 0, 0, 1, 1]);
    let files: Vec<u8> = file.dataset("files").unwrap().read_raw().unwrap();
    let files = String::from_utf8(files).unwrap();
    assert_eq!(files.matches('\0').count(), 5);
    assert_eq!(files.split('\0').nth(3), Some("dogs/a.png"));
}

#[test]
#[ignore = "needs h5py: `make test` fetches it and runs this too"]
fn h5py_reads_a_packed_file() {
    let directory = tempfile::tempdir().unwrap();
    let root = class_folders(directory.path());
    let out = directory.path().join("photos.h5");
    pack(&root, &out, &PackOptions::default()).unwrap();
    let script = "
import sys, zlib, h5py
with h5py.File(sys.argv[1]) as file:
    o = file['offsets'][()]
    assert file['bytes'].chunks is None and file['bytes'].dtype == 'u1'
    assert file['bytes'][o[3]:o[4]].tobytes() == open(sys.argv[2], 'rb').read()
    assert file['labels'][()].tolist() == [0, 0, 0, 1, 1]
    images = [file['bytes'][start:end].tobytes() for start, end in zip(o, o[1:])]
    assert file['checksums'][()].tolist() == [zlib.crc32(image) for image in images]
    assert file['files'][()].tobytes().split(b'\\0')[3] == b'dogs/a.png'
    assert file['class_names'].asstr()[()].tolist() == ['cats', 'dogs']
    assert file.attrs['format'].decode() == 'jepa-host packed images' and file.attrs['format_version'] == 2
    assert file.attrs['source'].decode() == 'photos'
";
    python(script, &[&out, &root.join("dogs/a.png")]);
}

#[test]
#[ignore = "needs h5py: `make test` fetches it and runs this too"]
fn h5py_reads_a_file_of_features() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("features.h5");
    let mut file = FeatureFile::create(&out, 3, 2, false).unwrap();
    file.append(&[0.0, 0.5, 1.0, 1.5], &[4, -1], &[0, 1]).unwrap();
    file.append(&[2.0, 2.5], &[7], &[2]).unwrap();
    file.finish().unwrap();
    let script = "
import sys, h5py
with h5py.File(sys.argv[1]) as file:
    assert file['features'].dtype == 'f4' and file['labels'].dtype == file['indices'].dtype == 'i8'
    assert file['features'][()].tolist() == [[0, 0.5], [1, 1.5], [2, 2.5]]
    assert file['labels'][()].tolist() == [4, -1, 7] and file['indices'][()].tolist() == [0, 1, 2]
";
    python(script, &[&out]);
}

/// Runs a script that imports h5py, and fails when it does.
fn python(script: &str, files: &[&Path]) {
    let python = std::env::var("PYTHON").unwrap_or("python3".to_owned());
    let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.deps/python");
    let mut command = Command::new(python);
    let command = command.env("PYTHONPATH", fetched).args(["-c", script]).args(files);
    assert!(command.status().unwrap().success());
}

#[test]
fn a_reference_layout_file_and_its_packed_copy_are_the_same_data() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("packed.h5");
    let report = pack(&path("reference_layout.h5"), &out, &PackOptions::default()).unwrap();
    assert_eq!((report.images, report.classes, report.source_kind), (6, 3, "hdf5"));
    let (reference, packed) =
        (Dataset::open(path("reference_layout.h5")).unwrap(), Dataset::open(&out).unwrap());
    assert_eq!(reference.labels(), packed.labels());
    assert_eq!(reference.fingerprint().unwrap(), packed.fingerprint().unwrap());
    for index in 0..6 {
        assert_eq!(reference.read(index).unwrap(), packed.read(index).unwrap());
    }
}

#[test]
fn the_fingerprint_notices_another_label() {
    let directory = tempfile::tempdir().unwrap();
    let images: Vec<_> = (0..3).map(|seed| png(&picture(8, 8, seed))).collect();
    let fingerprint = |labels: &[i64]| {
        let path = directory.path().join("a.h5");
        crate::fixtures::write_reference(&path, &images, Some(labels));
        Dataset::open(path).unwrap().fingerprint().unwrap()
    };
    assert_eq!(fingerprint(&[0, 1, 2]), fingerprint(&[0, 1, 2]));
    assert_ne!(fingerprint(&[0, 1, 2]), fingerprint(&[0, 2, 1]));
}

#[test]
fn packing_twice_gives_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let root = class_folders(directory.path());
    let packed = |name: &str| {
        let out = directory.path().join(name);
        pack(&root, &out, &PackOptions::default()).unwrap();
        fs::read(out).unwrap()
    };
    let first = packed("a.h5");
    // HDF5 keeps times in seconds.
    thread::sleep(Duration::from_millis(1100));
    assert!(packed("b.h5") == first);
}

#[test]
fn idx_files_become_png_with_the_same_pixels() {
    for gzip in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let images = [[0, 50, 100, 150, 200, 250], [9, 8, 7, 6, 5, 4], [1; 6]];
        write_idx(directory.path(), "train", &images, &[2, 0, 1], gzip);
        write_idx(directory.path(), "t10k", &images[..1], &[2], gzip);
        let out = directory.path().join("train.h5");
        let names = Some(vec!["shirt".to_owned(), "T-shirt/top".to_owned(), "été".to_owned()]);
        let options =
            PackOptions { split: Some(Split::Train), class_names: names.clone(), ..PackOptions::default() };
        pack(directory.path(), &out, &options).unwrap();
        let dataset = Dataset::open(&out).unwrap();
        assert_eq!(dataset.labels().unwrap(), [2, 0, 1]);
        assert_eq!(dataset.class_names().map(<[_]>::to_vec), names);
        for (index, pixels) in images.iter().enumerate() {
            let image = decode::decode(&dataset.read(index).unwrap()).unwrap();
            assert_eq!((image.width, image.height), (3, 2));
            assert!(image.pixels.iter().step_by(3).eq(pixels));
        }
        let test = directory.path().join("test.h5");
        pack(directory.path(), &test, &PackOptions { split: Some(Split::Test), ..PackOptions::default() })
            .unwrap();
        assert_eq!(Dataset::open(&test).unwrap().len(), 1);

        let error =
            pack(directory.path(), &out, &PackOptions { force: true, ..PackOptions::default() }).unwrap_err();
        assert!(error.to_string().contains("choose with --split train or --split test"), "{error}");
    }
}

#[test]
fn damaged_idx_files_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    write_idx(directory.path(), "train", &[[0; 6], [1; 6]], &[0], false);
    let out = directory.path().join("out.h5");
    let error = pack(directory.path(), &out, &PackOptions::default()).unwrap_err().to_string();
    assert!(error.contains("there are 2 images, and 1 labels"), "{error}");
    write_idx(directory.path(), "train", &[[0; 6], [1; 6]], &[0, 1], false);
    let images = directory.path().join("train-images-idx3-ubyte");
    let whole = fs::read(&images).unwrap();
    fs::write(&images, &whole[..whole.len() - 1]).unwrap();
    let error = pack(&images, &out, &PackOptions::default()).unwrap_err().to_string();
    assert!(error.contains("promises [2, 2, 3]") && error.contains("it is damaged"), "{error}");
    assert!(!out.exists());
}

#[test]
fn unreadable_images_are_refused_by_name_or_left_out_on_demand() {
    let directory = tempfile::tempdir().unwrap();
    let root = class_folders(directory.path());
    fs::write(root.join("cats/broken.jpg"), b"\xff\xd8\xff\xe0 not much of a photo").unwrap();
    let out = directory.path().join("photos.h5");
    let error = pack(&root, &out, &PackOptions::default()).unwrap_err().to_string();
    assert!(error.contains("1 of its images is unreadable: cats/broken.jpg ("), "{error}");
    assert!(error.contains("--skip-bad"), "{error}");
    assert!(!out.exists());

    let report = pack(&root, &out, &PackOptions { skip_bad: true, ..PackOptions::default() }).unwrap();
    assert_eq!(report.skipped.iter().map(|bad| bad.name.as_str()).collect::<Vec<_>>(), ["cats/broken.jpg"]);
    assert_eq!(Dataset::open(&out).unwrap().labels().unwrap(), [0, 0, 0, 1, 1]);
}

#[test]
fn images_are_made_smaller_on_demand_by_any_number_of_threads() {
    let directory = tempfile::tempdir().unwrap();
    let root = class_folders(directory.path());
    let pack_with = |out: &str, threads| {
        let smaller = Some(Smaller { shorter_side: 16, quality: 90 });
        let out = directory.path().join(out);
        let report = pack(&root, &out, &PackOptions { smaller, threads, ..PackOptions::default() }).unwrap();
        (out, report)
    };
    let (out, report) = pack_with("one.h5", 1);
    assert_eq!((report.images, report.made_smaller), (5, 3));
    let whole = directory.path().join("whole.h5");
    pack(&root, &whole, &PackOptions::default()).unwrap();
    let (dataset, whole) = (Dataset::open(&out).unwrap(), Dataset::open(&whole).unwrap());
    let sizes: Vec<_> = (0..5).map(|i| decode::header(&dataset.read(i).unwrap()).unwrap()).collect();
    let sizes: Vec<_> = sizes.iter().map(|header| (header.format, header.width, header.height)).collect();
    // 32 × 20, 31 × 20, 10 × 10, 12 × 14 and 30 × 20 they were.
    assert_eq!(
        sizes,
        [("jpeg", 25, 16), ("jpeg", 24, 16), ("png", 10, 10), ("png", 12, 14), ("jpeg", 24, 16)]
    );
    assert_eq!(dataset.read(2).unwrap(), whole.read(2).unwrap(), "what is small enough stays as it is");
    let (small, large) = (
        decode::decode(&dataset.read(0).unwrap()).unwrap(),
        decode::decode(&whole.read(0).unwrap()).unwrap(),
    );
    let (mut resized, all) = (decode::Rgb::default(), CropBox { top: 0, left: 0, height: 20, width: 32 });
    Resampler::default().resize(&Region::whole(&large), all, (25, 16), Interpolation::Bicubic, &mut resized);
    let differences = small.pixels.iter().zip(&resized.pixels).map(|(a, b)| f64::from(a.abs_diff(*b)));
    let mean = differences.sum::<f64>() / small.pixels.len() as f64;
    assert!(mean < 5.0, "{mean} levels in the mean beside the pixels that were encoded");
    let provenance = dataset.provenance().unwrap();
    assert_eq!((provenance.shorter_side, provenance.jpeg_quality), (Some(16), Some(90)));
    assert_eq!(provenance.source_sha256, whole.provenance().unwrap().source_sha256);
    assert_eq!(fs::read(out).unwrap(), fs::read(pack_with("four.h5", 4).0).unwrap());
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 4, "nothing else is left");
}

#[test]
fn a_pack_goes_on_where_another_ended() {
    let directory = tempfile::tempdir().unwrap();
    let root = class_folders(directory.path());
    let pack_to = |out: &str, smaller: Option<Smaller>, skip_bad: bool| {
        let out = directory.path().join(out);
        pack(&root, &out, &PackOptions { smaller, skip_bad, ..PackOptions::default() })
            .map(|_| fs::read(&out).unwrap())
    };
    let small = Some(Smaller { shorter_side: 16, quality: 90 });
    let (undisturbed, undisturbed_small) =
        (pack_to("a.h5", None, false).unwrap(), pack_to("b.h5", small, false).unwrap());

    let broken = root.join("dogs/broken.jpg");
    fs::write(&broken, "nothing").unwrap();
    for (out, smaller) in [("c.h5", None), ("d.h5", small)] {
        let error = pack_to(out, smaller, false).unwrap_err().to_string();
        assert!(error.contains("dogs/broken.jpg"), "{error}");
        assert!(directory.path().join(format!("{out}.packing")).exists());
    }
    // What has been done is not done again: what was made smaller is not even read.
    let photo = root.join("cats/1.jpg");
    let (bytes, modified) = (fs::read(&photo).unwrap(), fs::metadata(&photo).unwrap().modified().unwrap());
    let write = |bytes: &[u8]| {
        fs::write(&photo, bytes).unwrap();
        let times = fs::FileTimes::new().set_modified(modified);
        fs::File::options().write(true).open(&photo).unwrap().set_times(times).unwrap();
    };
    write(&vec![0; bytes.len()]);
    // Nor is the rest, when what was wrong has been mended.
    fs::remove_file(&broken).unwrap();
    assert!(pack_to("d.h5", small, false).unwrap() == undisturbed_small);
    let error = pack_to("c.h5", None, false).unwrap_err().to_string();
    assert!(error.contains("1.jpg changed while it was being packed"), "{error}");
    write(&bytes);
    assert!(pack_to("c.h5", None, false).unwrap() == undisturbed);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 5, "nothing else is left");
}

#[test]
fn what_cannot_be_read_is_not_left_out_as_bad() {
    let directory = tempfile::tempdir().unwrap();
    let root = class_folders(directory.path());
    // Its length and time are known, and to read it is an error of the system's.
    std::os::unix::fs::symlink("/proc/self/mem", root.join("cats/link.jpg")).unwrap();
    let out = directory.path().join("photos.h5");
    let error = pack(&root, &out, &PackOptions { skip_bad: true, ..PackOptions::default() }).unwrap_err();
    assert!(matches!(error, DataError::Io { .. }) && error.to_string().contains("link.jpg"), "{error}");
    assert!(!out.exists());
}

#[test]
fn what_is_not_there_or_not_allowed_is_left_out_on_demand() {
    let directory = tempfile::tempdir().unwrap();
    let root = class_folders(directory.path());
    std::os::unix::fs::symlink("/no/such/photo.jpg", root.join("cats/link.jpg")).unwrap();
    let out = directory.path().join("photos.h5");
    let error = pack(&root, &out, &PackOptions::default()).unwrap_err().to_string();
    assert!(error.contains("cats/link.jpg (No such file"), "{error}");
    let report = pack(&root, &out, &PackOptions { skip_bad: true, ..PackOptions::default() }).unwrap();
    assert_eq!((report.images, report.skipped.len()), (5, 1));
}

#[test]
fn nothing_but_a_file_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let root = class_folders(directory.path());
    let forced = PackOptions { force: true, ..PackOptions::default() };
    // What a link leads to, and not the link.
    let (file, link) = (directory.path().join("file.h5"), directory.path().join("link.h5"));
    fs::write(&file, "old").unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    assert!(pack(&root, &link, &PackOptions::default()).unwrap_err().to_string().contains("--force"));
    pack(&root, &link, &forced).unwrap();
    assert!(link.is_symlink() && Dataset::open(&file).unwrap().len() == 5);

    let fifo = directory.path().join("fifo.h5");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    for (out, is) in [(&root, "a directory"), (&fifo, "no file")] {
        let error = pack(&root, out, &forced).unwrap_err().to_string();
        assert!(error.contains(is) && error.contains("give another name"), "{error}");
    }
    fs::remove_file(&file).unwrap();
    let error = pack(&root, &link, &forced).unwrap_err().to_string();
    assert!(error.contains("cannot follow"), "{error}");
}

#[test]
fn a_corrupt_chunk_is_a_bad_image() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("chunked.h5");
    let mut bytes = fs::read(path("chunked.h5")).unwrap();
    // What h5py deflates at its usual level begins so.
    let at = bytes.windows(2).position(|start| start == [0x78, 0x5e]).unwrap();
    bytes[at + 2..at + 20].fill(0xff);
    fs::write(&source, bytes).unwrap();
    let dataset = Dataset::open(&source).unwrap();
    dataset.require_size(1).unwrap();
    assert_eq!(dataset.fingerprint().unwrap().len(), 64);
    let bad = data::verify(&dataset, true, 1, &|_, _| {}).bad;
    assert_eq!(bad.len(), 1, "{bad:?}");
    let out = directory.path().join("out.h5");
    let report = pack(&source, &out, &PackOptions { skip_bad: true, ..PackOptions::default() }).unwrap();
    assert_eq!(report.skipped.iter().map(|bad| bad.index).collect::<Vec<_>>(), [bad[0].index]);
}

#[test]
fn names_that_are_damaged_are_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("photos.h5");
    pack(&class_folders(directory.path()), &out, &PackOptions::default()).unwrap();
    let mut bytes = fs::read(&out).unwrap();
    let at = bytes.windows(5).rposition(|name| name == b"cats\0").unwrap();
    bytes[at] = 0xe3;
    fs::write(&out, bytes).unwrap();
    let error = Dataset::open(&out).unwrap_err().to_string();
    assert!(error.contains("`class_names` is damaged: it is not UTF-8"), "{error}");
}

#[test]
fn a_name_that_does_not_fit_is_refused_and_nothing_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let root = class_folders(directory.path());
    let class_names = Some(vec!["é".repeat(129), "dogs".to_owned()]);
    let out = directory.path().join("photos.h5");
    let error = pack(&root, &out, &PackOptions { class_names, ..PackOptions::default() }).unwrap_err();
    assert!(error.to_string().contains("longer than 256 bytes"), "{error}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "the photos");
}

#[test]
fn an_existing_file_is_only_overwritten_by_force() {
    let directory = tempfile::tempdir().unwrap();
    let root = class_folders(directory.path());
    let out = directory.path().join("photos.h5");
    fs::write(&out, "precious").unwrap();
    let error = pack(&root, &out, &PackOptions::default()).unwrap_err().to_string();
    assert!(error.contains("exists already") && error.contains("--force"), "{error}");
    assert_eq!(fs::read(&out).unwrap(), b"precious");
    pack(&root, &out, &PackOptions { force: true, ..PackOptions::default() }).unwrap();
    assert_eq!(Dataset::open(&out).unwrap().len(), 5);
}

#[test]
fn a_limit_takes_an_even_share_of_every_class() {
    let directory = tempfile::tempdir().unwrap();
    let source = small_set(directory.path(), 40, &[]);
    let out = directory.path().join("part.h5");
    pack(&source, &out, &PackOptions { limit: Some(10), ..PackOptions::default() }).unwrap();
    let mut counts = [0; 4];
    for &label in Dataset::open(&out).unwrap().labels().unwrap() {
        counts[label as usize] += 1;
    }
    assert_eq!(counts, [3, 3, 2, 2]);
}

#[test]
fn what_cannot_be_packed_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out.h5");
    let refusal = |source: &Path| pack(source, &out, &PackOptions::default()).unwrap_err().to_string();
    let empty = directory.path().join("empty");
    fs::create_dir(&empty).unwrap();
    assert!(refusal(&empty).contains("it has no JPEG or PNG files"));
    let text = directory.path().join("notes.txt");
    fs::write(&text, "notes").unwrap();
    assert!(refusal(&text).contains("neither a directory of class folders nor an HDF5 or IDX file"));
    assert!(refusal(Path::new("/no/such")).contains("No such file"));
    assert!(!out.exists());
}

#[test]
fn inspect_and_verify_tell_what_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let packed = directory.path().join("photos.h5");
    pack(&class_folders(directory.path()), &packed, &PackOptions::default()).unwrap();
    let summary = data::inspect(&Dataset::open(&packed).unwrap()).unwrap();
    let classes: Vec<_> =
        summary.classes.unwrap().into_iter().map(|class| (class.name.unwrap(), class.images)).collect();
    assert_eq!(classes, [("cats".to_owned(), 3), ("dogs".to_owned(), 2)]);
    assert_eq!((summary.sample.width, summary.sample.height), ((10, 32), (10, 20)));
    assert_eq!(summary.sample.formats.into_iter().collect::<Vec<_>>(), [("jpeg", 3), ("png", 2)]);

    let report = data::verify(&Dataset::open(&packed).unwrap(), true, 2, &|_, _| {});
    assert!(report.bad.is_empty());
    let broken = small_set(directory.path(), 50, &[0, 33]);
    let report = data::verify(&Dataset::open(broken).unwrap(), true, 2, &|_, _| {});
    assert_eq!(report.images, 50);
    assert_eq!(report.bad.iter().map(|bad| bad.index).collect::<Vec<_>>(), [0, 33]);
    for deep in [true, false] {
        let report = data::verify(&Dataset::open(path("bad_jpeg.h5")).unwrap(), deep, 1, &|_, _| {});
        assert_eq!(report.bad.iter().map(|bad| bad.index).collect::<Vec<_>>(), [3], "deep: {deep}");
    }
    // That one is cut is seen at its end; noise within its data is nothing that this tells.
    let mut damaged = png(&picture(30, 20, 1));
    let cut = damaged[..damaged.len() - 20].to_vec();
    let middle = damaged.len() / 2;
    damaged[middle..middle + 8].fill(0);
    let file = directory.path().join("damaged.h5");
    write_reference(&file, &[damaged, cut], None);
    let bad = |deep| data::verify(&Dataset::open(&file).unwrap(), deep, 1, &|_, _| {}).bad;
    assert_eq!(bad(false).iter().map(|bad| bad.index).collect::<Vec<_>>(), [1]);
    assert_eq!(bad(true).len(), 2);
}

#[test]
fn a_bit_that_flips_in_an_image_is_seen_whether_or_not_it_decodes() {
    let directory = tempfile::tempdir().unwrap();
    let root = class_folders(directory.path());
    let out = directory.path().join("photos.h5");
    pack(&root, &out, &PackOptions::default()).unwrap();
    let offset = {
        let file = hdf5::File::open(&out).unwrap();
        let offsets: Vec<u64> = file.dataset("offsets").unwrap().read_raw().unwrap();
        // In the middle of the pixels of dogs/b.JPG, which still decodes.
        file.dataset("bytes").unwrap().offset().unwrap() + (offsets[4] + offsets[5]) / 2
    };
    let sound = data::verify(&Dataset::open(&out).unwrap(), false, 1, &|_, _| {});
    assert!(sound.checksums && sound.bad.is_empty(), "{:?}", sound.bad);

    let mut bytes = fs::read(&out).unwrap();
    bytes[offset as usize] ^= 1;
    fs::write(&out, &bytes).unwrap();
    let dataset = Dataset::open(&out).unwrap();
    let report = data::verify(&dataset, false, 1, &|_, _| {});
    let [bad] = report.bad.as_slice() else { panic!("{:?}", report.bad) };
    assert_eq!((bad.index, bad.name.as_str()), (4, "image 4 (dogs/b.JPG)"));
    assert!(bad.reason.contains("its checksum differs"), "{}", bad.reason);
    let error = dataset.read(4).unwrap_err().to_string();
    assert!(
        error.contains("photos.h5: image 4 (dogs/b.JPG) is corrupt: it is not what was packed"),
        "{error}"
    );

    // Packed again, images keep their names, and their damage is not taken over.
    let again = directory.path().join("again.h5");
    let report = pack(&out, &again, &PackOptions { skip_bad: true, ..PackOptions::default() }).unwrap();
    assert_eq!((report.images, report.skipped.len()), (4, 1));
    assert_eq!(Dataset::open(&again).unwrap().file_name(3), Some("dogs/a.png"));
}

#[test]
fn held_out_images_get_the_labels_of_the_training_images() {
    let directory = tempfile::tempdir().unwrap();
    let root = class_folders(directory.path());
    let [train, val] = ["train.h5", "val.h5"].map(|name| directory.path().join(name));
    pack(&root, &train, &PackOptions::default()).unwrap();
    // Without cats, dogs would be class 0.
    let held_out = directory.path().join("held_out");
    fs::create_dir_all(&held_out).unwrap();
    fs::rename(root.join("dogs"), held_out.join("dogs")).unwrap();
    pack(&held_out, &val, &PackOptions::default()).unwrap();
    let train_set = Dataset::open(&train).unwrap();
    let error =
        Dataset::open(&val).unwrap().require_same_classes(&train_set, "data.train").unwrap_err().to_string();
    assert!(error.contains("val.h5: class 0 is `dogs`, and in data.train it is `cats`"), "{error}");
    assert!(error.contains("--classes-of") && error.contains("train.h5"), "{error}");

    let classes = train_set.class_names().map(<[_]>::to_vec);
    let options = PackOptions { label_by: classes.clone(), force: true, ..PackOptions::default() };
    pack(&held_out, &val, &options).unwrap();
    let val_set = Dataset::open(&val).unwrap();
    assert_eq!(val_set.labels(), Some(&[1i64, 1][..]));
    val_set.require_same_classes(&train_set, "data.train").unwrap();

    fs::rename(held_out.join("dogs"), held_out.join("dog")).unwrap();
    let error = pack(&held_out, &val, &options).unwrap_err().to_string();
    assert!(error.contains("`dog` is none of the 2") && error.contains("did you mean `dogs`?"), "{error}");
    let unnamed = PackOptions { label_by: classes, force: true, ..PackOptions::default() };
    let error = pack(&path("reference_layout.h5"), &val, &unnamed).unwrap_err().to_string();
    assert!(error.contains("its classes have no names"), "{error}");
}

#[test]
fn who_breaks_off_goes_on_where_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let root = class_folders(directory.path());
    let [whole, broken] = ["whole.h5", "broken.h5"].map(|name| directory.path().join(name));
    let options = PackOptions { threads: 1, ..PackOptions::default() };
    pack(&root, &whole, &options).unwrap();
    for at in [PackProgress::Checked(2, 5), PackProgress::Written(3, 5)] {
        let until =
            |progress| if progress == at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        let error = data::pack(&root, &broken, &options, &until).unwrap_err();
        assert!(matches!(error, DataError::Interrupted), "{error}");
        let mut left: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["broken.h5.packing", "photos", "whole.h5"]);
    }
    pack(&root, &broken, &options).unwrap();
    assert_eq!(fs::read(&broken).unwrap(), fs::read(&whole).unwrap());
}

/// The packed file with its images stored by the library, in chunks, as `h5repack` may leave it.
fn in_chunks(packed: &Path, flipped: Option<usize>) {
    let file = hdf5::File::open_rw(packed).unwrap();
    let mut bytes: Vec<u8> = file.dataset("bytes").unwrap().read_raw().unwrap();
    if let Some(at) = flipped {
        bytes[at] ^= 1;
    }
    file.unlink("bytes").unwrap();
    file.new_dataset_builder().with_data(&bytes).chunk(512).create("bytes").unwrap();
}

#[test]
fn checksums_are_compared_however_the_images_are_stored() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("photos.h5");
    for (flipped, bad) in [(None, 0), (Some(700), 1)] {
        let options = PackOptions { force: true, ..PackOptions::default() };
        pack(&class_folders(directory.path()), &out, &options).unwrap();
        in_chunks(&out, flipped);
        let report = data::verify(&Dataset::open(&out).unwrap(), false, 1, &|_, _| {});
        assert_eq!((report.checksums, report.bad.len()), (true, bad), "{:?}", report.bad);
    }
}

#[test]
fn a_file_without_checksums_and_names_is_read_as_before() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("photos.h5");
    pack(&class_folders(directory.path()), &out, &PackOptions::default()).unwrap();
    let checksums: Vec<u32> = {
        let file = hdf5::File::open_rw(&out).unwrap();
        let checksums = file.dataset("checksums").unwrap().read_raw().unwrap();
        file.unlink("checksums").unwrap();
        file.unlink("files").unwrap();
        checksums
    };
    let dataset = Dataset::open(&out).unwrap();
    let report = data::verify(&dataset, true, 1, &|_, _| {});
    assert!(!report.checksums && report.bad.is_empty(), "{:?}", report.bad);
    assert_eq!(dataset.image_name(2), "image 2");

    let file = hdf5::File::open_rw(&out).unwrap();
    file.new_dataset_builder().with_data(&checksums[1..]).create("checksums").unwrap();
    file.close().unwrap();
    let error = Dataset::open(&out).unwrap_err().to_string();
    assert!(error.contains("it has 5 images and 4 checksums"), "{error}");
}

#[test]
fn training_goes_on_without_an_image_whose_checksum_differs() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("photos.h5");
    pack(&class_folders(directory.path()), &out, &PackOptions::default()).unwrap();
    in_chunks(&out, Some(700));
    let batches = |on_error| {
        let views = vec![ViewSpec::new("whole").resize_center_crop(1.0, Interpolation::Bilinear)];
        let options = LoaderOptions { batch_size: 5, on_error, ..LoaderOptions::new(views, 8) };
        let loader = Loader::new(Arc::new(Dataset::open(&out).unwrap()), options).unwrap();
        let batch = loader.batches(0, 0).next().unwrap();
        batch.map(|batch| batch.finish(Device::Cpu).unwrap())
    };
    assert!(matches!(batches(OnError::Fail).unwrap_err(), DataError::Corrupt { .. }));
    assert_eq!(batches(OnError::Replace).unwrap().replaced, 1);
}
