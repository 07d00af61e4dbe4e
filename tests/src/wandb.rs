//! W&B's side: its own reader of the files that wandb-core writes, its command line, and a stand-in for its server.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::mem;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use flate2::read::GzDecoder;
use serde_json::{Value, json};

use crate::real::{Room, Running, python, records};

/// A key that the stand-in takes, as it does all others.
pub const KEY: &str = "0123456789abcdef0123456789abcdef01234567";

/// wandb-core as `tests/setup.sh` fetches it.
///
/// # Panics
/// When it is not there.
pub fn core() -> PathBuf {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.deps/lib/wandb-core");
    file.canonicalize().expect("tests/setup.sh fetches wandb-core")
}

/// The records of the sessions of a run's folder `wandb`, each as W&B's own reader gives them back, oldest first.
///
/// # Panics
/// When it cannot read one.
pub fn sessions(run: &Path) -> Vec<Vec<Value>> {
    let mut files = Vec::new();
    for session in run.join("wandb").read_dir().expect("a folder of W&B").map(|entry| entry.unwrap().path()) {
        if session.is_dir() {
            let inside = session.read_dir().unwrap().map(|entry| entry.unwrap().path());
            files
                .extend(inside.filter(|path| path.extension().is_some_and(|extension| extension == "wandb")));
        }
    }
    files.sort();
    let read = |file: PathBuf| {
        let mut command = Command::new(core());
        command.args(["leet", "inspect", "-no-observability", "-json", "-run-file"]).arg(&file);
        let output = command.output().expect("wandb-core runs");
        let text = String::from_utf8(output.stdout).expect("JSON is text");
        text.lines().map(|line| serde_json::from_str(line).expect("a record")).collect()
    };
    files.into_iter().map(read).collect()
}

/// The records of a kind.
pub fn of_kind<'r>(records: &'r [Value], kind: &str) -> Vec<&'r Value> {
    records.iter().filter(|record| record["type"] == kind).map(|record| &record[kind]).collect()
}

/// Makes sure that W&B's history holds every record of a run once, in order, with every value and every image.
///
/// # Panics
/// When it does not.
#[track_caller]
pub fn assert_history(history: &[Value], run: &Path) {
    let records = records(run);
    let steps = |rows: &[Value]| rows.iter().map(|row| row["step"].clone()).collect::<Vec<_>>();
    assert_eq!(steps(history), steps(&records));
    for (index, (row, record)) in history.iter().zip(&records).enumerate() {
        assert_eq!(row["_step"], index);
        for (name, value) in record.as_object().unwrap().iter().filter(|(name, _)| *name != "time") {
            let Some(value) = value.as_f64() else { continue };
            let row = row[name].as_f64().unwrap();
            assert!((row - value).abs() <= 1e-12 * value.abs(), "{name}: {row} and {value}");
        }
        for name in record["images"].as_object().into_iter().flat_map(|images| images.keys()) {
            // W&B's reader of files writes the parts of a value under names of their own.
            let kind = row[name].get("_type").or_else(|| row.get(format!("{name}._type")));
            assert_eq!(kind.unwrap_or(&Value::Null), "image-file", "{row:#}");
        }
        for (name, histogram) in record["histograms"].as_object().into_iter().flatten() {
            let counts = row[name].get("values").or_else(|| row.get(format!("{name}.values")));
            assert_eq!(counts, Some(&histogram["counts"]), "{row:#}");
        }
    }
}

/// Whether W&B's command line is there.
pub fn has_cli() -> bool {
    let (python, packages) = python();
    let mut command = Command::new(python);
    let output = command.args(["-m", "wandb", "--version"]).env("PYTHONPATH", packages).output();
    output.is_ok_and(|output| output.status.success())
}

/// Starts `wandb` in `room` with these arguments, logged in to `server`.
pub fn start_cli(room: &Room, server: &Server, arguments: &[&str]) -> Running {
    let (python, packages) = python();
    let (core, packages) = (core().display().to_string(), packages.display().to_string());
    let home = room.path().display().to_string();
    let environment = [
        ("JEPA_WANDB_CORE", core.as_str()),
        ("PYTHONPATH", &packages),
        ("HOME", &home),
        ("WANDB_BASE_URL", &server.url),
        ("WANDB_API_KEY", KEY),
        ("WANDB_ERROR_REPORTING", "false"),
    ];
    room.start_other_in(&environment, &python, ["-m", "wandb"].iter().chain(arguments))
}

/// What the stand-in has been told.
#[derive(Debug, Default)]
pub struct Told {
    /// The run's id.
    pub run: Value,
    /// The history, line by line.
    pub history: Vec<Value>,
    /// The newest summary.
    pub summary: Value,
    /// The newest configuration.
    pub config: Value,
    /// The sweep that the run belongs to.
    pub sweep: Value,
    /// The run's exit code, when it has ended.
    pub exit_code: Option<i64>,
    /// Names of the GraphQL operations.
    pub operations: Vec<String>,
    /// API keys.
    pub keys: Vec<String>,
    /// How many uploads of history were refused so far.
    pub refused: usize,
    /// Answers to the next uploads: HTTP status codes.
    pub refuse_with: Vec<u16>,
    /// The configuration of the sweep: YAML.
    pub sweep_config: String,
    /// Commands that an agent is given at its next heartbeat.
    pub commands: Vec<Value>,
}

impl Told {
    /// Has an agent start the run `id` of the sweep with these parameters, at its next heartbeat.
    pub fn start_run(&mut self, id: &str, parameters: &[(&str, Value)]) {
        let program = self.sweep_config.lines().find_map(|line| line.strip_prefix("program: "));
        let arguments = parameters.iter().map(|(name, value)| (*name, json!({ "value": value })));
        let arguments: BTreeMap<_, _> = arguments.collect();
        let command = json!({ "type": "run", "run_id": id, "program": program, "args": arguments });
        self.commands.push(command);
    }
}

/// A stand-in for W&B's server: it keeps one run and one sweep.
pub struct Server {
    /// Its URL.
    pub url: String,
    told: Arc<Mutex<Told>>,
}

impl Server {
    /// Starts it on a free port of the loopback address. Its threads end with the test.
    ///
    /// # Panics
    /// When there is no free port.
    #[expect(clippy::new_without_default, reason = "it opens a port")]
    pub fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let told = Arc::new(Mutex::new(Told::default()));
        let kept = Arc::clone(&told);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let told = Arc::clone(&kept);
                thread::spawn(move || serve(stream, &told));
            }
        });
        Server { url, told }
    }

    /// What it has been told so far.
    pub fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().expect("no thread of the server panics")
    }
}

/// Answers requests until the client hangs up.
fn serve(stream: TcpStream, told: &Mutex<Told>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut stream = stream;
    loop {
        let mut first = String::new();
        if reader.read_line(&mut first).ok()? == 0 {
            return None;
        }
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim().split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        if headers.get("content-encoding").is_some_and(|coding| coding == "gzip") {
            let mut plain = Vec::new();
            GzDecoder::new(&*body).read_to_end(&mut plain).ok()?;
            body = plain;
        }
        let path = first.split(' ').nth(1).unwrap_or_default();
        let (status, answer) = answer(path, &headers, &body, &mut *told.lock().ok()?);
        let answer = answer.to_string();
        let head = format!(
            "HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            answer.len()
        );
        stream.write_all(format!("{head}{answer}").as_bytes()).ok()?;
    }
}

fn answer(path: &str, headers: &BTreeMap<String, String>, body: &[u8], told: &mut Told) -> (u16, Value) {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    if path.starts_with("/graphql") {
        told.keys.extend(headers.get("authorization").cloned());
        return (200, graphql(&body, told));
    }
    if !path.ends_with("/file_stream") {
        return (200, json!({}));
    }
    if body["files"]["wandb-history.jsonl"].is_object() && !told.refuse_with.is_empty() {
        told.refused += 1;
        return (told.refuse_with.remove(0), json!({ "error": "try again" }));
    }
    if let Some(chunk) = body["files"].get("wandb-history.jsonl") {
        let offset = chunk["offset"].as_u64().unwrap_or(0) as usize;
        let lines = chunk["content"].as_array().into_iter().flatten();
        for (at, line) in lines.enumerate() {
            let line = serde_json::from_str(line.as_str().unwrap_or_default()).unwrap_or_default();
            told.history.resize(offset + at, Value::Null);
            told.history.push(line);
        }
    }
    if let Some(line) = body["files"]["wandb-summary.json"]["content"].get(0).and_then(Value::as_str) {
        told.summary = serde_json::from_str(line).unwrap_or_default();
    }
    if body["complete"] == true {
        told.exit_code = body["exitcode"].as_i64();
    }
    (200, json!({ "limits": {} }))
}

fn graphql(body: &Value, told: &mut Told) -> Value {
    let query = body["query"].as_str().unwrap_or_default();
    let operation =
        query.split(['(', '{', ' ']).filter(|word| !word.trim().is_empty()).nth(1).unwrap_or_default();
    told.operations.push(operation.to_owned());
    let run = &body["variables"];
    match operation {
        "Viewer" => json!({ "data": { "viewer": {
            "id": "u", "entity": "somebody", "username": "somebody", "flags": "{}", "teams": { "edges": [] },
        } } }),
        "RunResumeStatus" if told.run != run["name"] => json!({ "data": { "model": null } }),
        "RunResumeStatus" => json!({ "data": { "model": {
            "id": "p", "name": run["project"], "entity": { "id": "e", "name": "somebody" },
            "bucket": {
                "id": "storage", "name": run["name"], "displayName": null, "tags": [], "notes": null,
                "summaryMetrics": told.summary.to_string(), "config": told.config.to_string(),
                "historyLineCount": told.history.len(), "eventsLineCount": 0, "logLineCount": 0,
                "historyTail": json!(told.history.last().map(Value::to_string).into_iter().collect::<Vec<_>>()).to_string(),
                "eventsTail": "[]", "wandbConfig": told.config["_wandb"]["value"].to_string(),
            },
        } } }),
        "UpsertBucket" => {
            told.run = run["name"].clone();
            if let Some(config) = run["config"].as_str() {
                told.config = serde_json::from_str(config).unwrap_or_default();
            }
            if run["sweep"].is_string() {
                told.sweep = run["sweep"].clone();
            }
            json!({ "data": { "upsertBucket": { "inserted": true, "bucket": {
                "id": "storage", "name": run["name"], "displayName": run["displayName"], "description": null,
                "config": "{}", "sweepName": null, "historyLineCount": told.history.len(),
                "project": { "id": "p", "name": run["project"], "entity": { "id": "e", "name": "somebody" } },
            } } } })
        }
        "UpsertSweep" => {
            told.sweep_config = run["config"].as_str().unwrap_or_default().to_owned();
            json!({ "data": { "upsertSweep": {
                "sweep": { "name": "sweep1", "project": {
                    "id": "p", "name": run["projectName"], "entity": { "id": "e", "name": "somebody" },
                } },
                "configValidationWarnings": [],
            } } })
        }
        "SweepWithRuns" => json!({ "data": { "project": { "sweep": {
            "id": "s", "name": run["sweep"], "config": told.sweep_config, "runs": { "edges": [] },
        } } } }),
        "CreateAgent" => json!({ "data": { "createAgent": { "agent": { "id": "agent1" } } } }),
        "Heartbeat" => {
            let commands = json!(mem::take(&mut told.commands)).to_string();
            json!({ "data": { "agentHeartbeat": { "agent": { "id": "agent1" }, "commands": commands } } })
        }
        _ => json!({ "data": null, "errors": [{ "message": "the stand-in does not know this" }] }),
    }
}
