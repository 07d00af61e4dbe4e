//! A few steps of plain SGD on noise, through the handles of the boundary. Both hosts, of then and of today, run this.

use jepa_plugin_api::abi::Plugin;
use jepa_plugin_api::params::Kind;
use jepa_plugin_api::tch::{self, Device, Tensor};
use jepa_plugin_api::{Result, testing};
use serde_json::Value;

/// The losses of three steps of a method of one plugin with a backbone of another, each given with its options.
pub fn losses(method: (&Plugin, &str, &Value), backbone: (&Plugin, &str, &Value)) -> Result<Vec<f64>> {
    tch::set_num_threads(1);
    tch::manual_seed(7);
    let (plugin, name, options) = (backbone.0.clone(), backbone.1.to_owned(), backbone.2.clone());
    let build = Box::new(move || plugin.build_backbone(&name, &options, "cpu"));
    let mut built = method.0.build_method(method.1, method.2, testing::facts(), build)?;
    let trained: Vec<Tensor> = built
        .entries()
        .iter()
        .filter(|entry| entry.kind == Kind::Parameter)
        .map(|entry| entry.tensor.shallow_clone())
        .collect();
    let mut losses = Vec::new();
    for step in 0..3 {
        let views = built.views().len();
        let views =
            (0..views).map(|_| Tensor::randn([4, 3, 32, 32], (tch::Kind::Float, Device::Cpu))).collect();
        let mut batch = testing::batch(views);
        batch.labels = Tensor::arange(4, (tch::Kind::Int64, Device::Cpu));
        batch.step = step;
        let loss = built.step(batch)?.loss;
        losses.push(f64::try_from(&loss)?);
        loss.f_backward()?;
        tch::no_grad(|| {
            for parameter in &trained {
                let mut gradient = parameter.grad();
                if gradient.defined() {
                    let _ = parameter.shallow_clone().g_sub_(&(&gradient * 0.05));
                    let _ = gradient.zero_();
                }
            }
        });
    }
    Ok(losses)
}
