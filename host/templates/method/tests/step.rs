//! {{Type}} in a test of its own crate: neither a host nor a plugin file is needed.

use {{lib}}::{{Type}};
use jepa_plugin_api::Method as _;
use jepa_plugin_api::tch::{Device, Kind, Tensor};
use jepa_plugin_api::testing::{self, SmallBackbone};
use serde_json::json;

#[test]
fn gradients_reach_every_parameter() {
    let options = json!({ "hidden": 16, "output": 8 });
    let mut built = testing::method::<{{Type}}, _>(options, testing::facts(), SmallBackbone::new).unwrap();
    let view = || Tensor::randn([4, 3, 32, 32], (Kind::Float, Device::Cpu));
    let step = built.method.step(&testing::batch(vec![view(), view()])).unwrap();
    assert!(f64::try_from(&step.loss).unwrap().is_finite());

    step.loss.backward();
    for entry in built.entries.iter().filter(|entry| entry.tensor.requires_grad()) {
        assert!(entry.tensor.grad().defined(), "no gradient reaches {}", entry.name);
    }
}
