//! Which plugin files the real binary loads: those that nobody else can have written, and that a lock lists.

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use jepa_host::plugin::{Admission, PluginError, PluginFile};
use jepa_tests::real::{Room, TINY_BACKBONE, demo_images, not_tried, plugin, setting};

const USAGE: i32 = 2;
const REFUSED: i32 = 3;

/// A copy of CNN-JEPA's plugin in this room.
fn copy(room: &Room, name: &str) -> PathBuf {
    let path = room.file(name);
    fs::copy(plugin("cnn_jepa"), &path).unwrap();
    path
}

/// The same plugin to the linker, and another file.
fn change(library: &Path) {
    OpenOptions::new().append(true).open(library).unwrap().write_all(b"\0").unwrap();
}

fn info<'a>(library: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    [&["plugin", "info", library.to_str().unwrap()], more].concat()
}

#[test]
fn a_file_that_everyone_may_write_is_refused_unless_allowed() {
    let room = Room::new();
    let library = copy(&room, "libopen.so");
    fs::set_permissions(&library, Permissions::from_mode(0o666)).unwrap();
    let ended = room.run(info(&library, &[])).expect(REFUSED);
    ended.error_says(&["libopen.so", "can be written by every user (mode 666)", "--allow-untrusted-plugins"]);
    room.run(info(&library, &["--allow-untrusted-plugins"])).expect(0);

    fs::set_permissions(&library, Permissions::from_mode(0o644)).unwrap();
    room.run(info(&library, &[])).expect(0);
    fs::set_permissions(room.path(), Permissions::from_mode(0o777)).unwrap();
    room.run(info(&library, &[])).expect(REFUSED).error_says(&["folder where every user may replace it"]);
    // As in /tmp: there, only the owner may replace a file.
    fs::set_permissions(room.path(), Permissions::from_mode(0o1777)).unwrap();
    room.run(info(&library, &[])).expect(0);
}

#[test]
fn somebody_else_s_file_is_refused_unless_allowed() {
    let room = Room::new();
    let library = copy(&room, "libforeign.so");
    if let Err(error) = chown(&library, Some(54321), None) {
        not_tried(&format!("only root can give files away ({error})"));
        return;
    }
    let ended = room.run(info(&library, &[])).expect(REFUSED);
    ended.error_says(&["libforeign.so", "belongs to user 54321", "--allow-untrusted-plugins"]);
    room.run(info(&library, &["--allow-untrusted-plugins"])).expect(0);

    let folder = room.file("theirs");
    fs::create_dir(&folder).unwrap();
    let library = copy(&room, "theirs/libours.so");
    chown(&folder, Some(54321), None).unwrap();
    room.run(info(&library, &[])).expect(REFUSED).error_says(&["a folder of user 54321, who may replace it"]);
    room.run(info(&library, &["--allow-untrusted-plugins"])).expect(0);
}

#[test]
fn a_file_that_is_replaced_after_it_was_checked_is_refused() {
    let room = Room::new();
    let library = copy(&room, "libcopy.so");
    let read = |path: &Path| PluginFile::read(path, &Admission::default()).unwrap();
    let refused = |file: PluginFile| match file.open() {
        Err(error @ PluginError::Changed { .. }) => {
            assert!(error.to_string().contains("libcopy.so"), "{error}")
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was opened"),
    };
    let checked = read(&library);
    fs::rename(copy(&room, "libother.so"), &library).unwrap();
    refused(checked);
    let checked = read(&library);
    change(&library);
    refused(checked);
    assert!(read(&library).open().is_ok());
}

#[test]
fn a_lock_pins_what_is_loaded() {
    let room = Room::new();
    let library = copy(&room, "libcopy.so");
    let path = library.to_str().unwrap();
    let ended = room.run(["plugin", "lock", path]).expect(0);
    assert!(ended.stdout.contains("plugins.lock lists 1 plugins"), "{}", ended.stdout);
    let text = fs::read_to_string(room.file("plugins.lock")).unwrap();
    assert!(text.contains("name = \"cnn-jepa\"") && text.contains("sha256 = \""), "{text}");

    let locked = ["--plugin-lock", "plugins.lock"];
    room.run(info(&library, &locked)).expect(0);
    // The backbone would come from a file that the lock does not list.
    let train = ["--plugin", path, "backbone.name=resnet18", locked[0], locked[1]];
    let ended = room.run(train).expect(REFUSED);
    ended.error_says(&[
        "the backbone `resnet18`",
        "libsparse_resnet.so",
        "does not list plugin `sparse-resnet`",
    ]);

    change(&library);
    let ended = room.run(info(&library, &locked)).expect(REFUSED);
    ended.error_says(&[
        "libcopy.so",
        "plugins.lock pins cnn-jepa 0.1.0 with SHA-256",
        "`jepa-host plugin lock`",
    ]);

    room.run(["plugin", "lock", path, "sparse_resnet"]).expect(0);
    room.run(train).expect(USAGE).error_says(&["data.train is not set"]);
}

#[test]
fn a_lock_leaves_nothing_out_in_silence() {
    let room = Room::new();
    let library = copy(&room, "libcopy.so");
    let path = library.to_str().unwrap();
    // Two files of one name: a run could load only one of them.
    change(&library);
    let ended = room.run(["plugin", "lock", path, "cnn_jepa"]).expect(REFUSED);
    ended.error_says(&["two plugins are named `cnn-jepa`", "name one of them"]);
    assert!(!room.file("plugins.lock").exists());

    fs::set_permissions(&library, Permissions::from_mode(0o666)).unwrap();
    let ended = room.run(["plugin", "lock", "--plugin-dir", "."]).expect(0);
    let words = "libcopy.so: can be written by every user";
    assert!(
        ended.stdout.contains("refused, and not listed: ") && ended.stdout.contains(words),
        "{}",
        ended.stdout
    );

    // A lock that was put together from two lists takes both files.
    fs::set_permissions(&library, Permissions::from_mode(0o644)).unwrap();
    room.run(["plugin", "lock", path, "--out", "other.lock"]).expect(0);
    let both = ["plugins.lock", "other.lock"].map(|name| fs::read_to_string(room.file(name)).unwrap());
    fs::write(room.file("both.lock"), both.concat()).unwrap();
    room.run(info(&library, &["--plugin-lock", "both.lock"])).expect(0);
    room.run(info(&plugin("cnn_jepa"), &["--plugin-lock", "both.lock"])).expect(0);
}

#[test]
fn a_lock_that_is_none_is_told() {
    let room = Room::new();
    fs::write(room.file("typo.lock"), "[[plugin]]\nname = \"cnn-jepa\"\n").unwrap();
    let ended = room.run(["plugin", "list", "--plugin-lock", "typo.lock"]).expect(USAGE);
    ended.error_says(&["typo.lock: is no plugin lock", "missing field `version`"]);
    let ended = room.run(["plugin", "list", "--plugin-lock", "none.lock"]).expect(USAGE);
    ended.error_says(&["none.lock: cannot be read", "`jepa-host plugin lock`"]);
}

#[test]
fn a_run_goes_on_with_the_same_files_only() {
    let room = Room::new();
    let library = copy(&room, "libcopy.so");
    let fixed = [
        "method.mask.min_keep=1",
        "data.size=16",
        "optimizer.batch_size=16",
        "trainer.device=cpu",
        "trainer.threads=1",
        "eval.every_epochs=0",
    ];
    let train = |more: &[&str]| {
        let images = setting("data.train", &demo_images());
        let arguments = ["--plugin", library.to_str().unwrap(), &images];
        room.run([&arguments, &TINY_BACKBONE[..], &fixed, more].concat())
    };
    train(&["trainer.max_steps=2"]).expect(0);
    change(&library);
    let ended = train(&["trainer.max_steps=3", "--resume", "auto"]).expect(USAGE);
    ended.error_says(&["plugin cnn-jepa was 0.1.0 (", ") and is 0.1.0 (", "--allow-changes"]);
    let ended = train(&["trainer.max_steps=3", "--resume", "auto", "--allow-changes"]).expect(0);
    assert!(ended.stderr.contains("going on although plugin cnn-jepa was"), "{}", ended.stderr);

    // Another plugin may have brought the method; one with probes alone changes no weights.
    let ended =
        train(&["trainer.max_steps=4", "--resume", "auto", "--plugin", "simclr", "method.name=cnn_jepa"]);
    let ended = ended.expect(USAGE);
    ended.error_says(&["plugin simclr was not loaded and is 0.1.0 (", "--allow-changes"]);
    train(&["trainer.max_steps=4", "--resume", "auto", "--plugin", "faulty_probe"]).expect(0);
    train(&["trainer.max_steps=5", "--resume", "auto"]).expect(0);
}

#[test]
fn nothing_is_opened_from_the_current_folder_by_accident() {
    let room = Room::new();
    fs::create_dir(room.file("plugins")).unwrap();
    for name in ["libstranger.so", "plugins/libstranger.so"] {
        copy(&room, name);
    }
    for name in ["stranger", "libstranger.so"] {
        room.run(["plugin", "info", name]).expect(REFUSED).error_says(&["no plugin `"]);
    }
    room.run(["plugin", "info", "stranger", "--plugin-dir", "plugins"]).expect(0);
    room.run(["plugin", "info", "./libstranger.so"]).expect(0);
}
