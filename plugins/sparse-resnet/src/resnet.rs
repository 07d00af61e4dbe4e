//! Deep residual networks (He et al., arXiv 1512.03385; Wide ResNet, arXiv 1605.07146), dense and sparse.
//!
//! Parameters have timm's names, shapes and initial values, so that weights go both ways. Stride sits in the 3×3
//! convolution of a bottleneck, as in timm and torchvision.

use jepa_plugin_api::nn::{BatchNorm, Conv2d, ConvOptions, Init};
use jepa_plugin_api::{Backbone, BackboneInfo, NormKind, Params, Result, bail, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sparse_conv::FeatureMap;
use tch::Tensor;

/// The keys under `backbone.`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ResNetOptions {
    /// First layers: `imagenet` (7×7 convolution of stride 2 and max-pool) or `small` (3×3 convolution of stride 1),
    /// for images of 32 to 96 px.
    pub stem: Stem,
    /// Channels of the stem and of the first stage; every further stage has twice as many.
    pub width: i64,
    /// Blocks in each stage, one to four stages; by default the architecture's own. Every stage after the first
    /// halves the map, so fewer stages leave a finer one.
    pub depths: Option<Vec<usize>>,
    /// Begin with the last batch norm of each residual branch at zero, so that every block begins as the identity.
    pub zero_init_residual: bool,
}

impl Default for ResNetOptions {
    fn default() -> Self {
        ResNetOptions { stem: Stem::Imagenet, width: 64, depths: None, zero_init_residual: true }
    }
}

/// The first layers of a ResNet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Stem {
    /// 7×7 convolution of stride 2, then 3×3 max-pool of stride 2: a quarter of the image's side.
    Imagenet,
    /// 3×3 convolution of stride 1: the image's own side.
    Small,
}

/// What an architecture's name stands for.
#[derive(Clone, Copy, Debug)]
pub struct Architecture {
    /// Kind of its residual blocks.
    pub block: Block,
    /// Blocks in each of its four stages.
    pub depths: [usize; 4],
    /// Channels inside a bottleneck of the first stage at width 64.
    pub base_width: i64,
}

/// The two kinds of residual block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// 3×3, 3×3.
    Basic,
    /// 1×1, 3×3, 1×1 with four times the channels at the end.
    Bottleneck,
}

impl Block {
    /// Channels that a block gives out, over those of its stage.
    pub fn expansion(self) -> i64 {
        match self {
            Block::Basic => 1,
            Block::Bottleneck => 4,
        }
    }
}

impl Architecture {
    /// The architecture that timm calls `name`.
    pub fn named(name: &str) -> Option<Self> {
        let (block, depths, base_width) = match name {
            "resnet18" => (Block::Basic, [2, 2, 2, 2], 64),
            "resnet34" => (Block::Basic, [3, 4, 6, 3], 64),
            "resnet50" => (Block::Bottleneck, [3, 4, 6, 3], 64),
            "resnet101" => (Block::Bottleneck, [3, 4, 23, 3], 64),
            "resnet152" => (Block::Bottleneck, [3, 8, 36, 3], 64),
            "wide_resnet50_2" => (Block::Bottleneck, [3, 4, 6, 3], 128),
            _ => return None,
        };
        Some(Architecture { block, depths, base_width })
    }
}

/// A convolution and the batch norm behind it.
struct ConvNorm {
    conv: Conv2d,
    norm: BatchNorm,
}

impl ConvNorm {
    /// "Same" padding, no bias; the norm begins with scale `gain`.
    fn new(conv: &Params, norm: &Params, channels: (i64, i64), kernel: i64, stride: i64, gain: f64) -> Self {
        let options =
            ConvOptions { stride, padding: kernel / 2, bias: false, init: Init::KaimingFanOut, groups: 1 };
        ConvNorm {
            conv: Conv2d::new(conv, channels.0, channels.1, kernel, options),
            norm: BatchNorm::with_weight(norm, channels.1, gain),
        }
    }

    fn forward(&self, x: &FeatureMap, train: bool) -> Result<FeatureMap> {
        x.conv(&self.conv).batch_norm(&self.norm, train)
    }

    fn forward_relu(&self, x: &FeatureMap, train: bool) -> Result<FeatureMap> {
        x.conv(&self.conv).batch_norm_relu(&self.norm, train)
    }
}

/// x ← ReLU(x + branch(x)), with a 1×1 convolution on the shortcut where the shape changes.
struct Residual {
    branch: Vec<ConvNorm>,
    downsample: Option<ConvNorm>,
}

impl Residual {
    /// `inner` are the channels inside a bottleneck, `out` those that leave the block.
    fn new(params: &Params, block: Block, plan: BlockPlan) -> Self {
        let BlockPlan { channels_in, inner, out, stride, last_gain } = plan;
        let shapes = match block {
            Block::Basic => vec![(channels_in, out, 3, stride), (out, out, 3, 1)],
            Block::Bottleneck => {
                vec![(channels_in, inner, 1, 1), (inner, inner, 3, stride), (inner, out, 1, 1)]
            }
        };
        let last = shapes.len();
        let branch = shapes.into_iter().zip(1..).map(|((from, to, kernel, stride), i)| {
            let gain = if i == last { last_gain } else { 1.0 };
            let (conv, norm) = (params.sub(format!("conv{i}")), params.sub(format!("bn{i}")));
            ConvNorm::new(&conv, &norm, (from, to), kernel, stride, gain)
        });
        let branch = branch.collect();
        let shortcut = || {
            let params = params.sub("downsample");
            ConvNorm::new(&params.sub("0"), &params.sub("1"), (channels_in, out), 1, stride, 1.0)
        };
        let downsample = (stride != 1 || channels_in != out).then(shortcut);
        Residual { branch, downsample }
    }

    fn forward(&self, x: &FeatureMap, train: bool) -> Result<FeatureMap> {
        let (last, first) = self.branch.split_last().expect("a branch has at least two layers");
        let mut y = first[0].forward_relu(x, train)?;
        for layer in &first[1..] {
            y = layer.forward_relu(&y, train)?;
        }
        let y = y.conv(&last.conv);
        match &self.downsample {
            None => y.batch_norm_add_relu(&last.norm, x, train),
            Some(shortcut) => y.batch_norm_add_relu(&last.norm, &shortcut.forward(x, train)?, train),
        }
    }
}

struct BlockPlan {
    channels_in: i64,
    inner: i64,
    out: i64,
    stride: i64,
    last_gain: f64,
}

/// A ResNet up to its last feature map, without pooling and classifier.
pub struct ResNet {
    stem: ConvNorm,
    max_pool: bool,
    /// `layer1` to `layer4`.
    stages: Vec<Vec<Residual>>,
    info: BackboneInfo,
}

impl Backbone for ResNet {
    const NAMES: &'static [&'static str] =
        &["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"];

    type Options = ResNetOptions;

    fn new(name: &str, options: ResNetOptions, params: &Params) -> Result<Self> {
        let Some(architecture) = Architecture::named(name) else {
            bail!("`{name}` is no ResNet: there are {}", Self::NAMES.join(", "));
        };
        let Architecture { block, base_width, .. } = architecture;
        let ResNetOptions { stem, width, depths, zero_init_residual } = options;
        let depths = depths.unwrap_or_else(|| architecture.depths.to_vec());
        ensure!((1..=8192).contains(&width), "backbone.width is {width}, but must lie in 1..=8192");
        ensure!(
            (1..=4).contains(&depths.len()) && depths.iter().all(|depth| (1..=1000).contains(depth)),
            "backbone.depths is {depths:?}, but must list 1 to 4 stages of 1 block or more"
        );

        let (kernel, stride) = match stem {
            Stem::Imagenet => (7, 2),
            Stem::Small => (3, 1),
        };
        let stem_layer =
            ConvNorm::new(&params.sub("conv1"), &params.sub("bn1"), (3, width), kernel, stride, 1.0);

        let last_gain = if zero_init_residual { 0.0 } else { 1.0 };
        let mut channels_in = width;
        let mut stages = Vec::new();
        for (stage, &depth) in depths.iter().enumerate() {
            let params = params.sub(format!("layer{}", stage + 1));
            let planes = width << stage;
            let (inner, out) = (planes * base_width / 64, planes * block.expansion());
            let mut blocks = Vec::new();
            for i in 0..depth {
                let stride = if stage > 0 && i == 0 { 2 } else { 1 };
                let plan = BlockPlan { channels_in, inner, out, stride, last_gain };
                blocks.push(Residual::new(&params.sub(i.to_string()), block, plan));
                channels_in = out;
            }
            stages.push(blocks);
        }

        let stem_stride = if stem == Stem::Imagenet { 4 } else { 1 };
        let info = BackboneInfo {
            channels: channels_in,
            downsample: stem_stride << (depths.len() - 1),
            norm: NormKind::Batch,
            sparse: true,
        };
        Ok(ResNet { stem: stem_layer, max_pool: stem == Stem::Imagenet, stages, info })
    }

    fn info(&self) -> BackboneInfo {
        self.info.clone()
    }

    fn forward(&self, images: &Tensor, mask: Option<&Tensor>, train: bool) -> Result<Tensor> {
        let images = FeatureMap::images(images, mask, self.info.downsample)?;
        let mut x = self.stem.forward_relu(&images, train)?;
        if self.max_pool {
            x = x.max_pool(3, 2, 1);
        }
        for block in self.stages.iter().flatten() {
            x = block.forward(&x, train)?;
        }
        Ok(x.into_map())
    }
}
