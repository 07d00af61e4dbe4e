//! What a run is told to do: layers of settings become one typed [`Config`], and every value knows where it came from.
//!
//! From weakest to strongest: the defaults of host and plugins, group files, the `--config` file, `JEPA_*` environment variables, `key=value` on the command line. Every layer is checked against the same
//! schema, so that a mistake is reported with its key and its layer even where a stronger layer hides it.
//!
//! Paths that a setting holds are relative to the current directory, as on a command line; the entries of `groups`
//! alone are relative to the file that lists them.

mod advice;
mod check;
mod error;
mod json_schema;
mod layers;
mod print;
mod resolve;
mod schema;

pub use check::validate_plugin_options;
pub use error::{ConfigError, Problem};
pub use json_schema::{SchemaOption, schema_options};
pub use layers::RESERVED_VARIABLES;
pub use resolve::{Base, Layers, ResolvedConfig, Source, Sources};
pub use schema::{
    Algorithm, Backbone, Checkpoint, Collapse, Config, Data, Device, Eval, Init, Knn, LinearProbe, LrScale,
    Method, Optimizer, PluginProbe, Precision, Ranks, Run, Track, Trainer, Wandb, WandbMode, WandbResume,
};
