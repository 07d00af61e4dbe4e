//! What the real binary does not take: plugins, settings and data sets, each with its exit code and one sentence.

use std::ffi::OsStr;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use jepa_tests::real::{
    Ended, Room, TINY_BACKBONE, TINY_SIMCLR, binary, demo_images, fixture, held_out_images, plugin, setting,
};

const PLUGIN_REFUSED: i32 = 3;
const USAGE: i32 = 2;
const DATA: i32 = 4;

// The manifest's fields, in bytes from its start. They are frozen, so they stand here once more.
const MAGIC: Range<usize> = 0..8;
const STRUCT_SIZE: Range<usize> = 8..12;
const API_MAJOR: Range<usize> = 12..14;
const API_MINOR: Range<usize> = 14..16;
const NAME: Range<usize> = 16..80;
const VERSION: Range<usize> = 80..112;
const RUSTC: Range<usize> = 112..176;
const BRIDGE: Range<usize> = 176..208;
const LIBTORCH: Range<usize> = 208..240;
const FEATURES: Range<usize> = 240..248;

/// What the host says of `library`, which it must refuse in one line and nothing else.
#[track_caller]
fn refused(room: &Room, library: &Path) -> Ended {
    let arguments = ["--plugin".as_ref(), library.as_os_str(), "backbone.name=resnet18".as_ref()];
    let ended = room.run(arguments).expect(PLUGIN_REFUSED);
    assert_eq!(ended.stderr.lines().count(), 1, "one sentence:\n{}", ended.stderr);
    assert_eq!(ended.stdout, "");
    ended.error_says(&[&library.display().to_string()]);
    assert!(!room.file("runs").exists(), "a refused plugin begins no run");
    ended
}

/// A copy of CNN-JEPA's plugin as `libpatched.so`, with these bytes in this field of its manifest.
fn patched(room: &Room, field: Range<usize>, value: &[u8]) -> PathBuf {
    let path = room.file("libpatched.so");
    let mut bytes = fs::read(plugin("cnn_jepa")).unwrap();
    patch(&mut bytes, field, value);
    fs::write(&path, bytes).unwrap();
    path
}

/// Writes these bytes into this field of a plugin's manifest.
fn patch(bytes: &mut [u8], field: Range<usize>, value: &[u8]) {
    let start = [b"JEPAPLUG".as_slice(), &248u32.to_le_bytes()].concat();
    let manifests: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(&start)).collect();
    let [manifest] = manifests[..] else { panic!("manifests lie at {manifests:?}, and there should be one") };
    let field = &mut bytes[manifest + field.start..manifest + field.end];
    field.fill(0);
    field[..value.len()].copy_from_slice(value);
}

/// A copy of a plugin that says `new` wherever it said `old`.
fn respelt(room: &Room, name: &str, old: &str, new: &str) -> String {
    assert_eq!(old.len(), new.len());
    let mut bytes = fs::read(plugin(name)).unwrap();
    let places: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(old.as_bytes())).collect();
    assert!(!places.is_empty(), "{name} never says {old}");
    places.iter().for_each(|at| bytes[*at..*at + new.len()].copy_from_slice(new.as_bytes()));
    let path = room.file(format!("lib{name}.so"));
    fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The same, built with plugin API 1.9.
fn of_the_future(room: &Room, name: &str, old: &str, new: &str) -> String {
    let path = respelt(room, name, old, new);
    let mut bytes = fs::read(&path).unwrap();
    patch(&mut bytes, API_MINOR, &[9, 0]);
    fs::write(&path, bytes).unwrap();
    path
}

/// Trains CNN-JEPA with these settings besides what it needs.
fn train(room: &Room, settings: &[String]) -> Ended {
    let plugin = plugin("cnn_jepa");
    let fixed = ["method.mask.min_keep=1", "data.size=16", "trainer.device=cpu", "trainer.threads=1"];
    let arguments = ["--plugin", plugin.to_str().unwrap()].into_iter().chain(TINY_BACKBONE).chain(fixed);
    room.run(arguments.map(str::to_owned).chain(settings.iter().cloned()))
}

#[test]
fn a_copied_plugin_is_taken() {
    // What the patched copies below are refused for is their patch, and not that they are copies.
    let room = Room::new();
    let copy = patched(&room, MAGIC, b"JEPAPLUG");
    let ended = room.run(["--plugin".as_ref(), copy.as_os_str(), "backbone.name=resnet18".as_ref()]);
    ended.expect(USAGE).error_says(&["data.train is not set"]);
}

#[test]
fn a_text_is_no_library() {
    let room = Room::new();
    let library = room.file("libx.so");
    fs::write(&library, "a plugin, I promise\n").unwrap();
    refused(&room, &library).error_says(&["is not a shared library for this machine"]);
}

#[test]
fn an_empty_file_is_no_library() {
    let room = Room::new();
    let library = room.file("libempty.so");
    fs::write(&library, "").unwrap();
    refused(&room, &library).error_says(&["is not a shared library for this machine"]);
}

#[test]
fn half_a_plugin_is_no_library() {
    let room = Room::new();
    let bytes = fs::read(plugin("cnn_jepa")).unwrap();
    let library = room.file("libhalf.so");
    fs::write(&library, &bytes[..bytes.len() / 2]).unwrap();
    refused(&room, &library).error_says(&["is not a shared library for this machine"]);
}

#[test]
fn a_library_without_a_manifest_is_refused() {
    let room = Room::new();
    let library = room.compile("libplain.so", "int answer(void) { return 42; }\n");
    refused(&room, &library).error_says(&[
        "is a library but not a jepa-host plugin",
        "no manifest",
        "export_plugin!",
    ]);
}

#[test]
fn a_program_is_no_plugin() {
    let room = Room::new();
    let program = room.file("libprogram.so");
    fs::copy(binary(), &program).unwrap();
    refused(&room, &program).error_says(&["not a jepa-host plugin"]);
}

#[test]
fn another_api_major_is_refused() {
    let room = Room::new();
    let library = patched(&room, API_MAJOR, &[9, 0]);
    refused(&room, &library).error_says(&["was built for plugin API 9.", "this host has 1."]);
}

#[test]
fn names_on_offer_are_usable_and_different() {
    let room = Room::new();
    let library = respelt(&room, "careless_plugin", "careless", "care.ess");
    refused(&room, library.as_ref()).error_says(&["offers the method `care.ess`", "rename it"]);
    let library = respelt(&room, "sparse_resnet", "resnet34", "resnet18");
    refused(&room, library.as_ref()).error_says(&["offers two backbones named `resnet18`", "rename it"]);
}

#[test]
fn features_of_the_upper_half_have_to_be_known() {
    let room = Room::new();
    let library = patched(&room, FEATURES, &(1u64 << 40).to_le_bytes());
    refused(&room, &library).error_says(&["features that this host does not know (0x10000000000)", "update"]);
    let library = patched(&room, FEATURES, &5u64.to_le_bytes());
    room.run(["plugin", "info", library.to_str().unwrap()]).expect(0);
}

#[test]
fn a_plugin_that_links_libtorch_has_to_say_which() {
    let room = Room::new();
    room.compile("libtorch_cpu.so", "int answer(void) { return 42; }\n");
    let manifest = |libtorch: &str| {
        let text = |field: Range<usize>, text: &str| format!("{:\0<1$}", text, field.len());
        let numbers = [&248u32.to_le_bytes()[..], &1u16.to_le_bytes(), &0u16.to_le_bytes()].concat();
        let texts = [
            text(NAME, "own"),
            text(VERSION, "1.0.0"),
            text(RUSTC, "none"),
            text(BRIDGE, "jepa_torch_0_24"),
            text(LIBTORCH, libtorch),
        ];
        let bytes = [b"JEPAPLUG", &numbers[..], texts.concat().as_bytes(), &[0; 8]].concat();
        let numbers: Vec<String> = bytes.iter().map(u8::to_string).collect();
        format!("const unsigned char JEPA_PLUGIN_MANIFEST[248] = {{ {} }};\n", numbers.join(", "))
    };
    let uses = "int answer(void);\nint ask(void) { return answer(); }\n";
    let link = ["-Wl,--no-as-needed", "-L.", "-ltorch_cpu"];
    let library = room.compile_with("libown.so", &(manifest("") + uses), &link);
    refused(&room, &library)
        .error_says(&["links libtorch_cpu.so, and its manifest names no version", "libtorch: "]);
    let library = room.compile_with("libown.so", &(manifest("1.2.3") + uses), &link);
    refused(&room, &library).error_says(&["brings C++ for libtorch 1.2.3", "build it for "]);
}

#[test]
fn a_refused_file_may_be_the_one_that_is_missed() {
    let room = Room::new();
    patched(&room, API_MAJOR, &[9, 0]);
    fs::write(room.file("libtext.so"), "a text\n").unwrap();
    let old = "libpatched.so: was built for plugin API 9.";
    let train = ["--plugin", "simclr", "--plugin-dir", ".", "backbone.name=my_net"];
    let ended = room.run(train).expect(PLUGIN_REFUSED);
    ended.error_says(&["no plugin offers the backbone `my_net`", old, "build it with jepa-plugin-api"]);
    assert!(!ended.stderr.contains("libtext.so"), "what is no plugin is not missed: {}", ended.stderr);
    let ended = room.run(["plugin", "info", "my_net", "--plugin-dir", "."]).expect(PLUGIN_REFUSED);
    ended.error_says(&["no plugin `my_net`", old]);
}

#[test]
fn what_a_newer_plugin_declares_and_this_host_cannot_read_is_refused() {
    let words = |plugin: &str| {
        format!("plugin `{plugin}` does not fit: it was built with plugin API 1.9 and declares what")
    };
    let images = setting("data.train", &demo_images());
    let train = |room: &Room, plugins: &[&str]| {
        let plugins = plugins.iter().flat_map(|plugin| ["--plugin", plugin]).chain([images.as_str()]);
        room.run(plugins.chain(TINY_BACKBONE).chain(["data.size=16"]).collect::<Vec<_>>())
    };
    let room = Room::new();
    let method = of_the_future(&room, "simclr", "random_resized_crop", "rhombic_resized_crp");
    let ended = train(&room, &[&method]).expect(PLUGIN_REFUSED);
    ended.error_says(&[&words("simclr"), "unknown variant `rhombic_resized_crp`", "update jepa-host"]);

    let backbone = of_the_future(&room, "sparse_resnet", "downsample", "downsampel");
    let ended = train(&room, &["simclr", &backbone]).expect(PLUGIN_REFUSED);
    ended.error_says(&[&words("sparse-resnet"), "missing field `downsample`", "update jepa-host"]);
}

#[test]
fn an_unknown_bridge_is_refused() {
    let room = Room::new();
    let library = patched(&room, BRIDGE, b"jepa_torch_0_99");
    refused(&room, &library)
        .error_says(&["needs the torch bridge `jepa_torch_0_99`", "this host has `jepa_torch_0_24`"]);
}

#[test]
fn cpp_for_another_libtorch_is_refused() {
    let room = Room::new();
    let library = patched(&room, LIBTORCH, b"1.2.3");
    refused(&room, &library).error_says(&["brings C++ for libtorch 1.2.3", "this host runs on"]);
}

#[test]
fn a_damaged_manifest_is_refused() {
    for (field, value) in [(MAGIC, b"NOPLUGIN".as_slice()), (STRUCT_SIZE, &[3]), (NAME, &[0xff, 0xfe])] {
        let room = Room::new();
        let library = patched(&room, field, value);
        refused(&room, &library).error_says(&["its manifest", "build it again"]);
    }
}

#[test]
fn a_missing_symbol_shows_at_load() {
    let room = Room::new();
    let source = r#"
        extern void nowhere_to_be_found(void);
        struct __attribute__((packed)) manifest {
            char magic[8]; unsigned size; unsigned short major, minor;
            char name[64], version[32], rustc[64], bridge[32], libtorch[32]; unsigned long long features;
        };
        struct manifest JEPA_PLUGIN_MANIFEST = {
            "JEPAPLUG", 248, 1, 0, "lacking", "0.1.0", "none", "jepa_torch_0_24", "", 0
        };
        void step(void) { nowhere_to_be_found(); }
    "#;
    let library = room.compile("liblacking.so", source);
    refused(&room, &library).error_says(&["cannot be opened", "undefined symbol", "nowhere_to_be_found"]);
}

#[test]
fn a_manifest_without_a_plugin_is_refused() {
    let room = Room::new();
    let source = r#"
        struct __attribute__((packed)) manifest {
            char magic[8]; unsigned size; unsigned short major, minor;
            char name[64], version[32], rustc[64], bridge[32], libtorch[32]; unsigned long long features;
        };
        struct manifest JEPA_PLUGIN_MANIFEST = {
            "JEPAPLUG", 248, 1, 0, "hollow", "0.1.0", "none", "jepa_torch_0_24", "", 0
        };
    "#;
    let library = room.compile("libhollow.so", source);
    refused(&room, &library).error_says(&["cannot be opened", "JEPA_PLUGIN_ROOT"]);
}

#[test]
fn two_plugins_of_one_name_are_refused() {
    let room = Room::new();
    let (first, second) = (plugin("cnn_jepa"), room.file("libtwin.so"));
    fs::copy(&first, &second).unwrap();
    let plugins = ["--plugin".as_ref(), first.as_os_str(), "--plugin".as_ref(), second.as_os_str()];
    let ended = room.run(plugins).expect(PLUGIN_REFUSED);
    assert_eq!(ended.stderr.lines().count(), 1, "one sentence:\n{}", ended.stderr);
    let (first, second) = (first.canonicalize().unwrap(), second.canonicalize().unwrap());
    let (first, second) = (first.display().to_string(), second.display().to_string());
    ended.error_says(&["two plugins are named `cnn-jepa`", &first, &second]);
}

#[test]
fn one_plugin_named_twice_is_loaded_once() {
    let room = Room::new();
    let ended = room.run(["--plugin", "cnn_jepa", "--plugin", "libcnn_jepa.so", "backbone.name=resnet18"]);
    ended.expect(USAGE).error_says(&["data.train is not set"]);
}

#[test]
fn an_unknown_backbone_gets_the_nearest_name() {
    let room = Room::new();
    let ended = room.run(["--plugin", "cnn_jepa", "backbone.name=resnet5O"]).expect(PLUGIN_REFUSED);
    assert_eq!(ended.stderr.lines().count(), 1, "one sentence:\n{}", ended.stderr);
    ended.error_says(&["no plugin offers the backbone `resnet5O`", "did you mean `resnet50`?", "resnet18"]);
}

#[test]
fn an_unknown_method_gets_the_nearest_name() {
    let room = Room::new();
    let ended = room.run(["--plugin", "cnn_jepa", "method.name=cnn_jeba", "backbone.name=resnet18"]);
    ended
        .expect(PLUGIN_REFUSED)
        .error_says(&["no plugin offers the method `cnn_jeba`", "did you mean `cnn_jepa`?"]);
}

#[test]
fn a_plugin_that_is_not_there_names_the_places() {
    let room = Room::new();
    let shelf = room.file("shelf");
    let arguments = ["--plugin".as_ref(), "nowhere".as_ref(), "--plugin-dir".as_ref(), shelf.as_os_str()];
    let ended = room.run(arguments).expect(PLUGIN_REFUSED);
    let beside = binary().with_file_name("libnowhere.so").canonicalize();
    assert!(beside.is_err(), "no such plugin is built");
    let (shelf, beside) = (shelf.join("libnowhere.so"), binary().with_file_name("libnowhere.so"));
    ended.error_says(&[
        "no plugin `nowhere`",
        &shelf.display().to_string(),
        &beside.display().to_string(),
        "--plugin-dir",
    ]);

    let ended = room.run(["--plugin", "cnn-jeppa"]).expect(PLUGIN_REFUSED);
    ended.error_says(&["no plugin `cnn-jeppa` (did you mean `cnn_jepa`?): looked for"]);

    let ended = room.run(["--plugin", "./libnowhere.so"]).expect(PLUGIN_REFUSED);
    ended.error_says(&["no plugin ./libnowhere.so: there is no such file"]);
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let images = setting("data.train", &demo_images());
    let cases: [(&str, &[&str]); 13] = [
        ("optimizer.lrr=1", &["optimizer.lrr (command line): unknown key", "did you mean optimizer.lr"]),
        ("method.predictor.depht=3", &["method.predictor.depht (command line)", "method.predictor.depth?"]),
        ("backbone.widht=8", &["backbone.widht (command line): unknown key", "did you mean backbone.width?"]),
        ("optimizer.lr=fast", &["optimizer.lr (command line)", "fast", "number"]),
        ("optimizer.batch_size=0", &["optimizer.batch_size (command line)", "1"]),
        ("trainer.precision=fp61", &["trainer.precision (command line)", "fp32"]),
        ("method.mask.strategy=fog", &["method.mask.strategy (command line)", "random"]),
        ("method.ema.to=1.1", &["method.ema.to (command line)", "out of range: must be at most 1"]),
        ("trainer.device=toaster", &["trainer.device", "toaster"]),
        ("checkpoint.best=eval/knn_top", &["checkpoint.best (command line)", "did you mean eval/knn_top1?"]),
        ("trainer.accumulate=501", &["8000 images", "batch_size 128", "accumulate 501"]),
        ("trainer.cuda_graphs=true", &["methods whose every step is the same", "cnn_jepa does not say that"]),
        ("nonsense", &["`nonsense` is neither a subcommand nor a setting, which reads key=value"]),
    ];
    let room = Room::new();
    for (argument, says) in cases {
        train(&room, &[images.clone(), argument.to_owned()]).expect(USAGE).error_says(says);
        assert!(!room.file("runs").exists(), "{argument} begins no run");
    }
}

#[test]
fn held_out_images_are_held_out_and_of_the_same_classes() {
    let room = Room::new();
    let names = "--class-names=a,b,c,d,e,f,g,h,i,j";
    let pack = ["data".as_ref(), "pack".as_ref(), held_out_images().as_os_str(), "other.h5".as_ref()]
        .map(OsStr::to_owned);
    room.run(pack.into_iter().chain([names.into()])).expect(0);
    let images = |val: &Path| {
        [setting("data.train", &demo_images()), setting("data.val", val), "trainer.max_steps=1".to_owned()]
    };
    let ended = train(&room, &images(&room.file("other.h5"))).expect(DATA);
    ended.error_says(&[
        "data.val: ",
        "other.h5: class 0 is `a`, and in data.train it is `T-shirt/top`",
        "--classes-of",
    ]);
    assert!(!room.file("runs").exists());

    let settings = images(&demo_images()).into_iter().chain(["eval.every_epochs=0".to_owned()]);
    let ended = train(&room, &settings.collect::<Vec<_>>()).expect(0);
    assert!(ended.stderr.contains("it judges by what was trained on"), "{}", ended.stderr);
}

#[test]
fn cuda_graphs_are_for_single_batches_and_change_nothing_on_a_cpu() {
    let room = Room::new();
    let images = setting("data.train", &demo_images());
    let simclr = |more: &str| {
        let fixed =
            ["--plugin", "simclr", "trainer.cuda_graphs=true", "trainer.max_steps=6", "eval.every_epochs=0"];
        let settings = fixed.into_iter().chain(TINY_BACKBONE).chain(TINY_SIMCLR);
        room.run(settings.chain([images.as_str(), more]))
    };
    let words = "steps of one batch, and trainer.accumulate is 2; use trainer.cuda_graphs=false";
    simclr("trainer.accumulate=2").expect(USAGE).error_says(&[words]);
    let ended = simclr("trainer.accumulate=1").expect(0);
    assert!(ended.stderr.contains("it changes nothing on a CPU"), "{}", ended.stderr);
}

#[test]
fn a_file_that_cannot_be_written_is_no_bad_data() {
    let room = Room::new();
    let out = ["data", "pack", held_out_images().to_str().unwrap(), "out.h5"].map(str::to_owned);
    // In blocks of 512 bytes: the journal fits, and the images do not.
    let ended = room.run_behind("ulimit -f 1000; trap '' XFSZ", &out).expect(1);
    ended.error_says(&["cannot write out.h5: File too large"]);
    assert!(!room.file("out.h5").exists());
    room.run(&out).expect(0);
}

#[test]
fn a_setting_is_no_file() {
    let room = Room::new();
    let images = setting("data.train", &demo_images());
    let ended = room.run(["data", "bench", "--method", "simclr", &images]).expect(USAGE);
    ended.error_says(&["stands where FILE belongs"]);
    train(&room, &["data.train=".to_owned()]).expect(USAGE).error_says(&["data.train is not set"]);
}

#[test]
fn variables_of_our_own_are_no_settings() {
    let room = Room::new();
    let run = |name: &str, value: &str| {
        let mut command = std::process::Command::new(binary());
        let command =
            command.current_dir(room.path()).args(["--plugin", "cnn_jepa", "backbone.name=resnet18"]);
        String::from_utf8(command.env(name, value).output().unwrap().stderr).unwrap()
    };
    for name in ["JEPA_DEPS_LIB", "JEPA_WANDB_CORE", "JEPA_PLUGIN_PATH", "JEPA_HOST"] {
        let stderr = run(name, "/nowhere");
        assert!(stderr.contains("data.train is not set"), "{name}: {stderr}");
    }
    let stderr = run("JEPA_OPTIMISER__LR", "1");
    assert!(stderr.contains("optimiser.lr (environment JEPA_OPTIMISER__LR): unknown key"), "{stderr}");
}

#[test]
fn options_may_stand_before_a_subcommand() {
    let room = Room::new();
    room.run(["--quiet", "plugin", "list"]).expect(0);
    room.run(["--plugin-dir", "shelf", "plugin", "list"]).expect(0);
    let ended = room.run(["--config", "a.toml", "doctor"]).expect(USAGE);
    ended.error_says(&["options of training stand before a subcommand"]);
}

#[test]
fn a_setting_in_a_file_is_refused_with_its_place() {
    let room = Room::new();
    fs::write(room.file("a.toml"), "[optimizer]\nlr = 0.1\nwarmup_epoch = 3\n").unwrap();
    let ended =
        room.run(["--plugin", "cnn_jepa", "--config", "a.toml", "backbone.name=resnet18"]).expect(USAGE);
    ended.error_says(&["optimizer.warmup_epoch (", "a.toml", "did you mean optimizer.warmup_epochs?"]);

    let ended = room.run(["--plugin", "cnn_jepa", "--config", "b.toml"]).expect(USAGE);
    ended.error_says(&["cannot read the configuration file b.toml"]);
}

#[test]
fn what_is_not_given_is_asked_for() {
    let room = Room::new();
    room.run(["backbone.name=resnet18"]).expect(USAGE).error_says(&["no method is loaded", "--plugin"]);
    room.run(["--plugin", "cnn_jepa"]).expect(USAGE).error_says(&["backbone.name is not set"]);
    train(&room, &[]).expect(USAGE).error_says(&["data.train is not set"]);
    room.run(["--plugin", "cnn_jepa", "--plugin", "faulty_plugin", "backbone.name=resnet18"])
        .expect(USAGE)
        .error_says(&["set method.name to one of", "cnn_jepa", "faulty"]);
}

#[test]
fn a_size_that_does_not_divide_is_refused() {
    let room = Room::new();
    let settings = [setting("data.train", &demo_images()), "data.size=17".to_owned()];
    let ended = train(&room, &settings).expect(USAGE);
    ended.error_says(&["17 px", "set data.size to a multiple of 2"]);
    assert!(!room.file("runs").exists(), "nothing was begun");
}

#[test]
fn images_that_would_be_enlarged_are_refused() {
    let room = Room::new();
    let (small, fitting) = (fixture("reference_layout.h5"), demo_images());
    let run = |settings: &[String]| train(&room, settings);
    for key in ["data.train", "data.val"] {
        let other = if key == "data.train" { "data.val" } else { "data.train" };
        let sets = [setting(key, &small), setting(other, &fitting), "data.size=26".to_owned()];
        let ended = run(&sets).expect(DATA);
        let file = small.display().to_string();
        ended.error_says(&[key, &file, "smaller than data.size = 26", "22 px", "data.upscale=true"]);
        assert!(!room.file("runs").exists(), "nothing was begun");
    }
    let allowed = ["data.size=26", "data.upscale=true", "trainer.max_steps=1", "optimizer.batch_size=4"];
    run(&[vec![setting("data.train", &small)], allowed.map(str::to_owned).to_vec()].concat()).expect(0);
}

#[test]
fn cells_matter_to_masks_alone() {
    let room = Room::new();
    let images = setting("data.train", &demo_images());
    let fixed = ["data.size=17", "trainer.device=cpu", "trainer.max_steps=1", "optimizer.batch_size=4"];
    let heads = ["method.hidden=8", "method.output=8", images.as_str()];
    let arguments = ["--plugin", "byol"].into_iter().chain(TINY_BACKBONE).chain(fixed).chain(heads);
    room.run(arguments).expect(0);
}

#[test]
fn a_backbone_that_cannot_look_at_the_images_begins_no_run() {
    let room = Room::new();
    let (images, file) =
        (setting("data.train", &demo_images()), setting("backbone.file", &fixture("torchscript_net.pt")));
    let script =
        ["backbone.name=torchscript", "backbone.channels=6", "backbone.downsample=8", "data.size=24"];
    let script = script.into_iter().chain([file.as_str()]).collect::<Vec<_>>();
    let cases: [(&[&str], [&str; 3]); 2] = [
        (&script, ["data.size = 24 px", "torchscript_net.pt", "backbone.downsample"]),
        (
            &["backbone.name=convnext_atto", "data.size=28"],
            ["data.size = 28 px", "a cell of 32 px", "backbone.stem"],
        ),
    ];
    for (settings, says) in cases {
        let arguments = ["--plugin", "byol", "trainer.device=cpu", &images].into_iter();
        room.run(arguments.chain(settings.iter().copied())).expect(USAGE).error_says(&says);
        assert!(!room.file("runs").exists(), "nothing was begun");
    }
}

#[test]
fn data_sets_that_cannot_be_used_are_refused() {
    let cases = [
        ("bad_truncated.h5", "is truncated"),
        ("bad_empty.h5", "holds no images"),
        ("bad_count.h5", "6 images but 5 labels"),
        ("bad_2d.h5", "is not laid out as a data set"),
        ("bad_dtype.h5", "is not laid out as a data set"),
        ("models.rs", "is not an HDF5 file"),
        ("absent.h5", "No such file"),
    ];
    let room = Room::new();
    fs::write(room.file("models.rs"), "fn main() {}\n").unwrap();
    for (name, says) in cases {
        let beside_us = room.file(name);
        let ours = beside_us.exists() || name == "absent.h5";
        let file = if ours { beside_us } else { fixture(name) };
        let ended = train(&room, &[setting("data.train", &file)]).expect(DATA);
        let path = file.display().to_string();
        assert!(ended.error().contains(&path), "the file is named:\n{}", ended.stderr);
        assert!(ended.error().contains(says), "{says}:\n{}", ended.stderr);
        let words = ended.error().matches("os error").count();
        assert!(words <= 1, "causes are told once:\n{}", ended.stderr);
        assert!(!room.file("runs").exists(), "{name} begins no run");
    }
}

#[test]
fn evaluation_needs_labels() {
    let room = Room::new();
    let unlabelled = fixture("bad_no_labels.h5");
    let settings = [
        setting("data.train", &demo_images()),
        setting("data.val", &unlabelled),
        "optimizer.batch_size=16".to_owned(),
    ];
    let ended = train(&room, &settings).expect(DATA);
    ended.error_says(&[&unlabelled.display().to_string(), "has no labels", "eval.every_epochs=0"]);
    assert!(!room.file("runs").exists(), "nothing was begun");
}

#[test]
fn a_corrupt_image_follows_the_policy() {
    let room = Room::new();
    let corrupt = fixture("bad_jpeg.h5");
    let settings = |policy: &str| {
        let fixed =
            ["optimizer.batch_size=2", "trainer.epochs=1", "eval.every_epochs=0", "eval.at_start=false"];
        let mut settings: Vec<String> = fixed.map(str::to_owned).to_vec();
        settings.extend([setting("data.train", &corrupt), "trainer.log_every_steps=1".to_owned()]);
        settings.push(format!("data.on_error={policy}"));
        settings
    };
    let ended = train(&room, &settings("fail")).expect(DATA);
    ended.error_says(&[&corrupt.display().to_string(), "image ", "is corrupt", "data.on_error"]);

    train(&room, &settings("replace")).expect(0);
    let metrics = fs::read_to_string(room.file("runs/cnn_jepa/version_1/metrics.jsonl")).unwrap();
    let replaced = |line: &str| {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        record["train/replaced"].as_f64()
    };
    assert!(
        metrics.lines().filter_map(replaced).sum::<f64>() > 0.0,
        "replaced images are counted:\n{metrics}"
    );
}
