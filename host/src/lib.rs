//! The host.

pub mod checkpoint;
pub mod config;
pub mod eval;
