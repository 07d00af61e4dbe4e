//! The augmentations that joint-embedding methods share, as options of a method.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Interpolation, Result, ViewSpec, ensure};

/// How a view is augmented: crop, flip, colour jitter, grey, blur, solarise, in this order. A step of probability 0 is
/// left out.
///
/// ```
/// use jepa_plugin_api::Augmentation;
/// let gentle = Augmentation { jitter: 0.0, blur: 0.0, ..Augmentation::SIMCLR };
/// let view = gentle.view("first");
/// assert_eq!(view.transforms.len(), 4, "crop, flip, grey, normalise");
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Augmentation {
    /// Least and greatest share of the image's area that the random crop takes, in (0, 1].
    pub crop_scale: (f64, f64),
    /// Probability of a horizontal flip.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub flip: f64,
    /// Probability of colour jitter.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub jitter: f64,
    /// Strength of the jitter in brightness: factors lie in 1 ± this.
    #[schemars(range(min = 0.0))]
    pub brightness: f64,
    /// Strength of the jitter in contrast.
    #[schemars(range(min = 0.0))]
    pub contrast: f64,
    /// Strength of the jitter in saturation.
    #[schemars(range(min = 0.0))]
    pub saturation: f64,
    /// Greatest turn of the hue, as a share of the circle.
    #[schemars(range(min = 0.0, max = 0.5))]
    pub hue: f64,
    /// Probability of grey.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub grayscale: f64,
    /// Probability of a Gaussian blur of 0.1 to 2 pixels; too much for images of 32 px.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub blur: f64,
    /// Probability of inverting values from 128 on.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub solarize: f64,
}

impl Default for Augmentation {
    fn default() -> Self {
        Augmentation::SIMCLR
    }
}

impl Augmentation {
    /// Both views of SimCLR (arXiv 2002.05709, appendix A), with colour strength 1.
    pub const SIMCLR: Augmentation = Augmentation {
        crop_scale: (0.08, 1.0),
        flip: 0.5,
        jitter: 0.8,
        brightness: 0.8,
        contrast: 0.8,
        saturation: 0.8,
        hue: 0.2,
        grayscale: 0.2,
        blur: 0.5,
        solarize: 0.0,
    };

    /// The first view of BYOL (arXiv 2006.07733, appendix B).
    pub const BYOL_1: Augmentation = Augmentation {
        brightness: 0.4,
        contrast: 0.4,
        saturation: 0.2,
        hue: 0.1,
        blur: 1.0,
        ..Augmentation::SIMCLR
    };

    /// The second view of BYOL.
    pub const BYOL_2: Augmentation = Augmentation { blur: 0.1, solarize: 0.2, ..Augmentation::BYOL_1 };

    /// Both views of VICReg (arXiv 2105.04906, appendix C).
    pub const VICREG: Augmentation = Augmentation { blur: 0.5, solarize: 0.1, ..Augmentation::BYOL_1 };

    /// Crop and flip alone.
    pub const CROP_AND_FLIP: Augmentation =
        Augmentation { jitter: 0.0, grayscale: 0.0, blur: 0.0, ..Augmentation::SIMCLR };

    /// Checks what the schema of the options cannot say. `key` is where they stand, such as `method.augment`.
    ///
    /// # Errors
    /// Names the key under `key` whose value makes no sense.
    ///
    /// ```
    /// use jepa_plugin_api::Augmentation;
    /// let backwards = Augmentation { crop_scale: (1.0, 0.2), ..Augmentation::SIMCLR };
    /// let error = backwards.check("method.augment").unwrap_err().to_string();
    /// assert!(error.starts_with("method.augment.crop_scale is [1, 0.2]"), "{error}");
    /// ```
    pub fn check(&self, key: &str) -> Result<()> {
        let (low, high) = self.crop_scale;
        ensure!(
            0.0 < low && low <= high && high <= 1.0,
            "{key}.crop_scale is [{low}, {high}], but must be two rising shares in (0, 1]"
        );
        Ok(())
    }

    /// The view that this makes, normalised with ImageNet's statistics.
    pub fn view(&self, name: &str) -> ViewSpec {
        let mut view = ViewSpec::new(name).random_resized_crop(self.crop_scale, Interpolation::Bilinear);
        if self.flip > 0.0 {
            view = view.horizontal_flip(self.flip);
        }
        if self.jitter > 0.0 {
            view = view.color_jitter(self.jitter, self.brightness, self.contrast, self.saturation, self.hue);
        }
        if self.grayscale > 0.0 {
            view = view.grayscale(self.grayscale);
        }
        if self.blur > 0.0 {
            view = view.gaussian_blur(self.blur);
        }
        if self.solarize > 0.0 {
            view = view.solarize(self.solarize);
        }
        view.normalize_imagenet()
    }
}
