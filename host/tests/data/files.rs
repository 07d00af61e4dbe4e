//! Files that h5py wrote are read, and every broken one is refused with a sentence that helps.

use std::fs;

use jepa_host::data::{DataError, Dataset, Layout, decode};

use crate::fixtures::{path, picture, png, write_reference};

fn refusal(name: &str) -> String {
    let error = Dataset::open(path(name)).unwrap_err().to_string();
    assert!(error.contains(name), "{error}");
    error
}

#[test]
fn the_reference_layout_of_h5py_is_read() {
    let dataset = Dataset::open(path("reference_layout.h5")).unwrap();
    assert_eq!(dataset.layout(), Layout::Reference);
    assert_eq!(dataset.len(), 6);
    assert_eq!(dataset.labels().unwrap(), [0, 0, 1, 1, 2, 2]);
    assert_eq!(dataset.require_labels("the test").unwrap(), [0, 0, 1, 1, 2, 2]);
    assert_eq!(dataset.classes(), 3);
    let sizes: Vec<_> = (0..6)
        .map(|index| decode::decode(&dataset.read(index).unwrap()).unwrap())
        .map(|image| (image.width, image.height))
        .collect();
    assert_eq!(sizes, [(26, 20), (25, 21), (24, 22), (23, 23), (22, 24), (12, 10)]);
}

#[test]
fn chunked_and_compressed_images_of_h5py_are_read() {
    let plain = Dataset::open(path("reference_layout.h5")).unwrap();
    let chunked = Dataset::open(path("chunked.h5")).unwrap();
    for index in 0..plain.len() {
        assert_eq!(plain.read(index).unwrap(), chunked.read(index).unwrap());
    }
    assert_eq!(plain.fingerprint().unwrap(), chunked.fingerprint().unwrap());
}

#[test]
fn chunks_without_compression_and_images_in_the_header_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.h5");
    let images: Vec<_> = (0..4).map(|seed| png(&picture(20, 20, seed))).collect();
    let file = hdf5::File::create(&path).unwrap();
    let group = file.create_group("images").unwrap();
    let build = |index: usize| group.new_dataset_builder().with_data(&images[index]);
    build(0).chunk(100).create("0").unwrap();
    build(1).chunk(100).fletcher32().shuffle().create("1").unwrap();
    build(2).layout(hdf5::dataset::Layout::Compact).create("2").unwrap();
    build(3).create("3").unwrap();
    drop(group);
    file.close().unwrap();
    let dataset = Dataset::open(&path).unwrap();
    for (index, image) in images.iter().enumerate() {
        assert_eq!(dataset.read(index).unwrap(), *image, "image {index}");
    }
}

#[test]
fn an_index_beyond_the_last_image_is_an_error() {
    let error = Dataset::open(path("reference_layout.h5")).unwrap().read(6).unwrap_err();
    assert!(error.to_string().ends_with("has 6 images, so there is no image 6"), "{error}");
}

#[test]
fn a_truncated_file_is_refused() {
    let error = refusal("bad_truncated.h5");
    assert!(error.contains("is truncated"), "{error}");
    assert!(error.contains("copy or pack it again"), "{error}");
}

#[test]
fn an_empty_data_set_is_refused() {
    assert!(refusal("bad_empty.h5").ends_with("holds no images; pack it again from a source that has some"));
}

#[test]
fn another_number_of_labels_than_images_is_refused() {
    assert!(refusal("bad_count.h5").contains("holds 6 images but 5 labels"));
}

#[test]
fn other_types_and_shapes_are_refused_with_the_images_number() {
    let error = refusal("bad_dtype.h5");
    assert!(error.contains("images/2 is float32") && error.contains("not a list of uint8"), "{error}");
    let error = refusal("bad_2d.h5");
    assert!(error.contains("images/2 is uint8 of shape [22, 24]"), "{error}");
}

#[test]
fn missing_labels_matter_only_to_those_who_need_them() {
    let dataset = Dataset::open(path("bad_no_labels.h5")).unwrap();
    assert_eq!(dataset.labels(), None);
    assert_eq!(dataset.classes(), 0);
    let error = dataset.require_labels("eval.linear").unwrap_err().to_string();
    assert!(
        error.contains("has no labels, and eval.linear needs one for each image; add a group `labels`"),
        "{error}"
    );
}

#[test]
fn a_file_that_is_not_hdf5_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.h5");
    for content in [&b""[..], b"hello", &[7; 5000]] {
        fs::write(&file, content).unwrap();
        let error = Dataset::open(&file).unwrap_err();
        assert!(matches!(error, DataError::NotHdf5 { .. }), "{error}");
        assert!(error.to_string().contains("jepa-host data pack"), "{error}");
    }
    let error = Dataset::open(directory.path().join("none.h5")).unwrap_err().to_string();
    assert!(error.starts_with("cannot open ") && error.contains("No such file"), "{error}");
    let error = Dataset::open(directory.path()).unwrap_err().to_string();
    assert!(error.contains("is a directory; `jepa-host data pack"), "{error}");
}

#[test]
fn hdf5_files_of_another_layout_say_what_they_have() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("other.h5");
    let file = hdf5::File::create(&path).unwrap();
    file.new_dataset_builder().with_data(&[1_u8, 2]).create("train_x").unwrap();
    file.close().unwrap();
    let error = Dataset::open(&path).unwrap_err().to_string();
    assert!(error.contains("it has no `images` (it has `train_x`)"), "{error}");

    let file = hdf5::File::create(&path).unwrap();
    file.new_dataset_builder().with_data(&[1_u8, 2]).create("images").unwrap();
    file.close().unwrap();
    let error = Dataset::open(&path).unwrap_err().to_string();
    assert!(error.contains("`images` is not a group of one data set per image"), "{error}");

    let file = hdf5::File::create(&path).unwrap();
    let group = file.create_group("images").unwrap();
    group.new_dataset_builder().with_data(&[1_u8, 2]).create("cat.png").unwrap();
    drop(group);
    file.close().unwrap();
    let error = Dataset::open(&path).unwrap_err().to_string();
    assert!(error.contains("`images` has 1 members but no \"0\""), "{error}");
}

#[test]
fn a_cut_in_the_images_of_an_old_style_file_is_found_when_it_is_opened() {
    // Where the library does not notice, the addresses do.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cut.h5");
    let images: Vec<_> = (0..20).map(|seed| png(&picture(40, 40, seed))).collect();
    write_reference(&path, &images, None);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 100]).unwrap();
    let error = Dataset::open(&path).unwrap_err();
    assert!(matches!(error, DataError::Truncated { .. }), "{error}");
}

#[test]
fn a_large_file_keeps_its_addresses_beside_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("large.h5");
    let count = 20_000;
    let images: Vec<Vec<u8>> = (0..count).map(|index: u32| index.to_le_bytes().to_vec()).collect();
    write_reference(&path, &images, None);
    let check = || {
        let dataset = Dataset::open(&path).unwrap();
        assert_eq!(dataset.len(), count as usize);
        for index in [0, 777, count - 1] {
            assert_eq!(dataset.read(index as usize).unwrap(), index.to_le_bytes());
        }
    };
    check();
    assert!(directory.path().join("large.h5.index").exists());
    check();
    // The same size and other contents: the index is made again.
    write_reference(&path, &images, None);
    check();
}
