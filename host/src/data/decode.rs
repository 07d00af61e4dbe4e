//! JPEG and PNG files to 8-bit RGB, as Pillow's `Image.open(…).convert("RGB")` does it.
//!
//! Grey becomes three equal channels, palettes are expanded, alpha is dropped (not blended), and an EXIF orientation
//! is left alone, because Pillow leaves it alone too. One difference is meant: 16-bit samples keep their high byte,
//! where Pillow clips grey ones at 255. What the file is called plays no part; its first bytes say what it is.

use std::io::Cursor;

use image::codecs::jpeg::JpegDecoder;
use image::codecs::png::PngDecoder;
use image::{ColorType, ImageDecoder, ImageError, ImageFormat, Limits};

/// More pixels than this in one image are refused: decoded, they would take 300 MB in every loader thread. Pillow
/// warns of a decompression bomb from 89 million on.
pub const MAX_PIXELS: u64 = 100_000_000;

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

/// Decodes one encoded file.
///
/// # Errors
/// A phrase that says why it does not decode, for a sentence that names the image.
pub fn decode(encoded: &[u8]) -> Result<Rgb, String> {
    let mut image = Rgb::default();
    decode_into(encoded, &mut image)?;
    Ok(image)
}

/// A decoder's words on one line.
fn words(error: ImageError) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// As [`decode`], into an image whose memory is used again.
pub fn decode_into(encoded: &[u8], image: &mut Rgb) -> Result<(), String> {
    match open(encoded)? {
        Opened::Jpeg(decoder) => {
            check_jpeg_end(encoded)?;
            read(decoder, image)
        }
        Opened::Png(decoder) => read(decoder, image),
    }
}

/// Reads format and size without decoding the pixels.
pub fn header(encoded: &[u8]) -> Result<Header, String> {
    let (format, (width, height)) = match open(encoded)? {
        Opened::Jpeg(decoder) => ("jpeg", decoder.dimensions()),
        Opened::Png(decoder) => ("png", decoder.dimensions()),
    };
    Ok(Header { format, width, height })
}

enum Opened<'a> {
    Jpeg(JpegDecoder<Cursor<&'a [u8]>>),
    Png(Box<PngDecoder<Cursor<&'a [u8]>>>),
}

fn open(encoded: &[u8]) -> Result<Opened<'_>, String> {
    if encoded.is_empty() {
        return Err("it has no bytes".into());
    }
    match image::guess_format(encoded) {
        Ok(ImageFormat::Jpeg) => JpegDecoder::new(Cursor::new(encoded)).map(Opened::Jpeg).map_err(words),
        Ok(ImageFormat::Png) => {
            // Bounds what metadata may unpack to; pixels are bounded by MAX_PIXELS.
            let mut limits = Limits::no_limits();
            limits.max_alloc = Some(64 << 20);
            PngDecoder::with_limits(Cursor::new(encoded), limits)
                .map(|decoder| Opened::Png(Box::new(decoder)))
                .map_err(words)
        }
        Ok(other) => Err(format!("it is {other:?}, and only JPEG and PNG are read")),
        Err(_) => {
            let start = encoded[..encoded.len().min(4)].escape_ascii();
            Err(format!("it is neither JPEG nor PNG (it starts with \"{start}\")"))
        }
    }
}

fn read(decoder: impl ImageDecoder, image: &mut Rgb) -> Result<(), String> {
    let (width, height) = decoder.dimensions();
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
    let count = count as usize;
    let color = decoder.color_type();
    image.width = width;
    image.height = height;
    // The decoder writes every byte, so the memory is only cleared where it grows.
    image.pixels.resize(count * usize::from(color.bytes_per_pixel()), 0);
    decoder.read_image(&mut image.pixels).map_err(words)?;
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
        decode_into(&png(&[9; 300], 10, 10, ExtendedColorType::Rgb8), &mut image).unwrap();
        decode_into(&png(&[5; 4], 2, 2, ExtendedColorType::L8), &mut image).unwrap();
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
            for kept in [1, 10, 100, whole.len() / 2, whole.len() - 50] {
                assert!(decode(&whole[..kept]).is_err(), "{kept} of {} bytes", whole.len());
            }
        }
    }
}
