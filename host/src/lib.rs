//! The host.

pub mod data;
