//! Cutting a box out of an image and resizing it, with Pillow's antialiased filters.

use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use jepa_plugin_api::Interpolation;

use super::decode::Rgb;

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

/// Resizes with scratch memory of its own: one per thread.
#[derive(Debug, Default)]
pub struct Resampler(Resizer);

impl Resampler {
    /// Cuts `crop` out of `image` and resizes it to `width × height` RGB pixels, which replace those of `out`.
    ///
    /// The box is cut first, so no pixel outside it has a say (as in torchvision's `resized_crop`, unlike Pillow's
    /// `resize(box=…)`).
    ///
    /// # Panics
    /// When the box is empty or reaches beyond the image.
    pub fn resize(
        &mut self,
        image: &Rgb,
        crop: CropBox,
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
        let source = TypedImageRef::<U8x3>::from_buffer(image.width, image.height, &image.pixels)
            .expect("an image has 3 bytes per pixel");
        let source = TypedCroppedImage::new(source, crop.left, crop.top, crop.width, crop.height)
            .expect("a crop lies inside its image");
        let mut target = TypedImage::<U8x3>::from_buffer(width, height, &mut out.pixels)
            .expect("the target has 3 bytes per pixel");
        self.0.resize_typed(&source, &mut target, &options).expect("both images have the same kind of pixel");
    }
}
