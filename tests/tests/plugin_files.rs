//! What `jepa-host plugin` says of the real plugin files, and what these files link.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use jepa_tests::real::{Room, binary, plugin};
use object::Endianness;
use object::elf::{DT_NEEDED, FileHeader64};
use object::read::elf::{Dyn as _, ElfFile};
use serde_json::Value;

/// What `jepa-host plugin …` prints as JSON.
#[track_caller]
fn json(arguments: &[&str]) -> Value {
    let ended = Room::new().run(["plugin"].iter().chain(arguments)).expect(0);
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error} in\n{}", ended.stdout))
}

/// The part of `schema` that describes the option `key`, such as `predictor.depth`.
#[track_caller]
fn option<'a>(schema: &'a Value, key: &str) -> &'a Value {
    key.split('.').fold(schema, |at, name| {
        let at = match at["$ref"].as_str() {
            Some(reference) => schema.pointer(reference.strip_prefix('#').unwrap()).unwrap(),
            None => at,
        };
        at["properties"].get(name).unwrap_or_else(|| panic!("no option {key} in\n{schema:#}"))
    })
}

/// The libraries that the file names as needed.
fn needed(path: &Path) -> Vec<String> {
    let bytes = fs::read(path).unwrap();
    let file = ElfFile::<FileHeader64<Endianness>>::parse(bytes.as_slice()).unwrap();
    let (endian, sections) = (file.endian(), file.elf_section_table());
    let (entries, strings) = sections.dynamic(endian, bytes.as_slice()).unwrap().expect("a dynamic section");
    let strings = sections.strings(endian, bytes.as_slice(), strings).unwrap();
    let entries = entries.iter().filter(|entry| entry.tag(endian) == DT_NEEDED);
    entries.map(|entry| String::from_utf8(entry.string(endian, strings).unwrap().to_vec()).unwrap()).collect()
}

#[test]
fn no_plugin_links_libtorch() {
    for name in ["cnn_jepa", "sparse_resnet", "faulty_plugin"] {
        let needed = needed(&plugin(name));
        assert!(needed.iter().any(|library| library == "libjepa_torch_0_24.so"), "{name} needs {needed:?}");
        let torch =
            |library: &String| ["libtorch", "libc10", "libstdc++"].iter().any(|l| library.starts_with(l));
        assert_eq!(needed.iter().find(|library| torch(library)), None, "{name} needs {needed:?}");
    }
}

#[test]
fn the_plugins_beside_the_binary_are_listed() {
    let list = json(&["list", "--format", "json"]);
    let names = |what: &str| -> Vec<&str> {
        let plugins = list["plugins"].as_array().unwrap();
        let offers = plugins.iter().flat_map(|plugin| plugin[what].as_array().unwrap());
        offers.map(|offer| offer["name"].as_str().unwrap()).collect()
    };
    assert!(names("methods").contains(&"cnn_jepa"), "{list:#}");
    for backbone in ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"] {
        assert!(names("backbones").contains(&backbone), "{backbone}: {list:#}");
    }
    assert_eq!(list["refused"], serde_json::json!([]));
}

#[test]
fn a_refused_plugin_is_listed_with_its_reason_and_others_people_s_libraries_are_not() {
    let room = Room::new();
    fs::write(room.file("libtext.so"), "a text\n").unwrap();
    room.compile("libplain.so", "int answer(void) { return 42; }\n");
    let ended = room.run(["plugin", "list", "--plugin-dir", ".", "--format", "json"]).expect(0);
    let list: Value = serde_json::from_str(&ended.stdout).unwrap();
    let refused = list["refused"].as_array().unwrap();
    assert_eq!(refused.len(), 1, "{list:#}");
    assert!(refused[0].as_str().unwrap().contains("libtext.so: is not a shared library"), "{list:#}");
    assert!(!list["plugins"].as_array().unwrap().is_empty(), "those beside the binary are still there");
}

#[test]
fn a_method_s_options_have_types_defaults_and_words() {
    let info = json(&["info", "cnn_jepa", "--format", "json"]);
    assert_eq!(info["manifest"]["name"], "cnn-jepa");
    assert_eq!(info["manifest"]["api_major"], 1);
    assert_eq!(info["manifest"]["bridge"], "jepa_torch_0_24");
    assert_eq!(info["manifest"]["libtorch"], Value::Null);
    let [method] = info["methods"].as_array().unwrap().as_slice() else { panic!("one method: {info:#}") };
    assert_eq!(method["name"], "cnn_jepa");

    let schema = &method["options"];
    for (key, default) in [
        ("crop_scale", serde_json::json!([0.2, 1.0])),
        ("flip", 0.5.into()),
        ("projection", false.into()),
        ("mask.ratio", 0.6.into()),
        ("mask.num_targets", 4.into()),
        ("ema.from", 0.996.into()),
        ("ema.to", 1.0.into()),
    ] {
        assert_eq!(option(schema, key)["default"], default, "{key}");
    }
    for key in ["crop_scale", "flip", "mask", "mask.strategy", "mask.sampling", "predictor.depth", "ema.to"] {
        let words = option(schema, key)["description"].as_str();
        assert!(words.is_some_and(|words| words.len() > 10), "{key} is explained");
    }
}

#[test]
fn a_plugin_is_found_by_file_by_name_and_by_what_it_offers() {
    let file = plugin("sparse_resnet").canonicalize().unwrap();
    let path = file.to_str().unwrap();
    for name in [path, "libsparse_resnet.so", "sparse_resnet", "sparse-resnet", "resnet50"] {
        let info = json(&["info", name, "--format", "json"]);
        assert_eq!(info["file"], path, "{name}");
        assert_eq!(info["manifest"]["name"], "sparse-resnet", "{name}");
        assert_eq!(info["sha256"].as_str().unwrap().len(), 64);
    }
    Room::new().run(["plugin", "info", "resnet51"]).expect(3).error_says(&["no plugin `resnet51`"]);
}

#[test]
fn people_get_the_same_as_text() {
    let room = Room::new();
    let list = room.run(["plugin", "list"]).expect(0).stdout;
    assert!(list.contains("cnn-jepa 0.1.0") && list.contains("method    cnn_jepa"), "{list}");
    let info = room.run(["plugin", "info", "cnn_jepa"]).expect(0).stdout;
    for text in [
        "method.flip = 0.5\n      Probability of a horizontal flip.",
        "method.mask.strategy = \"mixed\"   (\"random\" | \"multi_block\" | \"mixed\")\n      ",
        "method.ema.from = 0.996\n      ",
    ] {
        assert!(info.contains(text), "{text}:\n{info}");
    }
    let info = room.run(["plugin", "info", "resnet18"]).expect(0).stdout;
    for text in ["backbone.stem = \"imagenet\"   (\"imagenet\" | \"small\")", "backbone.depths = not set\n"] {
        assert!(info.contains(text), "{text}:\n{info}");
    }
}

#[test]
fn doctor_tells_what_the_bridge_lacks() {
    let room = Room::new();
    let told = room.run(["doctor", "--format", "json"]).expect(0).stdout;
    let told: Value = serde_json::from_str(&told).unwrap();
    assert!(told["bridge lacks"].as_array().is_some_and(Vec::is_empty), "this libtorch is its own: {told:#}");
    let told = room.run(["doctor"]).expect(0).stdout;
    assert!(told.contains("bridge lacks    nothing\n"), "{told}");
}

#[test]
fn who_reads_the_first_lines_only_causes_no_error() {
    let mut command = Command::new(binary());
    let command = command.args(["plugin", "info", "cnn_jepa"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");

    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = Command::new(binary()).args(["plugin", "list"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "a result that is lost is an error: {output:?}");
}
