//! Crates outside the workspace, built as their authors do.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::real::{demo_images, held_out_images, setting};

/// The checkout.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the checkout is there")
}

/// Builds with plain cargo what `prepare` gives: the folder of a crate, further arguments, and a name for the folder of
/// results, which it returns. One crate at a time, over processes too, as they share their results.
pub fn cargo(prepare: impl FnOnce() -> (PathBuf, Vec<String>, String)) -> PathBuf {
    let _turn = turn();
    let (folder, arguments, results) = prepare();
    let target = results_folder(&results);
    run_cargo("build", &folder, &arguments, &target, None);
    target
}

/// Builds the crate in `folder` with plain cargo where there is Rust, a linker for C, and nothing else: no C++ compiler
/// and no cmake, with `room` for the programs' names. Returns the folder of its plugin file.
pub fn build_with_a_c_linker_only(folder: &Path, room: &Path) -> PathBuf {
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output().expect("rustc starts").stdout;
    let rust = PathBuf::from(String::from_utf8_lossy(&sysroot).trim()).join("bin");
    let everywhere: Vec<PathBuf> = env::split_paths(&env::var_os("PATH").expect("a path")).collect();
    for name in ["cargo", "rustc", "cc", "ld", "as", "ar"] {
        let mut places = [&rust].into_iter().chain(&everywhere).map(|folder| folder.join(name));
        let program = places.find(|file| file.is_file()).unwrap_or_else(|| panic!("{name} is on the path"));
        // A link would have a compiler look for its parts beside the link.
        let script = format!("#!/bin/sh\nexec '{}' \"$@\"\n", program.display());
        let file = room.join(name);
        fs::write(&file, script).expect("the room can be written to");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("our own file");
    }
    let _turn = turn();
    let target = results_folder("bare");
    run_cargo("build", folder, &[], &target, Some(room));
    target.join("release")
}

/// Builds the crate in `folder`, runs its tests, and returns the folder of its plugin file.
pub fn build_and_test(folder: &Path) -> PathBuf {
    // Cargo replaces the files of a library while another cargo runs the tests of its documentation.
    let _turn = turn();
    let target = results_folder("authors");
    run_cargo("build", folder, &[], &target, None);
    let out = run_cargo("test", folder, &[], &target, None);
    assert!(out.contains("1 passed"), "no test ran:\n{out}");
    target.join("release")
}

fn results_folder(name: &str) -> PathBuf {
    let test = env::current_exe().expect("this program has a path");
    test.ancestors().nth(3).expect("it lies in target/release/deps").join(name)
}

fn turn() -> fs::File {
    let folder = results_folder("authors");
    fs::create_dir_all(&folder).expect("target can be written to");
    let turn = fs::File::create(folder.join("turn")).expect("target can be written to");
    turn.lock().expect("files can be locked");
    turn
}

/// `programs`: the only folder that programs are looked for in.
fn run_cargo(
    action: &str,
    folder: &Path,
    arguments: &[String],
    target: &Path,
    programs: Option<&Path>,
) -> String {
    // The very versions of the workspace, which are on this machine already.
    fs::copy(workspace().join("Cargo.lock"), folder.join("Cargo.lock")).expect("the crate can be written to");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args([action, "--release", "--offline"]).args(arguments);
    cargo.current_dir(folder).env("CARGO_TARGET_DIR", target);
    // No more than a stranger's shell would have.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let ours = ["CARGO_PKG", "CARGO_MANIFEST", "CMAKE", "JEPA_", "LD_LIBRARY", "LIBTORCH", "RUST_"];
        if ours.iter().any(|prefix| text.starts_with(prefix)) {
            cargo.env_remove(&name);
        }
    }
    if let Some(programs) = programs {
        cargo.env("PATH", programs);
    }
    let output = cargo.output().expect("cargo starts");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "cargo {action} in {}:\n{out}\n{err}", folder.display());
    out.into_owned()
}

/// Settings of a few steps, small and evaluated at the end, of any experiment.
pub fn few_steps() -> Vec<String> {
    let images = [setting("data.train", &demo_images()), setting("data.val", &held_out_images())];
    let small = ["data.size=16", "optimizer.batch_size=64"].map(str::to_owned);
    quick().into_iter().chain(small).chain(images).collect()
}

/// Settings that end the experiment of a crate's own `train.toml` after a few steps, and change nothing else of it.
pub fn quick() -> Vec<String> {
    let fixed = [
        "trainer.max_steps=8",
        "trainer.threads=1",
        "trainer.device=cpu",
        "trainer.log_every_steps=1",
        "eval.at_start=false",
        "eval.train_limit=500",
        "eval.linear.epochs=3",
    ];
    fixed.map(str::to_owned).to_vec()
}
