//! `jepa-host doctor`: what is there, and what is missing.

mod dist;

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use clap::Args;
use jepa_plugin_api::abi::{API_MAJOR, API_MINOR, BRIDGE, Offer};
use jepa_plugin_api::tch;
use serde_json::{Value, json};

use crate::cli::output::{Format, print};
use crate::cli::trackers::beside_bridge;
use crate::config::Device;
use crate::device::{self, DeviceError, check_native, cpu_capability, libtorch};
use crate::plugin::PluginSources;
use crate::track::wandb::core::Program;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  jepa-host doctor
  torchrun --no-python --nproc-per-node 4 jepa-host doctor --dist
  srun --nodes 2 --ntasks-per-node 8 jepa-host doctor --dist")]
pub(super) struct DoctorArgs {
    /// Try the processes that torchrun, srun or RANK and WORLD_SIZE start: whether they find each other, and how fast they
    /// talk
    #[arg(long)]
    dist: bool,
    /// Seconds to wait for a rank
    #[arg(long, value_name = "S", default_value_t = 60, requires = "dist", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl DoctorArgs {
    pub fn run(self, sources: &PluginSources) -> anyhow::Result<()> {
        if self.dist {
            return dist::run(Duration::from_secs(self.timeout), self.format);
        }
        let torch = libtorch();
        let path = |p: &Option<std::path::PathBuf>| p.as_ref().map(|p| p.display().to_string());
        let native = check_native().err().map(|error| error.to_string());
        let cuda = match device::choose(Device::Cuda(None), 0) {
            Ok(_) => format!("{} devices", tch::Cuda::device_count()),
            Err(DeviceError::NoCuda { reason, .. }) => format!("no: {reason}"),
            Err(error) => format!("no: {error}"),
        };
        let mut plugins = Vec::new();
        let found = sources.open_all();
        for found in &found {
            plugins.push(match found {
                Ok(p) => json!({ "name": p.name(), "version": p.file.manifest.version, "file": p.file.path }),
                Err(error) => json!({ "refused": error.to_string() }),
            });
        }
        let offers = |has: fn(&Offer) -> bool| found.iter().flatten().any(|p| has(p.plugin.offer()));
        let verdict = match &native {
            Some(_) => "cannot train: the native library is missing; run `make setup`",
            None if !offers(|offer| !offer.methods.is_empty()) => "cannot train: no plugin offers a method",
            None if !offers(|offer| !offer.backbones.is_empty()) => {
                "cannot train: no plugin offers a backbone"
            }
            None => "ready to train",
        };
        let report = json!({
            "jepa-host": env!("CARGO_PKG_VERSION"),
            "plugin API": format!("{API_MAJOR}.{API_MINOR}"),
            "libtorch": torch.version,
            "libtorch folder": path(&torch.folder),
            "torch bridge": path(&torch.bridge).map(|file| format!("{BRIDGE} at {file}")),
            LACKS: torch.bridge.as_deref().and_then(lacking),
            "native library": native.unwrap_or_else(|| "loaded".to_owned()),
            "CPU kernels": cpu_capability().unwrap_or_else(|error| error.to_string()),
            "threads": tch::get_num_threads(),
            "CUDA": cuda,
            "HDF5": crate::data::hdf5_version(),
            "wandb-core": wandb_core(),
            "plugins": plugins,
            "verdict": verdict,
        });
        print(self.format, &report, print_report)
    }
}

/// The key of what the torch bridge lacks.
const LACKS: &str = "bridge lacks";

fn print_report(report: &Value, out: &mut dyn Write) -> io::Result<()> {
    for (name, value) in report.as_object().into_iter().flatten() {
        match value {
            lacks if name == LACKS => writeln!(out, "{name:<16}{}", told_lacking(lacks))?,
            Value::String(text) => writeln!(out, "{name:<16}{text}")?,
            Value::Array(plugins) => {
                let none = "none: run `make build`, or name a folder with --plugin-dir";
                writeln!(
                    out,
                    "{}",
                    if plugins.is_empty() { format!("{name:<16}{none}") } else { name.clone() }
                )?;
                for plugin in plugins {
                    let text = |key: &str| plugin[key].as_str().unwrap_or_default();
                    match plugin["refused"].as_str() {
                        Some(reason) => writeln!(out, "  refused: {reason}")?,
                        None => writeln!(out, "  {} {}  {}", text("name"), text("version"), text("file"))?,
                    }
                }
            }
            Value::Null => writeln!(out, "{name:<16}missing")?,
            other => writeln!(out, "{name:<16}{other}")?,
        }
    }
    Ok(())
}

/// The functions of tch that the libtorch behind `bridge` has no more, where its build has written that down.
fn lacking(bridge: &Path) -> Option<Vec<String>> {
    let names = fs::read_to_string(bridge.with_extension("lacks")).ok()?;
    Some(names.lines().map(str::to_owned).collect())
}

fn told_lacking(names: &Value) -> String {
    let names: Option<Vec<&str>> =
        names.as_array().map(|names| names.iter().filter_map(Value::as_str).collect());
    match names.as_deref() {
        None => "unknown".to_owned(),
        Some([]) => "nothing".to_owned(),
        Some(some) => {
            format!("{} functions of libtorch, which are errors when called: {}", some.len(), some.join(", "))
        }
    }
}

/// W&B's engine: where it is and of which version, or how to get it.
fn wandb_core() -> String {
    match Program::find(beside_bridge().as_deref()) {
        Ok(program) => {
            let version = program.version.as_deref().unwrap_or("of unknown version");
            let remark = if program.is_tested() { "" } else { ", which was not tried" };
            format!("{version}{remark} at {}", program.file.display())
        }
        Err(error) => format!("no: {error:#}; training does without"),
    }
}
