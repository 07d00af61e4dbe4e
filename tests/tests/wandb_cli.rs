//! W&B's own command line, as pip installs it, with the real binary and a stand-in for W&B's server.

use std::fs;
use std::mem;
use std::os::unix::fs::symlink;
use std::path::Path;

use jepa_tests::real::{
    Room, TINY_BACKBONE, TINY_SIMCLR, binary, checkpoints, demo_images, not_tried, records, setting,
};
use jepa_tests::wandb::{KEY, Server, assert_history, core, has_cli, start_cli};
use serde_json::{Value, json};

const MISSING: &str = "there is no Python package wandb: tests/setup.sh fetches it";

/// A room that looks like the root of a checkout.
fn checkout() -> Room {
    let room = Room::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap();
    for folder in ["configs", "examples"] {
        symlink(root.join(folder), room.file(folder)).unwrap();
    }
    fs::create_dir_all(room.file("target/release")).unwrap();
    symlink(binary(), room.file("target/release/jepa-host")).unwrap();
    room
}

/// The parameters of `examples/sweep.yaml`, and what makes the demo short; the agent writes them as Python does.
fn parameters(lr: f64, ratio: f64) -> Vec<(&'static str, Value)> {
    vec![
        ("optimizer.lr", json!(lr)),
        ("method.mask.ratio", json!(ratio)),
        ("backbone.width", json!(4)),
        ("optimizer.batch_size", json!(16)),
        ("trainer.threads", json!(1)),
        ("trainer.clip", Value::Null),
        ("trainer.log_every_steps", json!(1)),
        ("eval.at_start", json!(false)),
        ("eval.every_epochs", json!(0)),
    ]
}

#[test]
fn an_agent_runs_the_example_sweep_and_ends_a_run_early() {
    if !has_cli() {
        return not_tried(MISSING);
    }
    let (room, server) = (checkout(), Server::new());
    let created = start_cli(&room, &server, &["sweep", "examples/sweep.yaml"]).wait().expect(0);
    // `Run sweep agent with: wandb agent ENTITY/PROJECT/SWEEP_ID`
    let sweep = created.stderr.split_whitespace().last().unwrap();

    let mut settings = parameters(0.0031622776601683794, 0.6);
    settings.push(("trainer.max_steps", json!(10)));
    server.told().start_run("first", &settings);
    let mut agent =
        start_cli(&room, &server, &["agent", "--count", "2", "--max-consecutive-failed-runs", "1", sweep]);
    agent.until("the end of the first run", || server.told().exit_code.is_some());
    let first = mem::take(&mut *server.told());
    assert_eq!(first.exit_code, Some(0));
    assert_eq!((&first.run, &first.sweep), (&json!("first"), &json!("sweep1")));
    assert_eq!(first.config["optimizer"]["value"]["lr"].as_f64(), Some(0.0031622776601683794));
    assert_eq!(first.config["optimizer.lr"]["value"].as_f64(), Some(0.0031622776601683794));
    assert_eq!(first.config["method"]["value"]["mask"]["ratio"].as_f64(), Some(0.6));
    assert_history(&first.history, &room.file("runs/demo/version_0"));

    let run = room.file("runs/demo/version_1");
    server.told().sweep_config = first.sweep_config;
    server.told().start_run("second", &parameters(0.004, 0.4));
    agent.until("30 records", || {
        fs::read_to_string(run.join("metrics.jsonl")).is_ok_and(|text| text.lines().count() > 30)
    });
    server.told().commands.push(json!({ "type": "stop", "run_id": "second" }));
    let agent = agent.wait().expect(0);
    assert!(!agent.stderr.contains("failed runs"), "a run that is ended has not failed:\n{}", agent.stderr);
    assert_eq!(server.told().exit_code, Some(143));
    assert_eq!(server.told().run, "second");
    assert_eq!(server.told().sweep, "sweep1");
    assert_history(&server.told().history, &run);
    let last = records(&run).last().unwrap()["step"].as_u64().unwrap();
    assert!(checkpoints(&run.join("checkpoints")).last().unwrap().ends_with(format!("step_{last:08}")));

    // It goes on without an agent.
    let core = core().display().to_string();
    let environment =
        [("JEPA_WANDB_CORE", core.as_str()), ("WANDB_BASE_URL", &server.url), ("WANDB_API_KEY", KEY)];
    let steps = format!("trainer.max_steps={}", last + 5);
    let command =
        ["--plugin", "libcnn_jepa.so", "--config", "configs/demo.toml", "method.mask.strategy=random"];
    let settings = parameters(0.004, 0.4).into_iter().map(|(name, value)| format!("{name}={value}"));
    let resumed = [&steps, "track.wandb.mode=online", "--resume", "auto"];
    let arguments = command.into_iter().chain(resumed).map(str::to_owned).chain(settings);
    room.start_in(&environment, arguments).wait().expect(0);
    assert_eq!(server.told().exit_code, Some(0));
    assert_history(&server.told().history, &run);
    assert_eq!(records(&run).last().unwrap()["step"], last + 5);
}

#[test]
fn a_run_that_was_offline_is_synced() {
    if !has_cli() {
        return not_tried(MISSING);
    }
    let (room, server) = (Room::new(), Server::new());
    let core = core().display().to_string();
    let images = setting("data.train", &demo_images());
    let fixed = ["--plugin", "simclr", &images, "trainer.threads=1", "track.wandb.mode=offline"];
    let arguments = || fixed.into_iter().chain(TINY_BACKBONE).chain(TINY_SIMCLR);
    let environment = [("JEPA_WANDB_CORE", core.as_str())];
    room.start_in(&environment, arguments().chain(["trainer.max_steps=10"])).wait().expect(0);
    let more = ["trainer.max_steps=15", "--resume", "auto"];
    room.start_in(&environment, arguments().chain(more)).wait().expect(0);

    let run = room.file("runs/simclr/version_0");
    let paths = run.join("wandb").read_dir().unwrap().map(|entry| entry.unwrap().path());
    let paths: Vec<_> = paths.filter(|path| path.is_dir()).map(|path| path.display().to_string()).collect();
    assert_eq!(paths.len(), 2);
    let arguments: Vec<_> = ["sync"].into_iter().chain(paths.iter().map(String::as_str)).collect();
    start_cli(&room, &server, &arguments).wait().expect(0);
    assert_history(&server.told().history, &run);
    assert_eq!(server.told().exit_code, Some(0));
}
