//! Batches depend on seed and epoch alone; corrupt images follow the policy.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jepa_host::data::decode::{Rgb, decode};
use jepa_host::data::{
    Augment, DataError, Dataset, Decode, LoadedBatch, Loader, LoaderOptions, OnError, RawBatch, Share,
};
use jepa_plugin_api::{Interpolation, Transform, ViewSpec};
use tch::{Device, Kind, Tensor};

use crate::fixtures::{jpeg, picture, png, small_set, write_reference};

fn views() -> Vec<ViewSpec> {
    let view = |name| {
        ViewSpec::new(name)
            .random_resized_crop((0.2, 1.0), Interpolation::Bicubic)
            .horizontal_flip(0.5)
            .normalize_imagenet()
    };
    vec![view("first"), view("second")]
}

fn options(threads: usize) -> LoaderOptions {
    LoaderOptions { batch_size: 6, seed: 42, threads, ..LoaderOptions::new(views(), 8) }
}

fn loader(path: &Path, options: LoaderOptions) -> Loader {
    Loader::new(Arc::new(Dataset::open(path).unwrap()), options).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.flatten(0, -1)).unwrap()
}

/// Everything in a batch, to compare.
type Contents = (Vec<Vec<f32>>, Vec<i64>, Vec<u64>, u64);

fn contents(batch: LoadedBatch) -> Contents {
    let labels = Vec::try_from(&batch.labels).unwrap();
    (batch.views.iter().map(values).collect(), labels, batch.indices, batch.replaced)
}

fn finished(batch: Result<RawBatch, DataError>) -> LoadedBatch {
    batch.unwrap().finish(Device::Cpu).unwrap()
}

fn epoch(loader: &Loader, epoch: u64, start: usize) -> Vec<Contents> {
    loader.batches(epoch, start).map(|batch| contents(finished(batch))).collect()
}

#[test]
fn batches_are_the_same_for_any_number_of_threads_and_from_any_start() {
    let directory = tempfile::tempdir().unwrap();
    let path = small_set(directory.path(), 50, &[3, 20]);
    let replace = |threads| LoaderOptions { on_error: OnError::Replace, ..options(threads) };
    let expected = epoch(&loader(&path, replace(1)), 5, 0);
    assert_eq!(expected.len(), 8);
    for threads in [2, 4] {
        let loader = loader(&path, LoaderOptions { prefetch: threads + 1, ..replace(threads) });
        assert_eq!(epoch(&loader, 5, 0), expected, "{threads} threads");
        for start in [1, 5, 7, 8, 100] {
            assert_eq!(epoch(&loader, 5, start), expected[start.min(8)..], "{threads} threads from {start}");
        }
    }
}

#[test]
fn shares_of_ranks_are_the_batches_of_one_process() {
    let directory = tempfile::tempdir().unwrap();
    let path = small_set(directory.path(), 50, &[3, 20]);
    let shared = |share, drop_last| {
        let options = LoaderOptions { on_error: OnError::Replace, share, drop_last, ..options(2) };
        loader(&path, options)
    };
    let whole = epoch(&shared(Share::Whole, true), 2, 1);
    for parts in [1, 2, 3, 6] {
        let of_part = |part| epoch(&shared(Share::OfEachBatch { part, parts }, true), 2, 1);
        let of_parts: Vec<Vec<Contents>> = (0..parts).map(of_part).collect();
        for (number, (views, labels, indices, replaced)) in whole.iter().enumerate() {
            let batch = || of_parts.iter().map(|part| &part[number]);
            assert_eq!(batch().flat_map(|batch| batch.2.clone()).collect::<Vec<_>>(), *indices);
            assert_eq!(batch().flat_map(|batch| batch.1.clone()).collect::<Vec<_>>(), *labels);
            assert_eq!(batch().map(|batch| batch.3).sum::<u64>(), *replaced);
            for (view, expected) in views.iter().enumerate() {
                assert_eq!(batch().flat_map(|batch| batch.0[view].clone()).collect::<Vec<_>>(), *expected);
            }
        }
    }
    // 9 batches, the last of two images: whole ones in turn.
    let whole = epoch(&shared(Share::Whole, false), 2, 0);
    for parts in [2, 4, 12] {
        let mut seen = vec![None; whole.len()];
        for part in 0..parts {
            let loader = shared(Share::OfBatches { part, parts }, false);
            let rounds: Vec<_> = loader.rounds(2).collect();
            assert_eq!(rounds.len(), whole.len().div_ceil(parts));
            for (number, batch) in rounds.into_iter().flatten() {
                assert!(seen[number].replace(contents(finished(batch))).is_none());
            }
        }
        assert_eq!(seen.into_iter().map(Option::unwrap).collect::<Vec<_>>(), whole);
    }
    let uneven = LoaderOptions { share: Share::OfEachBatch { part: 0, parts: 4 }, ..options(1) };
    let error = Loader::new(Arc::new(Dataset::open(&path).unwrap()), uneven).unwrap_err();
    assert!(error.to_string().contains("a batch of 6 images has no 4 equal parts"), "{error}");
}

#[test]
fn a_share_of_a_last_batch_may_be_empty() {
    let directory = tempfile::tempdir().unwrap();
    let path = small_set(directory.path(), 13, &[]);
    for (augment, crop_on_device) in [(Augment::Cpu, false), (Augment::Gpu, false), (Augment::Gpu, true)] {
        let share = Share::OfEachBatch { part: 0, parts: 6 };
        let options = LoaderOptions { share, drop_last: false, augment, crop_on_device, ..options(1) };
        let sizes: Vec<_> =
            loader(&path, options).batches(0, 0).map(|batch| finished(batch).views[1].size()).collect();
        assert_eq!(sizes, [[1, 3, 8, 8], [1, 3, 8, 8], [0, 3, 8, 8]]);
    }
}

#[test]
fn shapes_types_and_labels_are_as_promised() {
    let directory = tempfile::tempdir().unwrap();
    let loader = loader(&small_set(directory.path(), 20, &[]), options(2));
    let batch = finished(loader.batches(0, 0).next().unwrap());
    assert_eq!(batch.views.len(), 2);
    for view in &batch.views {
        assert_eq!((view.size(), view.kind()), (vec![6, 3, 8, 8], Kind::Float));
        assert!(values(view).iter().all(|value| (-2.2..2.7).contains(value)));
    }
    assert_ne!(values(&batch.views[0]), values(&batch.views[1]));
    assert_eq!((batch.labels.size(), batch.labels.kind()), (vec![6], Kind::Int64));
    let labels = Vec::<i64>::try_from(&batch.labels).unwrap();
    assert!(labels.iter().zip(&batch.indices).all(|(&label, &index)| label == index as i64 % 4));
}

#[test]
fn views_are_the_same_to_the_bit_when_the_device_finishes_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = small_set(directory.path(), 40, &[3]);
    let crop = |name| ViewSpec::new(name).random_resized_crop((0.1, 1.0), Interpolation::Bicubic);
    let views = vec![
        crop("all")
            .horizontal_flip(0.5)
            .color_jitter(0.8, 0.8, 0.8, 0.8, 0.2)
            .grayscale(0.2)
            .normalize_imagenet(),
        crop("blurred")
            .color_jitter(0.5, 0.4, 0.4, 0.0, 0.5)
            .gaussian_blur(0.9)
            .solarize(0.5)
            .normalize_imagenet(),
        // Wider than the picture.
        crop("strong").then(Transform::GaussianBlur { p: 0.7, sigma: (0.1, 20.0) }),
        crop("plain").normalize_imagenet(),
    ];
    for (size, crop_on_device) in [(8, false), (8, true), (33, false), (33, true)] {
        let batches = |augment| {
            let options = LoaderOptions {
                augment,
                crop_on_device,
                batch_size: 13,
                drop_last: false,
                on_error: OnError::Replace,
                ..LoaderOptions::new(views.clone(), size)
            };
            let loader = loader(&path, options);
            epoch(&loader, 1, 0)
        };
        let (ours, theirs) = (batches(Augment::Gpu), batches(Augment::Cpu));
        assert_eq!(ours.len(), 4);
        for (ours, theirs) in ours.iter().zip(&theirs) {
            for (view, (ours, theirs)) in views.iter().zip(ours.0.iter().zip(&theirs.0)) {
                let different = ours.iter().zip(theirs).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                assert_eq!(different, 0, "{} of {size} px, crop on the device: {crop_on_device}", view.name);
            }
            assert!(ours == theirs);
        }
    }
}

#[test]
fn of_jpegs_the_views_are_those_of_their_pixels() {
    let directory = tempfile::tempdir().unwrap();
    let pictures: Vec<Rgb> = (0..12).map(|i| picture(60 + 7 * i, 90 - 3 * i, i)).collect();
    let jpegs: Vec<Vec<u8>> = pictures.iter().map(jpeg).collect();
    let pngs: Vec<Vec<u8>> = jpegs.iter().map(|jpeg| png(&decode(jpeg).unwrap())).collect();
    let batches = |name: &str, images: &[Vec<u8>], decode| {
        let path = directory.path().join(name);
        write_reference(&path, images, None);
        let options = LoaderOptions { decode, ..options(2) };
        let by_threads = epoch(&loader(&path, options.clone()), 0, 0);
        let options = LoaderOptions { augment: Augment::Gpu, crop_on_device: true, ..options };
        assert!(epoch(&loader(&path, options), 0, 0) == by_threads, "{name}: cropped on the device");
        by_threads
    };
    let expected = batches("pixels.h5", &pngs, Decode::Exact);
    assert_eq!(batches("exact.h5", &jpegs, Decode::Exact), expected);
    // Views of 8 pixels see enough to be made from a smaller image: near, and not the same.
    let fast = batches("fast.h5", &jpegs, Decode::Fast);
    let all = |batches: &[Contents]| batches.iter().flat_map(|batch| batch.0.concat()).collect::<Vec<f32>>();
    let (fast, expected) = (all(&fast), all(&expected));
    let differences: Vec<f32> = fast.iter().zip(&expected).map(|(a, b)| (a - b).abs()).collect();
    let mean = differences.iter().sum::<f32>() / differences.len() as f32;
    // In units of a channel's deviation, of which 0.02 are about one level.
    assert!(mean > 0.0 && mean < 0.04, "{mean}");
}

#[test]
fn every_image_comes_once_an_epoch_in_an_order_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let path = small_set(directory.path(), 20, &[]);
    let loader = loader(&path, LoaderOptions { drop_last: false, ..options(2) });
    assert_eq!(loader.batches_per_epoch(), 4);
    let order =
        |epoch| -> Vec<u64> { loader.batches(epoch, 0).flat_map(|batch| finished(batch).indices).collect() };
    let (first, second) = (order(0), order(1));
    let order_0 = loader.order(0);
    assert_eq!(first, (0..order_0.len()).map(|place| order_0.at(place)).collect::<Vec<_>>());
    assert_ne!(first, second);
    for mut order in [first, second] {
        order.sort_unstable();
        assert_eq!(order, (0..20).collect::<Vec<_>>());
    }
}

#[test]
fn an_image_looks_different_in_every_epoch() {
    let directory = tempfile::tempdir().unwrap();
    let loader = loader(&small_set(directory.path(), 6, &[]), LoaderOptions { shuffle: false, ..options(1) });
    let look = |epoch| values(&finished(loader.batches(epoch, 0).next().unwrap()).views[0]);
    assert_ne!(look(0), look(1));
    assert_eq!(look(1), look(1));
}

#[test]
fn without_shuffle_and_drop_last_evaluation_sees_the_file_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = small_set(directory.path(), 20, &[]);
    let view = ViewSpec::new("center").resize_center_crop(0.875, Interpolation::Bilinear);
    let options = LoaderOptions {
        batch_size: 8,
        shuffle: false,
        drop_last: false,
        threads: 3,
        ..LoaderOptions::new(vec![view], 8)
    };
    let batches: Vec<_> = loader(&path, options).batches(0, 0).map(finished).collect();
    assert_eq!(batches.iter().map(|batch| batch.indices.len()).collect::<Vec<_>>(), [8, 8, 4]);
    assert!(batches.iter().flat_map(|batch| &batch.indices).copied().eq(0..20));
    assert!(
        batches.iter().all(|batch| values(&batch.views[0]).iter().all(|value| (0.0..=1.0).contains(value)))
    );
}

#[test]
fn images_without_labels_have_label_minus_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("unlabelled.h5");
    let images: Vec<_> = (0..6).map(|seed| png(&picture(8, 8, seed))).collect();
    write_reference(&path, &images, None);
    let batch = finished(loader(&path, options(2)).batches(0, 0).next().unwrap());
    assert_eq!(Vec::<i64>::try_from(&batch.labels).unwrap(), [-1; 6]);
}

#[test]
fn a_corrupt_image_stops_the_epoch_with_its_name_and_the_way_out() {
    let directory = tempfile::tempdir().unwrap();
    let path = small_set(directory.path(), 18, &[7, 13]);
    for threads in [1, 4] {
        let options = LoaderOptions { shuffle: false, ..options(threads) };
        let mut batches = loader(&path, options).batches(0, 0);
        assert!(batches.next().unwrap().is_ok());
        let error = batches.next().unwrap().unwrap_err();
        assert!(matches!(error, DataError::Corrupt { index: 7, .. }), "{error}");
        let sentence = error.to_string();
        assert!(sentence.contains("small.h5: image 7 is corrupt: "), "{sentence}");
        assert!(sentence.contains("data.on_error=\"replace\""), "{sentence}");
        assert!(batches.next().is_none(), "an epoch ends at its first error");
    }
}

#[test]
fn replaced_images_are_counted_and_bring_their_own_label() {
    let directory = tempfile::tempdir().unwrap();
    let path = small_set(directory.path(), 18, &[7, 13]);
    let options = LoaderOptions { shuffle: false, on_error: OnError::Replace, ..options(2) };
    let batches: Vec<_> = loader(&path, options).batches(0, 0).map(finished).collect();
    assert_eq!(batches.iter().map(|batch| batch.replaced).collect::<Vec<_>>(), [0, 1, 1]);
    for (batch, position) in [(&batches[1], 1), (&batches[2], 1)] {
        let used = batch.indices[position];
        assert!(used < 18 && ![7, 13].contains(&used));
        assert_eq!(batch.labels.int64_value(&[position as i64]), used as i64 % 4);
    }
}

#[test]
fn a_data_set_of_nothing_but_corrupt_images_is_an_error_under_any_policy() {
    let directory = tempfile::tempdir().unwrap();
    let path = small_set(directory.path(), 6, &[0, 1, 2, 3, 4, 5]);
    let options = LoaderOptions { on_error: OnError::Replace, ..options(2) };
    let error = loader(&path, options).batches(0, 0).next().unwrap().unwrap_err();
    assert!(matches!(error, DataError::TooManyCorrupt { .. }), "{error}");
}

#[test]
fn options_that_cannot_work_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let dataset = Arc::new(Dataset::open(small_set(directory.path(), 5, &[])).unwrap());
    let refusal = |options| Loader::new(dataset.clone(), options).unwrap_err().to_string();
    assert!(refusal(options(1)).contains("has 5 images, fewer than one batch of 6"));
    assert!(refusal(LoaderOptions { batch_size: 0, ..options(1) }).contains("batch size is 0"));
    assert!(refusal(LoaderOptions { views: vec![], ..options(1) }).contains("at least one view"));
    let whole = ViewSpec::new("whole");
    assert!(
        refusal(LoaderOptions { views: vec![whole], ..options(1) }).contains("view `whole`: it has no steps")
    );
}

#[test]
fn no_more_than_the_promised_batches_are_in_the_making() {
    let directory = tempfile::tempdir().unwrap();
    let loader = loader(&small_set(directory.path(), 60, &[]), LoaderOptions { prefetch: 3, ..options(2) });
    let mut batches = loader.batches(0, 0);
    batches.next().unwrap().unwrap();
    let start = Instant::now();
    while batches.ready() < 3 && start.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(batches.ready(), 3);
    assert_eq!(batches.count(), 9);
}

#[test]
fn dropping_the_batches_stops_the_threads_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("slow.h5");
    let image = png(&Rgb { width: 1500, height: 1500, pixels: vec![90; 1500 * 1500 * 3] });
    write_reference(&path, &vec![image; 400], None);
    let options = LoaderOptions { batch_size: 200, prefetch: 2, ..options(2) };
    let batches = loader(&path, options).batches(0, 0);
    assert_eq!(batches.ready(), 0);
    let start = Instant::now();
    drop(batches);
    // 400 such images take many seconds; one takes a few hundredths.
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}
