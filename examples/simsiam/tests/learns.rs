//! The method in a test of its own crate: no host and no plugin file.

use jepa_plugin_api::tch::{Device, Kind, Tensor};
use jepa_plugin_api::Method as _;
use jepa_plugin_api::testing::{self, SmallBackbone};
use serde_json::json;
use simsiam::SimSiam;

#[test]
fn each_view_pulls_the_other() {
    let options = json!({ "units": 16, "bottleneck": 4 });
    let mut built = testing::method::<SimSiam, _>(options, testing::facts(), SmallBackbone::new).unwrap();
    let view = || Tensor::randn([4, 3, 32, 32], (Kind::Float, Device::Cpu));
    let step = built.method.step(&testing::batch(vec![view(), view()])).unwrap();
    let loss = f64::try_from(&step.loss).unwrap();
    assert!((-1.0..=1.0).contains(&loss), "a mean of cosines, but {loss}");

    step.loss.backward();
    for entry in &built.entries {
        if entry.tensor.requires_grad() {
            assert!(entry.tensor.grad().defined(), "no gradient reaches {}", entry.name);
        }
    }
}
