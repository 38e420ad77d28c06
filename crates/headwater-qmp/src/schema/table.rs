//! Reads the notation of the table.
//!
//! ```text
//! # A comment.
//! enum OnOffAuto
//!     auto on off!deprecated
//! object Cache !feature                  an object; what follows "!" is a feature
//!     direct?: bool                      an optional member
//! object Options by driver               a union: the member `driver` decides what else there is
//!     driver: Driver
//!     = file OptionsFile                 the members of OptionsFile, if driver is `file`
//! alternate Ref
//!     | Options                          an object of this type ...
//!     | str                              ... or a string
//! command add (Options) -> Result        arguments are the members of Options
//! command remove                         arguments are these members; nothing is returned
//!     names: [str]
//! event GONE
//!     name: str
//! ```
//!
//! Types are `str bool int int32 uint16 uint32 uint64 size number any null`, `[T]`, and those that the table defines, in any order.
//! The table is part of the program, so a mistake in it panics, and every test finds it.

use std::collections::HashMap;

use super::{Builtin, Command, EnumValue, Event, Member, Schema, Shape, Type, TypeId, Union};

const BUILTINS: [(&str, Builtin); 11] = [
    ("any", Builtin::Any),
    ("null", Builtin::Null),
    ("bool", Builtin::Bool),
    ("str", Builtin::Str),
    ("number", Builtin::Number),
    ("int", Builtin::Int),
    ("int32", Builtin::Int32),
    ("uint16", Builtin::Uint16),
    ("uint32", Builtin::Uint32),
    ("uint64", Builtin::Uint64),
    ("size", Builtin::Size),
];

/// The object without members.
pub(super) const EMPTY: &str = "";

pub(super) fn read(texts: &[&str]) -> Schema {
    let mut table = Table::default();
    for (name, builtin) in BUILTINS {
        table.define(name, Vec::new(), Shape::Builtin(builtin));
    }
    table.define(EMPTY, Vec::new(), Shape::Object { members: Vec::new(), union: None });
    let mut paragraphs: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in texts.iter().flat_map(|text| text.lines()) {
        match line.strip_prefix("    ") {
            Some(body) => paragraphs.last_mut().expect("a body follows a head").1.push(body),
            None if line.is_empty() || line.starts_with('#') => {}
            None => paragraphs.push((line, Vec::new())),
        }
    }
    for (head, body) in &paragraphs {
        table.paragraph(head, body);
    }
    table.finish()
}

#[derive(Default)]
struct Table {
    /// `None` for a type that was named and isn't defined yet.
    types: Vec<Option<Type>>,
    type_by_name: HashMap<String, TypeId>,
    commands: Vec<Command>,
    events: Vec<Event>,
}

impl Table {
    fn paragraph(&mut self, head: &str, body: &[&str]) {
        let (head, features) = split_features(head);
        let (head, returns) = head.split_once(" -> ").unwrap_or((head, EMPTY));
        let mut words = head.split_whitespace();
        let keyword = words.next().expect("a head has a keyword");
        let name = words.next().unwrap_or_else(|| panic!("no name in {head:?}"));
        match (keyword, words.next(), words.next()) {
            ("enum", None, None) => {
                let values = body.iter().flat_map(|line| line.split_whitespace()).map(|word| {
                    let (name, features) = split_features(word);
                    EnumValue { name: name.to_owned(), features }
                });
                let shape = Shape::Enum(values.collect());
                self.define(name, features, shape);
            }
            ("alternate", None, None) => {
                let alternatives = body.iter().map(|line| {
                    let kind = line.strip_prefix("| ").unwrap_or_else(|| panic!("no | in {line:?}"));
                    self.named(kind)
                });
                let shape = Shape::Alternate(alternatives.collect());
                self.define(name, features, shape);
            }
            ("object", None, None) => self.object(name, features, None, body),
            ("object", Some("by"), Some(tag)) => self.object(name, features, Some(tag), body),
            ("command", arguments, None) => {
                let arguments = self.arguments(name, arguments, body);
                let returns = self.named(returns);
                self.commands.push(Command { name: name.to_owned(), arguments, returns, features });
            }
            ("event", data, None) => {
                let data = self.arguments(name, data, body);
                self.events.push(Event { name: name.to_owned(), data, features });
            }
            _ => panic!("unknown paragraph {head:?}"),
        }
    }

    /// The type of a command's arguments or an event's data, which is named or stands in the body.
    fn arguments(&mut self, owner: &str, named: Option<&str>, body: &[&str]) -> TypeId {
        if let Some(named) = named {
            assert!(body.is_empty(), "{owner} has a type and members");
            let name = named.strip_prefix('(').and_then(|name| name.strip_suffix(')'));
            return self.named(name.unwrap_or_else(|| panic!("no (type) in {named:?}")));
        }
        if body.is_empty() {
            return self.named(EMPTY);
        }
        let name = format!("{owner}-arg");
        self.object(&name, Vec::new(), None, body);
        self.named(&name)
    }

    fn object(&mut self, name: &str, features: Vec<String>, tag: Option<&str>, body: &[&str]) {
        let mut members = Vec::new();
        let mut branches = Vec::new();
        for line in body {
            if let Some(branch) = line.strip_prefix("= ") {
                let (case, kind) = branch.split_once(' ').unwrap_or_else(|| panic!("no type in {line:?}"));
                branches.push((case.to_owned(), self.named(kind)));
                continue;
            }
            let (line, features) = split_features(line);
            let (name, kind) = line.split_once(": ").unwrap_or_else(|| panic!("no type in {line:?}"));
            let kind = self.named(kind);
            let (name, optional) = name.strip_suffix('?').map_or((name, false), |name| (name, true));
            members.push(Member { name: name.to_owned(), optional, kind, features });
        }
        let union = tag.map(|tag| Union { tag: tag.to_owned(), branches });
        self.define(name, features, Shape::Object { members, union });
    }

    fn define(&mut self, name: &str, features: Vec<String>, shape: Shape) {
        let id = self.named(name);
        let slot = &mut self.types[id.0];
        assert!(slot.is_none(), "{name} is defined twice");
        *slot = Some(Type { name: name.to_owned(), features, shape });
    }

    /// The type of this name, which may be defined later.
    fn named(&mut self, name: &str) -> TypeId {
        if let Some(&id) = self.type_by_name.get(name) {
            return id;
        }
        let array = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).map(|element| {
            let element = self.named(element);
            Type { name: name.to_owned(), features: Vec::new(), shape: Shape::Array(element) }
        });
        let id = TypeId(self.types.len());
        self.types.push(array);
        self.type_by_name.insert(name.to_owned(), id);
        id
    }

    fn finish(self) -> Schema {
        let mut types = Vec::with_capacity(self.types.len());
        for (at, definition) in self.types.into_iter().enumerate() {
            types.push(definition.unwrap_or_else(|| {
                let name = self.type_by_name.iter().find(|(_, id)| id.0 == at);
                panic!("{name:?} is not defined")
            }));
        }
        Schema { types, type_by_name: self.type_by_name, commands: self.commands, events: self.events }
    }
}

fn split_features(text: &str) -> (&str, Vec<String>) {
    let mut parts = text.split('!').map(str::trim);
    let rest = parts.next().unwrap_or_default();
    (rest, parts.map(str::to_owned).collect())
}
