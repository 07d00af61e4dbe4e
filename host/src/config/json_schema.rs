//! Reads a JSON Schema as `schemars` writes it: references, tables, choices, and the options that it lists.

use serde_json::{Map, Value};

/// A schema and what its references point into.
#[derive(Clone, Copy)]
pub(super) struct JsonSchema<'a>(pub &'a Value);

/// One option that a schema lists, with the words of its author.
#[derive(Debug)]
pub struct SchemaOption<'a> {
    /// The dotted key.
    pub key: String,
    /// What it means.
    pub about: Option<&'a str>,
    /// Its value where it is not set, `null` for none. Without one, it must be set.
    pub default: Option<&'a Value>,
    /// The values that it takes, where the schema lists them.
    pub choices: Vec<&'a Value>,
}

/// The options of `section`, such as `method`, that `schema` lists; those of a table come after its name.
pub fn schema_options<'a>(section: &str, schema: &'a Value) -> Vec<SchemaOption<'a>> {
    let mut options = Vec::new();
    let reader = JsonSchema(schema);
    reader.collect_options(section, reader.resolve(schema), None, &mut options);
    options
}

impl<'a> JsonSchema<'a> {
    /// The schema itself, behind any references.
    pub fn resolve(self, schema: &'a Value) -> &'a Value {
        let mut schema = schema;
        // A schema that refers to itself only would never end; none is as deep as this.
        for _ in 0..32 {
            let Some(target) = schema.get("$ref").and_then(Value::as_str) else { break };
            match self.0.pointer(target.trim_start_matches('#')) {
                Some(found) => schema = found,
                None => break,
            }
        }
        schema
    }

    /// The entries of a table (which is no choice between several), looking through "or not set".
    pub fn table(self, schema: &'a Value) -> Option<&'a Value> {
        let schema = self.resolve(schema);
        let forms = forms_of(schema).into_iter().flatten().map(|form| self.resolve(form));
        let table = match forms.filter(|form| types(form) != ["null"]).collect::<Vec<_>>().as_slice() {
            [only] => only,
            _ => schema,
        };
        (table.get("properties").is_some() && forms_of(table).is_none()).then_some(table)
    }

    /// The values that are listed by `enum`, `const`, or alternatives of these; none where others are possible too.
    pub fn choices(self, schema: &'a Value) -> Option<Vec<&'a Value>> {
        let schema = self.resolve(schema);
        match (schema.get("enum"), schema.get("const"), forms_of(schema)) {
            (Some(Value::Array(values)), _, _) => Some(values.iter().collect()),
            (_, Some(value), _) => Some(vec![value]),
            (_, _, Some(forms)) => {
                let forms = forms.iter().map(|form| self.resolve(form));
                let lists: Option<Vec<_>> =
                    forms.filter(|form| types(form) != ["null"]).map(|form| self.choices(form)).collect();
                lists.map(|lists| lists.concat())
            }
            _ => None,
        }
    }

    /// Every dotted key that can be set.
    pub fn keys(self, schema: &'a Value, prefix: &str) -> Vec<String> {
        let Some(table) = self.table(schema) else { return vec![prefix.to_owned()] };
        let entries = properties(table).into_iter().flatten();
        entries.flat_map(|(name, inner)| self.keys(inner, &join(prefix, name))).collect()
    }

    /// `defaults` are those of the table as a whole: they win over what its entries say of themselves.
    fn collect_options(
        self,
        key: &str,
        table: &'a Value,
        defaults: Option<&'a Value>,
        options: &mut Vec<SchemaOption<'a>>,
    ) {
        for (name, inner) in properties(table).into_iter().flatten() {
            let key = join(key, name);
            let default = defaults.and_then(|defaults| defaults.get(name)).or(inner.get("default"));
            match self.table(inner) {
                Some(table) => self.collect_options(&key, table, default, options),
                None => options.push(SchemaOption {
                    key,
                    about: inner
                        .get("description")
                        .or(self.resolve(inner).get("description"))
                        .and_then(Value::as_str),
                    default,
                    choices: self.choices(inner).unwrap_or_default(),
                }),
            }
        }
    }
}

/// The alternatives of `anyOf` or `oneOf`.
pub(super) fn forms_of(schema: &Value) -> Option<&Vec<Value>> {
    schema.get("anyOf").or(schema.get("oneOf")).and_then(Value::as_array)
}

/// The entries of a table, by name.
pub(super) fn properties(schema: &Value) -> Option<&Map<String, Value>> {
    schema.get("properties").and_then(Value::as_object)
}

/// The JSON types that a schema admits.
pub(super) fn types(schema: &Value) -> Vec<&str> {
    match schema.get("type") {
        Some(Value::String(name)) => vec![name],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

/// `section.name`.
pub(super) fn join(section: &str, name: &str) -> String {
    if section.is_empty() { name.to_owned() } else { format!("{section}.{name}") }
}
