//! Folders as W&B artifacts.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use md5::{Digest as _, Md5};

use super::proto::{ArtifactManifest, ArtifactManifestEntry, ArtifactRecord, StoragePolicyConfigItem};
use super::settings::random_text;
use crate::checkpoint::{self, encoder_of, load_model, load_state, write_tensors};

/// The checkpoints that are worth an upload, with their aliases: the newest one, and the best one.
///
/// # Errors
/// When the run's checkpoints cannot be read.
pub fn checkpoints(run: &Path) -> anyhow::Result<Vec<(Vec<String>, PathBuf)>> {
    let Some(newest) = checkpoint::latest(run)? else { return Ok(Vec::new()) };
    let best = load_state(&newest)?.best.map(|best| best.step);
    let mut found = Vec::new();
    for folder in checkpoint::list(run)? {
        let is_best = best.is_some_and(|step| load_state(&folder).is_ok_and(|state| state.step == step));
        let aliases = [("best", is_best), ("latest", folder == newest)];
        let aliases: Vec<String> =
            aliases.into_iter().filter(|(_, applies)| *applies).map(|(name, _)| name.to_owned()).collect();
        if !aliases.is_empty() {
            found.push((aliases, folder));
        }
    }
    Ok(found)
}

/// Writes the newest checkpoint's backbone into `folder`, as `jepa-host export` does. Returns whether there is one.
///
/// # Errors
/// When the checkpoint cannot be read, or the file cannot be written.
pub fn export(run: &Path, folder: &Path) -> anyhow::Result<bool> {
    let Some(newest) = checkpoint::latest(run)? else { return Ok(false) };
    let (state, model) = load_model(&newest)?;
    let tensors = encoder_of(model, &state.encoder);
    if tensors.is_empty() {
        return Ok(false);
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    write_tensors(&folder.join(format!("{}.safetensors", state.backbone)), &tensors)?;
    Ok(true)
}

/// The files of `folder`, not of folders in it, as a version of the artifact `name`.
///
/// # Errors
/// When they cannot be read.
pub fn of_folder(folder: &Path, name: &str, kind: &str) -> anyhow::Result<ArtifactRecord> {
    let failed = || format!("cannot read {}", folder.display());
    let mut contents = Vec::new();
    for entry in fs::read_dir(folder).with_context(failed)? {
        let path = entry.with_context(failed)?.path();
        if path.is_file() {
            let (digest, size) = md5_of(&path).with_context(|| format!("cannot read {}", path.display()))?;
            contents.push(ArtifactManifestEntry {
                path: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                digest: BASE64_STANDARD.encode(digest),
                size: size as i64,
                local_path: path.display().to_string(),
                skip_cache: true,
            });
        }
    }
    contents.sort_by(|a, b| a.path.cmp(&b.path));
    let mut digest = Md5::new();
    digest.update("wandb-artifact-manifest-v1\n");
    for entry in &contents {
        digest.update(format!("{}:{}\n", entry.path, entry.digest));
    }
    let layout = StoragePolicyConfigItem { key: "storageLayout".to_owned(), value_json: "\"V2\"".to_owned() };
    Ok(ArtifactRecord {
        name: name.to_owned(),
        artifact_type: kind.to_owned(),
        digest: super::hex(&digest.finalize()),
        digest_algorithm: "MANIFEST_MD5".to_owned(),
        manifest: Some(ArtifactManifest {
            version: 1,
            storage_policy: "wandb-storage-policy-v1".to_owned(),
            storage_policy_config: vec![layout],
            contents,
        }),
        finalize: true,
        user_created: true,
        client_id: random_text(128),
        sequence_client_id: random_text(128),
        ..ArtifactRecord::default()
    })
}

fn md5_of(path: &Path) -> io::Result<([u8; 16], u64)> {
    struct Hasher(Md5);
    impl Write for Hasher {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.update(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut hasher = Hasher(Md5::new());
    let size = io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok((hasher.0.finalize().into(), size))
}
