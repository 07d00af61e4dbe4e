//! A picture of everything that crosses, kept for each minor version in `layout-<version>.txt`, so that no change of it
//! goes unnoticed.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

use abi_stable::StableAbi as _;
use abi_stable::type_layout::{TLData, TLField, TypeLayout};
use serde_json::{Value, json};
use tracing::Level;

use super::log::number;
use super::module::*;
use super::{API_MAJOR, API_MINOR, FailureKind};
use crate::params::Kind;
use crate::{
    Augmentation, BackboneInfo, EmaPair, EmaSchedule, Interpolation, NormKind, Transform, ViewSpec, testing,
};

const WHAT_TO_DO: &str = "\
What crosses between host and plugins has changed: plugins that people have compiled rely on it.
- By accident? Undo it.
- Only grown, at the end of a prefix type or by JSON keys with defaults? Then it is a new minor version: keep the crate
  of the present one (`cargo package`) in tests/compat, with a plugin and a host, raise the minor version in
  plugin-api/Cargo.toml, add a line to the history in abi/mod.rs, and run this test with JEPA_UPDATE_LAYOUT=1.
- Anything else is a new major version, and every plugin has to be compiled anew.
A version that was never released may still change: delete its picture and run with JEPA_UPDATE_LAYOUT=1.";

#[test]
fn what_crosses_is_what_this_version_promises() {
    let (path, picture) = (kept(API_MINOR), format!("{}\n{}", types(), texts()));
    if env::var_os("JEPA_UPDATE_LAYOUT").is_some() && !path.exists() {
        fs::write(&path, &picture).unwrap();
    }
    let promised = fs::read_to_string(&path).unwrap_or_default();
    if promised == picture {
        return;
    }
    let line = |text: &str, i: usize| text.lines().nth(i).unwrap_or("(nothing)").to_owned();
    let first = (0..).find(|i| line(&promised, *i) != line(&picture, *i)).unwrap();
    panic!(
        "{WHAT_TO_DO}\n\n{}, line {}:\n  promised {}\n  found    {}",
        path.display(),
        first + 1,
        line(&promised, first),
        line(&picture, first)
    );
}

#[test]
fn every_minor_only_appends_to_the_ones_before() {
    let picture = format!("{}\n{}", types(), texts());
    for minor in 0..API_MINOR {
        let promised = fs::read_to_string(kept(minor)).expect("the picture of every minor is kept");
        if let Err(lost) = contains(&picture, &promised) {
            panic!("{WHAT_TO_DO}\n\nplugin API {API_MAJOR}.{minor} promised, and this one has not:\n{lost}");
        }
    }
    assert!(contains(&picture, &picture.replace("max_level: u32", "max_level: u64")).is_err());
    assert!(contains(&picture, &picture.replace("\"batch\"", "\"group\"")).is_err());
    assert!(contains(&picture, &picture.replace("Panic 1", "Panic 3")).is_err());
}

fn kept(minor: u16) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/abi/layout-{API_MAJOR}.{minor}.txt"))
}

/// Whether `picture` has all that `promised` has. A block is a type or a text: its first line and the lines below it.
/// Types that may grow are of one size, whatever follows their prefix; all others change their first line.
fn contains(picture: &str, promised: &str) -> Result<(), String> {
    let blocks = |text: &str| -> Vec<(String, String)> {
        let starts = |line: &str| !line.starts_with([' ', '}']);
        let mut blocks: Vec<(String, String)> = Vec::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            match blocks.last_mut() {
                Some((_, body)) if !starts(line) => body.push_str(&format!("{line}\n")),
                _ => blocks.push((line.to_owned(), String::new())),
            }
        }
        blocks
    };
    let there = blocks(picture);
    for (head, body) in blocks(promised) {
        let grown =
            |(h, b): &&(String, String)| *h == head && (b.starts_with(&body) || json_contains(b, &body));
        if !there.iter().any(|block| grown(&block)) {
            return Err(format!("{head}\n{body}"));
        }
    }
    Ok(())
}

/// Whether the body of a text has every key, and every element of a list, that another has.
fn json_contains(body: &str, promised: &str) -> bool {
    fn within(new: &Value, old: &Value) -> bool {
        match (new, old) {
            (Value::Object(new), Value::Object(old)) => {
                old.iter().all(|(key, old)| new.get(key).is_some_and(|new| within(new, old)))
            }
            (Value::Array(new), Value::Array(old)) => {
                old.iter().all(|old| new.iter().any(|new| within(new, old)))
            }
            (new, old) => new == old,
        }
    }
    let value = |body: &str| serde_json::from_str::<Value>(&format!("{{\n{body}")).ok();
    matches!((value(body), value(promised)), (Some(new), Some(old)) if within(&new, &old))
}

/// Every type that the table of functions leads to, with its fields; foreign ones by their size.
fn types() -> String {
    let (mut seen, mut text) = (HashSet::new(), String::new());
    let mut waiting = vec![PluginModuleRef::LAYOUT];
    while let Some(layout) = waiting.pop() {
        if !seen.insert(layout.get_utypeid()) {
            continue;
        }
        let mut inner = Vec::new();
        let _ =
            writeln!(text, "{}: {} bytes, aligned to {}", name(layout), layout.size(), layout.alignment());
        for field in fields_of(layout).into_iter().chain(layout.phantom_fields().to_vec()) {
            inner.push(field.layout());
            let functions: Vec<_> = field.function_range().iter().collect();
            if functions.is_empty() && layout.package() == "jepa-plugin-api" {
                let _ = writeln!(text, "    {}: {}", field.name(), name(field.layout()));
            }
            for function in functions {
                let takes: Vec<_> = function.param_type_layouts.iter().map(|layout| layout()).collect();
                let gives = function.return_type_layout().map(|layout| layout());
                let names: Vec<String> = takes.iter().map(|layout| name(layout)).collect();
                let result = gives.map_or("()".to_owned(), name);
                let _ = writeln!(text, "    {}: fn({}) -> {result}", field.name(), names.join(", "));
                inner.extend(takes.into_iter().chain(gives));
            }
        }
        waiting.extend(inner.into_iter().rev());
    }
    text
}

/// A type's name with what it holds, which abi_stable leaves out of the names of its own enums and lists.
fn name(layout: &'static TypeLayout) -> String {
    let name = layout.full_type().to_string();
    let held: Vec<TLField> = match layout.data() {
        TLData::Enum(variants) => variants.fields.to_vec(),
        _ if name == "RVec" => {
            fields_of(layout).into_iter().filter(|field| field.name() == "_marker").collect()
        }
        _ => Vec::new(),
    };
    if held.is_empty() || name.contains('<') {
        return name.trim().to_owned();
    }
    let held: Vec<String> = held.iter().map(|field| self::name(field.layout())).collect();
    format!("{name}<{}>", held.join(", "))
}

fn fields_of(layout: &'static TypeLayout) -> Vec<TLField> {
    match layout.data() {
        TLData::Struct { fields } | TLData::Union { fields } => fields.to_vec(),
        TLData::PrefixType(prefix) => prefix.fields.to_vec(),
        TLData::Enum(variants) => variants.fields.to_vec(),
        TLData::Primitive(_) | TLData::Opaque => Vec::new(),
    }
}

/// The texts and numbers that cross: an example of each struct, and every variant of each enum.
fn texts() -> String {
    let crops = [Interpolation::Bilinear, Interpolation::Bicubic]
        .map(|interpolation| Transform::ResizeCenterCrop { crop_ratio: 0.875, interpolation });
    let view = Augmentation::SIMCLR.view("first").solarize(0.2);
    let view = crops.into_iter().fold(view, ViewSpec::then);
    let tensor = TensorName { name: "head.weight".into(), kind: Kind::Parameter };
    let buffer = TensorName { name: "head.mean".into(), kind: Kind::Buffer };
    let ema = EmaPair { online: "a".into(), target: "b".into(), schedule: EmaSchedule::default() };
    let info = |norm| BackboneInfo { channels: 8, downsample: 4, norm, sparse: true };
    let backbone = |norm| json!(BackboneDeclaration { info: info(norm), tensors: vec![tensor.clone()] });
    let schema = schemars::schema_for!(bool);
    let examples = [
        ("facts", json!(testing::facts())),
        ("batch", json!(BatchContext { seed: 1, epoch: 2, step: 3, train: true })),
        ("features", json!(FeaturesContext { classes: 10, seed: 1 })),
        (
            "method",
            json!(MethodDeclaration {
                views: vec![view, ViewSpec::new("plain")],
                tensors: vec![tensor.clone(), buffer],
                ema: vec![ema],
                backbones: vec!["encoder".into()],
                encoder: "encoder".into(),
            }),
        ),
        ("backbone", backbone(NormKind::Batch)),
        ("backbone with other norms", backbone(NormKind::Layer)),
        (
            "offer",
            json!(Offer {
                methods: vec![MethodOffer {
                    name: "m".into(),
                    needs_labels: true,
                    capturable: true,
                    options: schema.clone(),
                }],
                backbones: vec![BackboneOffer { name: "b".into(), options: schema.clone() }],
                probes: vec![ProbeOffer { name: "p".into(), options: schema }],
            }),
        ),
    ];
    let mut text = examples.map(|(name, example)| format!("{name} {example:#}\n")).concat();
    for kind in FailureKind::ALL {
        let _ = writeln!(text, "failure {kind:?} {}", kind.code());
    }
    for level in [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE] {
        let _ = writeln!(text, "log level {level} {}", number(Some(level)));
    }
    text
}

/// Does not compile when a variant is new: it belongs into [`texts`], and then into these lists.
#[expect(dead_code, reason = "only the compiler reads it")]
fn all_are_listed(norm: NormKind, interpolation: Interpolation, kind: Kind, transform: &Transform) {
    match norm {
        NormKind::Batch | NormKind::Layer => {}
    }
    match interpolation {
        Interpolation::Bilinear | Interpolation::Bicubic => {}
    }
    match kind {
        Kind::Parameter | Kind::Buffer => {}
    }
    match transform {
        Transform::RandomResizedCrop { .. }
        | Transform::ResizeCenterCrop { .. }
        | Transform::HorizontalFlip { .. }
        | Transform::ColorJitter { .. }
        | Transform::Grayscale { .. }
        | Transform::GaussianBlur { .. }
        | Transform::Solarize { .. }
        | Transform::Normalize { .. } => {}
    }
}
