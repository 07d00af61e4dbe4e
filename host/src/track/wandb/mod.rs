//! Runs in Weights & Biases, over wandb-core: offline files, uploads, retries, system metrics and the console log are
//! its own.
//!
//! The index of a record is W&B's `_step`, so that it says for itself what it has: online the server does, offline the
//! files of earlier sessions. Our own step and epoch are metrics, and the step is the horizontal axis of all others.

pub mod artifact;
mod auth;
pub mod core;
mod proto;
mod settings;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;

use self::core::Core;
use self::proto::{
    ArtifactRecord, BoolValue, ConfigRecord, Control, DoubleValue, Empty, FileType, FilesItem, FilesRecord,
    HistoryAction, HistoryStep, Info, Inform, InformInit, Int32Value, Item, ListString, LogArtifactRequest,
    MetricOptions, MetricRecord, Outcome, OutcomeKind, OutputRawRecord, OutputType, PartialHistoryRequest,
    RecordKind, Request, RequestKind, RequestType, Response, ResponseKind, ResponseType, RunExitRecord,
    RunRecord, RunStartRequest, RunUpdateResult, Settings, StringValue, SummaryRecord, Teardown,
};
use self::settings::now;
pub use self::settings::{WandbRun, mode};
use super::console::CONSOLE_FILE;
use super::{Record, Tracker, lower_is_better};
use crate::config::WandbResume;
use crate::hex::hex;

/// How long the engine may take for what needs no server.
const LOCAL: Duration = Duration::from_secs(30);
/// How long it may take to find the run on the server.
const SERVER: Duration = Duration::from_secs(90);
/// How long it may take to bring everything to the server at the end.
const UPLOAD: Duration = Duration::from_secs(24 * 3600);

/// A run's tracker.
pub struct Wandb {
    run: WandbRun,
    session: Option<Session>,
    /// Whether this process has been let into the run before.
    begun: bool,
    /// How much of the console's log has been sent.
    console: u64,
    /// The best values so far.
    best: BTreeMap<String, f64>,
}

/// What is open.
struct Session {
    core: Core,
    /// The folder of this session, and `files` in it.
    folder: PathBuf,
    /// The run as the server knows it.
    known: RunRecord,
}

impl Wandb {
    /// A tracker for `run`. The console's log is sent from where it ends now, for a run that is live.
    pub fn new(run: WandbRun) -> Self {
        let log = run.directory.join(CONSOLE_FILE);
        let console = if run.live { fs::metadata(log).map_or(0, |file| file.len()) } else { 0 };
        Wandb { run, session: None, begun: false, console, best: BTreeMap::new() }
    }

    fn begin(&mut self) -> anyhow::Result<u64> {
        let run = &self.run;
        let wandb = run.folder();
        // What an earlier session has written of this run, which the server cannot be asked for.
        let has = if run.online { 0 } else { steps_in_files(run)? };
        let (folder, timespec) = new_folder(&wandb, run)?;
        let (files, logs) = (folder.join("files"), folder.join("logs"));
        for made in [&files, &logs] {
            fs::create_dir_all(made).with_context(|| format!("cannot make {}", made.display()))?;
        }
        let mut core = Core::start(&run.program, &logs)?;
        let init =
            InformInit { settings: Some(self.settings(&folder, &timespec, has)), info: Some(self.info()) };
        let id = core.next_id();
        core.communicate(&id, RequestKind::InformInit(init), LOCAL)?;
        self.session = Some(Session { core, folder, known: RunRecord::default() });
        self.publish(RecordKind::Header(Empty {}))?;

        let patience = if self.run.online { SERVER } else { LOCAL };
        let answer = self.communicate(RecordKind::Run(self.run_record(has)), patience)?;
        let Outcome { kind: Some(OutcomeKind::Run(RunUpdateResult { run, error })) } = answer else {
            bail!("wandb-core does not say whether the run is there")
        };
        if let Some(error) = error.filter(|error| !error.message.is_empty()) {
            bail!("W&B refuses the run: {}", error.message);
        }
        let known = run.context("wandb-core does not tell the run")?;
        let first = if self.run.online { known.starting_step.max(0) as u64 } else { has };
        let start = RunStartRequest { run: Some(known.clone()), info: Some(self.info()) };
        self.session()?.known = known;
        self.begun = true;
        self.request(RequestType::RunStart(start), LOCAL)?;
        self.publish(request(RequestType::ProbeSystemInfo(Empty {})))?;
        for metric in axes() {
            self.publish(RecordKind::Metric(metric))?;
        }
        Ok(first)
    }

    fn settings(&self, folder: &Path, timespec: &str, has: u64) -> Settings {
        let run = &self.run;
        let text = |value: &str| Some(StringValue::from(value));
        let path = |path: &Path| Some(StringValue { value: path.display().to_string() });
        let program = std::env::current_exe().unwrap_or_default();
        let resume = match run.resume {
            // What this process, or an earlier one, has begun is gone on with.
            _ if has > 0 || self.begun => "allow",
            WandbResume::Allow => "allow",
            WandbResume::Must => "must",
            WandbResume::Never => "never",
        };
        Settings {
            args: Some(ListString { value: std::env::args().skip(1).collect() }),
            executable: path(&program),
            program: path(&program),
            offline: Some(BoolValue { value: !run.online }),
            mode: text(if run.online { "online" } else { "offline" }),
            run_mode: text(if run.online { "run" } else { "offline-run" }),
            os: text(std::env::consts::OS),
            host: text(&host_name()),
            start_time: Some(DoubleValue { value: now() }),
            stats_pid: Some(Int32Value { value: std::process::id() as i32 }),
            stats_sampling_interval: Some(DoubleValue { value: 15.0 }),
            api_key: run.api_key.as_ref().and_then(|key| text(key.reveal())),
            base_url: text(&run.base_url),
            app_url: text(&run.base_url.replacen("://api.", "://", 1)),
            console: text("wrap"),
            disable_job_creation: Some(BoolValue { value: true }),
            disable_update_check: Some(BoolValue { value: true }),
            project: text(&run.project),
            entity: Some(run.entity.as_str()).filter(|entity| !entity.is_empty()).and_then(text),
            run_group: text(&run.group),
            run_id: text(&run.id),
            run_name: text(&run.name),
            sweep_id: Some(run.sweep.as_str()).filter(|sweep| !sweep.is_empty()).and_then(text),
            resume: text(resume),
            init_timeout: Some(DoubleValue { value: SERVER.as_secs_f64() - 10.0 }),
            root_dir: path(&run.directory),
            wandb_dir: path(&run.folder()),
            sync_dir: path(folder),
            sync_file: path(&folder.join(format!("run-{}.wandb", run.id))),
            log_dir: path(&folder.join("logs")),
            log_internal: path(&folder.join("logs/debug-internal.log")),
            timespec: text(timespec),
            allow_offline_artifacts: Some(BoolValue { value: true }),
            primary: Some(BoolValue { value: true }),
            update_finish_state: Some(BoolValue { value: true }),
            transaction_log_flush_interval: Some(DoubleValue { value: 5.0 }),
        }
    }

    fn run_record(&self, has: u64) -> RunRecord {
        let run = &self.run;
        let sections = run.config.as_object().into_iter().flatten();
        let update = sections.map(|(key, value)| item(key, value)).collect();
        RunRecord {
            run_id: run.id.clone(),
            entity: run.entity.clone(),
            project: run.project.clone(),
            config: Some(ConfigRecord { update }),
            run_group: run.group.clone(),
            job_type: run.job_type.clone(),
            display_name: run.name.clone(),
            notes: run.notes.clone(),
            tags: run.tags.clone(),
            sweep_id: run.sweep.clone(),
            host: host_name(),
            starting_step: has as i64,
            start_time: Some(now().into()),
            resumed: has > 0,
            resume: has > 0 || run.resume != WandbResume::Never,
            info: Some(self.info()),
        }
    }

    fn info(&self) -> Info {
        Info { stream_id: self.run.id.clone() }
    }

    fn session(&mut self) -> anyhow::Result<&mut Session> {
        self.session.as_mut().context("wandb-core is not running")
    }

    fn publish(&mut self, kind: RecordKind) -> anyhow::Result<()> {
        let record = proto::Record { kind: Some(kind), control: None, info: Some(self.info()) };
        self.session()?.core.publish(RequestKind::Publish(record), LOCAL)
    }

    fn communicate(&mut self, kind: RecordKind, patience: Duration) -> anyhow::Result<Outcome> {
        let info = Some(self.info());
        let core = &mut self.session()?.core;
        let id = core.next_id();
        let control = Control { req_resp: true, mailbox_slot: id.clone() };
        let record = proto::Record { kind: Some(kind), control: Some(control), info };
        match core.communicate(&id, RequestKind::Communicate(record), patience)? {
            Some(ResponseKind::Result(outcome)) => Ok(outcome),
            _ => bail!("wandb-core answers something else than it was asked"),
        }
    }

    fn request(&mut self, kind: RequestType, patience: Duration) -> anyhow::Result<Option<ResponseType>> {
        match self.communicate(request(kind), patience)?.kind {
            Some(OutcomeKind::Response(Response { kind })) => Ok(kind),
            _ => bail!("wandb-core answers something else than it was asked"),
        }
    }

    /// Puts an image among the run's files. Returns what stands for it in the history.
    fn add_image(&mut self, index: u64, name: &str, file: &Path) -> anyhow::Result<Value> {
        let path = self.run.directory.join(file);
        let failed = || format!("cannot read {}", path.display());
        let bytes = fs::read(&path).with_context(failed)?;
        let (width, height) = image::image_dimensions(&path).with_context(failed)?;
        let hash = hex(&Sha256::digest(&bytes));
        let place = format!("media/images/{}_{index}_{}.png", name.replace('/', "_"), &hash[..20]);
        let copy = self.session()?.folder.join("files").join(&place);
        let folder = copy.parent().context("a file without a folder")?;
        fs::create_dir_all(folder)
            .and_then(|()| fs::write(&copy, &bytes))
            .with_context(|| format!("cannot write {}", copy.display()))?;
        let item = FilesItem { path: place.clone(), file_type: FileType::Media as i32 };
        self.publish(RecordKind::Files(FilesRecord { files: vec![item] }))?;
        Ok(json!({
            "_type": "image-file", "path": place, "sha256": hash, "size": bytes.len(),
            "width": width, "height": height, "format": "png",
        }))
    }

    /// Notes the best values that training has come to, and says in the summary which are new.
    fn note_best(&mut self, record: &Record) -> Vec<Item> {
        let mut news = Vec::new();
        let figures = record.figures.iter().filter(|(name, _)| record.step > 0 && has_a_best(name));
        for (name, &value) in figures {
            let best = self.best.get(name).copied();
            if best.is_none_or(|best| if lower_is_better(name) { value < best } else { value > best }) {
                self.best.insert(name.clone(), value);
                news.push(item(&format!("best/{name}"), &json!(value)));
            }
        }
        news
    }

    fn log_artifacts(&mut self) -> anyhow::Result<()> {
        if self.run.checkpoints {
            self.log_checkpoints()?;
        }
        if self.run.export {
            self.log_export()?;
        }
        Ok(())
    }

    fn log_checkpoints(&mut self) -> anyhow::Result<()> {
        let name = format!("checkpoint-{}", self.run.id);
        for (aliases, folder) in artifact::checkpoints(&self.run.directory)? {
            self.log_artifact(&folder, &name, aliases)?;
        }
        Ok(())
    }

    fn log_export(&mut self) -> anyhow::Result<()> {
        let folder = self.run.folder().join("export");
        match artifact::export(&self.run.directory, &folder)? {
            true => {
                self.log_artifact(&folder, &format!("backbone-{}", self.run.id), vec!["latest".to_owned()])
            }
            false => Ok(()),
        }
    }

    fn log_artifact(&mut self, folder: &Path, name: &str, aliases: Vec<String>) -> anyhow::Result<()> {
        let record = ArtifactRecord {
            run_id: self.run.id.clone(),
            project: self.run.project.clone(),
            entity: self.session()?.known.entity.clone(),
            aliases,
            ..artifact::of_folder(folder, name, "model")?
        };
        if !self.run.online {
            return self.publish(RecordKind::Artifact(record));
        }
        let ask = LogArtifactRequest { artifact: Some(record), history_step: 0, staging_dir: String::new() };
        match self.request(RequestType::LogArtifact(ask), UPLOAD)? {
            Some(ResponseType::LogArtifact(done)) if done.error_message.is_empty() => Ok(()),
            Some(ResponseType::LogArtifact(done)) => bail!("{}: {}", folder.display(), done.error_message),
            _ => bail!("wandb-core does not say whether it has {}", folder.display()),
        }
    }
}

impl Tracker for Wandb {
    fn name(&self) -> &'static str {
        "W&B"
    }

    fn open(&mut self) -> anyhow::Result<u64> {
        self.session = None;
        let begun = self.begin();
        if begun.is_err() {
            self.session = None;
        }
        begun
    }

    fn log(&mut self, index: u64, record: &Record) -> anyhow::Result<()> {
        let mut items = vec![item("step", &json!(record.step)), item("epoch", &json!(record.epoch))];
        items.extend(record.time.map(|time| item("_timestamp", &json!(time))));
        items.extend(record.figures.iter().map(|(name, value)| item(name, &json!(value))));
        for (name, file) in &record.images {
            items.push(item(name, &self.add_image(index, name, file)?));
        }
        for (name, histogram) in &record.histograms {
            let value =
                json!({ "_type": "histogram", "bins": histogram.edges(), "values": histogram.counts });
            items.push(item(name, &value));
        }
        self.publish(request(RequestType::PartialHistory(PartialHistoryRequest {
            item: items,
            step: Some(HistoryStep { num: index as i64 }),
            action: Some(HistoryAction { flush: true }),
        })))?;
        let update = self.note_best(record);
        if update.is_empty() {
            return Ok(());
        }
        self.publish(RecordKind::Summary(SummaryRecord { update }))
    }

    /// Sends what is new in the console's log.
    fn rest(&mut self) -> anyhow::Result<()> {
        let Ok(mut file) = File::open(self.run.directory.join(CONSOLE_FILE)) else { return Ok(()) };
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(self.console))?;
        file.read_to_end(&mut bytes)?;
        let Some(end) = bytes.iter().rposition(|&byte| byte == b'\n') else { return Ok(()) };
        let line = String::from_utf8_lossy(&bytes[..=end]).into_owned();
        self.publish(RecordKind::OutputRaw(OutputRawRecord {
            output_type: OutputType::Stderr as i32,
            timestamp: Some(now().into()),
            line,
        }))?;
        self.console += end as u64 + 1;
        Ok(())
    }

    fn place(&self) -> String {
        let WandbRun { entity, project, id, base_url, online, .. } = &self.run;
        match online {
            true => {
                let known = self.session.as_ref().map_or(entity, |session| &session.known.entity);
                format!("the W&B run {known}/{project}/{id} at {base_url}")
            }
            false => self.run.folder().display().to_string(),
        }
    }

    fn advice(&self) -> Option<String> {
        let sessions = || format!("{}/offline-run-*-{}", self.run.folder().display(), self.run.id);
        (!self.run.online).then(|| format!("wandb sync {} uploads the run", sessions()))
    }

    fn close(&mut self, exit_code: i32) -> anyhow::Result<()> {
        let logged = self.log_artifacts();
        // The run has ended as it has, whatever became of its artifacts.
        self.communicate(RecordKind::Exit(RunExitRecord { exit_code }), UPLOAD)?;
        let info = Some(self.info());
        let Session { mut core, .. } = self.session.take().context("wandb-core is not running")?;
        core.publish(RequestKind::InformFinish(Inform { info }), LOCAL)?;
        core.publish(RequestKind::InformTeardown(Teardown { exit_code }), LOCAL)?;
        core.wait(LOCAL);
        logged
    }
}

fn request(kind: RequestType) -> RecordKind {
    RecordKind::Request(Request { kind: Some(kind) })
}

fn item(key: &str, value: &Value) -> Item {
    Item { key: key.to_owned(), nested_key: Vec::new(), value_json: value.to_string() }
}

/// The step is the horizontal axis of everything; the epoch can be chosen.
fn axes() -> [MetricRecord; 3] {
    let options = |step_sync: bool, hidden: bool| Some(MetricOptions { step_sync, hidden, defined: true });
    let axis = |name: &str| MetricRecord {
        name: name.to_owned(),
        options: options(false, false),
        ..Default::default()
    };
    let all = MetricRecord {
        glob_name: "*".to_owned(),
        step_metric: "step".to_owned(),
        options: options(true, false),
        ..MetricRecord::default()
    };
    [axis("step"), axis("epoch"), all]
}

/// Whether there is a best value of `metric`.
fn has_a_best(metric: &str) -> bool {
    let score = metric.starts_with("eval/") && (metric.contains("top1") || metric.contains("top5"));
    score || lower_is_better(metric) || metric == "eval/rankme"
}

/// A folder as W&B names them: `offline-run-20261125_084923-abc123`.
fn new_folder(wandb: &Path, run: &WandbRun) -> anyhow::Result<(PathBuf, String)> {
    let kind = if run.online { "run" } else { "offline-run" };
    fs::create_dir_all(wandb).with_context(|| format!("cannot make {}", wandb.display()))?;
    let mut time = OffsetDateTime::now_utc();
    loop {
        let (date, clock) = (time.date(), time.time());
        let timespec = format!(
            "{:04}{:02}{:02}_{:02}{:02}{:02}",
            date.year(),
            date.month() as u8,
            date.day(),
            clock.hour(),
            clock.minute(),
            clock.second()
        );
        let folder = wandb.join(format!("{kind}-{timespec}-{}", run.id));
        match fs::create_dir(&folder) {
            Ok(()) => return Ok((folder, timespec)),
            // Two sessions in one second.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => time += time::Duration::SECOND,
            Err(error) => return Err(error).with_context(|| format!("cannot make {}", folder.display())),
        }
    }
}

/// How many records the files of earlier offline sessions hold.
fn steps_in_files(run: &WandbRun) -> anyhow::Result<u64> {
    let mut steps = 0;
    for folder in fs::read_dir(run.folder()).into_iter().flatten().flatten() {
        let name = folder.file_name();
        let name = name.to_string_lossy();
        if !(name.starts_with("offline-run-") && name.ends_with(&format!("-{}", run.id))) {
            continue;
        }
        let file = folder.path().join(format!("run-{}.wandb", run.id));
        if fs::metadata(&file).is_ok_and(|file| file.len() > 0) {
            steps = steps.max(steps_in_file(&run.program.file, &file)?);
        }
    }
    Ok(steps)
}

/// As W&B's own reader has it, which takes a file that ends in the middle of a record too.
fn steps_in_file(program: &Path, file: &Path) -> anyhow::Result<u64> {
    let mut command = Command::new(program);
    command.args(["leet", "inspect", "-no-observability", "-json", "-run-file"]).arg(file);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut reader = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
    let mut steps = 0;
    for line in BufReader::new(reader.stdout.take().context("no pipe")?).lines() {
        let line = line.with_context(|| format!("cannot read {}", file.display()))?;
        if line.contains(r#""type":"history""#) {
            let row: Value = serde_json::from_str(&line).context("wandb-core prints what is no JSON")?;
            let last =
                row["history"]["step"]["num"].as_u64().context("a row of the history without a step")?;
            steps = steps.max(last + 1);
        }
    }
    let status = reader.wait().context("wandb-core cannot be waited for")?;
    anyhow::ensure!(status.success(), "wandb-core does not read {}", file.display());
    Ok(steps)
}

fn host_name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()).unwrap_or_default()
}
