//! Errors across the boundary, and panics turned into errors on the side where they happen.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use abi_stable::StableAbi;
use abi_stable::std_types::{RResult, RString, RVec};

use super::grad_mode::GradMode;

/// What kind of failure a plugin reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The plugin returned an error.
    Error,
    /// The plugin panicked; the object that did is of no use any more.
    Panic,
    /// The method, backbone or probe cannot be built with these options, or on these data.
    Options,
    /// One side says what the other, of an earlier API minor, cannot read. Since 1.1.
    Unfit,
}

/// A plugin's failure, as the host (or another plugin) sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The plugin in which it happened, which need not be the one that was called.
    pub plugin: String,
    /// Error, panic or bad options.
    pub kind: FailureKind,
    /// What went wrong.
    pub message: String,
    /// The causes behind it, outermost first.
    pub chain: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.kind {
            FailureKind::Error => "failed",
            FailureKind::Panic => "panicked",
            FailureKind::Options => "refused its settings",
            FailureKind::Unfit => "does not fit",
        };
        write!(f, "plugin `{}` {verb}: {}", self.plugin, self.message)?;
        self.chain.iter().try_for_each(|cause| write!(f, ": {cause}"))
    }
}

impl std::error::Error for Failure {}

/// [`Failure`] in a layout that crosses. Codes that are not known read as errors.
#[repr(C)]
#[derive(StableAbi)]
pub struct AbiFailure {
    code: u32,
    plugin: RString,
    message: RString,
    chain: RVec<RString>,
}

impl FailureKind {
    /// All of them.
    pub(super) const ALL: [FailureKind; 4] =
        [FailureKind::Error, FailureKind::Panic, FailureKind::Options, FailureKind::Unfit];

    /// The number by which it crosses.
    pub(super) fn code(self) -> u32 {
        match self {
            FailureKind::Error => 0,
            FailureKind::Panic => 1,
            FailureKind::Options => 2,
            FailureKind::Unfit => 3,
        }
    }
}

impl From<Failure> for AbiFailure {
    fn from(failure: Failure) -> Self {
        AbiFailure {
            code: failure.kind.code(),
            plugin: failure.plugin.into(),
            message: failure.message.into(),
            chain: failure.chain.into_iter().map(RString::from).collect(),
        }
    }
}

impl From<AbiFailure> for Failure {
    fn from(failure: AbiFailure) -> Self {
        let kind = FailureKind::ALL.into_iter().find(|kind| kind.code() == failure.code);
        Failure {
            plugin: failure.plugin.into(),
            kind: kind.unwrap_or(FailureKind::Error),
            message: failure.message.into(),
            chain: failure.chain.into_iter().map(String::from).collect(),
        }
    }
}

impl Failure {
    /// The failure that `error` means when it comes out of `plugin`. A failure that `plugin` merely passes on, from a
    /// backbone of another plugin for one, keeps its origin, and gets in front of its message what was said on the
    /// way.
    pub(crate) fn from_error(plugin: &str, error: anyhow::Error) -> Self {
        let Some(origin) = error.chain().find_map(|cause| cause.downcast_ref::<Failure>()) else {
            return Failure {
                plugin: plugin.to_owned(),
                kind: FailureKind::Error,
                message: without_frames(error.to_string()),
                chain: error.chain().skip(1).map(|cause| without_frames(cause.to_string())).collect(),
            };
        };
        let on_the_way = error.chain().take_while(|cause| !cause.is::<Failure>()).map(ToString::to_string);
        let message = on_the_way.chain([origin.message.clone()]).collect::<Vec<_>>().join(": ");
        Failure { message, ..origin.clone() }
    }
}

thread_local! {
    /// How many [`contained`] calls are under way in this thread.
    static CONTAINED: Cell<u32> = const { Cell::new(0) };
    /// Where the last panic in one of them happened; the hook notes it.
    static PANIC_LOCATION: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Makes panics silent that the host reports. Others, in a thread of the plugin's own, are logged: nobody else tells
/// them.
pub(crate) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        let location = info.location().map(ToString::to_string);
        if CONTAINED.get() > 0 {
            PANIC_LOCATION.with(|slot| *slot.borrow_mut() = location);
            return;
        }
        let thread = std::thread::current();
        let (name, text) = (thread.name().unwrap_or("without a name"), panic_text(info.payload()));
        tracing::error!("thread {name} panicked: {text} (at {})", location.as_deref().unwrap_or("unknown"));
    }));
}

/// Runs `work`, an author's own code; a panic comes back as its message and place. What libtorch does in this thread is
/// then what it was before: unwinding leaves `tch::no_grad` open.
fn contained<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let gradients = GradMode::now();
    CONTAINED.set(CONTAINED.get() + 1);
    let result = catch_unwind(AssertUnwindSafe(work));
    CONTAINED.set(CONTAINED.get() - 1);
    result.map_err(|payload| {
        gradients.restore();
        let text = panic_text(payload.as_ref());
        // A payload whose own destructor panics must not reach the boundary either.
        std::mem::forget(payload);
        match PANIC_LOCATION.with(|slot| slot.borrow_mut().take()) {
            Some(location) => format!("{text} (at {location})"),
            None => text,
        }
    })
}

/// Runs `work`, a plugin's own code, so that neither an error nor a panic leaves it as anything but a value. After a
/// panic `poisoned` is set, and every later call through it fails at once.
pub(crate) fn guard<T, U: From<T>>(
    plugin: &str,
    poisoned: &AtomicBool,
    work: impl FnOnce() -> anyhow::Result<T>,
) -> RResult<U, AbiFailure> {
    let panicked = |message: String| Failure {
        plugin: plugin.to_owned(),
        kind: FailureKind::Panic,
        message,
        chain: Vec::new(),
    };
    if poisoned.load(Ordering::Relaxed) {
        return RResult::RErr(panicked("it panicked before and cannot go on".to_owned()).into());
    }
    // An error's own words and destructor are the author's code too.
    match contained(|| work().map_err(|error| Failure::from_error(plugin, error))) {
        Ok(Ok(value)) => RResult::ROk(value.into()),
        Ok(Err(failure)) => RResult::RErr(failure.into()),
        Err(message) => {
            poisoned.store(true, Ordering::Relaxed);
            RResult::RErr(panicked(message).into())
        }
    }
}

/// An object of the plugin's author, whose destructor may panic: that must not cross the boundary.
pub(crate) struct Contained<T: ?Sized> {
    plugin: &'static str,
    object: ManuallyDrop<Box<T>>,
}

impl<T: ?Sized> Contained<T> {
    /// Takes the object, of this plugin.
    pub fn new(plugin: &'static str, object: Box<T>) -> Self {
        Contained { plugin, object: ManuallyDrop::new(object) }
    }
}

impl<T: ?Sized> Deref for Contained<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.object
    }
}

impl<T: ?Sized> DerefMut for Contained<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.object
    }
}

impl<T: ?Sized> Drop for Contained<T> {
    fn drop(&mut self) {
        // SAFETY: this is the only place that takes the object out, and nothing uses it afterwards.
        let object = unsafe { ManuallyDrop::take(&mut self.object) };
        if let Err(message) = contained(|| drop(object)) {
            tracing::error!("plugin `{}` panicked while it was let go of: {message}", self.plugin);
        }
    }
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    without_frames(text.unwrap_or_else(|| "no message".to_owned()))
}

/// What libtorch says, without the frames of its C++ that follow. tch's functions without `f_` panic with such a
/// message in quotes.
fn without_frames(text: String) -> String {
    let Some(end) =
        ["\\nException raised from", "\nException raised from"].iter().find_map(|mark| text.find(mark))
    else {
        return text;
    };
    let text = &text[..end];
    let unwrapped = text.strip_prefix("called `Result::unwrap()` on an `Err` value: Torch(\"");
    unwrapped.map_or(text.to_owned(), |message| format!("libtorch: {message}"))
}
