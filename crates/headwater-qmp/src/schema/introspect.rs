//! The table as `query-qmp-schema` shows it.
//!
//! Names of types are no part of QMP, so they are replaced by numbers, and integers of every size become `int`. Clients
//! follow the numbers from the commands and events; types that none of these uses are left out.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::{Builtin, Schema, Shape, TypeId, Union};

impl Schema {
    pub(super) fn introspect(&self) -> Value {
        let mut view = View { schema: self, numbers: HashMap::new(), queue: Vec::new() };
        let mut entries = Vec::new();
        for command in &self.commands {
            let entry = json!({
                "name": command.name,
                "meta-type": "command",
                "arg-type": view.name(command.arguments),
                "ret-type": view.name(command.returns),
            });
            entries.push(with_features(entry, &command.features));
        }
        for event in &self.events {
            let entry = json!({
                "name": event.name,
                "meta-type": "event",
                "arg-type": view.name(event.data),
            });
            entries.push(with_features(entry, &event.features));
        }
        // Showing a type may name types that were not named before.
        let mut next = 0;
        while let Some(&(id, ref name)) = view.queue.get(next) {
            let name = name.clone();
            entries.push(view.show(id, name));
            next += 1;
        }
        Value::Array(entries)
    }
}

struct View<'a> {
    schema: &'a Schema,
    /// Numbers of enums, objects and alternates.
    numbers: HashMap<TypeId, usize>,
    /// Every type that was named, once, in order.
    queue: Vec<(TypeId, String)>,
}

impl View<'_> {
    /// What a type is called.
    fn name(&mut self, id: TypeId) -> String {
        let name = match self.schema.get(id).shape {
            Shape::Builtin(builtin) => builtin.name().to_owned(),
            Shape::Array(element) => format!("[{}]", self.name(element)),
            _ => {
                let next = self.numbers.len();
                self.numbers.entry(id).or_insert(next).to_string()
            }
        };
        if !self.queue.iter().any(|(_, queued)| *queued == name) {
            self.queue.push((id, name.clone()));
        }
        name
    }

    fn show(&mut self, id: TypeId, name: String) -> Value {
        let kind = self.schema.get(id);
        let entry = match &kind.shape {
            Shape::Builtin(builtin) => {
                json!({ "name": name, "meta-type": "builtin", "json-type": builtin.json_type() })
            }
            Shape::Enum(values) => {
                let members: Vec<Value> = values
                    .iter()
                    .map(|value| with_features(json!({ "name": value.name }), &value.features))
                    .collect();
                let names: Vec<&str> = values.iter().map(|value| value.name.as_str()).collect();
                json!({ "name": name, "meta-type": "enum", "members": members, "values": names })
            }
            Shape::Array(element) => {
                json!({ "name": name, "meta-type": "array", "element-type": self.name(*element) })
            }
            Shape::Alternate(alternatives) => {
                let members: Vec<Value> =
                    alternatives.iter().map(|&kind| json!({ "type": self.name(kind) })).collect();
                json!({ "name": name, "meta-type": "alternate", "members": members })
            }
            Shape::Object { members, union } => {
                let shown: Vec<Value> = members
                    .iter()
                    .map(|member| {
                        let mut shown = json!({ "name": member.name, "type": self.name(member.kind) });
                        if member.optional {
                            // No default is known but that there is one.
                            shown["default"] = Value::Null;
                        }
                        with_features(shown, &member.features)
                    })
                    .collect();
                let mut entry = json!({ "name": name, "meta-type": "object", "members": shown });
                if let Some(union) = union {
                    entry["tag"] = json!(union.tag);
                    entry["variants"] = self.variants(id, union);
                }
                entry
            }
        };
        with_features(entry, &kind.features)
    }

    /// What each value of the tag brings, also those that bring nothing.
    fn variants(&mut self, object: TypeId, union: &Union) -> Value {
        let empty = self.schema.empty();
        let cases: Vec<&str> = self.schema.cases(object, union).collect();
        cases
            .into_iter()
            .map(|case| {
                let branch = union.branches.iter().find(|(name, _)| name == case);
                let kind = branch.map_or(empty, |&(_, kind)| kind);
                json!({ "case": case, "type": self.name(kind) })
            })
            .collect()
    }
}

impl Schema {
    /// The values of a union's tag.
    fn cases<'a>(&'a self, object: TypeId, union: &'a Union) -> impl Iterator<Item = &'a str> {
        let members = match &self.get(object).shape {
            Shape::Object { members, .. } => members.as_slice(),
            _ => &[],
        };
        let tag = members.iter().find(|member| member.name == union.tag);
        let values = match tag.map(|tag| &self.get(tag.kind).shape) {
            Some(Shape::Enum(values)) => values.as_slice(),
            _ => &[],
        };
        values.iter().map(|value| value.name.as_str())
    }
}

impl Builtin {
    fn name(self) -> &'static str {
        match self {
            Self::Any => "any",
            Self::Null => "null",
            Self::Bool => "bool",
            Self::Str => "str",
            Self::Number => "number",
            Self::Int | Self::Int32 | Self::Uint16 | Self::Uint32 | Self::Uint64 | Self::Size => "int",
        }
    }

    fn json_type(self) -> &'static str {
        match self {
            Self::Any => "value",
            Self::Null => "null",
            Self::Bool => "boolean",
            Self::Str => "string",
            Self::Number => "number",
            Self::Int | Self::Int32 | Self::Uint16 | Self::Uint32 | Self::Uint64 | Self::Size => "int",
        }
    }
}

fn with_features(mut entry: Value, features: &[String]) -> Value {
    if !features.is_empty() {
        entry["features"] = json!(features);
    }
    entry
}
