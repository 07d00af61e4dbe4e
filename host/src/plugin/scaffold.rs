//! `jepa-host plugin new`: the crate of a new plugin, which builds, trains and has a test.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::Kind;

/// Where each file of a new crate goes, and its text with `{{…}}` to fill in.
type Template = [(&'static str, &'static str)];

/// Of every kind.
const COMMON: &Template = &[
    ("Cargo.toml", include_str!("../../templates/Cargo.toml")),
    (".gitignore", include_str!("../../templates/gitignore")),
];

const METHOD: &Template = &[
    ("train.toml", include_str!("../../templates/method/train.toml")),
    ("src/lib.rs", include_str!("../../templates/method/src/lib.rs")),
    ("tests/step.rs", include_str!("../../templates/method/tests/step.rs")),
];

const PROBE: &Template = &[
    ("train.toml", include_str!("../../templates/probe/train.toml")),
    ("src/lib.rs", include_str!("../../templates/probe/src/lib.rs")),
    ("tests/evaluate.rs", include_str!("../../templates/probe/tests/evaluate.rs")),
];

const BACKBONE: &Template = &[
    ("train.toml", include_str!("../../templates/backbone/train.toml")),
    ("src/lib.rs", include_str!("../../templates/backbone/src/lib.rs")),
    ("tests/forward.rs", include_str!("../../templates/backbone/tests/forward.rs")),
];

/// Words of Rust that name nothing else, and crates that are part of every one or that a new one uses.
const TAKEN: &[&str] = &[
    "abstract",
    "alloc",
    "as",
    "async",
    "await",
    "become",
    "box",
    "break",
    "const",
    "continue",
    "core",
    "crate",
    "do",
    "dyn",
    "else",
    "enum",
    "extern",
    "false",
    "final",
    "fn",
    "for",
    "gen",
    "if",
    "impl",
    "in",
    "jepa_plugin_api",
    "let",
    "loop",
    "macro",
    "match",
    "mod",
    "move",
    "mut",
    "override",
    "priv",
    "proc_macro",
    "pub",
    "ref",
    "return",
    "schemars",
    "self",
    "serde",
    "serde_json",
    "static",
    "std",
    "struct",
    "super",
    "test",
    "trait",
    "true",
    "try",
    "type",
    "typeof",
    "unsafe",
    "unsized",
    "use",
    "virtual",
    "where",
    "while",
    "yield",
];

/// Types that every file knows, or that macros write without saying where they are from.
const PRELUDE: &[&str] = &["Box", "Option", "Result", "Self", "Some", "String", "Vec"];

/// Why there is no new crate.
#[derive(Debug, thiserror::Error)]
pub enum ScaffoldError {
    /// A name that cannot be a crate's.
    #[error("`{name}` cannot name a plugin: use small letters, digits, - and _, beginning with a letter")]
    Name {
        /// As it was given.
        name: String,
    },
    /// A name that means something else in the new crate.
    #[error(
        "`{name}` cannot name this plugin: `{clash}` is something else in its source; choose another, such as my-{name}"
    )]
    Clash {
        /// As it was given.
        name: String,
        /// What it would be called.
        clash: String,
    },
    /// Something is there already.
    #[error("{} exists already; choose another name or folder", path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// The source of jepa-plugin-api is not where it should be.
    #[error(
        "{} is not the source of jepa-plugin-api; name the folder plugin-api of your jepa-host checkout with --api",
        path.display()
    )]
    NoApi {
        /// The folder.
        path: PathBuf,
    },
    /// The crate cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// The checkout that this program was built in.
fn checkout() -> PathBuf {
    let host = Path::new(env!("CARGO_MANIFEST_DIR"));
    host.parent().unwrap_or(host).to_owned()
}

/// Writes the crate `name` of a plugin of this `kind` into the new folder `path`. It depends on the source of
/// jepa-plugin-api in the folder `api`, by default that of the checkout in which this program was built. Returns the
/// name of its library file.
///
/// # Errors
/// A name that is none, a folder that is there already, an API that is not; nothing is written then.
pub fn create(name: &str, kind: Kind, path: &Path, api: Option<&Path>) -> Result<String, ScaffoldError> {
    let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) || !name.chars().all(letters) {
        return Err(ScaffoldError::Name { name: name.to_owned() });
    }
    let library = name.replace('-', "_");
    let type_name: String = library.split('_').map(capitalised).collect();
    let files = || COMMON.iter().chain(template_of(kind));
    if let Some(clash) = clash(&library, &type_name, files().map(|(_, text)| *text)) {
        return Err(ScaffoldError::Clash { name: name.to_owned(), clash });
    }
    if path.exists() {
        return Err(ScaffoldError::Exists { path: path.to_owned() });
    }
    let api = api.map_or_else(|| checkout().join("plugin-api"), Path::to_owned);
    let api = match api.canonicalize() {
        Ok(folder) if folder.join("Cargo.toml").is_file() => folder,
        _ => return Err(ScaffoldError::NoApi { path: api }),
    };
    let demo_data = api.parent().unwrap_or(&api).join("examples/demo-data");

    let filled = |text: &str| {
        text.replace("{{crate}}", name)
            .replace("{{lib}}", &library)
            .replace("{{name}}", &library)
            .replace("{{Type}}", &type_name)
            .replace("{{api}}", &api.display().to_string())
            .replace("{{data}}", &demo_data.display().to_string())
    };
    for (file, text) in files() {
        let file = path.join(file);
        let folder = file.parent().unwrap_or(path);
        fs::create_dir_all(folder)
            .and_then(|()| fs::write(&file, filled(text)))
            .map_err(|source| ScaffoldError::Write { path: file.clone(), source })?;
    }
    Ok(format!("lib{library}.so"))
}

fn template_of(kind: Kind) -> &'static Template {
    match kind {
        Kind::Method => METHOD,
        Kind::Backbone => BACKBONE,
        Kind::Probe => PROBE,
    }
}

/// The name of the crate or of its types that means something else in these files.
fn clash<'a>(library: &str, type_name: &str, texts: impl Iterator<Item = &'a str>) -> Option<String> {
    if TAKEN.contains(&library) {
        return Some(library.to_owned());
    }
    let code = texts.flat_map(str::lines).filter(|line| !line.trim_start().starts_with(['/', '#']));
    let words: BTreeSet<&str> = code
        .flat_map(|line| line.split(|c: char| !c.is_alphanumeric() && c != '_'))
        .chain(PRELUDE.iter().copied())
        .collect();
    [type_name.to_owned(), format!("{type_name}Options")]
        .into_iter()
        .find(|name| words.contains(name.as_str()))
}

fn capitalised(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_ascii_uppercase().to_string() + letters.as_str())
}
