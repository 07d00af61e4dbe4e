//! `jepa-host plugin list` and `jepa-host plugin info`.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde_json::{Value, json};

use super::Format;
use super::exit::Usage;
use crate::device::libtorch;
use crate::plugin::{LoadedPlugin, PluginError, Registry, SearchPath, open, plugin_files, read_manifest};

#[derive(Debug, Subcommand)]
pub(super) enum PluginCommand {
    /// List the plugins in the search folders
    List {
        /// How to print
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
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
            PluginCommand::Info { name, format } => info(&name, search, format),
        }
    }
}

/// The plugins in the search folders; files without a manifest are other people's libraries.
pub(super) fn found(search: &SearchPath) -> Vec<Result<LoadedPlugin, PluginError>> {
    let version = libtorch().version;
    let ours = |path: &PathBuf| !matches!(read_manifest(path, &version), Err(PluginError::NoManifest { .. }));
    plugin_files(search.folders()).into_iter().filter(ours).map(|path| open(&path, &version)).collect()
}

fn list(search: &SearchPath, format: Format) -> anyhow::Result<()> {
    let found = found(search);
    if format == Format::Json {
        let plugins: Vec<Value> = found.iter().flatten().map(describe).collect();
        let refused: Vec<String> = found.iter().filter_map(|f| Some(f.as_ref().err()?.to_string())).collect();
        println!("{:#}", json!({ "plugins": plugins, "refused": refused }));
        return Ok(());
    }
    for plugin in found.iter().flatten() {
        let offer = plugin.plugin.offer();
        println!("{} {}  {}", plugin.manifest.name, plugin.manifest.version, plugin.path.display());
        for method in &offer.methods {
            println!("  method    {}", method.name);
        }
        if !offer.backbones.is_empty() {
            let names: Vec<&str> = offer.backbones.iter().map(|b| b.name.as_str()).collect();
            println!("  backbones {}", names.join(", "));
        }
    }
    for error in found.iter().filter_map(|f| f.as_ref().err()) {
        println!("refused   {error}");
    }
    if found.is_empty() {
        let folders: Vec<String> = search.folders().iter().map(|f| f.display().to_string()).collect();
        println!("no plugins in {}; name a folder with --plugin-dir", folders.join(", "));
    }
    Ok(())
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
    match format {
        Format::Json => println!("{:#}", describe(plugin)),
        Format::Text => print_info(plugin),
    }
    Ok(())
}

fn describe(plugin: &LoadedPlugin) -> Value {
    let offer = plugin.plugin.offer();
    json!({
        "file": plugin.path, "sha256": plugin.sha256, "manifest": plugin.manifest,
        "methods": offer.methods, "backbones": offer.backbones,
    })
}

fn print_info(plugin: &LoadedPlugin) {
    let manifest = &plugin.manifest;
    println!("{} {}", manifest.name, manifest.version);
    println!("  file     {}", plugin.path.display());
    println!("  sha256   {}", plugin.sha256);
    println!("  API      {}.{}", manifest.api_major, manifest.api_minor);
    println!("  bridge   {}", manifest.bridge);
    println!("  compiler {}", manifest.rustc);
    let offer = plugin.plugin.offer();
    for method in &offer.methods {
        println!("\nmethod {}", method.name);
        print_options("method", method.options.as_value());
    }
    // Backbones of one type share their options: print these once.
    let mut rest = offer.backbones.as_slice();
    while let Some(first) = rest.first() {
        let same = rest.iter().take_while(|b| b.options == first.options).count();
        let names: Vec<&str> = rest[..same].iter().map(|b| b.name.as_str()).collect();
        println!("\nbackbones {}", names.join(", "));
        print_options("backbone", first.options.as_value());
        rest = &rest[same..];
    }
}

/// Prints the options of a JSON Schema: name, type, default, and the author's words.
fn print_options(section: &str, schema: &Value) {
    if let Some(about) = schema["description"].as_str() {
        println!("  {}", about.replace('\n', "\n  "));
    }
    let Some(options) = schema["properties"].as_object() else { return };
    for (name, option) in options {
        let default = match &option["default"] {
            Value::Null => "not set".to_owned(),
            value => value.to_string(),
        };
        println!("\n  {section}.{name} = {default}{}", choices(schema, option));
        if let Some(about) = option["description"].as_str() {
            println!("      {}", about.replace('\n', "\n      "));
        }
    }
}

/// The values that an option takes, where the schema lists them.
fn choices(schema: &Value, option: &Value) -> String {
    let reference = option["$ref"].as_str().or_else(|| option["allOf"][0]["$ref"].as_str());
    let target = reference.and_then(|r| schema.pointer(r.strip_prefix('#')?)).unwrap_or(option);
    let constants = target["oneOf"].as_array().map(|list| list.iter().map(|v| v["const"].clone()).collect());
    let Some(values): Option<Vec<Value>> = target["enum"].as_array().cloned().or(constants) else {
        return String::new();
    };
    let values: Vec<String> = values.iter().map(Value::to_string).collect();
    format!("   ({})", values.join(" | "))
}
