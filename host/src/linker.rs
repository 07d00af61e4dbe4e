//! The dynamic linker's words, for our own sentences.

use std::error::Error;

/// What the dynamic linker said: libloading wraps it in a frame of its own.
pub(crate) fn words(error: &libloading::Error) -> String {
    let mut innermost: &dyn Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
