//! `jepa-host data pack` that is killed half-way, by the real binary.

use std::fs;

use jepa_tests::real::{Room, demo_images};

#[test]
fn a_pack_that_was_killed_goes_on_to_the_same_bytes() {
    let room = Room::new();
    let source = demo_images().to_string_lossy().into_owned();
    let arguments = |out: &'static str| {
        let words = ["data", "pack", &source, out, "--shorter-side", "20", "--threads", "1"];
        words.map(str::to_owned)
    };
    room.run(arguments("undisturbed.h5")).expect(0);

    // In the middle of the work, and again in what was left of it.
    let (out, journal) = (room.file("out.h5"), room.file("out.h5.packing"));
    let length = || fs::metadata(&journal).map_or(0, |metadata| metadata.len());
    for least in [100_000, 1_000_000] {
        let mut running = room.start(arguments("out.h5"));
        running.until("so many images", || length() > least);
        running.signal(libc::SIGKILL);
        let ended = running.wait();
        assert!(!ended.status.success() && !out.exists(), "{}", ended.stderr);
    }
    let ended = room.run(arguments("out.h5")).expect(0);
    assert!(ended.stderr.contains("images are done already"), "{}", ended.stderr);
    assert!(!journal.exists());
    assert!(fs::read(&out).unwrap() == fs::read(room.file("undisturbed.h5")).unwrap());
}
