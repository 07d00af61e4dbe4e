//! Top-1 and top-5 hits. Among equal scores the lower class number comes first, so that a tie is decided the same
//! way everywhere and a classifier that knows nothing is not right about everything.

use tch::{Kind, Tensor};

use super::error::EvalError;

/// Hits in a number of images.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Hits {
    top1: i64,
    top5: i64,
    images: i64,
}

impl Hits {
    /// Counts a block: `scores` (B, C) without NaN, `labels` (B).
    pub(super) fn add(&mut self, scores: &Tensor, labels: &Tensor) -> Result<(), EvalError> {
        let classes = scores.size()[1];
        let labels = labels.f_unsqueeze(1)?;
        let own = scores.f_gather(1, &labels, false)?;
        let numbers = Tensor::f_arange(classes, (Kind::Int64, scores.device()))?;
        let ahead = scores.f_eq_tensor(&own)?.f_logical_and(&numbers.f_lt_tensor(&labels)?)?;
        let ahead = ahead.f_logical_or(&scores.f_gt_tensor(&own)?)?;
        let place = ahead.f_sum_dim_intlist(1, false, Kind::Int64)?;
        let within = |places: i64| -> Result<i64, EvalError> {
            Ok(place.f_lt(places)?.f_sum(Kind::Int64)?.f_int64_value(&[])?)
        };
        self.top1 += within(1)?;
        self.top5 += within(5.min(classes))?;
        self.images += labels.size()[0];
        Ok(())
    }

    /// The shares (top-1, top-5), in [0, 1]. With fewer than five classes, top-5 is 1.
    pub(super) fn shares(self) -> (f64, f64) {
        let images = self.images.max(1) as f64;
        (self.top1 as f64 / images, self.top5 as f64 / images)
    }
}
