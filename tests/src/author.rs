//! Crates outside the workspace, built as their authors do.

use std::env;
use std::fs;
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
    run_cargo("build", &folder, &arguments, &target);
    target
}

/// Builds the crate in `folder`, runs its tests, and returns the folder of its plugin file.
pub fn build_and_test(folder: &Path) -> PathBuf {
    // Cargo replaces the files of a library while another cargo runs the tests of its documentation.
    let _turn = turn();
    let target = results_folder("authors");
    run_cargo("build", folder, &[], &target);
    let out = run_cargo("test", folder, &[], &target);
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

fn run_cargo(action: &str, folder: &Path, arguments: &[String], target: &Path) -> String {
    // The very versions of the workspace, which are on this machine already.
    fs::copy(workspace().join("Cargo.lock"), folder.join("Cargo.lock")).expect("the crate can be written to");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args([action, "--release", "--offline"]).args(arguments);
    cargo.current_dir(folder).env("CARGO_TARGET_DIR", target);
    // No more than a stranger's shell would have.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let ours = ["CARGO_PKG", "CARGO_MANIFEST", "JEPA_", "LD_LIBRARY", "LIBTORCH", "RUST_"];
        if ours.iter().any(|prefix| text.starts_with(prefix)) {
            cargo.env_remove(&name);
        }
    }
    let output = cargo.output().expect("cargo starts");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "cargo {action} in {}:\n{out}\n{err}", folder.display());
    out.into_owned()
}

/// Settings of a few steps, small and judged at the end.
pub fn few_steps() -> Vec<String> {
    let fixed = [
        "data.size=16",
        "optimizer.batch_size=64",
        "trainer.max_steps=8",
        "trainer.threads=1",
        "trainer.device=cpu",
        "trainer.log_every_steps=1",
        "eval.at_start=false",
        "eval.train_limit=500",
        "eval.linear.epochs=3",
    ];
    let images = [setting("data.train", &demo_images()), setting("data.val", &held_out_images())];
    fixed.map(str::to_owned).into_iter().chain(images).collect()
}
