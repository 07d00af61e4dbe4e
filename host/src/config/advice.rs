//! What to say of a key that nobody knows.

use crate::nearest::nearest;

/// What to say after "unknown key": the key that was probably meant, else the keys that there are.
pub(super) fn advice(unknown: &str, known: &[String]) -> String {
    let (section, name) = split(unknown);
    let siblings: Vec<(&str, &str)> =
        known.iter().map(|key| split(key)).filter(|key| key.0 == section).collect();
    if let Some(close) = nearest(name, siblings.iter().map(|key| key.1)) {
        return match section {
            "" => format!("did you mean {close}?"),
            _ => format!("did you mean {section}.{close}?"),
        };
    }
    let elsewhere: Vec<&str> = known.iter().map(String::as_str).filter(|key| split(key).1 == name).collect();
    if !elsewhere.is_empty() {
        return format!("did you mean {}?", elsewhere.join(" or "));
    }
    if let Some(close) = nearest(unknown, known.iter().map(String::as_str)) {
        return format!("did you mean {close}?");
    }
    if section.is_empty() || siblings.is_empty() {
        let mut sections: Vec<&str> = known.iter().filter_map(|key| key.split('.').next()).collect();
        sections.dedup();
        return format!("the known keys begin with {}", sections.join(", "));
    }
    let names: Vec<&str> = siblings.iter().map(|key| key.1).collect();
    format!("the keys of {section} are {}", names.join(", "))
}

/// A dotted key's section and last name.
fn split(key: &str) -> (&str, &str) {
    key.rsplit_once('.').unwrap_or(("", key))
}
