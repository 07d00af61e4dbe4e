//! W&B's side: its own reader of the files that wandb-core writes, and a stand-in for its server.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use flate2::read::GzDecoder;
use serde_json::{Value, json};

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

/// What the stand-in has been told.
#[derive(Debug, Default)]
pub struct Told {
    /// The history, line by line.
    pub history: Vec<Value>,
    /// The newest summary.
    pub summary: Value,
    /// The newest configuration.
    pub config: Value,
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
}

/// A stand-in for W&B's server: it keeps one run.
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
        "RunResumeStatus" if told.config.is_null() => json!({ "data": { "model": null } }),
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
            if let Some(config) = run["config"].as_str() {
                told.config = serde_json::from_str(config).unwrap_or_default();
            }
            json!({ "data": { "upsertBucket": { "inserted": true, "bucket": {
                "id": "storage", "name": run["name"], "displayName": run["displayName"], "description": null,
                "config": "{}", "sweepName": null, "historyLineCount": told.history.len(),
                "project": { "id": "p", "name": run["project"], "entity": { "id": "e", "name": "somebody" } },
            } } } })
        }
        _ => json!({ "data": null, "errors": [{ "message": "the stand-in does not know this" }] }),
    }
}
