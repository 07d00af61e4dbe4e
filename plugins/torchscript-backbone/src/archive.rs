//! TorchScript files: a zip archive with the source text of each class, as `torch.jit.save` writes it.
//!
//! tch reaches a module's parameters but not its buffers, which a run has to save and restore: running statistics, say.
//! Only code of the module itself reaches them, so the module's class is given one more method before libtorch loads
//! it, which returns all of them.

use std::collections::HashMap;
use std::io::{Cursor, Read, Write};

use jepa_plugin_api::{Context, Result, bail, ensure};
use zip::write::FileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// The name of the method that [`with_buffers`] adds: it takes nothing, and returns a list of tensors.
pub const BUFFERS: &str = "jepa_host_buffers";

/// A module class or module interface, as its source text describes it.
#[derive(Debug, Default)]
struct Class {
    /// Whether it is an interface, behind which any module may be.
    interface: bool,
    /// Attributes with their types, in order.
    attributes: Vec<(String, String)>,
    /// Which of the attributes are buffers.
    buffers: Vec<String>,
    /// Name of the archive's file that it is in, and the offset there at which it ends.
    end: (String, usize),
}

/// The TorchScript file `file` with a method [`BUFFERS`], and the names of the tensors that it returns, in order. The
/// file as it is, when its module has no buffers.
///
/// # Errors
/// When it is not a TorchScript file, or has buffers out of reach.
pub fn with_buffers(file: Vec<u8>) -> Result<(Vec<u8>, Vec<String>)> {
    let not_script = "it is not a TorchScript file: write one with torch.jit.script(model).save(path)";
    let mut archive = ZipArchive::new(Cursor::new(file.as_slice())).context(not_script)?;
    let names: Vec<String> = archive.file_names().map(str::to_owned).collect();
    let root = names.iter().find_map(|name| Some(name.strip_suffix("/constants.pkl")?.to_owned()));
    // torch.save writes an archive without it.
    let root = root.context(not_script)?;

    let mut read = |name: &str| -> Result<Vec<u8>> {
        let mut content = Vec::new();
        archive.by_name(name)?.read_to_end(&mut content)?;
        Ok(content)
    };
    let mut texts = HashMap::new();
    let mut classes = HashMap::new();
    for name in &names {
        let path = name.strip_prefix(&format!("{root}/code/")).and_then(|path| path.strip_suffix(".py"));
        let Some(path) = path else { continue };
        let text = String::from_utf8(read(name)?).with_context(|| format!("{name} in it is no text"))?;
        read_classes(&text, name, &path.replace('/', "."), &mut classes);
        texts.insert(name.clone(), text);
    }

    let top = top_class(&read(&format!("{root}/data.pkl"))?).context(not_script)?;
    let mut buffers = Vec::new();
    collect(&classes, &top, &mut Vec::new(), &mut buffers)?;
    if buffers.is_empty() {
        return Ok((file, Vec::new()));
    }

    let (source, end) = &classes[&top].end;
    let mut text = texts.remove(source).expect("classes come from texts");
    text.insert_str(*end, &method(&top, &buffers));
    // Places in the old text, for messages.
    let outdated = format!("{source}.debug_pkl");
    let mut written = ZipWriter::new(Cursor::new(Vec::new()));
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i)?;
        if entry.name() == source {
            let options = FileOptions::default().compression_method(CompressionMethod::Stored);
            written.start_file(source.as_str(), options)?;
            written.write_all(text.as_bytes())?;
        } else if entry.name() != outdated {
            written.raw_copy_file(entry)?;
        }
    }
    let names = buffers.into_iter().map(|path| path.join(".")).collect();
    Ok((written.finish()?.into_inner(), names))
}

/// Adds the module classes of `text`, the file `source`, to `classes`, by their full name.
fn read_classes(text: &str, source: &str, prefix: &str, classes: &mut HashMap<String, Class>) {
    let mut current: Option<String> = None;
    let mut in_attributes = false;
    let mut offset = 0;
    for line in text.split_inclusive('\n') {
        offset += line.len();
        let line = line.trim_end();
        if !line.starts_with(' ') && !line.is_empty() {
            let head = line.strip_prefix("class ").and_then(|rest| rest.strip_suffix("):")?.split_once('('));
            let head = head.filter(|(_, base)| ["Module", "ModuleInterface"].contains(base));
            current = head.map(|(name, base)| {
                let name = format!("{prefix}.{name}");
                classes.insert(name.clone(), Class { interface: base != "Module", ..Class::default() });
                name
            });
            in_attributes = true;
        }
        let Some(name) = &current else { continue };
        let class = classes.get_mut(name).expect("it was put there at its head");
        if !line.is_empty() {
            class.end = (source.to_owned(), offset);
        }
        let line = line.trim_start();
        in_attributes &= !line.starts_with("def ");
        if !in_attributes {
            continue;
        }
        if let Some(list) = line.strip_prefix("__buffers__ = ") {
            // Every second piece between quotation marks is a name.
            class.buffers = list.split('"').skip(1).step_by(2).map(str::to_owned).collect();
        } else if let Some(rest) = line.strip_prefix("__annotations__[\"") {
            // A name that is no identifier: that of a layer in a Sequential is a number.
            class.attributes.extend(rest.split_once("\"] = ").map(owned));
        } else {
            class.attributes.extend(line.split_once(" : ").map(owned));
        }
    }
}

fn owned((name, kind): (&str, &str)) -> (String, String) {
    (name.to_owned(), kind.to_owned())
}

/// The class of the module itself: the first name that its pickle refers to, as `c`, module, line feed, name, line feed.
fn top_class(pickle: &[u8]) -> Option<String> {
    let start = pickle.iter().position(|&byte| byte == b'c')? + 1;
    let mut lines = pickle[start..].split(|&byte| byte == b'\n');
    let (module, name) = (lines.next()?, lines.next()?);
    Some(format!("{}.{}", str::from_utf8(module).ok()?, str::from_utf8(name).ok()?))
}

/// Adds the paths of all buffers below a module of class `name`, which lies at `path`.
fn collect(
    classes: &HashMap<String, Class>,
    name: &str,
    path: &mut Vec<String>,
    buffers: &mut Vec<Vec<String>>,
) -> Result<()> {
    let class = classes.get(name).with_context(|| format!("it does not describe its class {name}"))?;
    for (attribute, kind) in &class.attributes {
        path.push(attribute.clone());
        if class.buffers.contains(attribute) {
            match kind.as_str() {
                "Tensor" => buffers.push(path.clone()),
                "NoneType" => {}
                _ => bail!(
                    "its buffer {} is of type {kind}, and only tensors can be saved with a run",
                    path.join(".")
                ),
            }
        } else if let Some(part) = classes.get(kind) {
            ensure!(
                !part.interface,
                "its part {} is behind a module interface, where its buffers are out of reach",
                path.join(".")
            );
            collect(classes, kind, path, buffers)?;
        }
        path.pop();
    }
    Ok(())
}

/// The source text of the method that returns `buffers` of `class`.
fn method(class: &str, buffers: &[Vec<String>]) -> String {
    let attribute = |of: String, name: &String| format!("getattr({of}, \"{name}\")");
    let list: Vec<String> =
        buffers.iter().map(|path| path.iter().fold("self".to_owned(), attribute)).collect();
    format!("  def {BUFFERS}(self: {class}) -> List[Tensor]:\n    return [{}]\n", list.join(", "))
}
