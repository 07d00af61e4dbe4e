//! Everything that the author of a jepa-host plugin needs: three traits, a host to ask, and building blocks.
//!
//! A plugin is a crate of type `cdylib` with a [`Method`], a [`Backbone`] or a [`Probe`], and one [`export_plugin!`]. The
//! host owns the device, the data, random numbers, the optimizer, schedules, EMA, checkpoints, evaluation and logging; a
//! plugin owns the computation of a loss and says what it needs. So every plugin gets exact resume, mixed precision and
//! evaluation for nothing. The guide is this crate's `README.md`.

#![deny(missing_docs)]

pub mod abi;
mod augment;
pub mod autograd;
mod backbone;
pub mod cuda;
mod host;
pub mod matmul;
pub mod memory;
mod method;
pub mod nn;
pub mod parallel;
pub mod params;
mod probe;
pub mod ranks;
pub mod rng;
pub mod testing;
mod view;
pub mod winograd;

pub use anyhow::{self, Context, Error, Result, bail, ensure};
pub use schemars;
pub use serde;
pub use tch;
pub use tracing;

pub use abi::BackboneHandle;
pub use augment::Augmentation;
pub use backbone::{Backbone, BackboneInfo, NormKind};
pub use host::{EmaPair, EmaSchedule, Host, RunFacts, parse_device};
pub use method::{Batch, Method, NoOptions, Step};
pub use params::Params;
pub use probe::{FrozenFeatures, LabelledFeatures, Probe};
pub use rng::Rng;
pub use view::{IMAGENET_MEAN_STD, Interpolation, Transform, ViewSpec};

/// The guide, whose code has to run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Guide;

/// Makes a plugin of this crate: exports its methods, backbones and probes under the crate's name and version. Once per
/// crate.
///
/// Any of `methods: [A, B]`, `backbones: [C]` and `probes: [D]`, in this order. A plugin that links C++ of its own over
/// libtorch begins with the version that this was compiled against, `libtorch: "2.11.0"`: only a host that runs on the
/// same loads it. Since 1.1.
///
/// ```standalone_crate
/// use jepa_plugin_api::testing::SmallBackbone;
/// jepa_plugin_api::export_plugin! { backbones: [SmallBackbone] }
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! export_plugin {
    (
        $(libtorch: $libtorch:literal $(,)?)?
        $(methods: [$($method:ty),* $(,)?] $(,)?)?
        $(backbones: [$($backbone:ty),* $(,)?] $(,)?)?
        $(probes: [$($probe:ty),* $(,)?] $(,)?)?
    ) => {
        const _: () = {
            struct __Plugin;

            impl $crate::abi::Exports for __Plugin {
                const NAME: &'static str = env!("CARGO_PKG_NAME");

                fn methods() -> Vec<$crate::abi::MethodEntry> {
                    vec![$($($crate::abi::MethodEntry::of::<$method>()),*)?]
                }

                fn backbones() -> Vec<$crate::abi::BackboneEntry> {
                    vec![$($($crate::abi::BackboneEntry::of::<$backbone>()),*)?]
                }

                fn probes() -> Vec<$crate::abi::ProbeEntry> {
                    vec![$($($crate::abi::ProbeEntry::of::<$probe>()),*)?]
                }
            }

            // SAFETY: no other symbol of a plugin has this name; the host reads it by this name and type.
            #[unsafe(no_mangle)]
            static JEPA_PLUGIN_MANIFEST: $crate::abi::Manifest =
                $crate::abi::Manifest::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
                    $(.over_libtorch($libtorch))?;

            // SAFETY: as above.
            #[unsafe(no_mangle)]
            static JEPA_PLUGIN_ROOT: $crate::abi::RootHeader = $crate::abi::root_header::<__Plugin>();
        };
    };
}
