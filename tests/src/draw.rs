//! A small generator of cases, so that a failure names the seed that shows it again.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// From a seed.
pub struct Draw(pub u64);

impl Draw {
    /// A whole number in 0..`end`.
    pub fn below(&mut self, end: i64) -> i64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % end as u64) as i64
    }

    /// One of these.
    pub fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as i64) as usize]
    }
}

/// What follows is of `seed` alone: libtorch has one generator for all tests of a process, which take turns therefore.
pub fn alone(seed: u64) -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(seed as i64);
    turn
}
