//! What a method wants to see of each image, declared as data.
//!
//! A method lists its views; the host decodes each image once, draws the random numbers of each view from
//! (seed, epoch, sample, view), and delivers the views as tensors. No plugin touches pixels.

use serde::{Deserialize, Serialize};

/// The mean and standard deviation of ImageNet's RGB channels, in units of [0, 1].
///
/// ```
/// use jepa_plugin_api::{IMAGENET_MEAN_STD, Transform, ViewSpec};
/// let (mean, std) = IMAGENET_MEAN_STD;
/// assert_eq!(ViewSpec::new("view").normalize_imagenet().transforms, [Transform::Normalize { mean, std }]);
/// ```
pub const IMAGENET_MEAN_STD: ([f32; 3], [f32; 3]) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);

/// How pixels are interpolated when an image is resized. Both are antialiased, as Pillow and torchvision do it.
///
/// ```
/// use jepa_plugin_api::{Interpolation, ViewSpec};
/// let view = ViewSpec::new("view").resize_center_crop(0.875, Interpolation::Bicubic);
/// assert_eq!(view.name, "view");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    /// Triangle filter.
    Bilinear,
    /// Catmull-Rom-like cubic with a = -0.5.
    Bicubic,
}

/// One step from the decoded 8-bit RGB image towards a view. Steps run in the order they are listed.
///
/// ```
/// use jepa_plugin_api::{Transform, ViewSpec};
/// let upside_up = Transform::HorizontalFlip { p: 0.5 };
/// assert_eq!(ViewSpec::new("view").then(upside_up.clone()).transforms, [upside_up]);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Transform {
    /// Cut a random box of `scale` × the image's area and an aspect ratio (width / height) in `ratio`, log-uniform,
    /// and resize it to the view's size.
    RandomResizedCrop {
        /// Least and greatest share of the image's area, in (0, 1].
        scale: (f64, f64),
        /// Least and greatest width / height.
        ratio: (f64, f64),
        /// Resampling filter.
        interpolation: Interpolation,
    },
    /// Resize the shorter side to `size / crop_ratio` and cut the view's size from the centre: what evaluation sees.
    ResizeCenterCrop {
        /// Side of the crop over the shorter side of the resized image, in (0, 1]; 0.875 for 224 out of 256.
        crop_ratio: f64,
        /// Resampling filter.
        interpolation: Interpolation,
    },
    /// Mirror left and right with probability `p`.
    HorizontalFlip {
        /// Probability, in [0, 1].
        p: f64,
    },
    /// With probability `p`, change brightness, contrast, saturation and hue in a random order, as torchvision's
    /// `ColorJitter` does on 8-bit RGB: each of the first three by a factor drawn from [max(0, 1 − strength),
    /// 1 + strength], hue by a turn drawn from [−hue, hue] of the whole circle.
    ColorJitter {
        /// Probability, in [0, 1].
        p: f64,
        /// Strength, ≥ 0.
        brightness: f64,
        /// Strength, ≥ 0.
        contrast: f64,
        /// Strength, ≥ 0.
        saturation: f64,
        /// Largest turn, in [0, 0.5].
        hue: f64,
    },
    /// With probability `p`, give all three channels the luma of the pixel (ITU-R 601-2).
    Grayscale {
        /// Probability, in [0, 1].
        p: f64,
    },
    /// With probability `p`, blur with a Gaussian whose standard deviation is drawn from `sigma`.
    GaussianBlur {
        /// Probability, in [0, 1].
        p: f64,
        /// Least and greatest standard deviation, in pixels of the view.
        sigma: (f64, f64),
    },
    /// With probability `p`, invert every channel value at or above `threshold`.
    Solarize {
        /// Probability, in [0, 1].
        p: f64,
        /// The least value that is inverted.
        threshold: u8,
    },
    /// Scale to [0, 1], subtract `mean`, divide by `std`, per RGB channel. Last, and at most once.
    Normalize {
        /// Mean of each channel.
        mean: [f32; 3],
        /// Standard deviation of each channel, > 0.
        std: [f32; 3],
    },
}

/// One view of an image: the transforms that make it, and its name in logs and example images.
///
/// The host delivers it as f32 `(B, 3, S, S)`, where S is `data.size`.
///
/// ```
/// use jepa_plugin_api::{Interpolation, ViewSpec};
/// let view = ViewSpec::new("image")
///     .random_resized_crop((0.2, 1.0), Interpolation::Bicubic)
///     .horizontal_flip(0.5)
///     .normalize_imagenet();
/// assert_eq!(view.transforms.len(), 3);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ViewSpec {
    /// What people call this view.
    pub name: String,
    /// The steps, in order.
    pub transforms: Vec<Transform>,
}

impl ViewSpec {
    /// A view without any step yet.
    pub fn new(name: impl Into<String>) -> Self {
        ViewSpec { name: name.into(), transforms: Vec::new() }
    }

    /// Appends a step.
    pub fn then(mut self, transform: Transform) -> Self {
        self.transforms.push(transform);
        self
    }

    /// Appends [`Transform::RandomResizedCrop`] with aspect ratios from 3/4 to 4/3.
    pub fn random_resized_crop(self, scale: (f64, f64), interpolation: Interpolation) -> Self {
        self.then(Transform::RandomResizedCrop { scale, ratio: (3.0 / 4.0, 4.0 / 3.0), interpolation })
    }

    /// Appends [`Transform::ResizeCenterCrop`].
    pub fn resize_center_crop(self, crop_ratio: f64, interpolation: Interpolation) -> Self {
        self.then(Transform::ResizeCenterCrop { crop_ratio, interpolation })
    }

    /// Appends [`Transform::HorizontalFlip`].
    pub fn horizontal_flip(self, p: f64) -> Self {
        self.then(Transform::HorizontalFlip { p })
    }

    /// Appends [`Transform::ColorJitter`].
    pub fn color_jitter(self, p: f64, brightness: f64, contrast: f64, saturation: f64, hue: f64) -> Self {
        self.then(Transform::ColorJitter { p, brightness, contrast, saturation, hue })
    }

    /// Appends [`Transform::Grayscale`].
    pub fn grayscale(self, p: f64) -> Self {
        self.then(Transform::Grayscale { p })
    }

    /// Appends [`Transform::GaussianBlur`] with standard deviations of 0.1 to 2 pixels, as SimCLR, BYOL and VICReg
    /// have it.
    pub fn gaussian_blur(self, p: f64) -> Self {
        self.then(Transform::GaussianBlur { p, sigma: (0.1, 2.0) })
    }

    /// Appends [`Transform::Solarize`] of values from 128 on.
    pub fn solarize(self, p: f64) -> Self {
        self.then(Transform::Solarize { p, threshold: 128 })
    }

    /// Appends [`Transform::Normalize`] with ImageNet's statistics.
    pub fn normalize_imagenet(self) -> Self {
        let (mean, std) = IMAGENET_MEAN_STD;
        self.then(Transform::Normalize { mean, std })
    }
}
