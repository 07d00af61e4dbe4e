//! Named tensors as safetensors files: the same tensors give the same bytes, and come back to the bit.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use tch::{Device, Kind, Tensor};

use super::error::CheckpointError;

/// Tensors under their names, on any device.
pub type NamedTensors = Vec<(String, Tensor)>;

const KINDS: [(Kind, Dtype); 10] = [
    (Kind::Float, Dtype::F32),
    (Kind::BFloat16, Dtype::BF16),
    (Kind::Half, Dtype::F16),
    (Kind::Double, Dtype::F64),
    (Kind::Int64, Dtype::I64),
    (Kind::Int, Dtype::I32),
    (Kind::Int16, Dtype::I16),
    (Kind::Int8, Dtype::I8),
    (Kind::Uint8, Dtype::U8),
    (Kind::Bool, Dtype::BOOL),
];

/// A safetensors file to be: its header, and its tensors in the order of their bytes.
pub(super) struct Layout<'a> {
    header: Vec<u8>,
    tensors: Vec<(&'a str, &'a Tensor, usize)>,
}

impl<'a> Layout<'a> {
    /// Orders the tensors as safetensors does: by alignment, then by name.
    pub(super) fn new(tensors: &'a [(String, Tensor)]) -> Result<Self, CheckpointError> {
        let refuse = |name: &str, why: String| CheckpointError::Tensor { name: name.to_owned(), why };
        let mut entries = Vec::with_capacity(tensors.len());
        let mut names = BTreeSet::new();
        for (name, tensor) in tensors {
            if !names.insert(name) {
                return Err(refuse(name, "the name is given twice".to_owned()));
            }
            let kind = tensor.f_kind().map_err(|error| refuse(name, error.to_string()))?;
            let dtype = KINDS.iter().find(|(known, _)| *known == kind).map(|(_, dtype)| *dtype);
            let dtype = dtype.ok_or_else(|| refuse(name, format!("{kind:?} cannot be saved")))?;
            entries.push((dtype, name.as_str(), tensor, tensor.numel() * kind.elt_size_in_bytes()));
        }
        entries.sort_by(|left, right| right.0.cmp(&left.0).then(left.1.cmp(right.1)));

        let mut offset = 0;
        let mut infos = Vec::with_capacity(entries.len());
        for (dtype, name, tensor, bytes) in &entries {
            let shape = tensor.size().iter().map(|side| *side as usize).collect();
            infos.push((
                (*name).to_owned(),
                TensorInfo { dtype: *dtype, shape, data_offsets: (offset, offset + bytes) },
            ));
            offset += bytes;
        }
        // Readers in Python look for this entry. One only: several would be written in any order.
        let about = [("format".to_owned(), "pt".to_owned())].into();
        let mut header = Metadata::new(Some(about), infos)
            .map_err(|error| error.to_string())
            .and_then(|metadata| serde_json::to_vec(&metadata).map_err(|error| error.to_string()))
            .map_err(|why| refuse("header", why))?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let tensors = entries.into_iter().map(|(_, name, tensor, bytes)| (name, tensor, bytes)).collect();
        Ok(Layout { header, tensors })
    }

    /// The file's size in bytes.
    pub(super) fn size(&self) -> u64 {
        let tensors: usize = self.tensors.iter().map(|(_, _, bytes)| bytes).sum();
        (8 + self.header.len() + tensors) as u64
    }

    /// Writes one tensor after the other, so that no second copy of all of them is needed, and syncs the file.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        file.write_all(&(self.header.len() as u64).to_le_bytes())?;
        file.write_all(&self.header)?;
        let mut buffer = Vec::new();
        for (name, tensor, bytes) in &self.tensors {
            buffer.resize(*bytes, 0);
            tch::no_grad(|| {
                let tensor = tensor.f_to_device(Device::Cpu)?.f_contiguous()?;
                tensor.f_copy_data_u8(&mut buffer, tensor.numel())
            })
            .map_err(|error| io::Error::other(format!("tensor {name}: {error}")))?;
            file.write_all(&buffer)?;
        }
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
    }
}

/// Writes tensors to a safetensors file that tools in Python read, and syncs it. Deterministic.
///
/// # Errors
/// A name given twice, a dtype that the format lacks, a disk that is full.
pub fn write_tensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<(), CheckpointError> {
    let layout = Layout::new(tensors)?;
    layout.write(path).map_err(|source| CheckpointError::Save {
        path: path.to_owned(),
        needed: layout.size(),
        source,
    })
}

/// Reads all tensors of a safetensors file to the CPU, sorted by name.
///
/// # Errors
/// [`CheckpointError::Damaged`] for whatever keeps the file from being read.
pub fn read_tensors(path: &Path) -> Result<NamedTensors, CheckpointError> {
    let damaged = |why: String| CheckpointError::Damaged { file: path.to_owned(), why, others: Vec::new() };
    let bytes = std::fs::read(path).map_err(|error| damaged(error.to_string()))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|error| damaged(format!("not a whole safetensors file ({error})")))?;
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    for (name, view) in file.tensors() {
        let kind = KINDS.iter().find(|(_, dtype)| *dtype == view.dtype()).map(|(kind, _)| *kind);
        let kind = kind.ok_or_else(|| damaged(format!("tensor {name} has dtype {:?}", view.dtype())))?;
        let shape: Vec<i64> = view.shape().iter().map(|side| *side as i64).collect();
        let tensor = Tensor::f_from_data_size(view.data(), &shape, kind)
            .map_err(|error| damaged(format!("tensor {name}: {error}")))?;
        tensors.insert(name, tensor);
    }
    Ok(tensors.into_iter().collect())
}

/// Copies saved tensors into those of a model or optimizer, in place and on their device.
///
/// # Errors
/// [`CheckpointError::Mismatch`] with every name that is missing or left over and every shape or dtype that differs;
/// nothing is copied then.
pub fn restore(into: &[(String, Tensor)], from: &[(String, Tensor)]) -> Result<(), CheckpointError> {
    let saved: BTreeMap<&str, &Tensor> = from.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let wanted: BTreeSet<&str> = into.iter().map(|(name, _)| name.as_str()).collect();
    let mut faults = Vec::new();
    let missing: Vec<&str> = wanted.iter().copied().filter(|name| !saved.contains_key(name)).collect();
    if !missing.is_empty() {
        faults.push(format!("missing: {}", missing.join(", ")));
    }
    let unexpected: Vec<&str> = saved.keys().copied().filter(|name| !wanted.contains(name)).collect();
    if !unexpected.is_empty() {
        faults.push(format!("unexpected: {}", unexpected.join(", ")));
    }
    let describe = |tensor: &Tensor| format!("{:?} of {:?}", tensor.size(), tensor.kind());
    for (name, tensor) in into {
        if let Some(saved) = saved.get(name.as_str())
            && (saved.size() != tensor.size() || saved.kind() != tensor.kind())
        {
            faults.push(format!("{name} is {} in the file and {} here", describe(saved), describe(tensor)));
        }
    }
    if !faults.is_empty() {
        return Err(CheckpointError::Mismatch(faults));
    }
    tch::no_grad(|| {
        for (name, tensor) in into {
            if let Some(saved) = saved.get(name.as_str()) {
                tensor.shallow_clone().f_copy_(saved).map_err(|error| CheckpointError::Tensor {
                    name: name.clone(),
                    why: error.to_string(),
                })?;
            }
        }
        Ok(())
    })
}

/// Reads tensors of a checkpoint; an error lists the other checkpoints.
pub(super) fn read_of_checkpoint(path: &Path, others: &[PathBuf]) -> Result<NamedTensors, CheckpointError> {
    read_tensors(path).map_err(|error| match error {
        CheckpointError::Damaged { file, why, .. } => {
            CheckpointError::Damaged { file, why, others: others.to_vec() }
        }
        error => error,
    })
}
