//! Random numbers that depend on what they are for, never on which thread draws them or when.
//!
//! A generator is keyed by four numbers: the run's seed and, by convention, epoch, sample and purpose. The same key
//! gives the same numbers on every machine, so a run can stop anywhere and go on exactly.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng};

/// A keyed generator (ChaCha with 8 rounds; the key is the seed, so two keys never share a stream).
///
/// ```
/// use jepa_plugin_api::Rng;
/// const MY_PURPOSE: u64 = 0x6d79;
/// let mut rng = Rng::keyed(42, 0, 17, MY_PURPOSE);
/// let mut order = [0, 1, 2, 3];
/// rng.shuffle(&mut order);
/// assert!((2.0..3.0).contains(&rng.uniform(2.0, 3.0)) && rng.below(5) < 5);
/// // The same key, the same numbers.
/// assert_eq!(Rng::keyed(42, 0, 17, MY_PURPOSE).bits(), Rng::keyed(42, 0, 17, MY_PURPOSE).bits());
/// ```
#[derive(Clone, Debug)]
pub struct Rng(ChaCha8Rng);

impl Rng {
    /// The generator of this key. Use a constant of your own as `purpose`, so that two uses never share numbers.
    pub fn keyed(seed: u64, epoch: u64, sample: u64, purpose: u64) -> Self {
        let mut key = [0; 32];
        for (bytes, part) in key.chunks_exact_mut(8).zip([seed, epoch, sample, purpose]) {
            bytes.copy_from_slice(&part.to_le_bytes());
        }
        Rng(ChaCha8Rng::from_seed(key))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Uniform in [0, 1), in steps of 2⁻⁵³.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * (-53f64).exp2()
    }

    /// Uniform in [`low`, `high`).
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + self.unit() * (high - low)
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// Uniform among 0, 1, …, `n` − 1, without bias.
    ///
    /// # Panics
    /// When `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "no number lies below 0");
        let reach = u64::MAX - u64::MAX % n;
        loop {
            let bits = self.bits();
            if bits < reach {
                return bits % n;
            }
        }
    }

    /// Puts `items` into a uniformly random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}
