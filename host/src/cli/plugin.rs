//! `jepa-host plugin …`: what plugins there are, what they offer, and how a new one begins.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::check::CheckArgs;
use super::exit::Usage;
use super::output::{Format, print, print_text};
use super::settings::print_option;
use crate::checkpoint::replace_file;
use crate::config::schema_options;
use crate::plugin::scaffold;
use crate::plugin::{
    Kind, LoadedPlugin, LockedPlugins, PluginError, PluginFile, PluginSources, Registry, plugin_files,
};

#[derive(Debug, Subcommand)]
pub(super) enum PluginCommand {
    /// List the plugins in the search folders
    List {
        /// How to print
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Write the crate of a new plugin, which builds, trains and has a test
    New {
        /// Name of the crate, of its folder, and of what is in it
        name: String,
        /// What the plugin offers
        #[arg(long, value_enum, default_value_t)]
        kind: KindArg,
        /// The folder to make, by default NAME
        #[arg(long, value_name = "DIR")]
        path: Option<PathBuf>,
        /// Source of jepa-plugin-api, by default that of the checkout in which this jepa-host was built
        #[arg(long, value_name = "DIR")]
        api: Option<PathBuf>,
    },
    /// Write down which plugin files a run may load, for --plugin-lock
    Lock {
        /// Paths, file names or bare names; by default all plugins in the search folders
        #[arg(value_name = "PLUGIN")]
        plugins: Vec<PathBuf>,
        /// The file to write; one that is there is replaced
        #[arg(long, value_name = "FILE", default_value = "plugins.lock")]
        out: PathBuf,
    },
    /// Try every promise that the host relies on, on synthetic images; exit 3 when one is broken
    Check(CheckArgs),
    /// Show a plugin's versions, what it offers, and the options of that
    Info {
        /// A path, a file name, a bare name, or the name of a method, a backbone or a probe
        name: PathBuf,
        /// How to print
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
}

impl PluginCommand {
    pub fn run(self, sources: &PluginSources) -> anyhow::Result<()> {
        match self {
            PluginCommand::List { format } => list(sources, format),
            PluginCommand::New { name, kind, path, api } => new(&name, kind, path, api),
            PluginCommand::Lock { plugins, out } => lock(&plugins, &out, sources),
            PluginCommand::Check(args) => args.run(sources),
            PluginCommand::Info { name, format } => info(&name, sources, format),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(super) enum KindArg {
    /// A pretraining method
    #[default]
    Method,
    /// A convolutional network
    Backbone,
    /// An evaluation of frozen features
    Probe,
}

fn new(name: &str, kind: KindArg, path: Option<PathBuf>, api: Option<PathBuf>) -> anyhow::Result<()> {
    let kind = match kind {
        KindArg::Method => Kind::Method,
        KindArg::Backbone => Kind::Backbone,
        KindArg::Probe => Kind::Probe,
    };
    let path = path.unwrap_or_else(|| name.into());
    let library = scaffold::create(name, kind, &path, api.as_deref())?;
    let plugins = if kind == Kind::Method { "" } else { "--plugin simclr " };
    print_text(|out| {
        writeln!(out, "{} is ready. Next:\n", path.display())?;
        writeln!(out, "  cd {}", path.display())?;
        writeln!(out, "  cargo build --release")?;
        writeln!(out, "  jepa-host {plugins}--plugin target/release/{library} --config train.toml")?;
        writeln!(out, "  cargo test")
    })
}

fn list(sources: &PluginSources, format: Format) -> anyhow::Result<()> {
    let found = sources.open_all();
    let plugins: Vec<Value> = found.iter().flatten().map(describe).collect();
    let refused: Vec<String> = found.iter().filter_map(|f| Some(f.as_ref().err()?.to_string())).collect();
    let report = json!({ "plugins": plugins, "refused": refused });
    print(format, &report, |_, out| {
        for plugin in found.iter().flatten() {
            let offer = plugin.plugin.offer();
            writeln!(
                out,
                "{} {}  {}",
                plugin.name(),
                plugin.file.manifest.version,
                plugin.file.path.display()
            )?;
            for method in &offer.methods {
                writeln!(out, "  method    {}", method.name)?;
            }
            if !offer.backbones.is_empty() {
                let names: Vec<&str> = offer.backbones.iter().map(|b| b.name.as_str()).collect();
                writeln!(out, "  backbones {}", names.join(", "))?;
            }
            for probe in &offer.probes {
                writeln!(out, "  probe     {}", probe.name)?;
            }
        }
        for reason in &refused {
            writeln!(out, "refused   {reason}")?;
        }
        if found.is_empty() {
            let folders: Vec<String> = sources.folders().iter().map(|f| f.display().to_string()).collect();
            writeln!(out, "no plugins in {}; name a folder with --plugin-dir", folders.join(", "))?;
        }
        Ok(())
    })
}

/// Nothing of a plugin runs here. Files that may not be loaded are not locked either.
fn lock(plugins: &[PathBuf], out: &Path, sources: &PluginSources) -> anyhow::Result<()> {
    let admission = sources.admission();
    let (mut files, mut refused) = (Vec::new(), Vec::new());
    if plugins.is_empty() {
        for path in plugin_files(sources.folders()) {
            match PluginFile::read(&path, admission) {
                Ok(file) => files.push(file),
                Err(error) if error.is_no_plugin() => {}
                Err(error) => refused.push(error),
            }
        }
    }
    for name in plugins {
        files.push(PluginFile::read(&sources.find(name)?, admission)?);
    }
    let locked = LockedPlugins::of(&files)?;
    replace_file(out, locked.to_text().as_bytes())
        .with_context(|| format!("cannot write {}", out.display()))?;
    print_text(|text| {
        for plugin in &locked.plugins {
            writeln!(text, "{} {}  {}", plugin.name, plugin.version, plugin.sha256)?;
        }
        for error in &refused {
            writeln!(text, "refused, and not listed: {error}")?;
        }
        writeln!(
            text,
            "\n{} lists {} plugins: use it with --plugin-lock",
            out.display(),
            locked.plugins.len()
        )
    })
}

fn info(name: &Path, sources: &PluginSources, format: Format) -> anyhow::Result<()> {
    let mut registry = Registry::new(sources.admission());
    let wanted = name.to_string_lossy().into_owned();
    match sources.find(name) {
        Ok(path) => {
            registry.load(path)?;
        }
        // Not a file: perhaps something that a plugin offers.
        Err(mut not_found) => {
            let offers = |plugin: &LoadedPlugin| {
                let offer = plugin.plugin.offer();
                Kind::ALL.iter().any(|kind| kind.of(offer).iter().any(|(name, _)| *name == wanted))
            };
            let (mut owner, mut refusals) = (None, Vec::new());
            for found in sources.open_all() {
                match found {
                    Ok(plugin) if owner.is_none() && offers(&plugin) => owner = Some(plugin),
                    Ok(_) => {}
                    Err(error) if error.is_no_plugin() => {}
                    Err(error) => refusals.push(error),
                }
            }
            let Some(owner) = owner else {
                if let PluginError::NotFound { refused, .. } = &mut not_found {
                    *refused = PluginError::tail(&refusals);
                }
                return Err(not_found.into());
            };
            registry.load(owner.file.path)?;
        }
    }
    let plugin = registry.plugins().first().ok_or_else(|| Usage("no plugin".to_owned()))?;
    print(format, &describe(plugin), |_, out| print_info(plugin, out))
}

fn describe(plugin: &LoadedPlugin) -> Value {
    let offer = plugin.plugin.offer();
    json!({
        "file": plugin.file.path, "sha256": plugin.file.sha256, "manifest": plugin.file.manifest,
        "methods": offer.methods, "backbones": offer.backbones, "probes": offer.probes,
    })
}

fn print_info(plugin: &LoadedPlugin, out: &mut dyn Write) -> io::Result<()> {
    let manifest = &plugin.file.manifest;
    writeln!(out, "{} {}", manifest.name, manifest.version)?;
    writeln!(out, "  file     {}", plugin.file.path.display())?;
    writeln!(out, "  sha256   {}", plugin.file.sha256)?;
    writeln!(out, "  API      {}.{}", manifest.api_major, manifest.api_minor)?;
    writeln!(out, "  bridge   {}", manifest.bridge)?;
    writeln!(out, "  compiler {}", manifest.rustc)?;
    let offer = plugin.plugin.offer();
    for method in &offer.methods {
        writeln!(out, "\nmethod {}", method.name)?;
        print_schema("method", method.options.as_value(), out)?;
    }
    // Backbones of one type share their options: print these once.
    for same in offer.backbones.chunk_by(|a, b| a.options == b.options) {
        let names: Vec<&str> = same.iter().map(|b| b.name.as_str()).collect();
        writeln!(out, "\nbackbones {}", names.join(", "))?;
        print_schema("backbone", same[0].options.as_value(), out)?;
    }
    for probe in &offer.probes {
        writeln!(out, "\nprobe {}", probe.name)?;
        print_schema(&format!("eval.probes.{}", probe.name), probe.options.as_value(), out)?;
    }
    Ok(())
}

/// Prints what a JSON Schema says: the author's words, then each option.
fn print_schema(section: &str, schema: &Value, out: &mut dyn Write) -> io::Result<()> {
    if let Some(about) = schema["description"].as_str() {
        writeln!(out, "  {}", about.replace('\n', "\n  "))?;
    }
    for option in schema_options(section, schema) {
        print_option(&option, out)?;
    }
    Ok(())
}
