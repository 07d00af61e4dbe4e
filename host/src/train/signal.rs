//! SIGINT, SIGTERM, and SIGUSR1, which SLURM sends before the time is over: the first asks for the end at the next step, a
//! second one ends the process at once.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals as Incoming;
use signal_hook::low_level;

use super::error::signal_name;

/// Signals that come so close are one.
const AT_ONCE: Duration = Duration::from_secs(1);

/// The signal that arrived, if one did.
#[derive(Clone, Debug, Default)]
pub struct Signals(Arc<AtomicUsize>);

impl Signals {
    /// Takes over these signals for this process, and says when one arrives `what` comes of it.
    ///
    /// # Errors
    /// When the system refuses handlers.
    pub fn install(what: &'static str) -> io::Result<Self> {
        let arrived = Arc::new(AtomicUsize::new(0));
        let pending = Arc::clone(&arrived);
        let mut incoming = Incoming::new([SIGINT, SIGTERM, SIGUSR1])?;
        thread::Builder::new().name("signals".to_owned()).spawn(move || {
            let mut first = None;
            for signal in incoming.forever() {
                let before = pending.swap(signal as usize, Ordering::Relaxed);
                // Who ends all processes of a group or a service, and one that passes signals on, send it twice at once.
                if before != 0 && first.is_some_and(|first: Instant| first.elapsed() < AT_ONCE) {
                    continue;
                }
                first.get_or_insert_with(Instant::now);
                if before != 0 {
                    // Nothing is torn down: another thread may be in the middle of a step.
                    low_level::exit(128 + signal);
                }
                tracing::warn!("{}: {what}", signal_name(signal));
            }
        })?;
        Ok(Signals(arrived))
    }

    /// The signal that asks for the end.
    pub fn pending(&self) -> Option<i32> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            signal => Some(signal as i32),
        }
    }
}
