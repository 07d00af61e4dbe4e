//! Synthetic images, made into batches as the pipeline makes them.

use jepa_plugin_api::tch::{Device, Kind, Tensor};
use jepa_plugin_api::{Batch, Rng, ViewSpec};

use crate::data::augment::{Augmenter, Scratch};
use crate::data::check_views;
use crate::data::decode::Rgb;

/// Key of the numbers that an image is drawn from.
const IMAGE: u64 = 0x696d_6167_6500_0000;
/// Key of the numbers that its views are made with; the view's index is added.
const VIEW: u64 = 0x7669_6577_0000_0000;

/// Number of classes among the images.
pub const CLASSES: u64 = 4;

/// Batches of the views that a method declared.
pub struct Images {
    views: Vec<Augmenter>,
    size: i64,
}

impl Images {
    /// Images for `views` of `size × size` pixels.
    pub fn new(views: &[ViewSpec], size: usize) -> anyhow::Result<Images> {
        Ok(Images { views: check_views(views, size as u32)?, size: size as i64 })
    }

    /// The batch of step `step`: `count` images, f32 `(B, 3, S, S)` per view, labels i64 `(B)`.
    pub fn batch(&self, step: u64, count: usize, train: bool) -> Batch {
        let samples: Vec<u64> = (0..count as u64).map(|i| step * count as u64 + i).collect();
        let mut scratch = Scratch::default();
        let mut view = |index: usize, augmenter: &Augmenter| {
            let mut values = vec![0f32; augmenter.len() * count];
            for (&sample, out) in samples.iter().zip(values.chunks_mut(augmenter.len())) {
                let mut rng = Rng::keyed(0, step, sample, VIEW + index as u64);
                augmenter.apply(&image(sample, self.size as u32), &mut rng, &mut scratch, out);
            }
            Tensor::from_slice(&values).reshape([count as i64, 3, self.size, self.size])
        };
        let views = self.views.iter().enumerate().map(|(index, augmenter)| view(index, augmenter)).collect();
        let labels: Vec<i64> = samples.iter().map(|sample| (sample % CLASSES) as i64).collect();
        let labels = Tensor::from_slice(&labels).to_kind(Kind::Int64).to_device(Device::Cpu);
        Batch { views, labels, samples, seed: 0, epoch: 0, step, train }
    }
}

/// Waves in three colours, whose lengths and directions belong to the class, with noise on them.
fn image(sample: u64, size: u32) -> Rgb {
    let mut rng = Rng::keyed(0, 0, sample, IMAGE);
    let side = size + size / 2;
    let turn = (sample % CLASSES) as f64 + rng.unit() * 0.3;
    let (across, down) = (turn.cos() * 12.0 / f64::from(side), turn.sin() * 12.0 / f64::from(side));
    let phases = [0; 3].map(|_| rng.unit() * 6.3);
    let mut pixels = Vec::with_capacity((side * side * 3) as usize);
    for y in 0..side {
        for x in 0..side {
            let at = f64::from(x) * across + f64::from(y) * down;
            pixels.extend(phases.map(|phase| (128.0 + 90.0 * (at + phase).sin() + 30.0 * rng.unit()) as u8));
        }
    }
    Rgb { width: side, height: side, pixels }
}
