//! `tracing` across the boundary. Statics are per library, so each plugin gets a subscriber that hands events to the
//! host; the host's level comes first, and filtered events cost nothing.

use std::fmt::{self, Write as _};

use abi_stable::StableAbi;
use abi_stable::std_types::RStr;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span;
use tracing::{Event, Level, Metadata, Subscriber};

/// The host's function that takes events.
#[repr(C)]
#[derive(Clone, Copy, StableAbi)]
pub struct LogSink {
    max_level: u32,
    write: extern "C" fn(level: u32, target: RStr<'_>, message: RStr<'_>),
}

impl LogSink {
    /// A sink that calls `write`, of the host, for events up to the level that the host shows.
    pub(super) fn new(write: extern "C" fn(u32, RStr<'_>, RStr<'_>)) -> Self {
        LogSink { max_level: number(LevelFilter::current().into_level()), write }
    }

    /// Installs the forwarding subscriber in this library. Does nothing when the library has one already, as when
    /// plugin and host are linked together.
    pub(super) fn install(self) {
        let _ = tracing::subscriber::set_global_default(Forward(self));
    }
}

/// Gives an event that came from a plugin to the host's own subscriber.
pub(super) extern "C" fn emit_in_host(level: u32, target: RStr<'_>, message: RStr<'_>) {
    let (plugin, message) = (target.as_str(), message.as_str());
    match level {
        1 => tracing::error!(target: "plugin", "{plugin}: {message}"),
        2 => tracing::warn!(target: "plugin", "{plugin}: {message}"),
        3 => tracing::info!(target: "plugin", "{plugin}: {message}"),
        4 => tracing::debug!(target: "plugin", "{plugin}: {message}"),
        _ => tracing::trace!(target: "plugin", "{plugin}: {message}"),
    }
}

pub(super) fn number(level: Option<Level>) -> u32 {
    match level {
        None => 0,
        Some(Level::ERROR) => 1,
        Some(Level::WARN) => 2,
        Some(Level::INFO) => 3,
        Some(Level::DEBUG) => 4,
        Some(Level::TRACE) => 5,
    }
}

struct Forward(LogSink);

impl Subscriber for Forward {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && number(Some(*metadata.level())) <= self.0.max_level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(match self.0.max_level {
            0 => LevelFilter::OFF,
            1 => LevelFilter::ERROR,
            2 => LevelFilter::WARN,
            3 => LevelFilter::INFO,
            4 => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        })
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        let message = text.message + &text.fields;
        let metadata = event.metadata();
        (self.0.write)(number(Some(*metadata.level())), metadata.target().into(), message.as_str().into());
    }

    // Spans stay in the plugin: the host has no use for their numbers.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
