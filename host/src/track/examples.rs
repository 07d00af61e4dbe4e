//! Example images: what a method sees, as PNG files for trackers and reports.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use image::{ExtendedColorType, save_buffer};
use jepa_plugin_api::tch::{Device, Kind, Tensor};
use jepa_plugin_api::{Transform, ViewSpec};

/// The folder of images in a run's directory.
const FOLDER: &str = "media";
/// How many images of a batch are shown.
const SHOWN: i64 = 8;

/// Writes the first images of each tensor in `columns`, f32 `(B, 3, S, S)` as `views` normalise, side by side into one
/// file. Returns the files by `examples/<name>`, relative to `run`.
///
/// # Errors
/// When a file cannot be written.
pub fn write_examples(
    run: &Path,
    step: u64,
    views: &[ViewSpec],
    columns: &[(String, Tensor)],
) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let folder = run.join(FOLDER);
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut files = BTreeMap::new();
    for (name, images) in columns {
        let view = views.iter().find(|view| view.name == *name).or(views.first());
        let file = PathBuf::from(FOLDER).join(format!("{name}_{step:08}.png"));
        let path = run.join(&file);
        let (pixels, width, height) = strip(images, view)?;
        save_buffer(&path, &pixels, width, height, ExtendedColorType::Rgb8)
            .with_context(|| format!("cannot write {}", path.display()))?;
        files.insert(format!("examples/{name}"), file);
    }
    Ok(files)
}

/// RGB pixels of the first images in a row, with width and height.
fn strip(images: &Tensor, view: Option<&ViewSpec>) -> anyhow::Result<(Vec<u8>, u32, u32)> {
    let normalize = view.and_then(|view| {
        view.transforms.iter().find_map(|transform| match transform {
            Transform::Normalize { mean, std } => Some((*mean, *std)),
            _ => None,
        })
    });
    let count = images.size().first().copied().unwrap_or(0).min(SHOWN);
    let mut shown = images.f_narrow(0, 0, count)?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
    if let Some((mean, std)) = normalize {
        let channels = |values: [f32; 3]| Tensor::from_slice(&values).view([3, 1, 1]);
        shown = shown * channels(std) + channels(mean);
    }
    // (B, 3, H, W) to (H, B, W, 3).
    let shown = shown.f_clamp(0.0, 1.0)?.f_permute([2, 0, 3, 1])?;
    let size = shown.size();
    let [height, count, width, 3] = size[..] else { anyhow::bail!("{size:?} are no RGB images") };
    let bytes = (shown * 255.0).f_round()?.f_to_kind(Kind::Uint8)?.f_contiguous()?.f_view(-1)?;
    Ok((Vec::try_from(bytes)?, (count * width) as u32, height as u32))
}
