//! Tensors that other people's code computed: the files that `fixtures/generate.py` writes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tch::{Kind, Tensor};

/// One file of `fixtures/`.
pub struct Fixture {
    tensors: BTreeMap<String, Tensor>,
    metadata: BTreeMap<String, String>,
}

impl Fixture {
    /// Reads `fixtures/{name}.safetensors`, and what it takes from another file, as its metadata says.
    pub fn read(name: &str) -> Self {
        let mut fixture = Self::read_one(&format!("{name}.safetensors"));
        if let Some(other) = fixture.metadata.get("params_from") {
            let lends = |key: &String| key.starts_with("param.") || key.starts_with("input.");
            for (key, tensor) in Self::read_one(other).tensors.into_iter().filter(|(key, _)| lends(key)) {
                fixture.tensors.entry(key).or_insert(tensor);
            }
        }
        fixture
    }

    fn read_one(file: &str) -> Self {
        let path = path(file);
        let data = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let (_, header) = SafeTensors::read_metadata(&data).expect("a safetensors file");
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let content = SafeTensors::deserialize(&data).expect("a safetensors file");
        let tensor = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
            let kind = match view.dtype() {
                Dtype::F32 => Kind::Float,
                Dtype::U8 => Kind::Uint8,
                Dtype::I64 => Kind::Int64,
                other => panic!("{name} has dtype {other:?}"),
            };
            let shape: Vec<i64> = view.shape().iter().map(|&side| side as i64).collect();
            (name, Tensor::from_data_size(view.data(), &shape, kind))
        };
        Fixture { tensors: content.tensors().into_iter().map(tensor).collect(), metadata }
    }

    /// The tensor called `key`.
    pub fn tensor(&self, key: &str) -> Tensor {
        self.tensors.get(key).unwrap_or_else(|| panic!("the fixture has no `{key}`")).shallow_clone()
    }

    /// Whether there is a tensor called `key`.
    pub fn has(&self, key: &str) -> bool {
        self.tensors.contains_key(key)
    }

    /// The tensor called `key`, in which 1 is true.
    pub fn mask(&self, key: &str) -> Tensor {
        self.tensor(key).to_kind(Kind::Bool)
    }

    /// The tensors whose key is `prefix` and a name, under that name.
    pub fn under(&self, prefix: &str) -> Vec<(&str, Tensor)> {
        self.tensors
            .iter()
            .filter_map(|(key, tensor)| Some((key.strip_prefix(prefix)?, tensor.shallow_clone())))
            .collect()
    }

    /// The JSON text `key` of the file's metadata.
    pub fn json(&self, key: &str) -> Value {
        serde_json::from_str(&self.metadata[key]).expect("JSON in the metadata")
    }
}

/// Where `fixtures/{file}` is.
pub fn path(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(file)
}

/// max |a − b| / max |b|.
pub fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
    let largest = |x: Tensor| f64::try_from(x.to_kind(Kind::Double).abs().max()).expect("a number");
    largest(a.detach() - b) / largest(b.shallow_clone()).max(f64::MIN_POSITIVE)
}

/// Fails unless [`relative_error`] is at most `tolerance`.
#[track_caller]
pub fn assert_close(what: &str, ours: &Tensor, theirs: &Tensor, tolerance: f64) {
    let (our_shape, their_shape) = (ours.size(), theirs.size());
    assert_eq!(our_shape, their_shape, "shape of {what}");
    let error = relative_error(ours, theirs);
    assert!(error <= tolerance, "{what} is off by {error:.1e} relative, more than {tolerance:.0e}");
}
