//! ConvNeXts with timm's names and parameters, whose forward pass takes a mask of visible cells.

mod convnext;

pub use convnext::{Architecture, ConvNeXt, ConvNeXtOptions, Stem};

jepa_plugin_api::export_plugin! { backbones: [ConvNeXt] }
