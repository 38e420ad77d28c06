//! Checks values against types. The order in which a value's faults are found is the reference's: members in the order of their definition,
//! then those that depend on the tag, then what is unexpected.

use super::{Builtin, Definition, Member, Schema, Type, Variants};
use crate::error::QmpError;
use serde_json::{Map, Number, Value};

/// Where a value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// JSON, with types of its own.
    Json,
    /// Keys and values of a command line: leaves are strings, whatever their type.
    Keyval,
}

/// How deep a value may be nested.
const MAX_DEPTH: usize = 512;

struct Check<'a> {
    schema: &'a Schema,
    source: Source,
}

pub(super) fn check(schema: &Schema, name: &str, value: Value, source: Source) -> Result<Value, QmpError> {
    Check { schema, source }.named(name, value, &Path::default())
}

/// Where in the value we are.
#[derive(Default)]
struct Path {
    text: String,
    /// The last part of it, by which some messages name the place.
    last: String,
    depth: usize,
}

impl Path {
    fn member(&self, name: &str) -> Self {
        let text = if self.text.is_empty() { name.to_owned() } else { format!("{}.{name}", self.text) };
        Self { text, last: name.to_owned(), depth: self.depth + 1 }
    }

    fn element(&self, at: usize, source: Source) -> Self {
        let text = match source {
            Source::Json => format!("{}[{at}]", self.text),
            Source::Keyval => format!("{}.{at}", self.text),
        };
        Self { text, last: "null".into(), depth: self.depth + 1 }
    }

    fn wrong_type(&self, expected: &str) -> QmpError {
        let place = if self.text.is_empty() { "null" } else { &self.text };
        QmpError::generic(format!("Invalid parameter type for '{place}', expected: {expected}"))
    }

    fn expects(&self, what: &str) -> QmpError {
        QmpError::generic(format!("Parameter '{}' expects {what}", self.text))
    }
}

impl Check<'_> {
    fn of_type(&self, of: &Type, value: Value, path: &Path) -> Result<Value, QmpError> {
        if path.depth > MAX_DEPTH {
            return Err(QmpError::generic(format!("Parameter '{}' is nested too deeply", path.last)));
        }
        match of {
            Type::Builtin(builtin) => self.builtin(*builtin, value, path),
            Type::List(element) => match value {
                Value::Array(values) => {
                    let checked = values.into_iter().enumerate().map(|(at, value)| {
                        self.of_type(element, value, &path.element(at, self.source))
                    });
                    checked.collect::<Result<Vec<_>, _>>().map(Value::Array)
                }
                _ => Err(path.wrong_type("array")),
            },
            Type::Named(name) => self.named(name, value, path),
        }
    }

    fn builtin(&self, builtin: Builtin, value: Value, path: &Path) -> Result<Value, QmpError> {
        if self.source == Source::Keyval
            && let Value::String(text) = &value
        {
            return keyval_leaf(builtin, text, path);
        }
        let (fits, expected) = match builtin {
            Builtin::Str => (value.is_string(), "string"),
            Builtin::Int => (value.is_i64() || value.is_u64(), "integer"),
            Builtin::Bool => (value.is_boolean(), "boolean"),
            Builtin::Number => (value.is_number(), "number"),
            Builtin::Null => (value.is_null(), "null"),
            Builtin::Any => (true, ""),
        };
        let expected = if self.source == Source::Keyval { "scalar" } else { expected };
        if fits { Ok(value) } else { Err(path.wrong_type(expected)) }
    }

    fn named(&self, name: &str, value: Value, path: &Path) -> Result<Value, QmpError> {
        match self.schema.definition(name) {
            Some(Definition::Enum(values)) => match value {
                Value::String(text) if values.contains(&text.as_str()) => Ok(Value::String(text)),
                Value::String(text) => Err(QmpError::generic(format!(
                    "Parameter '{}' does not accept value '{text}'",
                    path.last
                ))),
                _ => Err(path.wrong_type("string")),
            },
            Some(Definition::Object { members, variants }) => match value {
                Value::Object(given) => self.object(members, variants.as_ref(), given, path).map(Value::Object),
                _ => Err(path.wrong_type("object")),
            },
            Some(Definition::Alternate(types)) => self.alternate(name, types, value, path),
            None => Err(QmpError::generic(format!("the schema has no type '{name}'"))),
        }
    }

    fn object(
        &self,
        members: &[Member],
        variants: Option<&Variants>,
        mut given: Map<String, Value>,
        path: &Path,
    ) -> Result<Map<String, Value>, QmpError> {
        let mut checked = Map::new();
        self.members(members, variants, &mut given, &mut checked, path)?;
        match given.keys().next() {
            Some(name) => {
                let at = path.member(name);
                Err(QmpError::generic(format!("Parameter '{}' is unexpected", at.text)))
            }
            None => Ok(checked),
        }
    }

    fn members(
        &self,
        members: &[Member],
        variants: Option<&Variants>,
        given: &mut Map<String, Value>,
        checked: &mut Map<String, Value>,
        path: &Path,
    ) -> Result<(), QmpError> {
        // The tag comes first: what else may be there depends on it.
        let tag = variants.map(|variants| variants.tag);
        let (first, rest): (Vec<&Member>, Vec<&Member>) =
            members.iter().partition(|member| Some(member.name) == tag);
        for member in first.into_iter().chain(rest) {
            let at = path.member(member.name);
            match given.remove(member.name) {
                Some(value) => {
                    let value = self.of_type(&member.of, value, &at)?;
                    checked.insert(member.name.to_owned(), value);
                }
                None if member.optional => {}
                None => return Err(QmpError::generic(format!("Parameter '{}' is missing", at.text))),
            }
        }
        let Some(variants) = variants else { return Ok(()) };
        let value = checked.get(variants.tag).and_then(Value::as_str).unwrap_or_default();
        let Some((_, object)) = variants.cases.iter().find(|(case, _)| *case == value) else { return Ok(()) };
        match self.schema.definition(object) {
            Some(Definition::Object { members, variants }) => {
                self.members(members, variants.as_ref(), given, checked, path)
            }
            _ => Ok(()),
        }
    }

    /// A value that may be of one of several types, told apart by what JSON calls them.
    fn alternate(&self, name: &str, types: &[Type], value: Value, path: &Path) -> Result<Value, QmpError> {
        let fits = |of: &&Type| match (of, &value) {
            (Type::Builtin(Builtin::Str), Value::String(_))
            | (Type::Builtin(Builtin::Null), Value::Null)
            | (Type::Builtin(Builtin::Any), _)
            | (Type::List(_), Value::Array(_)) => true,
            (Type::Builtin(Builtin::Int), value) => value.is_i64() || value.is_u64(),
            (Type::Builtin(Builtin::Bool), Value::Bool(_)) => true,
            (Type::Named(name), value) => match self.schema.definition(name) {
                Some(Definition::Enum(_)) => value.is_string(),
                Some(Definition::Object { .. }) => value.is_object(),
                _ => false,
            },
            _ => false,
        };
        match types.iter().find(fits) {
            Some(of) => self.of_type(of, value, path),
            // Types of the same name in different places have a number at the end.
            None => Err(path.wrong_type(name.split('-').next().unwrap_or(name))),
        }
    }
}

/// A leaf of a command line as the type that it is to have.
fn keyval_leaf(builtin: Builtin, text: &str, path: &Path) -> Result<Value, QmpError> {
    match builtin {
        Builtin::Str | Builtin::Any => Ok(Value::String(text.to_owned())),
        Builtin::Bool => match text {
            "on" | "yes" | "true" | "y" => Ok(Value::Bool(true)),
            "off" | "no" | "false" | "n" => Ok(Value::Bool(false)),
            _ => Err(path.expects("'on' or 'off'")),
        },
        Builtin::Int => integer(text).map(Value::Number).ok_or_else(|| path.expects("integer")),
        Builtin::Number => {
            let number = text.parse::<f64>().ok().and_then(Number::from_f64);
            number.map(Value::Number).ok_or_else(|| path.expects("number"))
        }
        Builtin::Null if text.is_empty() => Ok(Value::Null),
        Builtin::Null => Err(path.wrong_type("null")),
    }
}

/// A number in one of C's notations, or a size with a suffix.
fn integer(text: &str) -> Option<Number> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let magnitude = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => {
            let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
            let shift = match &digits[end..] {
                "" | "b" | "B" => 0,
                "k" | "K" => 10,
                "m" | "M" => 20,
                "g" | "G" => 30,
                "t" | "T" => 40,
                "p" | "P" => 50,
                "e" | "E" => 60,
                _ => return None,
            };
            digits[..end].parse::<u64>().ok()?.checked_mul(1 << shift)?
        }
    };
    if negative { i64::try_from(magnitude).ok().map(|number| Number::from(-number)) } else { Some(Number::from(magnitude)) }
}
