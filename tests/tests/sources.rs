//! What holds of the sources themselves.

use std::fs;
use std::path::{Path, PathBuf};

use jepa_tests::author::workspace;

/// Where `unsafe` may stand, and why there. A file that ends in a slash is a folder.
const UNSAFE: [(&str, &str); 20] = [
    ("plugin-api/src/abi/", "the boundary"),
    ("plugin-api/src/lib.rs", "`export_plugin!` exports the boundary's two symbols"),
    ("plugin-api/src/autograd.rs", "bindings to host/bridge/autograd.cpp"),
    ("plugin-api/src/parallel.rs", "bindings to host/bridge/parallel.cpp"),
    ("plugin-api/src/ranks.rs", "bindings to host/bridge/ranks.cpp"),
    ("plugin-api/src/cuda/mod.rs", "bindings to host/bridge/cuda.cpp"),
    ("plugin-api/src/nn/fused_cuda.rs", "launches the kernels of norm.cu"),
    ("plugins/sparse-conv/src/cuda.rs", "launches those of kernels.cu"),
    ("plugin-api/src/memory.rs", "the numbers of a tensor as a slice"),
    ("host/src/plugin/", "the boundary, on the host's side"),
    ("host/src/device/native.rs", "bindings to host/native"),
    ("host/src/device/ranks.rs", "bindings to host/native, of ranks"),
    ("host/src/device/graph.rs", "bindings to host/native/cuda"),
    ("host/src/device/cuda.rs", "opens libtorch_cuda before the first CUDA call"),
    ("host/src/device/libtorch.rs", "asks the dynamic linker where libtorch is"),
    ("host/src/device/memory.rs", "asks the C library what memory it holds, and to keep it"),
    ("host/src/data/batch.rs", "threads write to disjoint parts of a batch"),
    ("host/src/data/cut.rs", "launches the kernels of cut.cu"),
    ("host/src/sweep/process.rs", "ties a trial's process to its own, and sends it signals"),
    ("tests/src/real.rs", "sends signals to its children"),
];

/// The Rust sources of the workspace, below `folder`. Those of earlier API versions stay as they were.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let name = entry.file_name().unwrap().to_str().unwrap();
        if entry.is_dir() && !name.starts_with('.') && !["target", "compat", "runs"].contains(&name) {
            sources(&entry, found);
        } else if name.ends_with(".rs") {
            found.push(entry);
        }
    }
}

#[test]
fn unsafe_code_stays_in_its_rooms() {
    let root = workspace();
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 100, "{files:?}");
    let keyword = ["un", "safe"].concat();
    let mut seen = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let uses = |line: &str| {
            let code = line.split("//").next().unwrap_or_default();
            [" {", " fn ", " impl ", " extern ", "(no_mangle)"]
                .iter()
                .any(|after| code.contains(&format!("{keyword}{after}")))
        };
        if !text.lines().any(uses) {
            continue;
        }
        let name = file.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
        let room =
            UNSAFE.iter().find(|(room, _)| name == *room || room.ends_with('/') && name.starts_with(room));
        let Some((room, _)) = room else {
            panic!(
                "{name} has {keyword} code: move that to where it belongs, or give the file a place and a reason here"
            )
        };
        seen.push(*room);
    }
    for (room, why) in UNSAFE {
        assert!(
            seen.contains(&room),
            "{room} needs no {keyword} code any more ({why}): take it out of this list"
        );
    }
}
