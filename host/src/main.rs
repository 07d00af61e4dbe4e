//! The jepa-host executable.
fn main() {}
