//! ConvNeXt (Liu et al., arXiv 2201.03545), dense and sparse as in SparK (Tian et al., arXiv 2301.03580).
//!
//! Parameters have timm's names and shapes, so that weights go both ways. timm's model also has `head.norm`, a layer
//! norm of pooled features before the classifier: it is no part of the feature map, and is not here. timm's model
//! without it is `create_model(name, num_classes=0)` after `reset_classifier(0, "", reset_other=True)`.

use jepa_plugin_api::nn::{Conv2d, ConvOptions, Init, LayerNorm2d, Linear};
use jepa_plugin_api::{Backbone, BackboneInfo, NormKind, Params, Result, bail, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sparse_conv::FeatureMap;
use tch::{Kind, Tensor};

/// The keys under `backbone.`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ConvNeXtOptions {
    /// First layer: `imagenet` (4×4 convolution of stride 4) or `small` (3×3 convolution of stride 1), for images of 32
    /// to 96 px. With four stages a cell of the last map spans 32 px or 8 px.
    pub stem: Stem,
    /// Channels of the stem and of the first stage, by default the architecture's own; every further stage has twice
    /// as many.
    pub width: Option<i64>,
    /// Blocks in each stage, one to four stages; by default the architecture's own. Every stage after the first
    /// halves the map, so fewer stages leave a finer one.
    pub depths: Option<Vec<usize>>,
    /// Stochastic depth: probability, in [0, 1), with which the last block leaves out its branch for an image in
    /// training. It rises linearly from 0 in the first block.
    pub drop_path: f64,
    /// Initial scale of each residual branch.
    pub layer_scale: f64,
}

impl Default for ConvNeXtOptions {
    fn default() -> Self {
        ConvNeXtOptions { stem: Stem::Imagenet, width: None, depths: None, drop_path: 0.0, layer_scale: 1e-6 }
    }
}

/// The first layer of a ConvNeXt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Stem {
    /// 4×4 convolution of stride 4: a quarter of the image's side.
    Imagenet,
    /// 3×3 convolution of stride 1: the image's own side. timm has no such stem.
    Small,
}

/// What an architecture's name stands for.
#[derive(Clone, Copy, Debug)]
pub struct Architecture {
    /// Blocks in each of its four stages.
    pub depths: [usize; 4],
    /// Channels of the first stage.
    pub width: i64,
    /// Whether timm keeps the weights of the two pointwise layers as those of 1×1 convolutions, `(out, in, 1, 1)`, or
    /// of linear layers, `(out, in)`. They compute the same.
    pub conv_mlp: bool,
}

impl Architecture {
    /// The architecture that timm calls `name`.
    pub fn named(name: &str) -> Option<Self> {
        let (depths, width, conv_mlp) = match name {
            "convnext_atto" => ([2, 2, 6, 2], 40, true),
            "convnext_femto" => ([2, 2, 6, 2], 48, true),
            "convnext_pico" => ([2, 2, 6, 2], 64, true),
            "convnext_nano" => ([2, 2, 8, 2], 80, true),
            "convnext_tiny" => ([3, 3, 9, 3], 96, false),
            "convnext_small" => ([3, 3, 27, 3], 96, false),
            "convnext_base" => ([3, 3, 27, 3], 128, false),
            "convnext_large" => ([3, 3, 27, 3], 192, false),
            _ => return None,
        };
        Some(Architecture { depths, width, conv_mlp })
    }
}

/// A linear map of the channels of each position.
enum Pointwise {
    Conv(Conv2d),
    Linear(Linear),
}

impl Pointwise {
    fn new(params: &Params, channels_in: i64, channels_out: i64, conv: bool) -> Self {
        match conv {
            true => Self::Conv(Conv2d::new(params, channels_in, channels_out, 1, convolution(1, 0))),
            false => Self::Linear(Linear::with_init(params, channels_in, channels_out, true, Init::Normal)),
        }
    }

    /// `(…, in)` to `(…, out)`.
    fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Pointwise::Conv(conv) => conv.pointwise(x),
            Pointwise::Linear(linear) => linear.forward(x),
        }
    }
}

fn convolution(stride: i64, padding: i64) -> ConvOptions {
    ConvOptions { stride, padding, groups: 1, bias: true, init: Init::Normal }
}

/// x ← x + γ · W₂ GELU(W₁ LayerNorm(depthwise 7×7 (x))), the paper's figure 4.
struct Block {
    conv_dw: Conv2d,
    norm: LayerNorm2d,
    fc1: Pointwise,
    fc2: Pointwise,
    /// γ `(C)`: the layer scale.
    gamma: Tensor,
    drop_path: f64,
}

impl Block {
    fn new(params: &Params, channels: i64, conv_mlp: bool, layer_scale: f64, drop_path: f64) -> Self {
        let gamma = Tensor::full([channels], layer_scale, (Kind::Float, params.device()));
        let gamma = params.parameter("gamma", gamma);
        let depthwise = ConvOptions { groups: channels, ..convolution(1, 3) };
        let conv_dw = Conv2d::new(&params.sub("conv_dw"), channels, channels, 7, depthwise);
        let norm = LayerNorm2d::new(&params.sub("norm"), channels);
        let mlp = params.sub("mlp");
        let fc1 = Pointwise::new(&mlp.sub("fc1"), channels, 4 * channels, conv_mlp);
        let fc2 = Pointwise::new(&mlp.sub("fc2"), 4 * channels, channels, conv_mlp);
        Block { conv_dw, norm, fc1, fc2, gamma, drop_path }
    }

    fn forward(&self, x: &FeatureMap, train: bool) -> FeatureMap {
        let mut branch = x.conv(&self.conv_dw).each_position(|x| {
            let inner = self.fc1.forward(&self.norm.last_dimension(x)).gelu("none");
            self.fc2.forward(&inner) * &self.gamma
        });
        if train && self.drop_path > 0.0 {
            branch = branch.drop_path(self.drop_path);
        }
        x.add(&branch)
    }
}

/// Layer norm and a 2×2 convolution of stride 2, then blocks; the first stage has blocks only.
struct Stage {
    downsample: Option<(LayerNorm2d, Conv2d)>,
    blocks: Vec<Block>,
}

impl Stage {
    fn forward(&self, x: FeatureMap, train: bool) -> FeatureMap {
        let x = match &self.downsample {
            None => x,
            Some((norm, conv)) => x.layer_norm(norm).conv(conv),
        };
        self.blocks.iter().fold(x, |x, block| block.forward(&x, train))
    }
}

/// A ConvNeXt up to its last feature map, without pooling, final norm and classifier.
pub struct ConvNeXt {
    stem: (Conv2d, LayerNorm2d),
    stages: Vec<Stage>,
    info: BackboneInfo,
}

impl Backbone for ConvNeXt {
    const NAMES: &'static [&'static str] = &[
        "convnext_atto",
        "convnext_femto",
        "convnext_pico",
        "convnext_nano",
        "convnext_tiny",
        "convnext_small",
        "convnext_base",
        "convnext_large",
    ];

    type Options = ConvNeXtOptions;

    fn new(name: &str, options: ConvNeXtOptions, params: &Params) -> Result<Self> {
        let Some(architecture) = Architecture::named(name) else {
            bail!("`{name}` is no ConvNeXt: there are {}", Self::NAMES.join(", "));
        };
        let ConvNeXtOptions { stem, width, depths, drop_path, layer_scale } = options;
        let width = width.unwrap_or(architecture.width);
        let depths = depths.unwrap_or_else(|| architecture.depths.to_vec());
        ensure!((1..=8192).contains(&width), "backbone.width is {width}, but must lie in 1..=8192");
        ensure!(
            (1..=4).contains(&depths.len()) && depths.iter().all(|depth| (1..=1000).contains(depth)),
            "backbone.depths is {depths:?}, but must list 1 to 4 stages of 1 block or more"
        );
        ensure!((0.0..1.0).contains(&drop_path), "backbone.drop_path is {drop_path}, but must lie in [0, 1)");
        ensure!(
            layer_scale.is_finite(),
            "backbone.layer_scale is {layer_scale}, but must be a finite number"
        );

        let (kernel, stem_stride, padding) = match stem {
            Stem::Imagenet => (4, 4, 0),
            Stem::Small => (3, 1, 1),
        };
        let stem = params.sub("stem");
        let stem = (
            Conv2d::new(&stem.sub("0"), 3, width, kernel, convolution(stem_stride, padding)),
            LayerNorm2d::new(&stem.sub("1"), width),
        );

        // The rate of a block rises by this much from one to the next, over all stages.
        let rise = drop_path / (depths.iter().sum::<usize>() - 1).max(1) as f64;
        let mut drop_path = (0..).map(|block| rise * block as f64);
        let mut channels = width;
        let mut stages = Vec::new();
        for (stage, &depth) in depths.iter().enumerate() {
            let params = params.sub(format!("stages.{stage}"));
            let downsample = (stage > 0).then(|| {
                let params = params.sub("downsample");
                let norm = LayerNorm2d::new(&params.sub("0"), channels);
                (norm, Conv2d::new(&params.sub("1"), channels, 2 * channels, 2, convolution(2, 0)))
            });
            channels = width << stage;
            let blocks = (0..depth).zip(&mut drop_path).map(|(i, drop_path)| {
                let params = params.sub(format!("blocks.{i}"));
                Block::new(&params, channels, architecture.conv_mlp, layer_scale, drop_path)
            });
            stages.push(Stage { downsample, blocks: blocks.collect() });
        }

        let downsample = stem_stride << (depths.len() - 1);
        let info = BackboneInfo { channels, downsample, norm: NormKind::Layer, sparse: true };
        Ok(ConvNeXt { stem, stages, info })
    }

    fn info(&self) -> BackboneInfo {
        self.info.clone()
    }

    fn forward(&self, images: &Tensor, mask: Option<&Tensor>, train: bool) -> Result<Tensor> {
        let (shape, r) = (images.size(), self.info.downsample);
        ensure!(
            shape.iter().skip(2).all(|side| *side >= r),
            "images {shape:?} have no room for a cell of {r} px: raise data.size, or set backbone.stem = \"small\""
        );
        let images = FeatureMap::images(images, mask, r)?;
        let x = images.conv(&self.stem.0).layer_norm(&self.stem.1);
        Ok(self.stages.iter().fold(x, |x, stage| stage.forward(x, train)).into_map())
    }
}
