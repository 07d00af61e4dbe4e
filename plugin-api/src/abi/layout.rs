//! A picture of everything that crosses, kept in `layout.txt`, so that no change of it goes unnoticed.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use abi_stable::StableAbi as _;
use abi_stable::type_layout::{TLData, TLField, TypeLayout};
use serde_json::json;

use super::module::*;
use super::{API_MAJOR, API_MINOR};
use crate::params::Kind;
use crate::{
    Augmentation, BackboneInfo, EmaPair, EmaSchedule, Interpolation, NormKind, Transform, ViewSpec, testing,
};

const WHAT_TO_DO: &str = "\
What crosses between host and plugins has changed: plugins that people have compiled rely on it.
- By accident? Undo it.
- Only grown, at the end of a prefix type or by JSON keys with defaults? Then it is a new minor version: keep the crate
  of the present one (`cargo package`) in tests/compat, raise the minor version in plugin-api/Cargo.toml, add a line to
  the history in abi/mod.rs, and run this test with JEPA_UPDATE_LAYOUT=1.
- Anything else is a new major version, and every plugin has to be compiled anew.
A version that was never released may still change: delete layout.txt and run with JEPA_UPDATE_LAYOUT=1.";

#[test]
fn what_crosses_is_what_this_version_promises() {
    let version = format!("plugin API {API_MAJOR}.{API_MINOR}\n");
    let picture = format!("{version}\n{}\n{}", types(), texts());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/abi/layout.txt");
    let kept = fs::read_to_string(&path).unwrap_or_default();
    if kept == picture {
        return;
    }
    if env::var_os("JEPA_UPDATE_LAYOUT").is_some() && !kept.starts_with(&version) {
        fs::write(&path, picture).unwrap();
        return;
    }
    let line = |text: &str, i: usize| text.lines().nth(i).unwrap_or("(nothing)").to_owned();
    let first = (0..).find(|i| line(&kept, *i) != line(&picture, *i)).unwrap();
    panic!(
        "{WHAT_TO_DO}\n\nlayout.txt, line {}:\n  promised {}\n  found    {}",
        first + 1,
        line(&kept, first),
        line(&picture, first)
    );
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

/// The texts that cross, by example.
fn texts() -> String {
    let crop = Transform::ResizeCenterCrop { crop_ratio: 0.875, interpolation: Interpolation::Bilinear };
    let view = Augmentation::SIMCLR.view("first").solarize(0.2).then(crop);
    let tensor = TensorName { name: "head.weight".into(), kind: Kind::Parameter };
    let buffer = TensorName { name: "head.mean".into(), kind: Kind::Buffer };
    let ema = EmaPair { online: "a".into(), target: "b".into(), schedule: EmaSchedule::default() };
    let info = BackboneInfo { channels: 8, downsample: 4, norm: NormKind::Batch, sparse: true };
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
        ("backbone", json!(BackboneDeclaration { info, tensors: vec![tensor] })),
        (
            "offer",
            json!(Offer {
                methods: vec![MethodOffer { name: "m".into(), needs_labels: true, options: schema.clone() }],
                backbones: vec![BackboneOffer { name: "b".into(), options: schema.clone() }],
                probes: vec![ProbeOffer { name: "p".into(), options: schema }],
            }),
        ),
    ];
    examples.map(|(name, example)| format!("{name} {example:#}\n")).concat()
}
