//! Every command, event and type that we have is as QEMU has it: names, order, types, optionality, features.
//!
//! Only an enum that selects a union's branch may lack values, which stand for what isn't offered, or have one of [`OURS`]. Commands of our own have their own
//! names ([`is_our_command`]), and so have members of ours ([`is_our_member`]).

use std::collections::{HashMap, HashSet};

use headwater_qmp::{Value, schema};
use serde_json::json;

use crate::daemon::Daemon;

/// Drivers that QEMU doesn't have.
const OURS: [&str; 5] = ["az", "gs", "replicas", "s3", "verify"];

pub(crate) fn is_ours(value: &Value) -> bool {
    value.as_str().is_some_and(|value| OURS.contains(&value))
}

/// True of a command that QEMU doesn't have.
pub(crate) fn is_our_command(name: &str) -> bool {
    name.starts_with("headwater-")
}

/// True of a member that QEMU's type or command doesn't have.
pub(crate) fn is_our_member(member: &Value) -> bool {
    member["name"].as_str().is_some_and(|name| name.starts_with("x-headwater-"))
}

struct Comparison<'a> {
    ours: HashMap<&'a str, &'a Value>,
    theirs: HashMap<&'a str, &'a Value>,
    /// Enums of ours that are the tag of a union.
    tags: HashSet<&'a str>,
    seen: HashSet<(&'a str, &'a str)>,
    differences: Vec<String>,
}

fn by_name(entries: &Value) -> HashMap<&str, &Value> {
    let entries = entries.as_array().expect("a list of entries");
    entries.iter().map(|entry| (text(entry, "name"), entry)).collect()
}

fn text<'a>(entry: &'a Value, member: &str) -> &'a str {
    entry[member].as_str().unwrap_or_else(|| panic!("no {member} in {entry}"))
}

fn list<'a>(entry: &'a Value, member: &str) -> &'a [Value] {
    entry[member].as_array().map(Vec::as_slice).unwrap_or_default()
}

impl<'a> Comparison<'a> {
    fn new(ours: &'a Value, theirs: &'a Value) -> Self {
        let ours = by_name(ours);
        let tags = ours
            .values()
            .filter_map(|entry| {
                let tag = entry.get("tag")?;
                let member = list(entry, "members").iter().find(|member| member["name"] == *tag)?;
                Some(text(member, "type"))
            })
            .collect();
        let theirs = by_name(theirs);
        Self { ours, theirs, tags, seen: HashSet::new(), differences: Vec::new() }
    }

    fn compare(&mut self, path: &str, ours: &'a str, theirs: &'a str) {
        if !self.seen.insert((ours, theirs)) {
            return;
        }
        let (Some(&a), Some(&b)) = (self.ours.get(ours), self.theirs.get(theirs)) else {
            self.differences.push(format!("{path}: {ours} or {theirs} is not defined"));
            return;
        };
        for member in ["meta-type", "features", "json-type", "tag", "allow-oob"] {
            self.equal(path, member, a.get(member), b.get(member));
        }
        for member in ["arg-type", "ret-type", "element-type"] {
            match (a.get(member).and_then(Value::as_str), b.get(member).and_then(Value::as_str)) {
                (Some(a), Some(b)) => self.compare(&format!("{path} {member}"), a, b),
                (a, b) => self.equal(path, member, a, b),
            }
        }
        match text(a, "meta-type") {
            "enum" if self.tags.contains(ours) => {
                for value in list(a, "members").iter().filter(|value| !is_ours(&value["name"])) {
                    let known = list(b, "members").contains(value);
                    self.equal(path, &value.to_string(), known, true);
                }
            }
            "enum" => {
                self.equal(path, "members", a.get("members"), b.get("members"));
                self.equal(path, "values", a.get("values"), b.get("values"));
            }
            "object" => {
                self.members(path, list(a, "members"), list(b, "members"), "name");
                let cases = list(a, "variants").iter().map(|variant| &variant["case"]);
                let cases: Vec<_> = cases.filter(|case| !is_ours(case)).collect();
                let known = list(b, "variants").iter().filter(|variant| cases.contains(&&variant["case"]));
                let mut known: Vec<_> = known.cloned().collect();
                let mut variants = list(a, "variants").to_vec();
                variants.retain(|variant| !is_ours(&variant["case"]));
                known.sort_by_key(|variant| variant["case"].to_string());
                variants.sort_by_key(|variant| variant["case"].to_string());
                self.equal(path, "number of variants", variants.len(), known.len());
                for case in cases {
                    let find = |of: &'a Value| list(of, "variants").iter().find(|v| v["case"] == *case);
                    if let (Some(a), Some(b)) = (find(a), find(b)) {
                        self.compare(&format!("{path}={case}"), text(a, "type"), text(b, "type"));
                    }
                }
            }
            "alternate" => self.members(path, list(a, "members"), list(b, "members"), "type"),
            _ => {}
        }
    }

    fn members(&mut self, path: &str, ours: &'a [Value], theirs: &'a [Value], named_by: &str) {
        let ours: Vec<_> = ours.iter().filter(|member| !is_our_member(member)).collect();
        self.equal(path, "number of members", ours.len(), theirs.len());
        for (a, b) in ours.into_iter().zip(theirs) {
            let path = format!("{path}.{}", a[named_by]);
            for member in ["name", "default", "features"] {
                self.equal(&path, member, a.get(member), b.get(member));
            }
            self.compare(&path, text(a, "type"), text(b, "type"));
        }
    }

    fn equal<T: PartialEq + std::fmt::Debug>(&mut self, path: &str, what: &str, ours: T, theirs: T) {
        if ours != theirs {
            self.differences.push(format!("{path}: {what}: ours {ours:?}, theirs {theirs:?}"));
        }
    }
}

#[test]
fn everything_of_ours_is_as_theirs() {
    let theirs = Daemon::start().execute(&json!({ "execute": "query-qmp-schema" }));
    let mut comparison = Comparison::new(schema::introspection(), &theirs["return"]);
    for name in schema::command_names().chain(schema::event_names()).filter(|name| !is_our_command(name)) {
        comparison.compare(name, name, name);
    }
    assert!(comparison.seen.len() > 200, "only {} types were compared", comparison.seen.len());
    assert!(comparison.differences.is_empty(), "{:#?}", comparison.differences);
}

#[test]
fn introspection_leaves_nothing_open() {
    let entries = by_name(schema::introspection());
    assert_eq!(entries.len(), schema::introspection().as_array().expect("a list").len(), "names are unique");
    for entry in entries.values() {
        let named = list(entry, "members").iter().chain(list(entry, "variants"));
        let types = named.filter_map(|item| item.get("type"));
        let own = ["arg-type", "ret-type", "element-type"].into_iter().filter_map(|name| entry.get(name));
        for kind in types.chain(own) {
            assert!(kind.as_str().is_some_and(|kind| entries.contains_key(kind)), "{kind} in {entry}");
        }
    }
}
