//! What clients are told about the schema: `query-commands` and `query-qmp-schema`. Types go by numbers there, as in the reference, so that nobody
//! relies on their names.

use super::{Builtin, Definition, Schema, Type};
use serde_json::{Value, json};
use std::collections::HashMap;

/// The answer to `query-commands`.
pub fn query_commands() -> Value {
    Schema::get().commands.iter().map(|command| json!({"name": command.name})).collect()
}

/// The answer to `query-qmp-schema`.
pub fn query_qmp_schema() -> Value {
    let schema = Schema::get();
    let mut told = Telling { numbers: HashMap::new(), lists: Vec::new(), builtins: Vec::new() };
    for (at, (name, _)) in schema.types.iter().enumerate() {
        told.numbers.insert((*name).to_owned(), at.to_string());
    }
    let mut entries = Vec::new();
    for command in &schema.commands {
        let mut entry = json!({
            "name": command.name,
            "meta-type": "command",
            "arg-type": told.number(command.arguments),
            "ret-type": told.of(&command.result),
        });
        with_features(&mut entry, &command.features);
        entries.push(entry);
    }
    for (name, data) in &schema.events {
        entries.push(json!({"name": name, "meta-type": "event", "arg-type": told.number(data)}));
    }
    for (name, definition) in &schema.types {
        let number = told.number(name);
        entries.push(match definition {
            Definition::Enum(values) => json!({
                "name": number,
                "meta-type": "enum",
                "members": values.iter().map(|value| json!({"name": value})).collect::<Value>(),
                "values": values,
            }),
            Definition::Alternate(types) => json!({
                "name": number,
                "meta-type": "alternate",
                "members": types.iter().map(|of| json!({"type": told.of(of)})).collect::<Value>(),
            }),
            Definition::Object { members, variants } => {
                let mut listed = Vec::new();
                for member in members {
                    let mut entry = json!({"name": member.name, "type": told.of(&member.of)});
                    if let (Value::Object(entry), true) = (&mut entry, member.optional) {
                        entry.insert("default".into(), Value::Null);
                    }
                    with_features(&mut entry, &member.features);
                    listed.push(entry);
                }
                let mut entry = json!({"name": number, "meta-type": "object", "members": listed});
                if let (Value::Object(entry), Some(variants)) = (&mut entry, variants) {
                    let cases = variants.cases.iter();
                    let cases = cases.map(|(case, of)| json!({"case": case, "type": told.number(of)}));
                    entry.insert("variants".into(), cases.collect());
                    entry.insert("tag".into(), variants.tag.into());
                }
                entry
            }
        });
    }
    // Lists of lists come up while others are told.
    let mut at = 0;
    while let Some(element) = told.lists.get(at).cloned() {
        let entry = json!({"name": format!("[{}]", told.of(&element)), "meta-type": "array", "element-type": told.of(&element)});
        entries.push(entry);
        at += 1;
    }
    for builtin in told.builtins {
        let (name, json_type) = builtin_names(builtin);
        entries.push(json!({"name": name, "meta-type": "builtin", "json-type": json_type}));
    }
    entries.into()
}

struct Telling {
    numbers: HashMap<String, String>,
    /// The elements of the lists that were named.
    lists: Vec<Type>,
    builtins: Vec<Builtin>,
}

impl Telling {
    fn number(&self, name: &str) -> String {
        self.numbers.get(name).cloned().unwrap_or_default()
    }

    fn of(&mut self, of: &Type) -> String {
        match of {
            Type::Named(name) => self.number(name),
            Type::Builtin(builtin) => {
                if !self.builtins.contains(builtin) {
                    self.builtins.push(*builtin);
                }
                builtin_names(*builtin).0.to_owned()
            }
            Type::List(element) => {
                if !self.lists.contains(element) {
                    self.lists.push((**element).clone());
                }
                format!("[{}]", self.of(element))
            }
        }
    }
}

fn builtin_names(builtin: Builtin) -> (&'static str, &'static str) {
    match builtin {
        Builtin::Str => ("str", "string"),
        Builtin::Int => ("int", "int"),
        Builtin::Bool => ("bool", "boolean"),
        Builtin::Number => ("number", "number"),
        Builtin::Null => ("null", "null"),
        Builtin::Any => ("any", "value"),
    }
}

fn with_features(entry: &mut Value, features: &[&'static str]) {
    if let (Value::Object(entry), false) = (entry, features.is_empty()) {
        entry.insert("features".into(), features.to_vec().into());
    }
}
