//! The backbone `torchscript`: any network that PyTorch saved with `torch.jit.script` or `torch.jit.trace`.

mod archive;
mod backbone;

pub use backbone::{TorchScript, TorchScriptOptions};

jepa_plugin_api::export_plugin! { backbones: [TorchScript] }
