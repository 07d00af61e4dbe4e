//! How a convolution of visible positions is cheapest: in one of two ways over these alone, or over the whole map.

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
    /// The whole map is convolved, and what is hidden is dropped.
    WholeMap,
}

impl Way {
    /// Whether it can compute this convolution of `rows` `(N, C)`: for tiles see [`Conv2d::takes_tiles`]; gathered ones are plain,
    /// or depthwise with a stride of 1, and every window touches the map.
    pub(crate) fn takes(self, rows: &Tensor, conv: &Conv2d) -> bool {
        let depthwise = is_depthwise(conv) && conv.stride == 1;
        let inside = conv.padding < conv.kernel();
        match self {
            Way::Tiled => conv.takes_tiles(rows),
            Way::Gathered => has_kernels(rows) && inside && (conv.groups == 1 || depthwise),
            Way::WholeMap => true,
        }
    }

    /// The one that takes least time, by a model of what `cargo bench -p jepa-tests --bench sparse_conv` has measured. Tiles are
    /// fastest where they [pay](jepa_plugin_api::winograd::Tiles::pay). What a gathered convolution takes is in proportion to the
    /// share of outputs that is visible, and if everything is, it takes so much longer than libtorch's of the whole map; the side
    /// of a cell has no influence, and channels have little. A model and no stopwatch, as a run must make the same choices when it
    /// is resumed.
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

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use jepa_plugin_api::Params;
    use jepa_plugin_api::nn::ConvOptions;
    use tch::{Device, Kind};

    use super::*;
    use crate::Visible;

    #[test]
    fn the_way_follows_what_is_visible() {
        // Every image shows the first cells of 7 × 7.
        let way = |cells: i64, side: i64, [inputs, outputs]: [i64; 2], kernel: i64, options: ConvOptions| {
            let mask = Tensor::arange(49, (Kind::Int64, Device::Cpu)).lt(cells).view([1, 1, 7, 7]);
            let visible = Rc::new(Visible::new(&mask.repeat([8, 1, 1, 1]), Device::Cpu).unwrap());
            let level = visible.at((side, side));
            let conv = Conv2d::new(&Params::new(Device::Cpu), inputs, outputs, kernel, options);
            Way::cheaper(&Tensor::zeros([level.count(), inputs], (Kind::Float, Device::Cpu)), &conv, &level)
        };
        let three = ConvOptions { padding: 1, bias: false, ..ConvOptions::default() };
        let strided = ConvOptions { stride: 2, ..three };
        // ResNet-50's, at 224 px: in its last stage a cell is one position.
        for (side, channels) in [(56, 64), (28, 128), (14, 256)] {
            for cells in [20, 49] {
                assert_eq!(way(cells, side, [channels; 2], 3, three), Way::Tiled, "{side} px, {cells} cells");
            }
        }
        assert_eq!(way(20, 7, [512; 2], 3, three), Way::Gathered);
        assert_eq!(way(49, 7, [512; 2], 3, three), Way::WholeMap);
        assert_eq!(way(20, 28, [128; 2], 3, strided), Way::Gathered);
        assert_eq!(way(49, 28, [128; 2], 3, strided), Way::WholeMap);
        // ConvNeXt's, whose kernels are of one channel each.
        let depthwise = ConvOptions { padding: 3, groups: 96, ..three };
        assert_eq!(way(20, 56, [96; 2], 7, depthwise), Way::Gathered);
        assert_eq!(way(40, 56, [96; 2], 7, depthwise), Way::WholeMap);
    }
}
