//! `jepa-host data pack` that is killed half-way, by the real binary.

use std::fs;

use jepa_tests::real::Room;
use libjpeg_turbo_rs::{PixelFormat, Subsampling, compress};

#[test]
fn a_pack_that_was_killed_goes_on_to_the_same_bytes() {
    let room = Room::new();
    // Large, so that there is time to kill.
    const SIDE: usize = 1500;
    let pixels: Vec<u8> = (0..SIDE * SIDE * 3).map(|i| ((i / 3 % SIDE) ^ (i / SIDE / 3)) as u8).collect();
    let photo = compress(&pixels, SIDE, SIDE, PixelFormat::Rgb, 80, Subsampling::S420).unwrap();
    fs::create_dir(room.file("photos")).unwrap();
    for number in 0..120 {
        fs::write(room.file(format!("photos/{number}.jpg")), &photo).unwrap();
    }
    let arguments =
        |out: &'static str| ["data", "pack", "photos", out, "--shorter-side", "100", "--threads", "1"];
    room.run(arguments("undisturbed.h5")).expect(0);

    // In the middle of the work, and again in what was left of it; at last by a person.
    let (out, journal) = (room.file("out.h5"), room.file("out.h5.packing"));
    let length = || fs::metadata(&journal).map_or(0, |metadata| metadata.len());
    for signal in [libc::SIGKILL, libc::SIGKILL, libc::SIGINT] {
        let before = length();
        let mut running = room.start(arguments("out.h5"));
        running.until("some more images", || length() > before + 10_000);
        running.signal(signal);
        let ended = running.wait().expect(128 + signal);
        assert!(!out.exists());
        if signal == libc::SIGINT {
            assert!(
                ended.stderr.contains("kept in out.h5.packing: the same command goes on"),
                "{}",
                ended.stderr
            );
        }
    }
    let ended = room.run(arguments("out.h5")).expect(0);
    assert!(ended.stderr.contains("images are done already"), "{}", ended.stderr);
    assert!(!journal.exists());
    assert!(fs::read(&out).unwrap() == fs::read(room.file("undisturbed.h5")).unwrap());
}
