//! {{Type}} in a test of its own crate: neither a host nor a plugin file is needed.

use {{lib}}::{{Type}};
use jepa_plugin_api::tch::{Device, Kind, Tensor};
use jepa_plugin_api::{Backbone as _, Params};

#[test]
fn a_map_has_the_promised_shape_and_gradients_reach_every_parameter() {
    let params = Params::new(Device::Cpu);
    let backbone = {{Type}}::new("{{name}}", Default::default(), &params).unwrap();
    let info = backbone.info();
    let map = backbone.forward(&Tensor::randn([4, 3, 32, 32], (Kind::Float, Device::Cpu)), None, true).unwrap();
    let side = 32 / info.downsample;
    assert_eq!(map.size(), [4, info.channels, side, side]);

    map.square().mean(Kind::Float).backward();
    for entry in params.entries().iter().filter(|entry| entry.tensor.requires_grad()) {
        assert!(entry.tensor.grad().defined(), "no gradient reaches {}", entry.name);
    }
}
