//! The order of an epoch, as a function: which image stands at a place is computed, not looked up.
//!
//! A shuffled list of a large data set costs memory in every process, and to start in the middle of it costs its making. This
//! is a keyed permutation instead: a Feistel network over the smallest power of four that has room for all images, applied
//! again where it leads beyond them ("cycle walking"; Black and Rogaway, CT-RSA 2002).

use jepa_plugin_api::Rng;

/// A permutation of the images of a data set. Copied to whoever asks for a part of the epoch.
#[derive(Clone, Debug)]
pub struct Order {
    len: u64,
    /// Of the network's halves.
    bits: u32,
    /// One for each round; none for the file's own order.
    keys: Vec<u64>,
}

/// As many as make the halves of a few bits, which a small data set has, look random too.
const ROUNDS: usize = 12;

impl Order {
    /// The images as they lie in the file.
    pub fn of_file(len: usize) -> Self {
        Order { len: len as u64, bits: 0, keys: Vec::new() }
    }

    /// A random order: which one, `rng` decides.
    pub fn shuffled(len: usize, rng: &mut Rng) -> Self {
        let len = len as u64;
        let bits = (u64::BITS - len.saturating_sub(1).leading_zeros()).div_ceil(2).max(1);
        Order { len, bits, keys: (0..ROUNDS).map(|_| rng.bits()).collect() }
    }

    /// Number of images.
    #[expect(clippy::len_without_is_empty, reason = "a data set has an image")]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// The image at a place.
    ///
    /// # Panics
    /// When there are fewer places.
    pub fn at(&self, place: usize) -> u64 {
        let mut image = place as u64;
        assert!(image < self.len, "place {place} of {}", self.len);
        if self.keys.is_empty() {
            return image;
        }
        // At most three of four lead beyond, and those that do come back: the way is a circle.
        loop {
            image = self.permute(image);
            if image < self.len {
                return image;
            }
        }
    }

    fn permute(&self, x: u64) -> u64 {
        let mask = (1 << self.bits) - 1;
        let (mut left, mut right) = (x >> self.bits, x & mask);
        for key in &self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.bits | right
    }
}

/// Every bit of the result depends on every bit of x (the finaliser of SplitMix64).
fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(len: usize, epoch: u64) -> Vec<u64> {
        let order = Order::shuffled(len, &mut Rng::keyed(3, epoch, 0, 0));
        (0..len).map(|place| order.at(place)).collect()
    }

    #[test]
    fn every_image_has_one_place() {
        for len in [1, 2, 3, 4, 5, 16, 17, 100, 1023, 1025, 70_000] {
            for epoch in 0..3 {
                let mut images = all(len, epoch);
                images.sort_unstable();
                assert!(images.iter().copied().eq(0..len as u64), "{len} images, epoch {epoch}");
            }
        }
        assert_eq!((0..5).map(|place| Order::of_file(5).at(place)).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    }

    /// Chi-squared over which image comes at a place, and which comes behind which, in many epochs.
    #[test]
    fn all_images_are_as_likely_at_every_place_and_behind_every_other() {
        for len in [3, 10, 50] {
            let epochs = 400 * len as u64;
            let (mut at_place, mut behind) = (vec![0.0f64; len * len], vec![0.0; len * len]);
            for epoch in 0..epochs {
                let images = all(len, epoch);
                for (place, image) in images.iter().enumerate() {
                    at_place[place * len + *image as usize] += 1.0;
                }
                for pair in images.windows(2) {
                    behind[pair[0] as usize * len + pair[1] as usize] += 1.0;
                }
            }
            // So many cells of each table are free to vary, up to the sums of rows and columns; five deviations.
            let spread = |table: &[f64], expected: f64, cells: usize, free: usize| {
                let chi: f64 = table.iter().map(|count| (count - expected).powi(2) / expected).sum();
                let bound = free as f64 + 5.0 * (2.0 * free as f64).sqrt();
                assert!(chi < bound, "{len} images, {cells} cells: chi-squared {chi:.0}, bound {bound:.0}");
            };
            let place_expected = epochs as f64 / len as f64;
            spread(&at_place, place_expected, len * len, (len - 1).pow(2));
            let pairs: Vec<f64> =
                (0..len * len).filter(|cell| cell / len != cell % len).map(|cell| behind[cell]).collect();
            let pair_expected = (epochs * (len as u64 - 1)) as f64 / pairs.len() as f64;
            spread(&pairs, pair_expected, pairs.len(), pairs.len() - 1);
        }
    }
}
