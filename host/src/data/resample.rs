//! Cutting a box out of an image and resizing it, with Pillow's antialiased filters.

use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use jepa_plugin_api::Interpolation;

use super::decode::{Place, Region, Rgb};

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
        match image.place(crop) {
            Place::Pixels(crop) => {
                self.convolve(image.pixels, crop, None, size, interpolation, out);
            }
            Place::Fractions(left, top, width, height) => {
                let (x, y) = (left.floor(), top.floor());
                let (right, bottom) = ((left + width).ceil(), (top + height).ceil());
                let pixels = CropBox {
                    top: y as u32,
                    left: x as u32,
                    height: (bottom - y) as u32,
                    width: (right - x) as u32,
                };
                let part = Some([left - x, top - y, width, height]);
                self.convolve(image.pixels, pixels, part, size, interpolation, out);
            }
        }
    }

    /// What is in the middle, `side × side` pixels, of the whole image resized to `width × height`, none of them less than
    /// `side`; the rest is not made. torchvision rounds the corner half to even.
    ///
    /// # Panics
    /// When the image is empty.
    pub fn resize_center(
        &mut self,
        image: &Rgb,
        (width, height): (u32, u32),
        side: u32,
        interpolation: Interpolation,
        out: &mut Rgb,
    ) {
        let range = |from: u32, to: u32| {
            let scale = f64::from(from) / f64::from(to);
            let corner = (f64::from(to - side) / 2.0).round_ties_even();
            (corner * scale, f64::from(side) * scale)
        };
        let ((left, part_width), (top, part_height)) =
            (range(image.width, width), range(image.height, height));
        let whole = CropBox { top: 0, left: 0, height: image.height, width: image.width };
        let part = Some([left, top, part_width, part_height]);
        self.convolve(image, whole, part, (side, side), interpolation, out);
    }

    /// Resizes `part` (left, top, width, height; without it, all) of the pixels in `crop`, none of which is left out.
    fn convolve(
        &mut self,
        image: &Rgb,
        crop: CropBox,
        part: Option<[f64; 4]>,
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
        let mut options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter)).use_alpha(false);
        if let Some([left, top, width, height]) = part {
            options = options.crop(left, top, width, height);
        }
        let source = TypedImageRef::<U8x3>::from_buffer(image.width, image.height, &image.pixels)
            .expect("an image has 3 bytes per pixel");
        let source = TypedCroppedImage::new(source, crop.left, crop.top, crop.width, crop.height)
            .expect("a crop lies inside its image");
        let mut target = TypedImage::<U8x3>::from_buffer(width, height, &mut out.pixels)
            .expect("the target has 3 bytes per pixel");
        self.0.resize_typed(&source, &mut target, &options).expect("a crop lies inside its image");
    }
}
