//! The caller's side of the boundary: safe handles on a plugin, its methods, its backbones and its probes.

use std::ffi::c_void;

use abi_stable::StableAbi as _;
use abi_stable::abi_stability::abi_checking::check_layout_compatibility;
use abi_stable::library::{AbiHeaderRef, IsLayoutChecked};
use abi_stable::sabi_trait::prelude::TD_Opaque;
use abi_stable::std_types::{RResult, RString, RVec};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tch::{Kind, Tensor};

use super::exports::{ErasedBackbone, backbone_object, names};
use super::failure::{AbiFailure, Failure, FailureKind};
use super::log::{LogSink, emit_in_host};
use super::module::*;
use super::tensor::TensorOwned;
use super::{API_MAJOR, API_MINOR, ManifestFields};
use crate::host::RunFacts;
use crate::params::Entry;
use crate::{BackboneInfo, Batch, Context as _, EmaPair, FrozenFeatures, Params, Result, Step, ViewSpec};

/// What to do about a file that does not keep to the API that it names.
const REMEDY: &str = "build it with the jepa-plugin-api of this host, as it is";

/// A plugin whose functions can be called. A clone is another handle on the same plugin.
#[derive(Clone)]
pub struct Plugin {
    name: String,
    /// Major and minor version of the API that it was built with.
    api: (u16, u16),
    module: PluginModuleRef,
    offer: Offer,
}

impl Plugin {
    /// Takes over the plugin of this `manifest` whose [`RootHeader`](super::RootHeader) is at `root`: checks the layout
    /// of every type that crosses, connects logging and panics, and asks what it offers.
    ///
    /// # Errors
    /// One sentence for a layout or an abi_stable that does not fit; the long comparison of types goes to the debug
    /// log.
    ///
    /// # Safety
    /// `root` is the address of the static [`ROOT_SYMBOL`](super::ROOT_SYMBOL) of a library that is never unloaded.
    pub unsafe fn adopt(manifest: &ManifestFields, root: *const c_void) -> Result<Self> {
        anyhow::ensure!(!root.is_null(), "its table of functions is null");
        // SAFETY: AbiHeaderRef is a transparent wrapper of a non-null pointer to the header's first field, which the
        // caller vouches for.
        let header = unsafe { std::mem::transmute::<*const c_void, AbiHeaderRef>(root) };
        let header = header
            .upgrade()
            .map_err(|error| anyhow::anyhow!("its abi_stable does not fit: {error}; {REMEDY}"))?;
        let IsLayoutChecked::Yes(theirs) = header.root_mod_consts().layout() else {
            anyhow::bail!("it carries no description of its types; {REMEDY}");
        };
        check_either_way(theirs)?;
        // SAFETY: the layouts were compared just now.
        let module = unsafe { header.unchecked_layout::<PluginModuleRef>() }
            .map_err(|error| anyhow::anyhow!("it fails to start: {error}"))?;
        (module.attach())(LogSink::new(emit_in_host));
        let api = (manifest.api_major, manifest.api_minor);
        let mut plugin = Plugin { name: manifest.name.clone(), api, module, offer: Offer::default() };
        plugin.offer = plugin.read(&unwrap((module.offer_json())())?)?;
        Ok(plugin)
    }

    /// Reads what the plugin declares. One of a later minor may declare what this host does not know.
    fn read<T: DeserializeOwned>(&self, json: &str) -> Result<T, Failure> {
        serde_json::from_str(json).map_err(|error| {
            let (major, minor) = self.api;
            let remedy = if minor > API_MINOR { "update jepa-host" } else { "build it again" };
            Failure {
                plugin: self.name.clone(),
                kind: FailureKind::Unfit,
                message: format!(
                    "it was built with plugin API {major}.{minor} and declares what this host, with \
                     {API_MAJOR}.{API_MINOR}, cannot read ({error}): {remedy}"
                ),
                chain: Vec::new(),
            }
        })
    }

    /// The plugin's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it offers.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Sends a leaf tensor through the plugin and differentiates what comes back: proof that both sides use the same
    /// libtorch and that its graph crosses.
    ///
    /// # Errors
    /// When the plugin fails, or the gradient is not the expected one.
    pub fn self_test(&self) -> Result<()> {
        let x = Tensor::from_slice(&[1f32, 2., 3.]).set_requires_grad(true);
        let y = self.cross(&x)?;
        y.f_backward()?;
        let gradient = Vec::<f32>::try_from(&x.grad())?;
        anyhow::ensure!(gradient == [2., 2., 2.], "gradients do not cross the boundary: {gradient:?}");
        Ok(())
    }

    /// Sends `x` through the plugin, which gives the sum of its doubled elements: a call that does nothing else, for
    /// measuring what a call costs.
    ///
    /// # Errors
    /// The plugin's [`Failure`].
    pub fn cross(&self, x: &Tensor) -> Result<Tensor> {
        Ok(unwrap((self.module.self_test())(x.shallow_clone().into()))?.into())
    }

    /// Builds one of the plugin's backbones on `device` (`cpu` or `cuda:<n>`).
    ///
    /// # Errors
    /// The plugin's [`Failure`].
    pub fn build_backbone(&self, name: &str, options: &Value, device: &str) -> Result<BackboneHandle> {
        let options = options.to_string();
        let object = (self.module.build_backbone())(name.into(), options.as_str().into(), device.into());
        let object = unwrap(object)?;
        let declaration = self.read(&object.declaration_json())?;
        Ok(BackboneHandle { code: BackboneCode::Plugin(object), declaration })
    }

    /// Builds one of the plugin's methods; `backbone` builds what it asks for.
    ///
    /// # Errors
    /// The plugin's [`Failure`], or that of a backbone.
    pub fn build_method(
        &self,
        name: &str,
        options: &Value,
        facts: RunFacts,
        backbone: Box<dyn Fn() -> Result<BackboneHandle>>,
    ) -> Result<MethodHandle> {
        let options = options.to_string();
        let host = AbiHost_TO::from_value(HostSide { facts, backbone }, TD_Opaque);
        let object = unwrap((self.module.build_method())(name.into(), options.as_str().into(), host))?;
        let declaration: MethodDeclaration = self.read(&object.declaration_json())?;
        let entries = named(&declaration.tensors, object.tensors())?;
        Ok(MethodHandle { plugin: self.name.clone(), object, declaration, entries })
    }

    /// Builds one of the plugin's probes.
    ///
    /// # Errors
    /// The plugin's [`Failure`].
    pub fn build_probe(&self, name: &str, options: &Value) -> Result<ProbeHandle> {
        let build = self.module.build_probe().context("plugins of API 1.0 have no probes")?;
        let object = unwrap(build(name.into(), options.to_string().as_str().into()))?;
        Ok(ProbeHandle { plugin: self.name.clone(), object })
    }
}

/// Prefix types may be longer on either side, but abi_stable only accepts a longer implementation: ask both ways.
fn check_either_way(theirs: &'static abi_stable::type_layout::TypeLayout) -> Result<()> {
    let ours = PluginModuleRef::LAYOUT;
    let Err(errors) = check_layout_compatibility(ours, theirs) else { return Ok(()) };
    if check_layout_compatibility(theirs, ours).is_ok() {
        return Ok(());
    }
    tracing::debug!("layouts that do not fit:\n{errors}");
    anyhow::bail!("its types are laid out differently from the host's (RUST_LOG=debug shows where); {REMEDY}")
}

fn unwrap<T>(result: RResult<T, AbiFailure>) -> Result<T, Failure> {
    result.into_result().map_err(Failure::from)
}

fn named(names: &[TensorName], tensors: RVec<TensorOwned>) -> Result<Vec<Entry>> {
    anyhow::ensure!(names.len() == tensors.len(), "{} names for {} tensors", names.len(), tensors.len());
    let pairs = names.iter().zip(tensors.into_iter().map(Tensor::from));
    Ok(pairs.map(|(name, tensor)| Entry { name: name.name.clone(), kind: name.kind, tensor }).collect())
}

/// The host's side of a method's constructor.
struct HostSide {
    facts: RunFacts,
    backbone: Box<dyn Fn() -> Result<BackboneHandle>>,
}

impl AbiHost for HostSide {
    fn facts_json(&self) -> RString {
        serde_json::to_string(&self.facts).expect("facts become JSON").into()
    }

    fn backbone(&self) -> RResult<BackboneObject, AbiFailure> {
        match (self.backbone)() {
            Ok(handle) => RResult::ROk(handle.into_object()),
            Err(error) => RResult::RErr(Failure::from_error("jepa-host", error).into()),
        }
    }
}

/// A method, wherever its code is.
pub struct MethodHandle {
    plugin: String,
    object: MethodObject,
    declaration: MethodDeclaration,
    entries: Vec<Entry>,
}

impl MethodHandle {
    /// The views it wants.
    pub fn views(&self) -> &[ViewSpec] {
        &self.declaration.views
    }

    /// The EMA pairs it declares.
    pub fn ema(&self) -> &[EmaPair] {
        &self.declaration.ema
    }

    /// The names of its backbones.
    pub fn backbones(&self) -> &[String] {
        &self.declaration.backbones
    }

    /// The backbone that is learned for, see [`Method::ENCODER`](crate::Method::ENCODER).
    pub fn encoder(&self) -> &str {
        &self.declaration.encoder
    }

    /// All its tensors, backbones' included.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The loss of one batch, see [`Method::step`](crate::Method::step): a scalar, with a graph when the batch is for
    /// training, and scalar metrics.
    ///
    /// # Errors
    /// The plugin's [`Failure`], also when it returns something else than that.
    pub fn step(&mut self, batch: Batch) -> Result<Step, Failure> {
        let train = batch.train;
        let batch = sent(batch);
        let AbiStep { loss, metrics } = unwrap(self.object.step(batch))?;
        let metric = |m: AbiMetric| (m.name.into(), m.value.into());
        let step = Step { loss: loss.into(), metrics: metrics.into_iter().map(metric).collect() };
        self.check_step(&step, train)?;
        Ok(step)
    }

    /// Features f32 `(B, D)` of images `(B, 3, S, S)`, see [`Method::encode`](crate::Method::encode).
    ///
    /// # Errors
    /// The plugin's [`Failure`], also when it returns something else than features.
    pub fn encode(&mut self, images: &Tensor) -> Result<Tensor, Failure> {
        let features = Tensor::from(unwrap(self.object.encode(images.shallow_clone().into()))?);
        match *features.size() {
            [rows, columns] if rows == images.size()[0] && columns > 0 && features.is_floating_point() => {
                Ok(features.to_kind(Kind::Float))
            }
            _ => Err(self.wrong(format!(
                "`encode` must return floating-point features ({}, D), and returned {}",
                images.size()[0],
                described(&features)
            ))),
        }
    }

    /// What a person should see of `batch`: named images `(B, 3, S, S)`, see
    /// [`Method::examples`](crate::Method::examples), or the views by their names.
    ///
    /// # Errors
    /// The plugin's [`Failure`], also when it returns something else than images.
    pub fn examples(&mut self, batch: &Batch) -> Result<Vec<(String, Tensor)>, Failure> {
        let views = || batch.views.iter().map(Tensor::shallow_clone);
        let copy = Batch {
            views: views().collect(),
            labels: batch.labels.shallow_clone(),
            samples: batch.samples.clone(),
            ..*batch
        };
        let examples = unwrap(self.object.examples(sent(copy)))?;
        if examples.is_empty() {
            return Ok(self.views().iter().map(|view| view.name.clone()).zip(views()).collect());
        }
        let mut named = Vec::new();
        for AbiImages { name, images } in examples {
            let images = Tensor::from(images);
            if !matches!(images.size()[..], [_, 3, _, _]) || !images.is_floating_point() {
                return Err(self.wrong(format!(
                    "`examples` must return images (B, 3, H, W), and returned `{name}` as {}",
                    described(&images)
                )));
            }
            named.push((name.into(), images));
        }
        Ok(named)
    }

    fn check_step(&self, step: &Step, train: bool) -> Result<(), Failure> {
        let scalar = |value: &Tensor| value.numel() == 1 && value.is_floating_point();
        if !scalar(&step.loss) {
            return Err(self
                .wrong(format!("`step` must return a scalar loss, and returned {}", described(&step.loss))));
        }
        if train && !step.loss.requires_grad() {
            return Err(self.wrong("no gradient flows from the loss that `step` returned".to_owned()));
        }
        match step.metrics.iter().find(|(_, value)| !scalar(value)) {
            Some((name, value)) => Err(self.wrong(format!(
                "`step` must return scalar metrics, and returned `{name}` as {}",
                described(value)
            ))),
            None => Ok(()),
        }
    }

    fn wrong(&self, message: String) -> Failure {
        wrong(&self.plugin, message)
    }
}

/// What is wrong with a value that a plugin returned.
fn wrong(plugin: &str, message: String) -> Failure {
    Failure { plugin: plugin.to_owned(), kind: FailureKind::Error, message, chain: Vec::new() }
}

/// Kind and shape, for messages.
fn described(tensor: &Tensor) -> String {
    format!("{:?} of shape {:?}", tensor.kind(), tensor.size())
}

/// A backbone, wherever its code is.
///
/// ```
/// use jepa_plugin_api::testing::SmallBackbone;
/// use jepa_plugin_api::{BackboneHandle, Params, tch};
/// let params = Params::new(tch::Device::Cpu);
/// let backbone = BackboneHandle::linked(SmallBackbone::new(&params)?, &params)?;
/// let images = tch::Tensor::zeros([2, 3, 32, 32], (tch::Kind::Float, tch::Device::Cpu));
/// assert_eq!(backbone.cells(32)?, 8);
/// assert_eq!(backbone.forward(&images, None, true)?.size(), [2, 8, 8, 8]);
/// assert_eq!(backbone.pooled(&images, true)?.size(), [2, 8]);
/// # Ok::<(), jepa_plugin_api::Error>(())
/// ```
pub struct BackboneHandle {
    code: BackboneCode,
    declaration: BackboneDeclaration,
}

enum BackboneCode {
    /// Behind the boundary.
    Plugin(BackboneObject),
    /// Linked into this program, which calls it directly.
    Linked { backbone: Box<dyn ErasedBackbone>, entries: Vec<Entry> },
}

impl BackboneHandle {
    /// A backbone of this program's own, which registered its tensors in `params`: for tests without a plugin file.
    /// Nothing crosses the boundary when it is called.
    ///
    /// # Errors
    /// None: it fits where the host's way of getting a backbone may fail.
    pub fn linked<B: crate::Backbone>(backbone: B, params: &Params) -> Result<Self> {
        let entries = params.entries();
        let declaration = BackboneDeclaration { info: backbone.info(), tensors: names(&entries) };
        let code = BackboneCode::Linked { backbone: Box::new(backbone), entries };
        Ok(BackboneHandle { code, declaration })
    }

    /// What the host gives to a method.
    fn into_object(self) -> BackboneObject {
        match self.code {
            BackboneCode::Plugin(object) => object,
            BackboneCode::Linked { backbone, entries } => backbone_object("linked", backbone, entries),
        }
    }

    /// A backbone that the host gives to a method of `plugin`.
    pub(super) fn received(plugin: &str, object: BackboneObject) -> Result<Self, Failure> {
        match serde_json::from_str(&object.declaration_json()) {
            Ok(declaration) => Ok(BackboneHandle { code: BackboneCode::Plugin(object), declaration }),
            Err(error) => Err(Failure {
                plugin: plugin.to_owned(),
                kind: FailureKind::Unfit,
                message: format!(
                    "it was built with plugin API {API_MAJOR}.{API_MINOR} and cannot read what the backbone declares \
                     ({error}): build it with a newer jepa-plugin-api"
                ),
                chain: Vec::new(),
            }),
        }
    }

    /// What a method has to know about it.
    pub fn info(&self) -> &BackboneInfo {
        &self.declaration.info
    }

    /// Its tensors, by timm's names.
    ///
    /// # Errors
    /// When the plugin does not keep to the boundary.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        match &self.code {
            BackboneCode::Plugin(object) => named(&self.declaration.tensors, object.tensors()),
            BackboneCode::Linked { entries, .. } => Ok(entries.iter().map(Entry::share).collect()),
        }
    }

    /// The feature map `(B, C, S / r, S / r)`; with a mask in sparse mode. See
    /// [`Backbone::forward`](crate::Backbone::forward).
    ///
    /// # Errors
    /// When the backbone fails, or is asked for a sparse mode that it does not have.
    pub fn forward(&self, images: &Tensor, mask: Option<&Tensor>, train: bool) -> Result<Tensor> {
        anyhow::ensure!(mask.is_none() || self.info().sparse, "this backbone has no sparse mode");
        match &self.code {
            BackboneCode::Plugin(object) => {
                let mask = mask.map(|mask| mask.shallow_clone().into()).into();
                Ok(unwrap(object.forward(images.shallow_clone().into(), mask, train))?.into())
            }
            BackboneCode::Linked { backbone, .. } => backbone.forward(images, mask, train),
        }
    }
}

/// A probe, wherever its code is.
pub struct ProbeHandle {
    plugin: String,
    object: ProbeObject,
}

impl ProbeHandle {
    /// The metrics of these features, see [`Probe::evaluate`](crate::Probe::evaluate).
    ///
    /// # Errors
    /// The plugin's [`Failure`], also for a metric without a name or that is no finite number.
    pub fn evaluate(&mut self, features: FrozenFeatures) -> Result<Vec<(String, f64)>, Failure> {
        let FrozenFeatures { train, held_out, classes, seed } = features;
        let context = FeaturesContext { classes, seed };
        let metrics = unwrap(self.object.evaluate(AbiFeatures {
            train_x: train.x.into(),
            train_y: train.y.into(),
            held_out_x: held_out.x.into(),
            held_out_y: held_out.y.into(),
            context_json: serde_json::to_string(&context).expect("numbers become JSON").into(),
        }))?;
        let metric = |AbiProbeMetric { name, value }| -> Result<(String, f64), Failure> {
            if name.is_empty() || !value.is_finite() {
                return Err(wrong(
                    &self.plugin,
                    format!("`evaluate` returned {value} as the metric `{name}`"),
                ));
            }
            Ok((name.into(), value))
        };
        metrics.into_iter().map(metric).collect()
    }
}

/// A batch on its way across.
fn sent(batch: Batch) -> AbiBatch {
    let context = BatchContext { seed: batch.seed, epoch: batch.epoch, step: batch.step, train: batch.train };
    AbiBatch {
        views: batch.views.into_iter().map(Into::into).collect(),
        labels: batch.labels.into(),
        samples: batch.samples.into(),
        context_json: serde_json::to_string(&context).expect("numbers become JSON").into(),
    }
}
