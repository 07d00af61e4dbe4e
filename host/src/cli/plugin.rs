//! `jepa-host plugin …`: what plugins there are, what they offer, and how a new one begins.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::check::CheckArgs;
use super::exit::Usage;
use super::output::{Format, print, print_text};
use crate::config::schema_options;
use crate::device::libtorch;
use crate::plugin::scaffold::{self, Kind};
use crate::plugin::{LoadedPlugin, PluginError, Registry, SearchPath, open, plugin_files, read_manifest};

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
        /// Name of the crate, of its folder, and of the method or backbone in it
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
    /// Try every promise that the host relies on, on synthetic images; exit 3 when one is broken
    Check(CheckArgs),
    /// Show a plugin's versions, methods, backbones, and their options
    Info {
        /// A path, a file name, a bare name, or the name of a method or backbone
        name: PathBuf,
        /// How to print
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
}

impl PluginCommand {
    pub fn run(self, search: &SearchPath) -> anyhow::Result<()> {
        match self {
            PluginCommand::List { format } => list(search, format),
            PluginCommand::New { name, kind, path, api } => new(&name, kind, path, api),
            PluginCommand::Check(args) => args.run(search),
            PluginCommand::Info { name, format } => info(&name, search, format),
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
}

fn new(name: &str, kind: KindArg, path: Option<PathBuf>, api: Option<PathBuf>) -> anyhow::Result<()> {
    let kind = match kind {
        KindArg::Method => Kind::Method,
        KindArg::Backbone => Kind::Backbone,
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

/// The plugins in the search folders; files without a manifest are other people's libraries.
pub(super) fn found(search: &SearchPath) -> Vec<Result<LoadedPlugin, PluginError>> {
    let version = libtorch().version;
    let ours = |path: &PathBuf| !matches!(read_manifest(path, &version), Err(PluginError::NoManifest { .. }));
    plugin_files(search.folders()).into_iter().filter(ours).map(|path| open(&path, &version)).collect()
}

fn list(search: &SearchPath, format: Format) -> anyhow::Result<()> {
    let found = found(search);
    let plugins: Vec<Value> = found.iter().flatten().map(describe).collect();
    let refused: Vec<String> = found.iter().filter_map(|f| Some(f.as_ref().err()?.to_string())).collect();
    let report = json!({ "plugins": plugins, "refused": refused });
    print(format, &report, |_, out| {
        for plugin in found.iter().flatten() {
            let offer = plugin.plugin.offer();
            writeln!(out, "{} {}  {}", plugin.manifest.name, plugin.manifest.version, plugin.path.display())?;
            for method in &offer.methods {
                writeln!(out, "  method    {}", method.name)?;
            }
            if !offer.backbones.is_empty() {
                let names: Vec<&str> = offer.backbones.iter().map(|b| b.name.as_str()).collect();
                writeln!(out, "  backbones {}", names.join(", "))?;
            }
        }
        for reason in &refused {
            writeln!(out, "refused   {reason}")?;
        }
        if found.is_empty() {
            let folders: Vec<String> = search.folders().iter().map(|f| f.display().to_string()).collect();
            writeln!(out, "no plugins in {}; name a folder with --plugin-dir", folders.join(", "))?;
        }
        Ok(())
    })
}

fn info(name: &Path, search: &SearchPath, format: Format) -> anyhow::Result<()> {
    let mut registry = Registry::new(&libtorch().version);
    let wanted = name.to_string_lossy().into_owned();
    match search.find(name) {
        Ok(path) => {
            registry.load(path)?;
        }
        // Not a file: perhaps a method or a backbone of some plugin.
        Err(not_found) => {
            let offers = |plugin: &LoadedPlugin| {
                let offer = plugin.plugin.offer();
                offer.methods.iter().any(|m| m.name == wanted)
                    || offer.backbones.iter().any(|b| b.name == wanted)
            };
            let owner = found(search).into_iter().flatten().find(offers).ok_or(not_found)?;
            registry.load(owner.path)?;
        }
    }
    let plugin = registry.plugins().first().ok_or_else(|| Usage("no plugin".to_owned()))?;
    print(format, &describe(plugin), |_, out| print_info(plugin, out))
}

fn describe(plugin: &LoadedPlugin) -> Value {
    let offer = plugin.plugin.offer();
    json!({
        "file": plugin.path, "sha256": plugin.sha256, "manifest": plugin.manifest,
        "methods": offer.methods, "backbones": offer.backbones,
    })
}

fn print_info(plugin: &LoadedPlugin, out: &mut dyn Write) -> io::Result<()> {
    let manifest = &plugin.manifest;
    writeln!(out, "{} {}", manifest.name, manifest.version)?;
    writeln!(out, "  file     {}", plugin.path.display())?;
    writeln!(out, "  sha256   {}", plugin.sha256)?;
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
    Ok(())
}

/// Prints what a JSON Schema says: the author's words, then each option.
fn print_schema(section: &str, schema: &Value, out: &mut dyn Write) -> io::Result<()> {
    if let Some(about) = schema["description"].as_str() {
        writeln!(out, "  {}", about.replace('\n', "\n  "))?;
    }
    for option in schema_options(section, schema) {
        let default = match option.default {
            None | Some(Value::Null) => "not set".to_owned(),
            Some(value) => value.to_string(),
        };
        let choices: Vec<String> = option.choices.iter().map(|value| value.to_string()).collect();
        let choices =
            if choices.is_empty() { String::new() } else { format!("   ({})", choices.join(" | ")) };
        writeln!(out, "\n  {} = {default}{choices}", option.key)?;
        if let Some(about) = option.about {
            writeln!(out, "      {}", about.replace('\n', "\n      "))?;
        }
    }
    Ok(())
}
