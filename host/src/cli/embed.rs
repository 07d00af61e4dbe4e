//! `jepa-host embed`: the features of a data set as an HDF5 file.

use std::path::PathBuf;

use clap::Args;
use jepa_plugin_api::tch::Device;
use serde_json::json;

use super::exit::Usage;
use super::output::{Format, check_out, print};
use super::session::SavedArgs;
use crate::data::FeatureFile;
use crate::eval::{Features, evaluation_view, feature_loader};
use crate::plugin::PluginSources;

/// Write the features of a data set as HDF5: `features` f32 (N, D), `labels` i64 (N), `indices` i64 (N)
#[derive(Debug, Args)]
pub(super) struct EmbedArgs {
    /// The file to write
    #[arg(long, short, value_name = "FILE")]
    out: PathBuf,
    /// The images; by default data.val of the run
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Replace the file when it is there
    #[arg(long)]
    force: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    #[command(flatten)]
    saved: SavedArgs,
}

impl EmbedArgs {
    pub fn run(self, sources: &PluginSources) -> anyhow::Result<()> {
        check_out(&self.out, self.force)?;
        let mut saved = self.saved.open(sources)?;
        let config = saved.session.config();
        let (key, data) = match (&self.data, &config.data.val) {
            (Some(data), _) => ("--data", data),
            (None, Some(data)) => ("data.val", data),
            (None, None) => {
                return Err(Usage("the run has no data.val: name the images with --data".to_owned()).into());
            }
        };
        let set = saved.session.open_images(key, data)?;
        let view = evaluation_view(config, saved.model.method.views());
        let loader = feature_loader(config, view, &set, false)?;
        let mut file: Option<FeatureFile> = None;
        for batch in loader.batches(0, 0) {
            let batch = batch?.finish(Device::Cpu)?;
            let x = saved.model.encode(&batch.views[0], saved.device)?.to_device(Device::Cpu);
            let features = Features::new(&x, &batch.labels)?;
            let file = match &mut file {
                Some(file) => file,
                None => {
                    let columns = features.dimensions() as usize;
                    file.insert(FeatureFile::create(&self.out, set.len(), columns, self.force)?)
                }
            };
            let values = Vec::<f32>::try_from(features.x.contiguous().view(-1))?;
            file.append(&values, &Vec::<i64>::try_from(&features.y)?, &batch.indices)?;
        }
        let Some(file) = file else {
            return Err(Usage(format!("{} has no images", data.display())).into());
        };
        let columns = file.finish()?;
        let report = json!({ "file": self.out, "images": set.len(), "dimensions": columns });
        print(self.format, &report, |_, out| {
            writeln!(out, "{}: features ({}, {columns})", self.out.display(), set.len())
        })
    }
}
