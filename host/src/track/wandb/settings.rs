//! Which W&B run a run's records go to: from `track.wandb.…`, from W&B's own environment variables, and from what an
//! earlier session of the run has left.

use std::fs;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use serde_json::Value;

use super::auth::ApiKey;
use super::core::Program;
use crate::config::{Wandb as Options, WandbMode, WandbResume};

/// W&B's server, unless `WANDB_BASE_URL` names another.
const SERVER: &str = "https://api.wandb.ai";
/// The project of a run that names none.
const PROJECT: &str = "jepa-host";
/// The file in a run's folder `wandb` that keeps its id.
const ID_FILE: &str = "id";

/// A W&B run.
pub struct WandbRun {
    /// wandb-core.
    pub program: Program,
    /// Whether records go to the server, or to files that `wandb sync` brings there.
    pub online: bool,
    /// The server.
    pub base_url: String,
    /// What it is asked with; none offline.
    pub api_key: Option<ApiKey>,
    /// Identifies the run within its project, for ever.
    pub id: String,
    /// The project.
    pub project: String,
    /// A user or a team; empty: the key's own.
    pub entity: String,
    /// Runs that belong together.
    pub group: String,
    /// Kind of run within a group.
    pub job_type: String,
    /// Name for people.
    pub name: String,
    /// Text for people.
    pub notes: String,
    /// Words to find it by.
    pub tags: Vec<String>,
    /// The sweep that it belongs to.
    pub sweep: String,
    /// What to do about a run of this id that is there.
    pub resume: WandbResume,
    /// Whether checkpoints are logged as artifacts.
    pub checkpoints: bool,
    /// Whether the backbone is logged as an artifact.
    pub export: bool,
    /// The run's directory, absolute.
    pub directory: PathBuf,
    /// The resolved configuration.
    pub config: Value,
    /// Whether the run trains now, in this process.
    pub live: bool,
}

/// Where records go by `options` and the environment; an agent of a sweep expects them online.
pub fn mode(options: &Options, env: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<WandbMode> {
    if let Some(mode) = options.mode {
        return Ok(mode);
    }
    match env("WANDB_MODE").as_deref() {
        None if env("WANDB_SWEEP_ID").is_some() => Ok(WandbMode::Online),
        None | Some("disabled" | "dryrun") => Ok(WandbMode::Disabled),
        Some("offline") => Ok(WandbMode::Offline),
        Some("online" | "run") => Ok(WandbMode::Online),
        Some(other) => anyhow::bail!("WANDB_MODE is {other}: it may be online, offline or disabled"),
    }
}

impl WandbRun {
    /// The W&B run for the run in `directory`, called `name` unless somebody named it.
    ///
    /// # Errors
    /// When wandb-core is not there, when there is no API key to go online with, or when the folder cannot be written.
    pub fn resolve(
        options: &Options,
        env: &dyn Fn(&str) -> Option<String>,
        mode: WandbMode,
        program: Program,
        directory: &Path,
        name: &str,
        config: Value,
    ) -> anyhow::Result<Self> {
        let directory = fs::canonicalize(directory).with_context(|| directory.display().to_string())?;
        let online = mode == WandbMode::Online;
        let base_url = env("WANDB_BASE_URL").unwrap_or_else(|| SERVER.to_owned());
        let api_key = online.then(|| ApiKey::find(&base_url)).flatten();
        anyhow::ensure!(
            !online || api_key.is_some(),
            "there is no API key for {base_url}: set WANDB_API_KEY, or run `wandb login`, or use \
             track.wandb.mode=offline"
        );
        let text = |option: &Option<String>, variable: &str| {
            option.clone().or_else(|| env(variable)).unwrap_or_default()
        };
        let project = text(&options.project, "WANDB_PROJECT");
        let display_name = text(&options.name, "WANDB_NAME");
        let tags = match env("WANDB_TAGS") {
            Some(tags) if options.tags.is_empty() => {
                tags.split(',').map(|tag| tag.trim().to_owned()).collect()
            }
            _ => options.tags.clone(),
        };
        let resume = match (options.resume, env("WANDB_RESUME").as_deref()) {
            (Some(resume), _) => resume,
            (None, Some("must")) => WandbResume::Must,
            (None, Some("never")) => WandbResume::Never,
            _ => WandbResume::Allow,
        };
        Ok(WandbRun {
            program,
            online,
            base_url,
            api_key,
            id: id(options.id.clone().or_else(|| env("WANDB_RUN_ID")), &directory)?,
            project: if project.is_empty() { PROJECT.to_owned() } else { project },
            entity: text(&options.entity, "WANDB_ENTITY"),
            group: text(&options.group, "WANDB_RUN_GROUP"),
            job_type: text(&options.job_type, "WANDB_JOB_TYPE"),
            name: if display_name.is_empty() { name.to_owned() } else { display_name },
            notes: text(&options.notes, "WANDB_NOTES"),
            tags,
            sweep: env("WANDB_SWEEP_ID").unwrap_or_default(),
            resume,
            checkpoints: options.checkpoints,
            export: options.export,
            directory,
            config,
            live: true,
        })
    }

    /// The folder of W&B's files.
    pub fn folder(&self) -> PathBuf {
        self.directory.join("wandb")
    }
}

/// The id that an earlier session has used; else the one that is wanted; else a new one. It is kept for later ones.
fn id(wanted: Option<String>, directory: &Path) -> anyhow::Result<String> {
    let folder = directory.join("wandb");
    let file = folder.join(ID_FILE);
    if let Ok(kept) = fs::read_to_string(&file) {
        let kept = kept.trim().to_owned();
        if let Some(wanted) = wanted.filter(|wanted| *wanted != kept) {
            tracing::warn!("this run is the W&B run {kept}, and not {wanted}: it goes on as {kept}");
        }
        return Ok(kept);
    }
    let id = wanted.unwrap_or_else(|| random_text(8));
    fs::create_dir_all(&folder)
        .and_then(|()| fs::write(&file, format!("{id}\n")))
        .with_context(|| format!("cannot write {}", file.display()))?;
    Ok(id)
}

/// Lowercase letters and digits that nobody else draws.
pub fn random_text(length: usize) -> String {
    const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    // The standard library keys its hashes by the system's random numbers.
    let random = RandomState::new();
    let draw = |at: usize| {
        let mut hasher = random.build_hasher();
        hasher.write_usize(at);
        ALPHABET[(hasher.finish() % 36) as usize] as char
    };
    (0..length).map(draw).collect()
}

/// Seconds since 1970.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
