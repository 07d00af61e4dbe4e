//! The probe by itself: no plugin file, no host, no data set.

use jepa_plugin_api::tch::Tensor;
use jepa_plugin_api::{FrozenFeatures, LabelledFeatures, Probe as _};
use serde_json::{from_value, json};
use {{lib}}::{{Type}};

/// Four features in the plane, of classes 0, 0, 1, 1.
fn plane(points: [[f32; 2]; 4]) -> LabelledFeatures {
    let x = Tensor::from_slice(points.as_flattened()).view([4, 2]);
    LabelledFeatures { x, y: Tensor::from_slice(&[0i64, 0, 1, 1]) }
}

#[test]
fn three_of_four_are_near_their_class() {
    let features = FrozenFeatures {
        train: plane([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]),
        held_out: plane([[2.0, 0.1], [0.2, 3.0], [0.0, 0.5], [0.1, 0.2]]),
        classes: 2,
        seed: 0,
    };
    let mut probe = {{Type}}::new(from_value(json!({ "cosine": true })).unwrap()).unwrap();
    assert_eq!(probe.evaluate(&features).unwrap(), [("top1".to_owned(), 0.75)]);
}
