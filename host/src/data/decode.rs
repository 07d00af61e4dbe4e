//! JPEG and PNG files to 8-bit RGB, as Pillow's `Image.open(…).convert("RGB")` does it: of a JPEG, byte for byte.
//!
//! Grey becomes three equal channels, palettes are expanded, alpha is dropped (not blended), and an EXIF orientation
//! is left alone, because Pillow leaves it alone too. One difference is meant: 16-bit samples keep their high byte,
//! where Pillow clips grey ones at 255. What the file is called plays no part; its first bytes say what it is.
//!
//! An image is [opened](Encoded::open), which tells its size, and then as much of it is [decoded](Encoded::decode) as is
//! needed.

use std::any::Any;
use std::cell::Cell;
use std::io::Cursor;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

use image::codecs::jpeg::JpegDecoder;
use image::codecs::png::PngDecoder;
use image::{ColorType, ImageDecoder, ImageFormat, Limits};
use libjpeg_turbo_rs::{DecodeLimits, Decoder, PixelFormat, ScalingFactor};

use super::resample::CropBox;

/// More pixels than this in one image are refused: decoded, they would take 300 MB in every loader thread, and while they
/// are, 600 MB of a JPEG, 800 MB of a PNG of 16-bit colours and 1.2 GB of a progressive JPEG. Pillow warns of a
/// decompression bomb from 89 million on.
pub const MAX_PIXELS: u64 = 100_000_000;

/// A JPEG of more passes is refused: each costs as much time as an image. Encoders write 10.
const MAX_SCANS: usize = 100;

/// A decoded image: rows from the top, pixels from the left, red, green, blue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rgb {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `height × width × 3` bytes.
    pub pixels: Vec<u8>,
}

/// What the first bytes of an encoded image say about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// "jpeg" or "png".
    pub format: &'static str,
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

/// A part of an image, or all of it.
#[derive(Clone, Copy, Debug)]
pub struct Region<'a> {
    /// The pixels of the part.
    pub pixels: &'a Rgb,
    /// Where its first pixel lies in the image, after that was made smaller.
    pub origin: (u32, u32),
    /// How many times smaller the image was made.
    pub shrink: u32,
}

/// Where a box of an image lies in a part of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Place {
    /// On whole pixels.
    Pixels(CropBox),
    /// In an image that was made smaller: left, top, width and height.
    Fractions(f64, f64, f64, f64),
}

impl Place {
    /// The pixels that have a say, and which part of them counts: left, top, width and height.
    pub fn split(self) -> (CropBox, [f64; 4]) {
        match self {
            Place::Pixels(crop) => (crop, [0.0, 0.0, crop.width.into(), crop.height.into()]),
            Place::Fractions(left, top, width, height) => {
                let (x, y) = (left.floor(), top.floor());
                let (right, bottom) = ((left + width).ceil(), (top + height).ceil());
                let pixels = CropBox {
                    top: y as u32,
                    left: x as u32,
                    height: (bottom - y) as u32,
                    width: (right - x) as u32,
                };
                // Less than a pixel is left out on every side. (Where more is, fast_image_resize 6.1 can miscount the columns
                // that it needs.)
                (pixels, [left - x, top - y, width, height])
            }
        }
    }
}

impl<'a> Region<'a> {
    /// All of an image.
    pub fn whole(pixels: &'a Rgb) -> Self {
        Region { pixels, origin: (0, 0), shrink: 1 }
    }

    /// Where `crop`, a box in the image as it was, lies in this part.
    pub fn place(&self, crop: CropBox) -> Place {
        let (left, top) = self.origin;
        if self.shrink == 1 {
            return Place::Pixels(CropBox { top: crop.top - top, left: crop.left - left, ..crop });
        }
        let shrunk = |length: u32| f64::from(length) / f64::from(self.shrink);
        let (x, y) = (shrunk(crop.left) - f64::from(left), shrunk(crop.top) - f64::from(top));
        Place::Fractions(x, y, shrunk(crop.width), shrunk(crop.height))
    }
}

/// An encoded image of which the header is read.
pub struct Encoded<'a> {
    bytes: &'a [u8],
    decoder: Codec<'a>,
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

enum Codec<'a> {
    Jpeg(Box<Decoder<'a>>),
    /// Of four colours.
    Cmyk(JpegDecoder<Cursor<&'a [u8]>>),
    Png(Box<PngDecoder<Cursor<&'a [u8]>>>),
}

/// Decodes one encoded file.
///
/// # Errors
/// A phrase that says why it does not decode, for a sentence that names the image.
pub fn decode(encoded: &[u8]) -> Result<Rgb, String> {
    let mut image = Rgb::default();
    let encoded = Encoded::open(encoded)?;
    let whole = encoded.whole();
    encoded.decode(whole, 1, &mut image)?;
    Ok(image)
}

/// Reads format and size without decoding the pixels, and whether the end is there.
pub fn header(encoded: &[u8]) -> Result<Header, String> {
    let Encoded { decoder, width, height, .. } = Encoded::open(encoded)?;
    match decoder {
        Codec::Png(_) => check_png_end(encoded)?,
        Codec::Jpeg(_) | Codec::Cmyk(_) => check_jpeg_end(encoded)?,
    }
    let format = if matches!(decoder, Codec::Png(_)) { "png" } else { "jpeg" };
    Ok(Header { format, width, height })
}

impl<'a> Encoded<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// A phrase, as from [`decode`], for an image that is too large too.
    pub fn open(bytes: &'a [u8]) -> Result<Self, String> {
        if bytes.is_empty() {
            return Err("it has no bytes".into());
        }
        let (decoder, (width, height)) = match image::guess_format(bytes) {
            Ok(ImageFormat::Jpeg) => open_jpeg(bytes)?,
            Ok(ImageFormat::Png) => {
                // Bounds what metadata may unpack to; pixels are bounded by MAX_PIXELS.
                let mut limits = Limits::no_limits();
                limits.max_alloc = Some(64 << 20);
                let decoder = guarded(|| PngDecoder::with_limits(Cursor::new(bytes), limits))?;
                let size = decoder.dimensions();
                (Codec::Png(Box::new(decoder)), size)
            }
            Ok(other) => return Err(format!("it is {other:?}, and only JPEG and PNG are read")),
            Err(_) => {
                let start = bytes[..bytes.len().min(4)].escape_ascii();
                return Err(format!("it is neither JPEG nor PNG (it starts with \"{start}\")"));
            }
        };
        let count = u64::from(width) * u64::from(height);
        if count == 0 {
            return Err(format!("it is {width} × {height}"));
        }
        if count > MAX_PIXELS {
            return Err(format!(
                "it is {width} × {height}, {} million pixels, and the limit is {}",
                count / 1_000_000,
                MAX_PIXELS / 1_000_000
            ));
        }
        Ok(Encoded { bytes, decoder, width, height })
    }

    /// The box of the whole image.
    pub fn whole(&self) -> CropBox {
        CropBox { top: 0, left: 0, height: self.height, width: self.width }
    }

    /// Decodes at least `part`, into memory that is used again, and made `shrink` times smaller, if that is less work: 1, 2
    /// or 4. The part is what the whole image has there.
    ///
    /// # Errors
    /// A phrase, as from [`decode`]. What lies below the part may be damaged.
    pub fn decode(self, part: CropBox, shrink: u32, image: &mut Rgb) -> Result<Region<'_>, String> {
        let (origin, shrink) = match self.decoder {
            Codec::Jpeg(decoder) => {
                check_jpeg_end(self.bytes)?;
                decode_jpeg(*decoder, part, shrink, image)?
            }
            Codec::Cmyk(decoder) => {
                check_jpeg_end(self.bytes)?;
                read(decoder, image)?;
                ((0, 0), 1)
            }
            Codec::Png(decoder) => {
                read(decoder, image)?;
                ((0, 0), 1)
            }
        };
        Ok(Region { pixels: image, origin, shrink })
    }
}

thread_local! {
    /// Whether a panic in this thread is a decoder's, and comes back as an error.
    static IS_GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Calls a decoder. Of one that panics, the image is bad and not the run: what it leaves behind is only bytes.
fn guarded<R, E: ToString>(decode: impl FnOnce() -> Result<R, E>) -> Result<R, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let other = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !IS_GUARDED.get() {
                other(info);
            }
        }));
    });
    IS_GUARDED.set(true);
    let decoded = panic::catch_unwind(AssertUnwindSafe(decode));
    IS_GUARDED.set(false);
    match decoded {
        Ok(decoded) => decoded.map_err(|error| words(&error)),
        Err(payload) => Err(format!("its decoder panics: {}", panic_message(payload.as_ref()))),
    }
}

/// What a panic says.
pub(super) fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

fn open_jpeg(bytes: &[u8]) -> Result<(Codec<'_>, (u32, u32)), String> {
    let limits = DecodeLimits { max_scans: MAX_SCANS, ..DecodeLimits::default() };
    let decoder = guarded(|| Decoder::new_with_limits(bytes, limits))?;
    let header = decoder.header();
    if header.precision != 8 {
        return Err(format!("its samples have {} bits, and only 8 are read", header.precision));
    }
    if header.components.len() == 4 {
        let decoder = guarded(|| JpegDecoder::new(Cursor::new(bytes)))?;
        let size = decoder.dimensions();
        return Ok((Codec::Cmyk(decoder), size));
    }
    let size = (u32::from(header.width), u32::from(header.height));
    Ok((Codec::Jpeg(Box::new(decoder)), size))
}

/// Returns origin and scale of what it has decoded, as in a [`Region`].
///
/// Entropy coding has to be undone for all of it, and of a progressive one what comes behind that too. Otherwise columns and
/// rows beside the part are left out.
fn decode_jpeg(
    mut decoder: Decoder,
    part: CropBox,
    shrink: u32,
    image: &mut Rgb,
) -> Result<((u32, u32), u32), String> {
    // A pixel's colour is interpolated between its neighbours, which have to be decoded too.
    const BESIDE: u32 = 2;
    // What is coded without loss has no blocks that could be left out or made smaller.
    let shrink = if decoder.header().is_lossless { 1 } else { shrink };
    decoder.set_output_format(PixelFormat::Rgb);
    decoder.set_scale(ScalingFactor::try_new(1, shrink).map_err(|error| words(&error))?);
    let (width, height) = (decoder.output_width() as u32, decoder.output_height() as u32);
    let range = |from: u32, length: u32, side: u32| {
        ((from / shrink).saturating_sub(BESIDE), ((from + length).div_ceil(shrink) + BESIDE).min(side))
    };
    let (left, right) = range(part.left, part.width, width);
    let (top, bottom) = range(part.top, part.height, height);
    if (right - left, bottom - top) == (width, height) || decoder.header().is_lossless {
        // The memory is only cleared where it grows.
        image.pixels.resize(guarded(|| decoder.output_buffer_size())?, 0);
        let decoded = guarded(|| decoder.decode_image_into(&mut image.pixels))?;
        image.pixels.truncate(decoded.bytes_written);
        (image.width, image.height) = (decoded.width as u32, decoded.height as u32);
        return Ok(((0, 0), shrink));
    }
    let (columns, rows) = ((right - left) as usize, (bottom - top) as usize);
    decoder.set_crop_region(left as usize, top as usize, columns, rows);
    let decoded = guarded(|| decoder.decode_image())?;
    image.pixels = decoded.data;
    (image.width, image.height) = (decoded.width as u32, decoded.height as u32);
    // It begins where a block of columns does.
    match (right.checked_sub(image.width), bottom.checked_sub(image.height)) {
        (Some(left), Some(top)) => Ok(((left, top), shrink)),
        _ => Err(format!("it was decoded to {} × {} pixels", image.width, image.height)),
    }
}

/// A decoder's words on one line.
fn words(error: &impl ToString) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn read(decoder: impl ImageDecoder, image: &mut Rgb) -> Result<(), String> {
    let (width, height) = decoder.dimensions();
    let count = width as usize * height as usize;
    let color = decoder.color_type();
    image.width = width;
    image.height = height;
    // The decoder writes every byte, so the memory is only cleared where it grows.
    image.pixels.resize(count * usize::from(color.bytes_per_pixel()), 0);
    guarded(|| decoder.read_image(&mut image.pixels))?;
    match color {
        ColorType::Rgb8 => {}
        ColorType::Rgba8 => {
            keep_rgb(&mut image.pixels, count, |pixel: [u8; 4]| [pixel[0], pixel[1], pixel[2]])
        }
        ColorType::Rgb16 => keep_rgb(&mut image.pixels, count, |pixel: [u8; 6]| {
            [high(pixel[0], pixel[1]), high(pixel[2], pixel[3]), high(pixel[4], pixel[5])]
        }),
        ColorType::Rgba16 => keep_rgb(&mut image.pixels, count, |pixel: [u8; 8]| {
            [high(pixel[0], pixel[1]), high(pixel[2], pixel[3]), high(pixel[4], pixel[5])]
        }),
        ColorType::L8 => spread_grey(&mut image.pixels, count, |pixel: [u8; 1]| pixel[0]),
        ColorType::La8 => spread_grey(&mut image.pixels, count, |pixel: [u8; 2]| pixel[0]),
        ColorType::L16 => spread_grey(&mut image.pixels, count, |pixel: [u8; 2]| high(pixel[0], pixel[1])),
        ColorType::La16 => spread_grey(&mut image.pixels, count, |pixel: [u8; 4]| high(pixel[0], pixel[1])),
        other => return Err(format!("its colours ({other:?}) are not supported")),
    }
    Ok(())
}

/// The high byte of a 16-bit sample that lies in memory in this machine's order.
fn high(first: u8, second: u8) -> u8 {
    (u16::from_ne_bytes([first, second]) >> 8) as u8
}

/// Shrinks pixels of `N` ≥ 3 bytes to RGB in place.
fn keep_rgb<const N: usize>(pixels: &mut Vec<u8>, count: usize, rgb: impl Fn([u8; N]) -> [u8; 3]) {
    let mut pixel = [0; N];
    for i in 0..count {
        pixel.copy_from_slice(&pixels[i * N..(i + 1) * N]);
        pixels[i * 3..(i + 1) * 3].copy_from_slice(&rgb(pixel));
    }
    pixels.truncate(count * 3);
}

/// Turns grey pixels of `N` bytes into RGB. `N` may be more or less than 3, so grey is gathered first.
fn spread_grey<const N: usize>(pixels: &mut Vec<u8>, count: usize, grey: impl Fn([u8; N]) -> u8) {
    let mut pixel = [0; N];
    for i in 0..count {
        pixel.copy_from_slice(&pixels[i * N..(i + 1) * N]);
        pixels[i] = grey(pixel);
    }
    pixels.resize(count * 3, 0);
    for i in (0..count).rev() {
        let value = pixels[i];
        pixels[i * 3..(i + 1) * 3].fill(value);
    }
}

/// Refuses a JPEG whose data ends early. The decoder would fill the rest with grey; Pillow refuses as well.
///
/// Inside the scan a 0xFF byte of data is followed by 0x00, so FF D9 there can only be the end-of-image marker. The
/// search starts behind the headers, because these may hold a thumbnail with a marker of its own.
fn check_jpeg_end(encoded: &[u8]) -> Result<(), String> {
    const START_OF_SCAN: u8 = 0xDA;
    let mut at = 2;
    loop {
        match encoded.get(at..) {
            Some([0xFF, 0xFF, ..]) => at += 1,
            Some([0xFF, START_OF_SCAN, ..]) => break,
            Some([0xFF, 0xD0..=0xD8 | 0x01, ..]) => at += 2,
            Some([0xFF, _, high, low, ..]) => at += 2 + usize::from(u16::from_be_bytes([*high, *low])),
            Some([0xFF, ..]) | None => return Err("its header is cut off".into()),
            // Junk between segments: leave the judgement to the decoder.
            Some(_) => return Ok(()),
        }
    }
    let ended = encoded[at..].windows(2).rev().any(|pair| pair == [0xFF, 0xD9]);
    if ended { Ok(()) } else { Err(format!("its data ends early, after {} bytes", encoded.len())) }
}

/// Refuses a PNG whose data ends before its last chunk.
fn check_png_end(encoded: &[u8]) -> Result<(), String> {
    let mut at = 8;
    loop {
        match encoded.get(at..at + 8) {
            Some([_, _, _, _, b'I', b'E', b'N', b'D']) => return Ok(()),
            // Of a chunk, the length is that of its data; its type and a checksum stand around it.
            Some([a, b, c, d, ..]) => at += 12 + u32::from_be_bytes([*a, *b, *c, *d]) as usize,
            _ => return Err(format!("its data ends early, after {} bytes", encoded.len())),
        }
    }
}

#[cfg(test)]
mod tests {
    use image::{ExtendedColorType, ImageEncoder};

    use super::*;

    fn png(pixels: &[u8], width: u32, height: u32, color: ExtendedColorType) -> Vec<u8> {
        let mut out = Vec::new();
        image::codecs::png::PngEncoder::new(&mut out).write_image(pixels, width, height, color).unwrap();
        out
    }

    #[test]
    fn grey_becomes_three_equal_channels_and_alpha_is_dropped() {
        let grey = decode(&png(&[7, 200], 2, 1, ExtendedColorType::L8)).unwrap();
        assert_eq!(grey.pixels, [7, 7, 7, 200, 200, 200]);
        let grey_alpha = decode(&png(&[7, 0, 200, 9], 2, 1, ExtendedColorType::La8)).unwrap();
        assert_eq!(grey_alpha.pixels, [7, 7, 7, 200, 200, 200]);
        let alpha = decode(&png(&[1, 2, 3, 0, 4, 5, 6, 128], 1, 2, ExtendedColorType::Rgba8)).unwrap();
        assert_eq!((alpha.width, alpha.height), (1, 2));
        assert_eq!(alpha.pixels, [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn sixteen_bit_samples_keep_their_high_byte() {
        let samples: Vec<u8> = [0x1234_u16, 0xFF00, 0x00FF].into_iter().flat_map(u16::to_ne_bytes).collect();
        assert_eq!(decode(&png(&samples, 1, 1, ExtendedColorType::Rgb16)).unwrap().pixels, [0x12, 0xFF, 0]);
        let grey = decode(&png(&samples, 3, 1, ExtendedColorType::L16)).unwrap();
        assert_eq!(grey.pixels, [0x12, 0x12, 0x12, 0xFF, 0xFF, 0xFF, 0, 0, 0]);
    }

    #[test]
    fn memory_is_used_again_whatever_the_sizes() {
        let mut image = Rgb::default();
        for encoded in
            [png(&[9; 300], 10, 10, ExtendedColorType::Rgb8), png(&[5; 4], 2, 2, ExtendedColorType::L8)]
        {
            let encoded = Encoded::open(&encoded).unwrap();
            let whole = encoded.whole();
            encoded.decode(whole, 1, &mut image).unwrap();
        }
        assert_eq!(image, Rgb { width: 2, height: 2, pixels: vec![5; 12] });
    }

    #[test]
    fn an_image_of_hundreds_of_megapixels_is_refused_by_its_header() {
        let mut huge = png(&[0; 3], 1, 1, ExtendedColorType::Rgb8);
        huge[16..20].copy_from_slice(&31_000_u32.to_be_bytes());
        huge[20..24].copy_from_slice(&20_097_u32.to_be_bytes());
        let crc = crc32(&huge[12..29]);
        huge[29..33].copy_from_slice(&crc.to_be_bytes());
        assert_eq!(
            decode(&huge).unwrap_err(),
            "it is 31000 × 20097, 623 million pixels, and the limit is 100"
        );
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0_u32, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
        })
    }

    #[test]
    fn what_is_no_image_says_what_it_is() {
        assert_eq!(decode(b"").unwrap_err(), "it has no bytes");
        assert_eq!(
            decode(b"hello world").unwrap_err(),
            "it is neither JPEG nor PNG (it starts with \"hell\")"
        );
        assert!(decode(b"GIF89a\x01\x00\x01\x00").unwrap_err().contains("only JPEG and PNG"));
    }

    #[test]
    fn a_cut_file_is_refused_wherever_it_is_cut() {
        let noise: Vec<u8> =
            (0..64 * 64 * 3_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut jpeg = Vec::new();
        image::codecs::jpeg::JpegEncoder::new(&mut jpeg)
            .write_image(&noise, 64, 64, ExtendedColorType::Rgb8)
            .unwrap();
        let png = png(&noise, 64, 64, ExtendedColorType::Rgb8);
        for whole in [jpeg, png] {
            assert!(decode(&whole).is_ok());
            assert!(header(&whole).is_ok());
            for kept in [1, 10, 100, whole.len() / 2, whole.len() - 50] {
                assert!(decode(&whole[..kept]).is_err(), "{kept} of {} bytes", whole.len());
                assert!(header(&whole[..kept]).is_err(), "{kept} of {} bytes", whole.len());
            }
        }
    }
}
