//! Which commands, events and types there are: one table, `qapi.txt`, from which follow the checks of arguments and options, and what clients
//! are told by `query-qmp-schema`.
//!
//! A line of the table is one of
//!
//! ```text
//! command NAME: ARGUMENTS -> RESULT [!FEATURE...]
//! event NAME: DATA
//! object NAME: MEMBER[?][!FEATURE...]:TYPE ... [| TAG VALUE=OBJECT ...]
//! enum NAME: VALUE ...
//! alternate NAME: TYPE ...
//! ```
//!
//! A type is the name of another line, `[TYPE]` for lists, or `str`, `int`, `bool`, `number`, `null`, `any`. A member with `?` may be left out. After
//! `|` stands, for each value of the member TAG that has any, the object whose members come in addition. Lines that would be too long go on in the next
//! one, indented.

mod check;
mod introspect;

use crate::error::QmpError;
use crate::message::no_such_command;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::sync::OnceLock;

pub use check::Source;
pub use introspect::{query_commands, query_qmp_schema};

/// The table.
const TABLE: &str = include_str!("schema/qapi.txt");

/// A reference to a type.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Type {
    Builtin(Builtin),
    List(Box<Type>),
    Named(&'static str),
}

/// The types that need no definition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Builtin {
    Str,
    Int,
    Bool,
    Number,
    Null,
    Any,
}

/// A member of an object.
#[derive(Debug)]
struct Member {
    name: &'static str,
    optional: bool,
    of: Type,
    features: Vec<&'static str>,
}

/// The members that depend on another member's value.
#[derive(Debug)]
struct Variants {
    tag: &'static str,
    cases: Vec<(&'static str, &'static str)>,
}

/// What a named type is.
#[derive(Debug)]
enum Definition {
    Object { members: Vec<Member>, variants: Option<Variants> },
    Enum(Vec<&'static str>),
    Alternate(Vec<Type>),
}

/// A command.
#[derive(Debug)]
pub struct Command {
    name: &'static str,
    arguments: &'static str,
    result: Type,
    features: Vec<&'static str>,
}

/// The table, read.
#[derive(Debug, Default)]
struct Schema {
    commands: Vec<Command>,
    events: Vec<(&'static str, &'static str)>,
    /// In the order of the table.
    types: Vec<(&'static str, Definition)>,
    by_name: HashMap<&'static str, usize>,
}

impl Schema {
    fn get() -> &'static Self {
        static SCHEMA: OnceLock<Schema> = OnceLock::new();
        SCHEMA.get_or_init(|| Self::parse(TABLE))
    }

    /// Reads the table, which is ours: a test reads all of it.
    fn parse(table: &'static str) -> Self {
        let mut schema = Self::default();
        for line in table.lines().filter(|line| !line.is_empty()) {
            let (head, body) = line.split_once(':').unwrap_or((line, ""));
            let (kind, name) = head.split_once(' ').unwrap_or((head, ""));
            let body = body.trim();
            let definition = match kind {
                "command" => {
                    let (types, features) = split_features(body);
                    let (arguments, result) = types.split_once(" -> ").unwrap_or((types, "Empty"));
                    let result = Type::parse(result.trim());
                    schema.commands.push(Command { name, arguments: arguments.trim(), result, features });
                    continue;
                }
                "event" => {
                    schema.events.push((name, body));
                    continue;
                }
                "enum" => Definition::Enum(body.split_whitespace().collect()),
                "alternate" => Definition::Alternate(body.split_whitespace().map(Type::parse).collect()),
                _ => object(body),
            };
            schema.by_name.insert(name, schema.types.len());
            schema.types.push((name, definition));
        }
        schema
    }

    fn definition(&self, name: &str) -> Option<&Definition> {
        self.by_name.get(name).map(|at| &self.types[*at].1)
    }
}

/// Cuts the words off that begin with `!`.
fn split_features(text: &'static str) -> (&'static str, Vec<&'static str>) {
    match text.split_once('!') {
        Some((text, features)) => (text.trim(), features.split('!').map(str::trim).collect()),
        None => (text, Vec::new()),
    }
}

fn object(body: &'static str) -> Definition {
    let (members, variants) = match body.split_once('|') {
        Some((members, variants)) => (members, Some(variants)),
        None => (body, None),
    };
    let members = members
        .split_whitespace()
        .map(|word| {
            let (name, of) = word.split_once(':').unwrap_or((word, "any"));
            let (name, features) = split_features(name);
            let optional = name.ends_with('?');
            Member { name: name.trim_end_matches('?'), optional, of: Type::parse(of), features }
        })
        .collect();
    let variants = variants.map(|text| {
        let mut words = text.split_whitespace();
        let tag = words.next().unwrap_or_default();
        Variants { tag, cases: words.filter_map(|word| word.split_once('=')).collect() }
    });
    Definition::Object { members, variants }
}

impl Type {
    fn parse(text: &'static str) -> Self {
        if let Some(element) = text.strip_prefix('[') {
            return Self::List(Box::new(Self::parse(element.trim_end_matches(']'))));
        }
        match text {
            "str" => Self::Builtin(Builtin::Str),
            "int" => Self::Builtin(Builtin::Int),
            "bool" => Self::Builtin(Builtin::Bool),
            "number" => Self::Builtin(Builtin::Number),
            "null" => Self::Builtin(Builtin::Null),
            "any" => Self::Builtin(Builtin::Any),
            _ => Self::Named(text),
        }
    }
}

/// The command of that name.
pub fn command(name: &str) -> Option<&'static Command> {
    Schema::get().commands.iter().find(|command| command.name == name)
}

/// Checks a command's arguments, and gives them back.
///
/// # Errors
/// In QMP's words: what is missing, unexpected, or of the wrong type; `CommandNotFound` if there is no such command.
pub fn check_command(name: &str, arguments: Map<String, Value>) -> Result<Value, QmpError> {
    let command = command(name).ok_or_else(|| no_such_command(name))?;
    check_type(command.arguments, Value::Object(arguments), Source::Json)
}

/// Checks a value against the type of that name, and gives it back as JSON would have carried it.
///
/// # Errors
/// As for [`check_command`].
pub fn check_type(name: &str, value: Value, source: Source) -> Result<Value, QmpError> {
    check::check(Schema::get(), name, value, source)
}

/// The properties of an object type, with their types' names; none if there is no such type.
pub fn object_properties(qom_type: &str) -> Option<Vec<(&'static str, &'static str)>> {
    let schema = Schema::get();
    let Some(Definition::Object { variants: Some(variants), .. }) = schema.definition("ObjectOptions") else { return None };
    let (_, object) = variants.cases.iter().find(|(case, _)| *case == qom_type)?;
    let Some(Definition::Object { members, .. }) = schema.definition(object) else { return None };
    let shown = |of: &Type| match of {
        Type::Builtin(Builtin::Str) => "string",
        Type::Builtin(Builtin::Int) => "int",
        Type::Builtin(Builtin::Bool) => "bool",
        Type::Named(name) => name,
        _ => "any",
    };
    Some(members.iter().map(|member| (member.name, shown(&member.of))).collect())
}

#[cfg(test)]
mod tests;
