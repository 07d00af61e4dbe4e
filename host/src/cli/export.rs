//! `jepa-host export`: the learned backbone as a safetensors file.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde_json::json;

use super::exit::Usage;
use super::output::{Format, check_out, print};
use crate::checkpoint::{encoder_of, find_checkpoint, load_model, write_tensors};
use crate::files::{put_in_place, temporary_beside};

/// Write the learned backbone as safetensors, with timm's names: no plugin is needed
#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// A run directory (the newest checkpoint is taken), or a checkpoint
    #[arg(value_name = "RUN|CHECKPOINT")]
    run: PathBuf,
    /// The file to write, such as resnet50.safetensors
    out: PathBuf,
    /// Replace the file when it is there
    #[arg(long)]
    force: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl ExportArgs {
    pub fn run(self) -> anyhow::Result<()> {
        check_out(&self.out, self.force)?;
        let checkpoint = find_checkpoint(&self.run)?;
        let (state, model) = load_model(&checkpoint)?;
        let tensors = encoder_of(model, &state.encoder);
        if tensors.is_empty() {
            return Err(Usage(format!("the method {} has no backbone to export", state.method)).into());
        }
        let temporary = temporary_beside(&self.out);
        write_tensors(&temporary, &tensors)?;
        put_in_place(&temporary, &self.out)
            .with_context(|| format!("cannot write {}", self.out.display()))?;
        let python = in_timm(&state.backbone, &self.out);
        let report = json!({
            "file": self.out, "backbone": state.backbone, "checkpoint": checkpoint, "tensors": tensors.len(),
            "python": python,
        });
        print(self.format, &report, |_, out| {
            writeln!(out, "{}: {} of {}", self.out.display(), state.backbone, checkpoint.display())?;
            writeln!(out, "{} tensors, from the method's `{}`", tensors.len(), state.encoder)?;
            match &python {
                Some(lines) => writeln!(
                    out,
                    "\nIn Python, where no backbone option changes the architecture:\n\n{lines}"
                ),
                None => Ok(()),
            }
        })
    }
}

/// How timm loads `file`, where it knows `backbone`.
fn in_timm(backbone: &str, file: &Path) -> Option<String> {
    let convnext = backbone.starts_with("convnext_");
    if !convnext && !backbone.contains("resnet") {
        return None;
    }
    let mut lines = format!("model = timm.create_model(\"{backbone}\", num_classes=0)\n");
    if convnext {
        lines += "model.head.norm = torch.nn.Identity()  # belongs to timm's classifier\n";
    }
    lines +=
        &format!("model.load_state_dict(safetensors.torch.load_file(\"{}\"), strict=True)", file.display());
    Some(lines)
}
