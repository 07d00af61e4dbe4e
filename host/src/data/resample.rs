//! Cutting a box out of an image and resizing it, with Pillow's antialiased filters.

use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use jepa_plugin_api::Interpolation;

use super::decode::{Region, Rgb};

/// A box of whole pixels inside an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CropBox {
    /// First row.
    pub top: u32,
    /// First column.
    pub left: u32,
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
}

impl CropBox {
    /// The smallest box that has both.
    pub fn around(self, other: CropBox) -> CropBox {
        let (top, left) = (self.top.min(other.top), self.left.min(other.left));
        let bottom = (self.top + self.height).max(other.top + other.height);
        let right = (self.left + self.width).max(other.left + other.width);
        CropBox { top, left, height: bottom - top, width: right - left }
    }
}

/// Resizes with scratch memory of its own: one per thread.
#[derive(Debug, Default)]
pub struct Resampler(Resizer);

impl Resampler {
    /// Cuts `crop` out of `image` and resizes it to `width × height` RGB pixels, which replace those of `out`.
    ///
    /// The box is cut first, so no pixel outside it has a say, as in torchvision's `resized_crop` and unlike Pillow's
    /// `resize(box=…)`. Of an image that was made smaller before, the pixels count on which the box's edges fall.
    ///
    /// # Panics
    /// When the box is empty or reaches beyond the part of the image.
    pub fn resize(
        &mut self,
        image: &Region,
        crop: CropBox,
        size: (u32, u32),
        interpolation: Interpolation,
        out: &mut Rgb,
    ) {
        let (pixels, part) = image.place(crop).split();
        self.convolve(image.pixels, pixels, part, size, interpolation, out);
    }

    /// Resizes `part` (left, top, width, height) of the pixels in `crop`, all of which have a say.
    pub(super) fn convolve(
        &mut self,
        image: &Rgb,
        crop: CropBox,
        [x, y, wide, high]: [f64; 4],
        (width, height): (u32, u32),
        interpolation: Interpolation,
        out: &mut Rgb,
    ) {
        out.width = width;
        out.height = height;
        out.pixels.resize(width as usize * height as usize * 3, 0);
        let filter = match interpolation {
            Interpolation::Bilinear => FilterType::Bilinear,
            Interpolation::Bicubic => FilterType::CatmullRom,
        };
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter)).use_alpha(false);
        let options = options.crop(x, y, wide, high);
        let source = TypedImageRef::<U8x3>::from_buffer(image.width, image.height, &image.pixels)
            .expect("an image has 3 bytes per pixel");
        let source = TypedCroppedImage::new(source, crop.left, crop.top, crop.width, crop.height)
            .expect("a crop lies inside its image");
        let mut target = TypedImage::<U8x3>::from_buffer(width, height, &mut out.pixels)
            .expect("the target has 3 bytes per pixel");
        self.0.resize_typed(&source, &mut target, &options).expect("a crop lies inside its image");
    }
}
