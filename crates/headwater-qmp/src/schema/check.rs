//! Compares a value with a type.
//!
//! Members are visited in the order of the table: those of the object, then those that its tag brings, then what is left
//! over. The first error ends it. That order and the texts are QEMU's, with its quirk that a message about a value of an
//! enum, an alternate or the range of a number names the member alone, and any other the whole path. Where several
//! members are left over, QEMU names the one that its hash table yields first; here it is the first in alphabetical order.
//!
//! Recursion ends at [`MAX_DEPTH`], which is less than a reader allows: a thread's usual stack must stand it.

use serde_json::{Map, Number, Value};

use super::number::{bool_from_text, int_from_text, size_from_text, uint_from_text};
use super::{Builtin, EnumValue, Member, Schema, Shape, Type, TypeId, Union};
use crate::error::QmpError;

/// Most objects and lists within each other. No type needs more than a few, but for a chain of nodes described in one piece.
const MAX_DEPTH: usize = 256;

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// JSON, where a number is a number.
    Json,
    /// `key=value`, where every leaf is a string that says what the type makes of it.
    Keyval,
}

/// Where in a value the check is.
#[derive(Clone, Copy)]
struct Path<'a> {
    source: Source,
    depth: usize,
    /// What contains it; `None` at the top.
    parent: Option<&'a Path<'a>>,
    step: Step<'a>,
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Root,
    Member(&'a str),
    Element(usize),
}

impl<'a> Path<'a> {
    fn root(source: Source) -> Self {
        Self { source, depth: 0, parent: None, step: Step::Root }
    }

    fn member(&'a self, name: &'a str) -> Self {
        self.step(Step::Member(name))
    }

    fn element(&'a self, index: usize) -> Self {
        self.step(Step::Element(index))
    }

    fn step(&'a self, step: Step<'a>) -> Self {
        Self { source: self.source, depth: self.depth + 1, parent: Some(self), step }
    }

    /// The name alone. Elements have none.
    fn name(&self) -> &'a str {
        match self.step {
            Step::Member(name) => name,
            Step::Root | Step::Element(_) => "null",
        }
    }

    /// The name with those of what contains it.
    fn full(&self) -> String {
        let outer = match self.parent {
            Some(parent) if !matches!(parent.step, Step::Root) => Some(parent.full()),
            _ => None,
        };
        match (outer, self.step, self.source) {
            (_, Step::Root, _) => "<anonymous>".to_owned(),
            (None, Step::Member(name), _) => name.to_owned(),
            (Some(outer), Step::Member(name), _) => format!("{outer}.{name}"),
            (outer, Step::Element(index), Source::Json) => format!("{}[{index}]", outer.unwrap_or_default()),
            (outer, Step::Element(index), Source::Keyval) => format!("{}.{index}", outer.unwrap_or_default()),
        }
    }

    fn wrong_type(&self, expected: &str) -> QmpError {
        QmpError::wrong_type(&self.full(), expected)
    }

    /// The text of a leaf that was given as an option.
    fn text<'v>(&self, value: &'v Value) -> Result<&'v str, QmpError> {
        let not_leaf = || QmpError::generic(format!("Parameters '{}.*' are unexpected", self.full()));
        value.as_str().ok_or_else(not_leaf)
    }
}

impl Schema {
    pub(super) fn check_root(&self, kind: TypeId, value: Value, source: Source) -> Result<Value, QmpError> {
        self.check(kind, value, &Path::root(source))
    }

    pub(super) fn check_members(
        &self,
        kind: TypeId,
        members: Map<String, Value>,
        source: Source,
    ) -> Result<Map<String, Value>, QmpError> {
        match self.check_root(kind, Value::Object(members), source)? {
            Value::Object(members) => Ok(members),
            // The type of a command's arguments is an object.
            _ => Err(Path::root(source).wrong_type("object")),
        }
    }

    fn check(&self, id: TypeId, value: Value, path: &Path<'_>) -> Result<Value, QmpError> {
        if path.depth > MAX_DEPTH {
            return Err(QmpError::generic(format!("Parameter '{}' is nested too deeply", path.name())));
        }
        let Type { name, shape, .. } = self.get(id);
        match shape {
            Shape::Builtin(builtin) => builtin.check(value, path),
            Shape::Enum(values) => check_enum(values, value, path),
            Shape::Array(element) => {
                let Value::Array(items) = value else { return Err(path.wrong_type("array")) };
                let items = items.into_iter().enumerate();
                items.map(|(index, item)| self.check(*element, item, &path.element(index))).collect()
            }
            Shape::Object { members, union } => {
                let Value::Object(given) = value else { return Err(path.wrong_type("object")) };
                self.check_object(members, union.as_ref(), given, path).map(Value::Object)
            }
            Shape::Alternate(alternatives) => {
                match alternatives.iter().find(|&&alternative| self.takes(alternative, &value)) {
                    Some(&alternative) => self.check(alternative, value, path),
                    None => Err(QmpError::wrong_type(path.name(), name)),
                }
            }
        }
    }

    fn check_object(
        &self,
        members: &[Member],
        union: Option<&Union>,
        mut given: Map<String, Value>,
        path: &Path<'_>,
    ) -> Result<Map<String, Value>, QmpError> {
        let mut checked = Map::new();
        self.take_members(members, &mut given, &mut checked, path)?;
        if let Some(Union { tag, branches }) = union {
            let tag = checked.get(tag);
            let branch = branches.iter().find(|(case, _)| tag.is_some_and(|tag| tag == case));
            if let Some((_, branch)) = branch
                && let Shape::Object { members, .. } = &self.get(*branch).shape
            {
                self.take_members(members, &mut given, &mut checked, path)?;
            }
        }
        match given.keys().next() {
            Some(left_over) => Err(QmpError::unexpected(&path.member(left_over).full())),
            None => Ok(checked),
        }
    }

    /// Moves `members` from `given` to `checked`.
    fn take_members(
        &self,
        members: &[Member],
        given: &mut Map<String, Value>,
        checked: &mut Map<String, Value>,
        path: &Path<'_>,
    ) -> Result<(), QmpError> {
        for member in members {
            let path = path.member(&member.name);
            match given.remove(&member.name) {
                Some(value) => {
                    checked.insert(member.name.clone(), self.check(member.kind, value, &path)?);
                }
                None if member.optional => {}
                None => return Err(QmpError::missing(&path.full())),
            }
        }
        Ok(())
    }

    /// Whether an alternate takes the branch of this type: its JSON type alone decides.
    fn takes(&self, id: TypeId, value: &Value) -> bool {
        matches!(
            (&self.get(id).shape, value),
            (Shape::Object { .. }, Value::Object(_))
                | (Shape::Enum(_) | Shape::Builtin(Builtin::Str), Value::String(_))
                | (Shape::Builtin(Builtin::Null), Value::Null)
        )
    }
}

fn check_enum(values: &[EnumValue], value: Value, path: &Path<'_>) -> Result<Value, QmpError> {
    let value = Builtin::Str.check(value, path)?;
    match value.as_str() {
        Some(text) if !values.iter().any(|value| value.name == text) => {
            Err(QmpError::not_accepted(path.name(), text))
        }
        _ => Ok(value),
    }
}

impl Builtin {
    fn check(self, value: Value, path: &Path<'_>) -> Result<Value, QmpError> {
        match (self, path.source) {
            (Self::Any, _) => Ok(value),
            (Self::Null, _) => value.is_null().then_some(value).ok_or_else(|| path.wrong_type("null")),
            (Self::Str, Source::Json) => {
                value.is_string().then_some(value).ok_or_else(|| path.wrong_type("string"))
            }
            (Self::Str, Source::Keyval) => path.text(&value).map(Value::from),
            (Self::Bool, Source::Json) => {
                value.is_boolean().then_some(value).ok_or_else(|| path.wrong_type("boolean"))
            }
            (Self::Bool, Source::Keyval) => bool_from_text(path.text(&value)?)
                .map(Value::Bool)
                .ok_or_else(|| QmpError::expects(&path.full(), "'on' or 'off'")),
            (Self::Number, Source::Json) => {
                value.is_number().then_some(value).ok_or_else(|| path.wrong_type("number"))
            }
            (Self::Number, Source::Keyval) => (path.text(&value)?.parse().ok())
                .and_then(Number::from_f64)
                .map(Value::Number)
                .ok_or_else(|| path.wrong_type("number")),
            (Self::Int | Self::Int32, _) => {
                let integer = signed(&value, path)?;
                match i32::try_from(integer) {
                    Err(_) if self == Self::Int32 => Err(QmpError::expects(path.name(), "int32_t")),
                    _ => Ok(integer.into()),
                }
            }
            (Self::Uint16, _) => unsigned(&value, path)?.below(1 << 16, "uint16_t"),
            (Self::Uint32, _) => unsigned(&value, path)?.below(1 << 32, "uint32_t"),
            (Self::Uint64, _) | (Self::Size, Source::Json) => Ok(unsigned(&value, path)?.value.into()),
            (Self::Size, Source::Keyval) => size_from_text(path.text(&value)?)
                .map(Value::from)
                .map_err(|_| QmpError::expects(&path.full(), "size")),
        }
    }
}

fn signed(value: &Value, path: &Path<'_>) -> Result<i64, QmpError> {
    match path.source {
        Source::Json => value.as_i64().ok_or_else(|| path.wrong_type("integer")),
        Source::Keyval => {
            int_from_text(path.text(value)?).map_err(|_| QmpError::expects(&path.full(), "integer"))
        }
    }
}

/// An unsigned integer that may still be too large for its type.
struct Unsigned<'a> {
    value: u64,
    name: &'a str,
}

impl Unsigned<'_> {
    fn below(self, limit: u64, kind: &str) -> Result<Value, QmpError> {
        if self.value < limit { Ok(self.value.into()) } else { Err(QmpError::expects(self.name, kind)) }
    }
}

fn unsigned<'a>(value: &Value, path: &Path<'a>) -> Result<Unsigned<'a>, QmpError> {
    let (number, expected) = match path.source {
        // QEMU takes a negative integer modulo 2^64.
        Source::Json => (value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned)), "uint64"),
        Source::Keyval => (uint_from_text(path.text(value)?).ok(), "integer"),
    };
    let value = number.ok_or_else(|| QmpError::expects(&path.full(), expected))?;
    Ok(Unsigned { value, name: path.name() })
}
