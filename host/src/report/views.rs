//! What the method saw: the first and the latest example images that a run has kept, inside the page.

use std::fmt::Write as _;
use std::fs;
use std::io::Cursor;
use std::path::{Component, Path};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::{ImageFormat, ImageReader, Limits};

use super::format::{count, plural};
use super::html::{self, text};
use super::run::SavedRun;
use crate::track::Record;

/// A file may have so many bytes, all files of a page so many, and an image in memory so many.
const FILE_BYTES: u64 = 2_000_000;
const PAGE_BYTES: u64 = 24_000_000;
const DECODED_BYTES: u64 = 64_000_000;
/// Smaller images are shown a whole number of times as large, up to this width in pixels.
const WIDTH: u32 = 640;

/// The images of all runs. One that cannot be shown has a sentence why in its place.
pub fn views(runs: &[SavedRun]) -> String {
    let (mut out, mut left) = (String::new(), PAGE_BYTES);
    for (place, run) in runs.iter().enumerate() {
        let Some((first, latest)) = run.examples() else { continue };
        if runs.len() > 1 {
            let _ = writeln!(out, "<h3>{}</h3>", html::run(place, &run.name));
        }
        out.push_str("<div class=\"views\">\n");
        let shown = match first.step < latest.step {
            true => vec![("First, step", first), ("Latest, step", latest)],
            false => vec![("Step", latest)],
        };
        for (title, record) in shown {
            let title = format!("{title} {}", count(record.step as i64));
            let level = if runs.len() > 1 { "h4" } else { "h3" };
            let _ = writeln!(out, "<div><{level}>{title}</{level}>");
            images(&mut out, &run.path, record, &mut left);
            out.push_str("</div>\n");
        }
        out.push_str("</div>\n");
    }
    if out.is_empty() {
        return "<p>The records have no images.</p>\n".to_owned();
    }
    out.push_str("<p class=\"note\">The rows of a step have the same images of one batch, as the method takes them or hides parts of them. Each step has a batch of its own, so that the first and the latest show different images.</p>\n");
    out
}

fn images(out: &mut String, run: &Path, record: &Record, left: &mut u64) {
    let step = count(record.step as i64);
    for (name, file) in &record.images {
        let name = text(name.strip_prefix("examples/").unwrap_or(name));
        let _ = match embed(run, file, left) {
            Ok(image) => {
                let (width, height) = (image.width * image.zoom, image.height * image.zoom);
                let small = if image.zoom > 1 { " class=\"small\"" } else { "" };
                let shown = plural(u64::from((image.width / image.height).max(1)), "image");
                writeln!(
                    out,
                    "<figure><img{small} src=\"{}\" width=\"{width}\" height=\"{height}\" alt=\"{name} at step {step}: {shown} in a row\"><figcaption>{name}, step {step}</figcaption></figure>",
                    image.uri
                )
            }
            Err(why) => writeln!(out, "<p>{name}, step {step}, is not shown: {}.</p>", text(&why)),
        };
    }
}

/// An image for a page that stands alone.
struct Embedded {
    uri: String,
    width: u32,
    height: u32,
    zoom: u32,
}

/// The PNG `file` of the run in `run`, which takes its bytes from those that are `left`. A record may name files of its
/// run only.
fn embed(run: &Path, file: &Path, left: &mut u64) -> Result<Embedded, String> {
    let name = file.display();
    if !file.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(format!("{name} lies outside the run"));
    }
    let path = run.join(file);
    let found = fs::metadata(&path).map_err(|error| format!("{name}: {error}"))?;
    let size = found.len();
    if !found.is_file() || size > FILE_BYTES {
        return Err(format!("{name} is no file of at most {} bytes", count(FILE_BYTES as i64)));
    }
    let Some(rest) = left.checked_sub(size) else {
        return Err(format!("the images before {name} have all bytes that a page may have for them"));
    };
    let bytes = fs::read(&path).map_err(|error| format!("{name}: {error}"))?;
    let (width, height) =
        size_of(&bytes).map_err(|error| format!("{name} is no whole PNG image: {error}"))?;
    *left = rest;
    let uri = format!("data:image/png;base64,{}", STANDARD.encode(bytes));
    Ok(Embedded { uri, width, height, zoom: (WIDTH / width).max(1) })
}

/// Width and height of a PNG image all of which can be read; a PNG image has no side of 0.
fn size_of(bytes: &[u8]) -> image::ImageResult<(u32, u32)> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), ImageFormat::Png);
    let mut limits = Limits::default();
    limits.max_alloc = Some(DECODED_BYTES);
    reader.limits(limits);
    let image = reader.decode()?;
    Ok((image.width(), image.height()))
}
