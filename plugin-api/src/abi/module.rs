//! The table of functions behind a plugin, and the objects it makes: the types that abi_stable checks.
//!
//! Prefix types grow at the end only, all in the same API minor. Texts named `…_json` carry serde structs of this
//! crate, which grow by keys with defaults.

// abi_stable's macros write code that these lints do not like.
#![allow(missing_docs, non_local_definitions, non_camel_case_types, clippy::all)]

use abi_stable::library::RootModule;
use abi_stable::package_version_strings;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::std_types::{RBox, ROption, RResult, RStr, RString, RVec};
use abi_stable::{StableAbi, sabi_trait};
use schemars::Schema;
use serde::{Deserialize, Serialize};

use super::failure::AbiFailure;
use super::log::LogSink;
use super::tensor::TensorOwned;
use crate::params::Kind;
use crate::{BackboneInfo, EmaPair, ViewSpec};

/// What a plugin file offers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Offer {
    /// The methods in it.
    #[serde(default)]
    pub methods: Vec<MethodOffer>,
    /// The backbones in it.
    #[serde(default)]
    pub backbones: Vec<BackboneOffer>,
    /// The probes in it. Since 1.1.
    #[serde(default)]
    pub probes: Vec<ProbeOffer>,
}

/// A method on offer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MethodOffer {
    /// Its name in `method.name`.
    pub name: String,
    /// Whether it learns from labels. Since 1.1.
    #[serde(default)]
    pub needs_labels: bool,
    /// Whether its steps may be captured and replayed. Since 1.1.
    #[serde(default)]
    pub capturable: bool,
    /// JSON Schema of its options.
    pub options: Schema,
}

/// A backbone on offer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackboneOffer {
    /// Its name in `backbone.name`.
    pub name: String,
    /// JSON Schema of its options.
    pub options: Schema,
}

/// A probe on offer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProbeOffer {
    /// Its name under `eval.probes.`.
    pub name: String,
    /// JSON Schema of its options.
    pub options: Schema,
}

/// What a built method declares.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MethodDeclaration {
    pub views: Vec<ViewSpec>,
    pub tensors: Vec<TensorName>,
    #[serde(default)]
    pub ema: Vec<EmaPair>,
    /// The names of its backbones.
    #[serde(default)]
    pub backbones: Vec<String>,
    /// The one of them that is learned for.
    #[serde(default)]
    pub encoder: String,
}

/// What a built backbone declares.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackboneDeclaration {
    pub info: BackboneInfo,
    pub tensors: Vec<TensorName>,
}

/// Name and kind of the tensor at the same place in `tensors()`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TensorName {
    pub name: String,
    pub kind: Kind,
}

/// Where a batch stands in the run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct BatchContext {
    pub seed: u64,
    pub epoch: u64,
    pub step: u64,
    pub train: bool,
}

/// [`crate::Batch`] in a layout that crosses.
///
/// OWNERSHIP: the tensors are the callee's.
#[repr(C)]
#[derive(StableAbi)]
pub struct AbiBatch {
    pub views: RVec<TensorOwned>,
    pub labels: TensorOwned,
    pub samples: RVec<u64>,
    pub context_json: RString,
}

/// [`crate::Step`] in a layout that crosses.
///
/// OWNERSHIP: the tensors are the caller's.
#[repr(C)]
#[derive(StableAbi)]
pub struct AbiStep {
    pub loss: TensorOwned,
    pub metrics: RVec<AbiMetric>,
}

/// A named scalar.
#[repr(C)]
#[derive(StableAbi)]
pub struct AbiMetric {
    pub name: RString,
    pub value: TensorOwned,
}

/// Named images `(B, 3, S, S)`. Since 1.1.
///
/// OWNERSHIP: the tensor is the caller's.
#[repr(C)]
#[derive(StableAbi)]
pub struct AbiImages {
    pub name: RString,
    pub images: TensorOwned,
}

/// [`crate::FrozenFeatures`] in a layout that crosses.
///
/// OWNERSHIP: the tensors are the callee's.
#[repr(C)]
#[derive(StableAbi)]
pub struct AbiFeatures {
    pub train_x: TensorOwned,
    pub train_y: TensorOwned,
    pub held_out_x: TensorOwned,
    pub held_out_y: TensorOwned,
    pub context_json: RString,
}

/// What features come from.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct FeaturesContext {
    pub classes: i64,
    pub seed: u64,
}

/// A named number.
#[repr(C)]
#[derive(StableAbi)]
pub struct AbiProbeMetric {
    pub name: RString,
    pub value: f64,
}

#[sabi_trait]
pub trait AbiBackbone: Send {
    fn declaration_json(&self) -> RString;
    fn tensors(&self) -> RVec<TensorOwned>;
    #[sabi(last_prefix_field)]
    fn forward(
        &self,
        images: TensorOwned,
        mask: ROption<TensorOwned>,
        train: bool,
    ) -> RResult<TensorOwned, AbiFailure>;
}
pub type BackboneObject = AbiBackbone_TO<'static, RBox<()>>;

#[sabi_trait]
pub trait AbiMethod: Send {
    fn declaration_json(&self) -> RString;
    fn tensors(&self) -> RVec<TensorOwned>;
    fn step(&mut self, batch: AbiBatch) -> RResult<AbiStep, AbiFailure>;
    #[sabi(last_prefix_field)]
    fn encode(&mut self, images: TensorOwned) -> RResult<TensorOwned, AbiFailure>;
    /// Since 1.1.
    fn examples(&mut self, batch: AbiBatch) -> RResult<RVec<AbiImages>, AbiFailure> {
        drop(batch);
        RResult::ROk(RVec::new())
    }
}
pub type MethodObject = AbiMethod_TO<'static, RBox<()>>;

#[sabi_trait]
pub trait AbiProbe: Send {
    #[sabi(last_prefix_field)]
    fn evaluate(&mut self, features: AbiFeatures) -> RResult<RVec<AbiProbeMetric>, AbiFailure>;
}
pub type ProbeObject = AbiProbe_TO<'static, RBox<()>>;

/// The host, as a method's constructor reaches it.
#[sabi_trait]
pub trait AbiHost {
    fn facts_json(&self) -> RString;
    #[sabi(last_prefix_field)]
    fn backbone(&self) -> RResult<BackboneObject, AbiFailure>;
}
pub type HostObject = AbiHost_TO<'static, RBox<()>>;

/// The functions of a plugin.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginModuleRef)))]
#[sabi(missing_field(panic))]
pub struct PluginModule {
    /// Called once, first: takes over logging and panics.
    pub attach: extern "C" fn(log: LogSink),
    /// An [`Offer`].
    pub offer_json: extern "C" fn() -> RResult<RString, AbiFailure>,
    /// Returns the sum of 2 · x, with a graph.
    pub self_test: extern "C" fn(x: TensorOwned) -> RResult<TensorOwned, AbiFailure>,
    pub build_method: extern "C" fn(
        name: RStr<'_>,
        options_json: RStr<'_>,
        host: HostObject,
    ) -> RResult<MethodObject, AbiFailure>,
    #[sabi(last_prefix_field)]
    pub build_backbone: extern "C" fn(
        name: RStr<'_>,
        options_json: RStr<'_>,
        device: RStr<'_>,
    ) -> RResult<BackboneObject, AbiFailure>,
    /// Since 1.1.
    #[sabi(missing_field(option))]
    pub build_probe:
        extern "C" fn(name: RStr<'_>, options_json: RStr<'_>) -> RResult<ProbeObject, AbiFailure>,
}

impl RootModule for PluginModuleRef {
    abi_stable::declare_root_module_statics! {PluginModuleRef}
    const BASE_NAME: &'static str = "jepa_plugin";
    const NAME: &'static str = "jepa_plugin";
    const VERSION_STRINGS: VersionStrings = package_version_strings!();
}
