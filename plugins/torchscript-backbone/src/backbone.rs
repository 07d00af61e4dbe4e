//! A TorchScript module as a backbone.

use std::cell::{Cell, RefCell};
use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};

use jepa_plugin_api::params::{Entry, Kind as EntryKind};
use jepa_plugin_api::{
    Backbone, BackboneInfo, Context, Error, NormKind, Params, Result, bail, ensure, ranks,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::jit::{IValue, f_set_graph_executor_optimize};
use tch::{CModule, Kind, TchError, Tensor};

use crate::archive::{BUFFERS, with_buffers};

/// The keys under `backbone.`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TorchScriptOptions {
    /// The file, as `torch.jit.script(model).save(path)` writes it; a relative path starts at the current directory.
    /// It takes images f32 (B, 3, S, S) and gives a feature map (B, C, S / r, S / r), or (B, C), which counts as a map
    /// of one cell. Training begins with its weights. A traced module keeps the mode that it was traced in, so script
    /// what has batch norm or dropout.
    pub file: PathBuf,
    /// Side in pixels of the images on which the script is run once, to find C and r. Set it to data.size for a
    /// network that takes one size only.
    pub image_size: i64,
    /// C; with `downsample`, spares that run.
    pub channels: Option<i64>,
    /// Pixels r that a cell of the map spans, each way; with `channels`, spares that run.
    pub downsample: Option<i64>,
}

impl Default for TorchScriptOptions {
    fn default() -> Self {
        TorchScriptOptions { file: PathBuf::new(), image_size: 224, channels: None, downsample: None }
    }
}

/// A module that libtorch's interpreter runs; its parameters and buffers are those of the run.
pub struct TorchScript {
    file: PathBuf,
    module: RefCell<CModule>,
    /// The mode that the module is in.
    train: Cell<bool>,
    info: BackboneInfo,
}

impl TorchScript {
    /// What the module gives for `images` f32 `(B, 3, S, S)`, in training or in evaluation mode.
    fn run(&self, images: &Tensor, train: bool) -> Result<Tensor, TchError> {
        let mut module = self.module.borrow_mut();
        if self.train.replace(train) != train {
            if train { module.f_set_train()? } else { module.f_set_eval()? }
        }
        // libtorch would profile the first pass and compute gradients in another order from then on, to other last
        // digits: a run that is resumed, and begins anew to count passes, must not differ from one that never stopped.
        f_set_graph_executor_optimize(false)?;
        module.forward_ts(&[images])
    }

    /// C and r, from a pass over two grey images with side `size`.
    fn measure(&self, size: i64, params: &Params) -> Result<(i64, i64)> {
        ensure!(size > 0, "backbone.image_size is {size}, but must be at least 1");
        let images = Tensor::zeros([2, 3, size, size], (Kind::Float, params.device()));
        let output = tch::no_grad(|| self.run(&images, false)).map_err(|error| {
            let why = format!("it fails on images of {size} px, see backbone.image_size: {}", gist(&error));
            self.wrong(why)
        })?;
        let shape = output.size();
        match *shape {
            [2, channels] if channels > 0 => Ok((channels, size)),
            [2, channels, height, width]
                if channels > 0 && height > 0 && height == width && size % height == 0 =>
            {
                Ok((channels, size / height))
            }
            _ => Err(self.wrong(format!(
                "it makes {shape:?} of images [2, 3, {size}, {size}], but must make a map [2, C, {size} / r, {size} / \
                 r], or [2, C]; see backbone.image_size"
            ))),
        }
    }

    fn wrong(&self, why: impl Display) -> Error {
        wrong(&self.file, why)
    }
}

/// The error of a file, in words: its settings do not fit, whatever libtorch says of it.
fn wrong(file: &Path, why: impl Display) -> Error {
    Error::msg(format!("backbone.file `{}`: {why}", file.display()))
}

/// What libtorch says, without the places in its own source and in the script's.
fn gist(error: &TchError) -> String {
    let text = error.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let says = |line: &&&str| line.contains("Error:") && !line.contains("Traceback");
    let line = lines.iter().rfind(says).or(lines.first()).map_or("", |line| *line);
    line.to_owned()
}

impl Backbone for TorchScript {
    const NAMES: &'static [&'static str] = &["torchscript"];

    type Options = TorchScriptOptions;

    fn new(_name: &str, options: TorchScriptOptions, params: &Params) -> Result<Self> {
        let TorchScriptOptions { file, image_size, channels, downsample } = options;
        ensure!(
            !file.as_os_str().is_empty(),
            "backbone.file is not set: name the TorchScript file of the backbone"
        );
        let content = fs::read(&file).map_err(|error| wrong(&file, format!("it cannot be read: {error}")))?;
        let (content, buffer_names) = with_buffers(content).map_err(|error| wrong(&file, error))?;
        let mut module =
            CModule::load_data_on_device(&mut content.as_slice(), params.device()).map_err(|error| {
                let why = format!("libtorch cannot load it: {}", gist(&error));
                wrong(&file, why)
            })?;

        let entries = entries(&module, buffer_names).map_err(|error| wrong(&file, error))?;
        let has_statistics = entries.iter().any(|entry| entry.name.ends_with("running_mean"));
        params.adopt(entries);
        let norm = if has_statistics { NormKind::Batch } else { NormKind::Layer };

        let info = BackboneInfo { channels: 0, downsample: 0, norm, sparse: false };
        module.f_set_eval()?;
        let mut script = TorchScript { file, module: RefCell::new(module), train: Cell::new(false), info };
        let (channels, downsample) = match (channels, downsample) {
            (None, None) => script.measure(image_size, params)?,
            (Some(channels), Some(downsample)) => {
                ensure!(
                    channels > 0 && downsample > 0,
                    "backbone.channels and backbone.downsample are {channels} and {downsample}, but must be at least 1"
                );
                (channels, downsample)
            }
            _ => bail!("backbone.channels and backbone.downsample go together: set both, or none"),
        };
        script.info = BackboneInfo { channels, downsample, ..script.info };
        Ok(script)
    }

    fn info(&self) -> BackboneInfo {
        self.info.clone()
    }

    fn forward(&self, images: &Tensor, mask: Option<&Tensor>, train: bool) -> Result<Tensor> {
        ensure!(
            mask.is_none(),
            "a TorchScript has no sparse mode: it cannot be asked for visible cells only"
        );
        let BackboneInfo { channels, downsample, norm, .. } = self.info;
        ensure!(
            !train || norm != NormKind::Batch || ranks::size() == 1,
            "the batch norms of a TorchScript look at their own rank's images alone: train it in one process"
        );
        let (given, output) = (images.size(), self.run(images, train));
        let output = output.with_context(|| format!("backbone.file `{}`", self.file.display()))?;
        let shape = output.size();
        match (given.as_slice(), shape.as_slice()) {
            (&[batch, _, height, width], &[b, c, h, w])
                if [b, c] == [batch, channels] && [h, w] == [height / downsample, width / downsample] =>
            {
                Ok(output)
            }
            (&[batch, ..], &[b, c]) if [b, c] == [batch, channels] => Ok(output.view([b, c, 1, 1])),
            _ => Err(self.wrong(format!(
                "it makes {shape:?} of images {given:?}, but backbone.channels is {channels} and backbone.downsample \
                 is {downsample} (found with images of backbone.image_size, unless they were set)"
            ))),
        }
    }
}

/// The parameters and buffers of `module`, under its own names: the very tensors that it computes with. A parameter
/// that wants no gradient counts as a buffer, which is saved but not trained. What has two names goes by the first.
fn entries(module: &CModule, buffer_names: Vec<String>) -> Result<Vec<Entry>> {
    let parameters = module.named_parameters()?.into_iter().map(|(name, tensor)| {
        let kind = if tensor.requires_grad() { EntryKind::Parameter } else { EntryKind::Buffer };
        Entry { name, kind, tensor }
    });
    let buffers = match buffer_names.len() {
        0 => Vec::new(),
        count => match module.method_is::<IValue>(BUFFERS, &[])? {
            IValue::TensorList(buffers) if buffers.len() == count => buffers,
            _ => bail!("its {count} buffers cannot be reached"),
        },
    };
    let buffers = buffer_names.into_iter().zip(buffers);
    let buffers = buffers.map(|(name, tensor)| Entry { name, kind: EntryKind::Buffer, tensor });

    let mut seen = Vec::new();
    let mut all: Vec<Entry> = parameters.chain(buffers).collect();
    all.retain(|entry| {
        let (place, new) = (entry.tensor.data_ptr(), !seen.contains(&entry.tensor.data_ptr()));
        seen.push(place);
        new || entry.tensor.numel() == 0
    });
    let mut trained = all.iter().filter(|entry| entry.kind == EntryKind::Parameter).peekable();
    ensure!(
        trained.peek().is_some(),
        "it has no parameter to train: torch.jit.freeze and torch.jit.optimize_for_inference leave none"
    );
    if let Some(other) = trained.find(|entry| entry.tensor.kind() != Kind::Float) {
        bail!("its parameter {} is {:?}: save the model in float32", other.name, other.tensor.kind());
    }
    Ok(all)
}
