//! Whether a convolution is cheaper over visible positions alone or over the whole map.

use jepa_plugin_api::nn::Conv2d;
use tch::Tensor;

use crate::canvas::has_kernels;
use crate::conv::is_depthwise;
use crate::visible::Level;

/// How a convolution of visible positions is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// [Tiles](jepa_plugin_api::winograd) of 2 × 2 positions, those in which something is visible.
    Tiled,
    /// What the windows of visible outputs see, and nothing else, is multiplied with the weights.
    Gathered,
    /// libtorch convolves the whole map, and what is hidden is dropped.
    WholeMap,
}

impl Way {
    /// Whether it can compute this convolution of `rows`: tiles are there for 3×3 kernels in fp32; gathered ones are plain, or
    /// depthwise with a stride of 1, and every window touches the map.
    pub(crate) fn takes(self, rows: &Tensor, conv: &Conv2d) -> bool {
        let depthwise = is_depthwise(conv) && conv.stride == 1;
        let inside = conv.padding < conv.kernel();
        match self {
            Way::Tiled => conv.takes_tiles(rows),
            Way::Gathered => has_kernels(rows) && inside && (conv.groups == 1 || depthwise),
            Way::WholeMap => true,
        }
    }

    /// The one that takes less time, by a model of what `cargo bench -p jepa-tests --bench sparse_conv` has measured: what
    /// a gathered convolution takes is in proportion to the share of outputs that is visible, and if everything is, it takes
    /// so much longer than libtorch's. The side of a cell has no influence but on tiles, and channels have little. A model and
    /// no stopwatch, as a run must make the same choices when it is resumed.
    pub(crate) fn cheaper(rows: &Tensor, conv: &Conv2d, to: &Level) -> Self {
        let channels = |dimension: usize| conv.weight.size()[dimension] as usize;
        if Way::Tiled.takes(rows, conv) && to.tiles().pay(channels(1), channels(0)) {
            return Way::Tiled;
        }
        let of_everything = match (is_depthwise(conv), conv.stride) {
            (true, _) => 1.35,
            (false, 1) => 1.2,
            // libtorch's gradient of the input is slow with a stride.
            (false, _) => 1.0,
        };
        match Way::Gathered.takes(rows, conv) && to.share() * of_everything < 1.0 {
            true => Way::Gathered,
            false => Way::WholeMap,
        }
    }
}
