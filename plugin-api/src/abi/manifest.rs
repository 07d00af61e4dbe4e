//! The frozen record that every plugin file carries. It holds no pointers, so the host reads it from the file's bytes
//! and can refuse a plugin before any of its code runs.

use thiserror::Error;

use super::{API_MAJOR, API_MINOR, BRIDGE};

const MAGIC: [u8; 8] = *b"JEPAPLUG";

/// The record itself. Its layout never changes; a later one would only append, and say so in `struct_size`.
#[repr(C)]
pub struct Manifest {
    magic: [u8; 8],
    struct_size: u32,
    api_major: u16,
    api_minor: u16,
    name: [u8; 64],
    version: [u8; 32],
    rustc: [u8; 64],
    bridge: [u8; 32],
    libtorch: [u8; 32],
    features: u64,
}

const SIZE: usize = size_of::<Manifest>();
const _: () = assert!(SIZE == 248, "the manifest's layout is frozen");

impl Manifest {
    /// The manifest of a plugin called `name`, built against this copy of the API.
    ///
    /// # Panics
    /// At compile time, when a text does not fit its field.
    pub const fn new(name: &str, version: &str) -> Self {
        Manifest {
            magic: MAGIC,
            struct_size: SIZE as u32,
            api_major: API_MAJOR,
            api_minor: API_MINOR,
            name: padded(name),
            version: padded(version),
            rustc: padded(env!("JEPA_RUSTC_VERSION")),
            bridge: padded(BRIDGE),
            libtorch: [0; 32],
            features: 0,
        }
    }

    /// The same, of a plugin with C++ of its own that was compiled against libtorch `version`.
    ///
    /// # Panics
    /// As above.
    pub const fn over_libtorch(self, version: &str) -> Self {
        Manifest { libtorch: padded(version), ..self }
    }
}

const fn padded<const N: usize>(text: &str) -> [u8; N] {
    let (bytes, mut field, mut i) = (text.as_bytes(), [0; N], 0);
    assert!(bytes.len() < N, "text too long for the plugin manifest");
    while i < bytes.len() {
        field[i] = bytes[i];
        i += 1;
    }
    field
}

/// What a manifest says, as the host reads it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ManifestFields {
    /// Major version of the boundary that the plugin was built with.
    pub api_major: u16,
    /// Minor version of the boundary.
    pub api_minor: u16,
    /// The plugin's name: that of its crate.
    pub name: String,
    /// The plugin's own version.
    pub version: String,
    /// The compiler that built it.
    pub rustc: String,
    /// The torch bridge that it calls.
    pub bridge: String,
    /// The exact libtorch that it needs, when it brings C++ of its own.
    pub libtorch: Option<String>,
    /// Bits for what the plugin has or needs; none is defined yet. A host passes over bits of the lower half that it does
    /// not know, and refuses the plugin for one of the upper half: see [`unknown_needs`](Self::unknown_needs).
    pub features: u64,
}

/// Why bytes are not a manifest that can be read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ManifestError {
    /// Too short, or not starting with the magic.
    #[error("its manifest is damaged")]
    Damaged,
    /// A text field is not UTF-8.
    #[error("its manifest holds a text that is not UTF-8")]
    Text,
}

impl ManifestFields {
    /// The bits of `features` that this version does not know and must not pass over.
    pub fn unknown_needs(&self) -> u64 {
        self.features & 0xffff_ffff_0000_0000
    }

    /// Reads the bytes of an exported [`Manifest`].
    ///
    /// # Errors
    /// When they are too short, do not start with the magic, or hold texts that are not UTF-8.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let mut rest = bytes.get(..SIZE).ok_or(ManifestError::Damaged)?;
        let mut take = |n: usize| {
            let (field, tail) = rest.split_at(n);
            rest = tail;
            field
        };
        if take(8) != MAGIC {
            return Err(ManifestError::Damaged);
        }
        let number = |field: &[u8]| field.iter().rev().fold(0u64, |n, byte| n << 8 | u64::from(*byte));
        let text = |field: &[u8]| {
            let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
            str::from_utf8(&field[..end]).map(str::to_owned).map_err(|_| ManifestError::Text)
        };
        let struct_size = number(take(4));
        if struct_size < SIZE as u64 {
            return Err(ManifestError::Damaged);
        }
        Ok(ManifestFields {
            api_major: number(take(2)) as u16,
            api_minor: number(take(2)) as u16,
            name: text(take(64))?,
            version: text(take(32))?,
            rustc: text(take(64))?,
            bridge: text(take(32))?,
            libtorch: Some(text(take(32))?).filter(|v| !v.is_empty()),
            features: number(take(8)),
        })
    }
}
