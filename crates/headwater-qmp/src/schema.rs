//! The commands, events and types that are offered, and the checks that follow from them.
//!
//! The table is in the text files of `schema/`, in a notation that `table` reads; it is read once. `check` compares a
//! value with a type, `introspect` makes the answer to `query-qmp-schema`.
//!
//! The table names only what this program offers: a driver of QEMU's that isn't in it is refused as QEMU refuses one that
//! doesn't exist. A command may be in it and yet be refused by whoever carries it out.

mod check;
mod introspect;
mod number;
mod table;

use std::collections::HashMap;
use std::sync::LazyLock;

use serde_json::{Map, Value};

use crate::error::QmpError;
pub use check::Source;
pub(crate) use number::{NumberError, bool_from_text, size_from_text, uint_from_text};

static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
    table::read(&[
        include_str!("schema/control.txt"),
        include_str!("schema/node.txt"),
        include_str!("schema/store.txt"),
        include_str!("schema/bitmap.txt"),
        include_str!("schema/job.txt"),
        include_str!("schema/query.txt"),
        include_str!("schema/export.txt"),
        include_str!("schema/object.txt"),
        include_str!("schema/chardev.txt"),
        include_str!("schema/headwater.txt"),
    ])
});

/// Everything that the table says, with names resolved.
#[derive(Debug)]
struct Schema {
    types: Vec<Type>,
    type_by_name: HashMap<String, TypeId>,
    /// In the order of the table.
    commands: Vec<Command>,
    events: Vec<Event>,
}

/// Where a type is in [`Schema::types`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct TypeId(usize);

#[derive(Debug)]
struct Type {
    name: String,
    features: Vec<String>,
    shape: Shape,
}

#[derive(Debug)]
enum Shape {
    Builtin(Builtin),
    Enum(Vec<EnumValue>),
    Array(TypeId),
    Object { members: Vec<Member>, union: Option<Union> },
    Alternate(Vec<TypeId>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Builtin {
    Any,
    Null,
    Bool,
    Str,
    Number,
    Int,
    Int32,
    Uint16,
    Uint32,
    Uint64,
    /// Like `Uint64`, and written with a suffix in options.
    Size,
}

#[derive(Debug)]
struct EnumValue {
    name: String,
    features: Vec<String>,
}

#[derive(Debug)]
struct Member {
    name: String,
    optional: bool,
    kind: TypeId,
    features: Vec<String>,
}

/// The members that depend on the value of another member.
#[derive(Debug)]
struct Union {
    /// Name of the member that decides. It is an enum.
    tag: String,
    /// Values of the tag that bring members; the others bring none.
    branches: Vec<(String, TypeId)>,
}

/// A command of the table.
#[derive(Debug)]
pub struct Command {
    name: String,
    arguments: TypeId,
    returns: TypeId,
    features: Vec<String>,
}

#[derive(Debug)]
struct Event {
    name: String,
    data: TypeId,
    features: Vec<String>,
}

impl Command {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether QEMU announces its removal.
    pub fn is_deprecated(&self) -> bool {
        self.features.iter().any(|feature| feature == "deprecated")
    }

    /// Checks arguments; returns them normalised.
    pub fn check(&self, arguments: Map<String, Value>) -> Result<Map<String, Value>, QmpError> {
        SCHEMA.check_members(self.arguments, arguments, Source::Json)
    }
}

/// The command of that name.
pub fn command(name: &str) -> Option<&'static Command> {
    SCHEMA.commands.iter().find(|command| command.name == name)
}

/// The names of all commands.
pub fn command_names() -> impl Iterator<Item = &'static str> {
    SCHEMA.commands.iter().map(Command::name)
}

/// The names of all events.
pub fn event_names() -> impl Iterator<Item = &'static str> {
    SCHEMA.events.iter().map(|event| event.name.as_str())
}

/// Checks the arguments of a command; returns them normalised.
///
/// An unsigned integer that was given as a negative one is returned as QEMU takes it, modulo 2^64.
pub fn check_command(name: &str, arguments: Map<String, Value>) -> Result<Map<String, Value>, QmpError> {
    command(name).ok_or_else(|| QmpError::command_not_found(name))?.check(arguments)
}

/// Checks a value against a type; returns what QMP would have sent.
///
/// # Panics
/// If the table has no type of this name.
pub fn check_type(name: &str, value: Value, source: Source) -> Result<Value, QmpError> {
    let kind = SCHEMA.type_by_name.get(name);
    let kind = kind.unwrap_or_else(|| panic!("the schema has no type {name}"));
    SCHEMA.check_root(*kind, value, source)
}

/// The answer to `query-qmp-schema`.
pub fn introspection() -> &'static Value {
    static INTROSPECTION: LazyLock<Value> = LazyLock::new(|| SCHEMA.introspect());
    &INTROSPECTION
}

/// The answer to `query-commands`.
pub fn query_commands() -> Value {
    command_names().map(|name| serde_json::json!({ "name": name })).collect()
}

impl Schema {
    fn get(&self, id: TypeId) -> &Type {
        &self.types[id.0]
    }

    /// The object without members.
    fn empty(&self) -> TypeId {
        self.type_by_name[table::EMPTY]
    }
}

#[cfg(test)]
mod tests;
