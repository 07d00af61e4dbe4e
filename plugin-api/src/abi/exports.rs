//! The plugin's side of the boundary: from the safe traits to the table of functions.

use std::sync::atomic::AtomicBool;

use abi_stable::library::{__call_root_module_loader, CheckTypeLayout, LibHeader, RootModuleResult};
use abi_stable::prefix_type::PrefixTypeTrait;
use abi_stable::sabi_trait::prelude::TD_Opaque;
use abi_stable::std_types::{ROption, RResult, RStr, RString, RVec};
use anyhow::{Context as _, bail};
use schemars::schema_for;
use serde::Serialize;
use serde_json::Value;
use tch::{Kind, TchError, Tensor};

use super::failure::{AbiFailure, Contained, guard, install_panic_hook};
use super::log::LogSink;
use super::module::*;
use super::tensor::TensorOwned;
use super::{BackboneHandle, Failure, FailureKind};
use crate::host::HostParts;
use crate::params::Entry;
use crate::{
    Backbone, BackboneInfo, Batch, FrozenFeatures, Host, LabelledFeatures, Method, Params, Probe, Result,
    Step, ViewSpec, parse_device,
};

/// What [`export_plugin!`](crate::export_plugin) implements: the names and entries of one plugin file.
pub trait Exports: 'static {
    /// The plugin's name.
    const NAME: &'static str;
    /// The methods in it.
    fn methods() -> Vec<MethodEntry>;
    /// The backbones in it.
    fn backbones() -> Vec<BackboneEntry>;
    /// The probes in it.
    fn probes() -> Vec<ProbeEntry>;
}

/// The static that a plugin exports beside its manifest.
pub type RootHeader = LibHeader;

/// The header through which a host reaches plugin `P`.
pub const fn root_header<P: Exports>() -> RootHeader {
    // SAFETY: `construct` returns the prefix of a PluginModuleRef, which is the type named here.
    unsafe { LibHeader::from_constructor::<PluginModuleRef>(construct::<P>, CheckTypeLayout::Yes) }
}

extern "C" fn construct<P: Exports>() -> RootModuleResult {
    __call_root_module_loader(module::<P>)
}

pub(super) fn module<P: Exports>() -> PluginModuleRef {
    PluginModule {
        attach,
        offer_json: offer_json::<P>,
        self_test: self_test::<P>,
        build_method: build_method::<P>,
        build_backbone: build_backbone::<P>,
        build_probe: build_probe::<P>,
    }
    .leak_into_prefix()
}

/// How a plugin builds one of its methods.
pub struct MethodEntry {
    encoder: &'static str,
    offer: MethodOffer,
    build: fn(Value, &mut Host<'_>) -> Result<Box<dyn ErasedMethod>>,
}

impl MethodEntry {
    /// The entry of method `M`.
    pub fn of<M: Method>() -> Self {
        MethodEntry {
            encoder: M::ENCODER,
            offer: MethodOffer {
                name: M::NAME.to_owned(),
                needs_labels: M::NEEDS_LABELS,
                capturable: M::CAPTURABLE,
                options: schema_for!(M::Options),
            },
            build: |options, host| Ok(Box::new(M::new(serde_json::from_value(options)?, host)?)),
        }
    }
}

/// How a plugin builds its backbones of one type.
pub struct BackboneEntry {
    offers: Vec<BackboneOffer>,
    build: fn(&str, Value, &Params) -> Result<Box<dyn ErasedBackbone>>,
}

impl BackboneEntry {
    /// The entry of backbone type `B`.
    pub fn of<B: Backbone>() -> Self {
        let offer =
            |name: &&str| BackboneOffer { name: (*name).to_owned(), options: schema_for!(B::Options) };
        BackboneEntry {
            offers: B::NAMES.iter().map(offer).collect(),
            build: |name, options, params| {
                Ok(Box::new(B::new(name, serde_json::from_value(options)?, params)?))
            },
        }
    }
}

/// How a plugin builds one of its probes.
pub struct ProbeEntry {
    offer: ProbeOffer,
    build: fn(Value) -> Result<Box<dyn ErasedProbe>>,
}

impl ProbeEntry {
    /// The entry of probe `P`.
    pub fn of<P: Probe>() -> Self {
        ProbeEntry {
            offer: ProbeOffer { name: P::NAME.to_owned(), options: schema_for!(P::Options) },
            build: |options| Ok(Box::new(P::new(serde_json::from_value(options)?)?)),
        }
    }
}

/// [`Method`] without its associated items, so that one object type serves all.
trait ErasedMethod: Send {
    fn views(&self) -> Vec<ViewSpec>;
    fn step(&mut self, batch: &Batch) -> Result<Step>;
    fn encode(&mut self, images: &Tensor) -> Result<Tensor>;
    fn examples(&mut self, batch: &Batch) -> Result<Vec<(String, Tensor)>>;
}

impl<M: Method> ErasedMethod for M {
    fn views(&self) -> Vec<ViewSpec> {
        Method::views(self)
    }
    fn step(&mut self, batch: &Batch) -> Result<Step> {
        Method::step(self, batch)
    }
    fn encode(&mut self, images: &Tensor) -> Result<Tensor> {
        Method::encode(self, images)
    }
    fn examples(&mut self, batch: &Batch) -> Result<Vec<(String, Tensor)>> {
        Method::examples(self, batch)
    }
}

/// [`Backbone`] without its associated items.
pub(super) trait ErasedBackbone: Send {
    fn info(&self) -> BackboneInfo;
    fn forward(&self, images: &Tensor, mask: Option<&Tensor>, train: bool) -> Result<Tensor>;
}

impl<B: Backbone> ErasedBackbone for B {
    fn info(&self) -> BackboneInfo {
        Backbone::info(self)
    }
    fn forward(&self, images: &Tensor, mask: Option<&Tensor>, train: bool) -> Result<Tensor> {
        Backbone::forward(self, images, mask, train)
    }
}

/// [`Probe`] without its associated items.
trait ErasedProbe: Send {
    fn evaluate(&mut self, features: &FrozenFeatures) -> Result<Vec<(String, f64)>>;
}

impl<P: Probe> ErasedProbe for P {
    fn evaluate(&mut self, features: &FrozenFeatures) -> Result<Vec<(String, f64)>> {
        Probe::evaluate(self, features)
    }
}

extern "C" fn attach(log: LogSink) {
    log.install();
    install_panic_hook();
}

extern "C" fn offer_json<P: Exports>() -> RResult<RString, AbiFailure> {
    // Schemas and defaults are the author's code too.
    guard(P::NAME, &AtomicBool::new(false), || {
        let methods = P::methods().into_iter().map(|entry| entry.offer).collect();
        let backbones = P::backbones().into_iter().flat_map(|entry| entry.offers).collect();
        let probes = P::probes().into_iter().map(|entry| entry.offer).collect();
        Ok(to_json(&Offer { methods, backbones, probes }))
    })
}

extern "C" fn self_test<P: Exports>(x: TensorOwned) -> RResult<TensorOwned, AbiFailure> {
    guard(P::NAME, &AtomicBool::new(false), || Ok((Tensor::from(x) * 2).f_sum(Kind::Float)?))
}

extern "C" fn build_method<P: Exports>(
    name: RStr<'_>,
    options_json: RStr<'_>,
    host: HostObject,
) -> RResult<MethodObject, AbiFailure> {
    guard(P::NAME, &AtomicBool::new(false), || {
        let entry = P::methods().into_iter().find(|entry| entry.offer.name == name.as_str());
        let entry = entry.with_context(|| format!("there is no method `{name}` in this plugin"))?;
        let facts =
            serde_json::from_str(host.facts_json().as_str()).context("the host's facts are unreadable")?;
        let mut backbone = || {
            let object = host.backbone().into_result().map_err(Failure::from)?;
            Ok(BackboneHandle::received(P::NAME, object)?)
        };
        let mut safe_host = Host::new(facts, &mut backbone)?;
        let options = serde_json::from_str(options_json.as_str())?;
        let method = (entry.build)(options, &mut safe_host).map_err(|error| refusal(P::NAME, error))?;
        let HostParts { params, ema, backbones } = safe_host.into_parts();
        let encoder = entry.encoder.to_owned();
        if !backbones.is_empty() && !backbones.contains(&encoder) {
            bail!("its encoder is `{encoder}`, and its backbones are {}", backbones.join(", "));
        }
        let (views, entries) = (method.views(), params.entries());
        let declaration = MethodDeclaration { views, tensors: names(&entries), ema, backbones, encoder };
        let tensors = entries.into_iter().map(|entry| entry.tensor).collect();
        let guarded = GuardedMethod {
            plugin: P::NAME,
            declaration_json: to_json(&declaration),
            tensors,
            poisoned: AtomicBool::new(false),
            method: Contained::new(P::NAME, method),
        };
        Ok(AbiMethod_TO::from_value(guarded, TD_Opaque))
    })
}

extern "C" fn build_backbone<P: Exports>(
    name: RStr<'_>,
    options_json: RStr<'_>,
    device: RStr<'_>,
) -> RResult<BackboneObject, AbiFailure> {
    guard(P::NAME, &AtomicBool::new(false), || {
        let offers = |entry: &BackboneEntry| entry.offers.iter().any(|offer| offer.name == name.as_str());
        let entry = P::backbones().into_iter().find(offers);
        let entry = entry.with_context(|| format!("there is no backbone `{name}` in this plugin"))?;
        let params = Params::new(parse_device(device.as_str())?);
        let options = serde_json::from_str(options_json.as_str())?;
        let backbone =
            (entry.build)(name.as_str(), options, &params).map_err(|error| refusal(P::NAME, error))?;
        Ok(backbone_object(P::NAME, backbone, params.entries()))
    })
}

extern "C" fn build_probe<P: Exports>(
    name: RStr<'_>,
    options_json: RStr<'_>,
) -> RResult<ProbeObject, AbiFailure> {
    guard(P::NAME, &AtomicBool::new(false), || {
        let entry = P::probes().into_iter().find(|entry| entry.offer.name == name.as_str());
        let entry = entry.with_context(|| format!("there is no probe `{name}` in this plugin"))?;
        let options = serde_json::from_str(options_json.as_str())?;
        let probe = (entry.build)(options).map_err(|error| refusal(P::NAME, error))?;
        let (poisoned, probe) = (AtomicBool::new(false), Contained::new(P::NAME, probe));
        Ok(AbiProbe_TO::from_value(GuardedProbe { plugin: P::NAME, poisoned, probe }, TD_Opaque))
    })
}

/// What an error in building a method, a backbone or a probe means: settings that do not fit, unless libtorch reports it,
/// for want of memory for one, or another plugin does.
fn refusal(plugin: &str, error: anyhow::Error) -> Failure {
    let of_libtorch = error.chain().any(|cause| cause.is::<TchError>());
    let passed_on = error.chain().any(|cause| cause.is::<Failure>());
    let failure = Failure::from_error(plugin, error);
    let kind = if of_libtorch || passed_on { failure.kind } else { FailureKind::Options };
    Failure { kind, ..failure }
}

pub(super) fn backbone_object(
    plugin: &'static str,
    backbone: Box<dyn ErasedBackbone>,
    entries: Vec<Entry>,
) -> BackboneObject {
    let declaration = BackboneDeclaration { info: backbone.info(), tensors: names(&entries) };
    let guarded = GuardedBackbone {
        plugin,
        declaration_json: to_json(&declaration),
        tensors: entries.into_iter().map(|entry| entry.tensor).collect(),
        poisoned: AtomicBool::new(false),
        backbone: Contained::new(plugin, backbone),
    };
    AbiBackbone_TO::from_value(guarded, TD_Opaque)
}

/// A method behind its guard against panics.
struct GuardedMethod {
    plugin: &'static str,
    declaration_json: RString,
    tensors: Vec<Tensor>,
    poisoned: AtomicBool,
    method: Contained<dyn ErasedMethod>,
}

impl AbiMethod for GuardedMethod {
    fn declaration_json(&self) -> RString {
        self.declaration_json.clone()
    }

    fn tensors(&self) -> RVec<TensorOwned> {
        share(&self.tensors)
    }

    fn step(&mut self, batch: AbiBatch) -> RResult<AbiStep, AbiFailure> {
        guard(self.plugin, &self.poisoned, || {
            let batch = received(batch)?;
            let Step { loss, metrics } = self.method.step(&batch)?;
            let metric =
                |(name, value): (String, Tensor)| AbiMetric { name: name.into(), value: value.into() };
            Ok(AbiStep { loss: loss.into(), metrics: metrics.into_iter().map(metric).collect() })
        })
    }

    fn encode(&mut self, images: TensorOwned) -> RResult<TensorOwned, AbiFailure> {
        guard(self.plugin, &self.poisoned, || self.method.encode(&images.into()))
    }

    fn examples(&mut self, batch: AbiBatch) -> RResult<RVec<AbiImages>, AbiFailure> {
        guard(self.plugin, &self.poisoned, || {
            let examples = self.method.examples(&received(batch)?)?;
            let images =
                |(name, images): (String, Tensor)| AbiImages { name: name.into(), images: images.into() };
            Ok(examples.into_iter().map(images).collect::<RVec<_>>())
        })
    }
}

/// A batch on this side of the boundary.
fn received(batch: AbiBatch) -> Result<Batch> {
    let context: BatchContext = serde_json::from_str(batch.context_json.as_str())?;
    Ok(Batch {
        views: batch.views.into_iter().map(Tensor::from).collect(),
        labels: batch.labels.into(),
        samples: batch.samples.into(),
        seed: context.seed,
        epoch: context.epoch,
        step: context.step,
        train: context.train,
    })
}

/// A backbone behind its guard against panics.
struct GuardedBackbone {
    plugin: &'static str,
    declaration_json: RString,
    tensors: Vec<Tensor>,
    poisoned: AtomicBool,
    backbone: Contained<dyn ErasedBackbone>,
}

impl AbiBackbone for GuardedBackbone {
    fn declaration_json(&self) -> RString {
        self.declaration_json.clone()
    }

    fn tensors(&self) -> RVec<TensorOwned> {
        share(&self.tensors)
    }

    fn forward(
        &self,
        images: TensorOwned,
        mask: ROption<TensorOwned>,
        train: bool,
    ) -> RResult<TensorOwned, AbiFailure> {
        guard(self.plugin, &self.poisoned, || {
            let mask = mask.into_option().map(Tensor::from);
            self.backbone.forward(&images.into(), mask.as_ref(), train)
        })
    }
}

/// A probe behind its guard against panics.
struct GuardedProbe {
    plugin: &'static str,
    poisoned: AtomicBool,
    probe: Contained<dyn ErasedProbe>,
}

impl AbiProbe for GuardedProbe {
    fn evaluate(&mut self, features: AbiFeatures) -> RResult<RVec<AbiProbeMetric>, AbiFailure> {
        guard(self.plugin, &self.poisoned, || {
            let context: FeaturesContext = serde_json::from_str(features.context_json.as_str())?;
            let set = |x: TensorOwned, y: TensorOwned| LabelledFeatures { x: x.into(), y: y.into() };
            let features = FrozenFeatures {
                train: set(features.train_x, features.train_y),
                held_out: set(features.held_out_x, features.held_out_y),
                classes: context.classes,
                seed: context.seed,
            };
            let metric = |(name, value): (String, f64)| AbiProbeMetric { name: name.into(), value };
            let metrics: RVec<AbiProbeMetric> =
                self.probe.evaluate(&features)?.into_iter().map(metric).collect();
            Ok(metrics)
        })
    }
}

fn share(tensors: &[Tensor]) -> RVec<TensorOwned> {
    tensors.iter().map(|tensor| tensor.shallow_clone().into()).collect()
}

pub(super) fn names(entries: &[Entry]) -> Vec<TensorName> {
    entries.iter().map(|entry| TensorName { name: entry.name.clone(), kind: entry.kind }).collect()
}

fn to_json<T: Serialize>(value: &T) -> RString {
    serde_json::to_string(value).expect("structs of strings and numbers become JSON").into()
}
