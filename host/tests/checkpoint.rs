//! What a person relies on when a run is stopped: whole checkpoints or none, exact bits, errors that name the file.

use std::fs;
use std::path::{Path, PathBuf};

use jepa_host::checkpoint::{
    self, Best, CheckpointError, FORMAT, NamedTensors, Resume, RunDir, State, resolve_resume, restore,
};
use jepa_host::plugin::PluginRecord;
use serde_json::json;
use tch::{Device, Kind, Tensor};

fn state(step: u64) -> State {
    State {
        format: FORMAT,
        step,
        epoch: step / 10,
        batch_in_epoch: step % 10,
        ema_is_ahead: false,
        seed: 42,
        method: "cnn-jepa".to_owned(),
        backbone: "resnet18".to_owned(),
        encoder: "target".to_owned(),
        best: None,
        first_eval: None,
        last_eval: None,
        meters: Default::default(),
        judged: None,
        metrics_lines: 0,
        config: json!({"optimizer": {"lr": 0.1}}),
        classes: 10,
        steps_per_epoch: 10,
        data_fingerprint: "abc".to_owned(),
        plugins: vec![PluginRecord {
            name: "cnn-jepa".to_owned(),
            version: "0.1.0".to_owned(),
            sha256: "0123456789abcdef".to_owned(),
            file: None,
            only_probes: false,
        }],
        host: "0.1.0".to_owned(),
        libtorch: "2.11.0".to_owned(),
        device: "cpu (AVX2)".to_owned(),
        threads: 2,
        ranks: 1,
    }
}

fn model() -> NamedTensors {
    vec![
        ("stem.weight".to_owned(), Tensor::from_slice(&[1.5f32, -0.0, f32::NAN, 1e-42]).view([2, 2])),
        ("bn.num_batches_tracked".to_owned(), Tensor::from(7i64)),
        ("a.mask".to_owned(), Tensor::from_slice(&[true, false, true])),
        ("half".to_owned(), Tensor::from_slice(&[0.1f32, 3.0]).to_kind(Kind::Half)),
        ("bf".to_owned(), Tensor::from_slice(&[0.1f32, 3.0]).to_kind(Kind::BFloat16)),
        ("bytes".to_owned(), Tensor::from_slice(&[0u8, 255])),
        ("empty".to_owned(), Tensor::zeros([0, 3], (Kind::Float, Device::Cpu))),
        // Not contiguous, and part of a graph.
        (
            "t".to_owned(),
            Tensor::arange(6, (Kind::Float, Device::Cpu))
                .view([2, 3])
                .transpose(0, 1)
                .set_requires_grad(true),
        ),
    ]
}

fn bits(tensor: &Tensor) -> (Vec<i64>, Kind, Vec<u8>) {
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.detach().contiguous().copy_data_u8(&mut bytes, tensor.numel());
    (tensor.size(), tensor.kind(), bytes)
}

fn run() -> (tempfile::TempDir, RunDir) {
    let directory = tempfile::tempdir().unwrap();
    let run = RunDir::create(directory.path(), "demo").unwrap();
    (directory, run)
}

fn save(run: &RunDir, step: u64) -> PathBuf {
    run.save(&state(step), &model(), &[], 2).unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn tensors_come_back_to_the_bit_and_equal_states_give_equal_bytes() {
    let (_a, first) = run();
    let (_b, second) = run();
    let path = first.save(&state(12), &model(), &model()[..2], 2).unwrap();
    let mut shuffled = model();
    shuffled.reverse();
    let other = second.save(&state(12), &shuffled, &model()[..2], 2).unwrap();
    for file in ["model.safetensors", "optimizer.safetensors", "state.json"] {
        assert_eq!(fs::read(path.join(file)).unwrap(), fs::read(other.join(file)).unwrap(), "{file}");
    }

    let loaded = checkpoint::load(&path).unwrap();
    assert_eq!(loaded.state, state(12));
    assert_eq!(loaded.optimizer.len(), 2);
    let mut expected = model();
    expected.sort_by(|left, right| left.0.cmp(&right.0));
    for ((name, tensor), (expected_name, expected)) in loaded.model.iter().zip(&expected) {
        assert_eq!(name, expected_name);
        assert_eq!(bits(tensor), bits(expected), "{name}");
    }
    assert!(path.ends_with("demo/version_0/checkpoints/step_00000012"));
}

#[test]
fn versions_count_up_and_belong_to_one_process_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let runs: Vec<RunDir> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..8).map(|_| scope.spawn(|| RunDir::create(directory.path(), "x").unwrap())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut versions: Vec<&str> = runs.iter().map(RunDir::version).collect();
    versions.sort();
    assert_eq!(
        versions,
        [
            "version_0",
            "version_1",
            "version_2",
            "version_3",
            "version_4",
            "version_5",
            "version_6",
            "version_7"
        ]
    );

    let path = runs[0].path().to_owned();
    assert!(matches!(RunDir::open(&path), Err(CheckpointError::Busy { .. })));
    drop(runs);
    RunDir::open(&path).unwrap();
    assert_eq!(RunDir::create(directory.path(), "x").unwrap().version(), "version_8");
}

#[test]
fn the_newest_and_the_best_are_kept() {
    let (_directory, run) = run();
    let best = |value, step| Some(Best { metric: "eval/linear_top1".to_owned(), value, step });
    for (step, best) in [
        (5, best(0.4, 5)),
        (10, best(0.6, 10)),
        (15, best(0.6, 10)),
        (20, best(0.6, 10)),
        (25, best(0.6, 10)),
    ] {
        run.save(&State { best, ..state(step) }, &model(), &[], 2).unwrap();
    }
    let folder = run.file("checkpoints");
    assert_eq!(names(&folder), ["best.json", "step_00000010", "step_00000020", "step_00000025"]);
    let found: Best = serde_json::from_slice(&fs::read(folder.join("best.json")).unwrap()).unwrap();
    assert_eq!((found.value, found.step), (0.6, 10));
    assert_eq!(checkpoint::latest(run.path()).unwrap(), Some(folder.join("step_00000025")));

    assert!(found.is_beaten_by(0.7) && !found.is_beaten_by(0.6));
    assert!(Best { metric: "val/loss".to_owned(), ..found }.is_beaten_by(0.5));
}

#[test]
fn a_save_cut_short_by_a_kill_is_ignored_and_cleared_away() {
    let (directory, run) = run();
    save(&run, 10);
    let folder = run.file("checkpoints");
    fs::create_dir(folder.join(".tmp_step_00000020")).unwrap();
    fs::write(folder.join(".tmp_step_00000020/model.safetensors"), b"half").unwrap();
    let resume = resolve_resume("auto", directory.path(), "demo").unwrap().unwrap();
    assert_eq!(resume.checkpoint, folder.join("step_00000010"));
    save(&run, 20);
    assert_eq!(names(&folder), ["step_00000010", "step_00000020"]);
}

#[test]
fn a_checkpoint_is_there_at_every_moment_of_being_replaced() {
    let (directory, run) = run();
    let path = save(&run, 10);
    let folder = run.file("checkpoints");
    let aside = folder.join(".old_step_00000010");
    fs::rename(&path, &aside).unwrap();
    let resume = resolve_resume("auto", directory.path(), "demo").unwrap().unwrap();
    assert_eq!(checkpoint::load(&resume.checkpoint).unwrap().state, state(10));
    save(&run, 20);
    assert_eq!(names(&folder), ["step_00000010", "step_00000020"]);
    save(&run, 20);
    assert_eq!(names(&folder), ["step_00000010", "step_00000020"]);
}

#[test]
fn a_damaged_checkpoint_is_an_error_that_names_the_file_and_the_way_out() {
    let (_directory, run) = run();
    let earlier = save(&run, 10);
    let path = save(&run, 20);
    let message = |path: &Path| checkpoint::load(path).unwrap_err().to_string();

    let model = path.join("model.safetensors");
    let whole = fs::read(&model).unwrap();
    for length in [0, 4, 100, whole.len() - 1] {
        fs::write(&model, &whole[..length]).unwrap();
        let message = message(&path);
        assert!(
            message.starts_with(&format!("{} cannot be used: not a whole safetensors file", model.display())),
            "{message}"
        );
        assert!(message.ends_with(&format!("--resume {}", earlier.display())), "{message}");
    }
    fs::remove_file(&model).unwrap();
    assert!(message(&path).starts_with(&format!("{} cannot be used: No such file", model.display())));
    fs::write(&model, &whole).unwrap();

    let file = path.join("state.json");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, &text[..50]).unwrap();
    assert!(message(&path).starts_with(&format!("{} cannot be used: not whole JSON", file.display())));
    fs::write(&file, text.replace("\"format\": 1", "\"format\": 2")).unwrap();
    let newer = message(&path);
    assert!(newer.contains("has checkpoint format 2, and this program reads format 1"), "{newer}");
    fs::write(&file, "{}").unwrap();
    assert!(message(&path).contains("it tells no format"));
    fs::remove_file(&file).unwrap();
    assert!(message(&path).starts_with(&format!("{} cannot be used", file.display())));
    assert!(message(run.path()).contains("is no checkpoint: it holds no state.json"));
    assert!(message(&run.file("nowhere")).contains("is no checkpoint: it does not exist"));
}

#[test]
fn resume_finds_the_checkpoint_that_is_meant() {
    let directory = tempfile::tempdir().unwrap();
    let runs = directory.path().canonicalize().unwrap();
    assert_eq!(resolve_resume("auto", &runs, "demo").unwrap(), None);
    let first = RunDir::create(&runs, "demo").unwrap();
    let (older, newer) = (save(&first, 10), save(&first, 20));
    let second = RunDir::create(&runs, "demo").unwrap();

    let expected = Resume { run: first.path().to_owned(), checkpoint: newer.clone() };
    let found = |request: &str| resolve_resume(request, &runs, "demo").map(Option::unwrap);
    assert_eq!(found("auto").unwrap(), expected);
    for path in [runs.join("demo"), first.path().to_owned(), first.file("checkpoints"), newer] {
        assert_eq!(found(path.to_str().unwrap()).unwrap(), expected);
    }
    let found_older = found(older.to_str().unwrap()).unwrap();
    assert_eq!(found_older, Resume { run: first.path().to_owned(), checkpoint: older.clone() });

    // A broken checkpoint is found all the same, so that loading it fails: nothing starts afresh or goes further back.
    fs::remove_file(expected.checkpoint.join("state.json")).unwrap();
    assert_eq!(found("auto").unwrap(), expected);
    assert_eq!(found(expected.checkpoint.to_str().unwrap()).unwrap(), expected);

    for (path, why) in [
        (runs.join("other"), "it does not exist"),
        (second.path().to_owned(), "there is none in it"),
        (runs.clone(), "there is none in it"),
    ] {
        let message = found(path.to_str().unwrap()).unwrap_err().to_string();
        assert!(message.starts_with(&format!("{} is no checkpoint: {why}", path.display())), "{message}");
    }
    let stray = runs.join("stray");
    fs::create_dir(&stray).unwrap();
    fs::copy(older.join("state.json"), stray.join("state.json")).unwrap();
    assert!(found(stray.to_str().unwrap()).unwrap_err().to_string().contains("outside a run"));
}

#[test]
fn going_back_cuts_the_metrics_and_puts_later_checkpoints_aside() {
    let (directory, run) = run();
    let path = run.save(&State { metrics_lines: 2, ..state(10) }, &model(), &[], 2).unwrap();
    let best = Some(Best { metric: "eval/knn_top1".to_owned(), value: 0.5, step: 20 });
    run.save(&State { best, ..state(20) }, &model(), &[], 2).unwrap();
    fs::write(run.file("metrics.jsonl"), "{1}\n{2}\n{3}\n{cut by a ki").unwrap();

    let loaded = checkpoint::load_state(&path).unwrap();
    let aside = run.rewind(&loaded, "metrics.jsonl").unwrap();
    let folder = run.file("checkpoints");
    assert_eq!(aside, [folder.join("superseded_step_00000020")]);
    assert_eq!(fs::read_to_string(run.file("metrics.jsonl")).unwrap(), "{1}\n{2}\n");
    assert_eq!(names(&folder), ["step_00000010", "superseded_step_00000020"]);
    assert_eq!(resolve_resume("auto", directory.path(), "demo").unwrap().unwrap().checkpoint, path);

    fs::write(run.file("metrics.jsonl"), "{1}\n{2").unwrap();
    let message = run.rewind(&loaded, "metrics.jsonl").unwrap_err().to_string();
    let expected = "metrics.jsonl cannot be used: it has 1 lines and had 2 when step 10 was saved";
    assert!(message.contains(expected), "{message}");
}

#[test]
fn a_full_disk_is_named_with_what_is_needed() {
    let full = Path::new("/dev/full");
    if !full.exists() {
        return;
    }
    let large = vec![("w".to_owned(), Tensor::zeros([1_000_000], (Kind::Float, Device::Cpu)))];
    let message = checkpoint::write_tensors(full, &large).unwrap_err().to_string();
    assert!(
        message.starts_with("cannot save the checkpoint /dev/full (4.0 MB needed): No space left on device"),
        "{message}"
    );
}

#[test]
fn a_save_that_fails_leaves_earlier_checkpoints_and_no_rubbish() {
    let (_directory, run) = run();
    let path = save(&run, 10);
    let unknown = [("q".to_owned(), Tensor::zeros([2], (Kind::ComplexFloat, Device::Cpu)))];
    let message = run.save(&state(20), &unknown, &[], 2).unwrap_err().to_string();
    assert_eq!(message, "tensor q: ComplexFloat cannot be saved");
    let nan =
        State { best: Some(Best { metric: "val/loss".to_owned(), value: f64::NAN, step: 20 }), ..state(20) };
    let message = run.save(&nan, &model(), &[], 2).unwrap_err().to_string();
    assert!(message.ends_with("its state holds a number that is not finite"), "{message}");
    assert_eq!(names(&run.file("checkpoints")), ["step_00000010"]);
    checkpoint::load(&path).unwrap();
}

#[test]
fn tensors_that_do_not_fit_are_all_listed_and_nothing_is_changed() {
    let zeros = |shape: &[i64], kind| Tensor::zeros(shape, (kind, Device::Cpu));
    let named = |tensors: Vec<(&str, Tensor)>| -> NamedTensors {
        tensors.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect()
    };
    let into = named(vec![
        ("a", zeros(&[2], Kind::Float)),
        ("b", zeros(&[2, 3], Kind::Float)),
        ("c", zeros(&[1], Kind::Float)),
        ("d", zeros(&[2], Kind::Float)),
    ]);
    let from = named(vec![
        ("a", zeros(&[2], Kind::Float) + 1),
        ("b", zeros(&[3, 2], Kind::Float)),
        ("d", zeros(&[2], Kind::Half)),
        ("e", zeros(&[1], Kind::Float)),
    ]);
    let message = restore(&into, &from).unwrap_err().to_string();
    for part in [
        "missing: c",
        "unexpected: e",
        "b is [3, 2] of Float in the file and [2, 3] of Float here",
        "d is [2] of Half",
    ] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(f64::try_from(into[0].1.sum(Kind::Float)).unwrap(), 0.0);

    let leaf = named(vec![("a", zeros(&[2], Kind::Float).set_requires_grad(true))]);
    restore(&leaf, &from[..1]).unwrap();
    assert_eq!(Vec::<f32>::try_from(leaf[0].1.detach()).unwrap(), [1.0, 1.0]);
    assert!(leaf[0].1.requires_grad() && leaf[0].1.is_leaf());
}

#[test]
fn what_changed_since_the_checkpoint_is_told() {
    assert!(state(1).changes(&state(2)).is_empty());
    let mut now = State { threads: 4, ..state(1) };
    now.plugins[0].sha256 = "fedcba9876543210".to_owned();
    assert_eq!(
        state(1).changes(&now),
        [
            "plugin cnn-jepa was 0.1.0 (0123456789ab) and is 0.1.0 (fedcba987654)",
            "the number of compute threads was 2 and is 4",
        ]
    );

    let with = |batch_size: u64, accumulate: u64| State {
        config: json!({"optimizer": {"batch_size": batch_size}, "trainer": {"accumulate": accumulate}, "data": {"threads": batch_size}}),
        batch_in_epoch: 6,
        ..state(1)
    };
    let (saved, now) = (with(16, 2), with(32, 1));
    assert_eq!(
        saved.changes(&now),
        ["optimizer.batch_size was 16 and is 32", "trainer.accumulate was 2 and is 1"],
        "data.threads is free"
    );
    assert_eq!(saved.batches_done(&now), Ok(3));
    assert_eq!(now.batches_done(&saved), Ok(12));
    let refused = saved.batches_done(&with(16, 1)).unwrap_err();
    assert!(refused.contains("16 × 2") && refused.contains("16 × 1"), "{refused}");
}
