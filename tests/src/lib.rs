//! Helpers shared by the integration tests.

pub mod author;
pub mod boundary;
pub mod browser;
pub mod draw;
pub mod fixture;
pub mod ranks;
pub mod real;
pub mod threads;
pub mod training;
pub mod wandb;

// Links the torch bridge's import library, which tch needs, into every test that uses this crate.
use jepa_plugin_api as _;
