//! What the loader's threads do with their time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::trace::Trace;

/// A part of making a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The bytes of an image, from the file or the system's cache of it.
    Read,
    /// Bytes to pixels.
    Decode,
    /// Pixels to views: crop, resize, flip, colour, and into the batch.
    Augment,
}

impl Work {
    /// Every part, in their order.
    pub const ALL: [Work; 3] = [Work::Read, Work::Decode, Work::Augment];

    /// A word for it.
    pub fn name(self) -> &'static str {
        &self.metric()["time/".len()..]
    }

    /// The metric with the seconds that a step's images take, of all threads together. They run beside the step.
    pub fn metric(self) -> &'static str {
        match self {
            Work::Read => "time/read",
            Work::Decode => "time/decode",
            Work::Augment => "time/augment",
        }
    }
}

/// Time by part, of all threads of a loader together.
#[derive(Debug, Default)]
pub struct Clock {
    nanoseconds: [AtomicU64; Work::ALL.len()],
    trace: Option<Trace>,
}

impl Clock {
    /// At zero. Every part that ends goes into `trace` as well, if there is one.
    pub fn new(trace: Option<Trace>) -> Clock {
        Clock { nanoseconds: Default::default(), trace }
    }

    /// Seconds by part, as in [`Work::ALL`].
    pub fn seconds(&self) -> [f64; Work::ALL.len()] {
        self.nanoseconds.each_ref().map(|part| part.load(Ordering::Relaxed) as f64 / 1e9)
    }

    /// What this thread does from now on.
    pub(super) fn start(&self) -> Lap<'_> {
        Lap { clock: self, since: Instant::now() }
    }
}

/// What a thread has done since the last lap.
pub(super) struct Lap<'a> {
    clock: &'a Clock,
    since: Instant,
}

impl Lap<'_> {
    /// It was `work`.
    pub fn end(&mut self, work: Work) {
        let now = Instant::now();
        let lasted = (now - self.since).as_nanos() as u64;
        self.clock.nanoseconds[work as usize].fetch_add(lasted, Ordering::Relaxed);
        if let Some(trace) = &self.clock.trace {
            trace.span(work.name(), self.since, now);
        }
        self.since = now;
    }
}
