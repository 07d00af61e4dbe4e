//! ResNets with timm's names and parameters, whose forward pass takes a mask of visible cells.

mod resnet;

pub use resnet::{Architecture, Block, ResNet, ResNetOptions, Stem};

jepa_plugin_api::export_plugin! { backbones: [ResNet] }
