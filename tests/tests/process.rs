//! The process itself.

use std::fs;

use jepa_tests::real::{Room, TINY_BACKBONE, demo_images, setting};

/// The variables of the process `id` that tell how long compute threads spin.
fn spins(id: u32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{id}/environ")).unwrap();
    let entries = bytes.split(|byte| *byte == 0).map(|entry| String::from_utf8_lossy(entry).into_owned());
    entries
        .filter(|entry| entry.starts_with("GOMP_SPINCOUNT=") || entry.starts_with("OMP_WAIT_POLICY="))
        .collect()
}

#[test]
fn compute_threads_give_way_unless_the_user_decides() {
    let images = setting("data.train", &demo_images());
    let settings = ["data.size=16", "optimizer.batch_size=16", "method.hidden=16", "method.output=8"];
    for (policy, expected) in [("", "GOMP_SPINCOUNT=1000"), ("active", "OMP_WAIT_POLICY=active")] {
        let room = Room::new();
        let environment = [("GOMP_SPINCOUNT", ""), ("OMP_WAIT_POLICY", policy)];
        let arguments = ["--plugin", "simclr", &images].into_iter().chain(TINY_BACKBONE).chain(settings);
        let mut run = room.start_in(&environment, arguments);
        run.until("a run", || room.file("runs/simclr/version_0/metrics.jsonl").exists());
        assert_eq!(spins(run.id()), [expected]);
    }
}
