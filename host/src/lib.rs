//! The host of jepa: it loads methods and backbones from plugin files and pretrains with them on real images.
//!
//! `cli` composes everything; `train` holds the loop; the other rooms do one thing each and do not know one another
//! more than they must. Nothing imports `cli`.

pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod conformance;
pub mod data;
pub mod device;
pub mod dist;
pub mod eval;
mod files;
mod hex;
mod linker;
mod nearest;
pub mod plugin;
pub mod provenance;
pub mod report;
pub mod sweep;
pub mod trace;
pub mod track;
pub mod train;
