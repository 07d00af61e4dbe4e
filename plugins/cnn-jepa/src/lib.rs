//! CNN-JEPA (Kalapos and Gyires-Tóth, arXiv 2408.07514): a joint-embedding predictive architecture for
//! convolutional networks.
//!
//! One view of each image goes two ways. The context encoder sees some of its cells, in sparse mode; a predictor fills
//! in the features of the others. The target encoder, an exponential moving average of the context encoder, sees the
//! whole image, and says what those features should have been.

mod masks;
mod predictor;
mod projection;

use jepa_plugin_api::nn::{l2_normalize, masked_mean, smooth_l1, spread, truncated_normal};
use jepa_plugin_api::{
    Augmentation, BackboneHandle, Batch, Context, EmaSchedule, Host, Interpolation, Method, Result, Step,
    ViewSpec, bail, ensure,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use masks::on_device;
pub use masks::{MaskOptions, MaskSampler, Masks, Sampling, Strategy};
pub use predictor::{Predictor, PredictorOptions};
pub use projection::Projection;

jepa_plugin_api::export_plugin! { methods: [CnnJepa] }

/// The keys under `method.`; the defaults are the published settings, but for `mask.sampling`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CnnJepaOptions {
    /// Least and greatest share of the image's area that the random crop takes, in (0, 1].
    pub crop_scale: (f64, f64),
    /// Probability of a horizontal flip.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub flip: f64,
    /// Which cells are context and which are targets.
    pub mask: MaskOptions,
    /// The network that predicts target features from context features.
    pub predictor: PredictorOptions,
    /// Put a projection head (1×1 convolution, norm, ReLU) behind the encoders.
    pub projection: bool,
    /// How the target encoder follows the context encoder.
    pub ema: EmaSchedule,
}

impl Default for CnnJepaOptions {
    fn default() -> Self {
        CnnJepaOptions {
            crop_scale: (0.2, 1.0),
            flip: 0.5,
            mask: MaskOptions::default(),
            predictor: PredictorOptions::default(),
            projection: false,
            ema: EmaSchedule::default(),
        }
    }
}

/// The method: context encoder, mask token, predictor, and the target encoder that follows.
pub struct CnnJepa {
    options: CnnJepaOptions,
    masks: MaskSampler,
    context: BackboneHandle,
    projection: Option<Projection>,
    /// `(1, C, 1, 1)`.
    mask_token: Tensor,
    predictor: Predictor,
    target: BackboneHandle,
    target_projection: Option<Projection>,
}

/// What one forward pass gives.
pub struct Output {
    /// Features of the context encoder `(B, C, f, f)`, zero at hidden cells, before the mask token.
    pub context: Tensor,
    /// The predictor's features `(B, C, f, f)`, before normalisation.
    pub prediction: Tensor,
    /// The target encoder's features `(B, C, f, f)`, before normalisation and without a graph.
    pub target: Tensor,
}

impl Method for CnnJepa {
    const NAME: &'static str = "cnn_jepa";
    const ENCODER: &'static str = "target";

    type Options = CnnJepaOptions;

    fn new(options: CnnJepaOptions, host: &mut Host) -> Result<Self> {
        Augmentation { crop_scale: options.crop_scale, ..Augmentation::CROP_AND_FLIP }.check("method")?;
        let context = host.backbone("context")?;
        let target = host.backbone("target")?;
        host.ema("context", "target", options.ema);

        let info = context.info();
        let (channels, norm) = (info.channels, info.norm);
        ensure!(
            info.sparse,
            "CNN-JEPA needs a backbone with a sparse mode: set backbone.name to a sparse one"
        );
        let masks = MaskSampler::new(&options.mask, context.cells(host.facts().image_size)?)?;

        let params = host.params();
        let mask_token = truncated_normal(&[1, channels, 1, 1], 0.02, 0.02, host.device());
        let mask_token = params.parameter("mask_token", mask_token);
        let predictor = Predictor::new(&options.predictor, &params.sub("predictor"), channels, norm)?;
        let head =
            |name: &str| options.projection.then(|| Projection::new(&params.sub(name), channels, norm));
        let (projection, target_projection) = (head("projection"), head("target_projection"));
        if options.projection {
            host.ema("projection", "target_projection", options.ema);
        }
        Ok(CnnJepa { options, masks, context, projection, mask_token, predictor, target, target_projection })
    }

    fn views(&self) -> Vec<ViewSpec> {
        let view = ViewSpec::new("image")
            .random_resized_crop(self.options.crop_scale, Interpolation::Bicubic)
            .horizontal_flip(self.options.flip)
            .normalize_imagenet();
        vec![view]
    }

    fn step(&mut self, batch: &Batch) -> Result<Step> {
        let [images] = batch.views.as_slice() else {
            bail!("CNN-JEPA declares one view, but the batch has {}", batch.views.len());
        };
        self.step_with(images, &self.masks.draw(batch), batch.train)
    }

    fn encode(&mut self, images: &Tensor) -> Result<Tensor> {
        tch::no_grad(|| self.target.pooled(images, false))
    }

    fn examples(&mut self, batch: &Batch) -> Result<Vec<(String, Tensor)>> {
        let [image] = batch.views.as_slice() else { return Ok(Vec::new()) };
        let masks = self.masks.draw(batch).to_device(image.device());
        let size = [image.size()[2], image.size()[3]];
        // Hidden cells are zero, the mean of normalised pixels: grey.
        let shown = |mask: &Tensor| image * mask.to_kind(Kind::Float).upsample_nearest2d(size, None, None);
        Ok(vec![
            ("image".to_owned(), image.shallow_clone()),
            ("context".to_owned(), shown(&masks.context)),
            ("target".to_owned(), shown(&masks.target)),
        ])
    }
}

impl CnnJepa {
    /// Both sides for `images` f32 `(B, 3, S, S)` of which the cells in `context_mask`, bool `(B, 1, f, f)`, are shown
    /// to the context encoder. With a mask on the CPU, nobody waits for a GPU.
    ///
    /// # Errors
    /// Those of the backbones, and of batch norm when a batch shows too little.
    pub fn forward(&self, images: &Tensor, context_mask: &Tensor, train: bool) -> Result<Output> {
        let mut context =
            self.context.forward(images, Some(context_mask), train).context("in the context encoder")?;
        if let Some(projection) = &self.projection {
            context = projection.forward(&context, Some(context_mask), train)?;
        }

        let context_mask = on_device(context_mask, context.device());
        let filled = context.where_self(&context_mask, &self.mask_token.to_kind(context.kind()));
        let prediction = self.predictor.forward(&filled, train);

        // In training mode too, so that its running statistics are its own: parameters are averaged, buffers are not.
        let target = tch::no_grad(|| -> Result<Tensor> {
            let target = self.target.forward(images, None, train).context("in the target encoder")?;
            self.target_projection
                .as_ref()
                .map_or(Ok(target.shallow_clone()), |p| p.forward(&target, None, train))
        })?;
        Ok(Output { context, prediction, target })
    }

    /// The loss and figures of `images` f32 `(B, 3, S, S)` with these masks.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn step_with(&self, images: &Tensor, masks: &Masks, train: bool) -> Result<Step> {
        let output = self.forward(images, &masks.context, train)?;
        let masks = masks.to_device(images.device());

        // Unit vectors at every cell, f32 whatever the precision of the networks.
        let prediction = l2_normalize(&output.prediction.to_kind(Kind::Float), 1);
        let target = l2_normalize(&output.target.to_kind(Kind::Float), 1);
        let per_cell =
            smooth_l1(&prediction, &target, 1.0).sum_dim_intlist([1].as_slice(), true, Kind::Float);
        let loss = masked_mean(&per_cell, &masks.target);

        let share = |mask: &Tensor| mask.to_kind(Kind::Float).mean(Kind::Float);
        Ok(Step::new(loss)
            .metric("context_share", &share(&masks.context))
            .metric("target_share", &share(&masks.target))
            .metric("prediction_spread", &spread(&cells(&prediction)))
            .metric("spread", &spread(&cells(&target))))
    }
}

/// The features `(B, C, f, f)` of each cell as rows `(B f², C)`.
fn cells(map: &Tensor) -> Tensor {
    map.permute([0, 2, 3, 1]).flatten(0, 2)
}
