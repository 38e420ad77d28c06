//! Wrong arguments are refused with the same class and text.
//!
//! The requests are made from our own introspection: for each command a minimal set of arguments, in which each member
//! in turn is left out or replaced by something else, to every depth. An unexpected member at the top keeps those
//! that turn out to be right from being carried out.

use std::collections::{HashMap, HashSet};

use headwater_qmp::{Map, Value, schema};
use serde_json::json;

use crate::daemon::Daemon;
use crate::introspection::{is_our_command, is_our_member, is_ours};

const UNEXPECTED: &str = "unexpected-member";

struct Generator<'a> {
    entries: HashMap<&'a str, &'a Value>,
    /// Types whose members were all tried somewhere.
    tried: HashSet<String>,
}

impl<'a> Generator<'a> {
    fn new() -> Self {
        let entries = schema::introspection().as_array().expect("a list of entries");
        let entries = entries.iter().filter_map(|entry| Some((entry["name"].as_str()?, entry))).collect();
        Self { entries, tried: HashSet::new() }
    }

    fn entry(&self, kind: &str) -> &'a Value {
        self.entries[kind]
    }

    fn list(&self, kind: &str, member: &str) -> &'a [Value] {
        self.entry(kind)[member].as_array().map(Vec::as_slice).unwrap_or_default()
    }

    /// The smallest right value.
    fn sample(&self, kind: &str) -> Value {
        match self.entry(kind)["meta-type"].as_str() {
            Some("builtin") => match kind {
                "str" => json!("text"),
                "int" => json!(1),
                "number" => json!(1.5),
                "bool" => json!(true),
                _ => Value::Null,
            },
            Some("enum") => self.list(kind, "members")[0]["name"].clone(),
            Some("array") => json!([]),
            // The branch that isn't an object ends the recursion.
            Some("alternate") => {
                let branches = self.list(kind, "members").iter().filter_map(|branch| branch["type"].as_str());
                let is_object = |kind: &&str| self.entry(kind)["meta-type"] == "object";
                let mut plain = branches.filter(|kind| !is_object(kind));
                self.sample(plain.next().expect("an alternate has a branch that isn't an object"))
            }
            _ => Value::Object(self.objects(kind).remove(0).0),
        }
    }

    /// The smallest right objects, one for each value of the tag, each with all its members.
    fn objects(&self, kind: &str) -> Vec<(Map<String, Value>, Vec<&'a Value>)> {
        let common: Vec<_> =
            self.list(kind, "members").iter().filter(|member| !is_our_member(member)).collect();
        let variants = self.list(kind, "variants");
        if variants.is_empty() {
            return vec![(self.required(&common), common)];
        }
        let tag = self.entry(kind)["tag"].as_str().expect("a union has a tag");
        variants
            .iter()
            .filter(|variant| !is_ours(&variant["case"]))
            .map(|variant| {
                let mut members = common.clone();
                members.extend(self.list(variant["type"].as_str().expect("a variant has a type"), "members"));
                let mut object = self.required(&members);
                object.insert(tag.to_owned(), variant["case"].clone());
                (object, members)
            })
            .collect()
    }

    fn required(&self, members: &[&Value]) -> Map<String, Value> {
        let required = members.iter().filter(|member| member.get("default").is_none());
        required
            .filter_map(|member| {
                Some((member["name"].as_str()?.to_owned(), self.sample(member["type"].as_str()?)))
            })
            .collect()
    }

    /// Values to put where one of this type belongs, right and wrong.
    fn attempts(&mut self, kind: &str) -> Vec<Value> {
        let mut attempts = vec![
            json!(null),
            json!(true),
            json!(7),
            json!(-1),
            json!(1.5),
            json!(65536),
            json!(1_u64 << 32),
            json!(1_u64 << 63),
            json!(1e30),
            json!("no-such-value"),
            json!(""),
            json!([]),
            json!({}),
        ];
        if !self.tried.insert(kind.to_owned()) {
            return attempts;
        }
        match self.entry(kind)["meta-type"].as_str() {
            Some("array") => {
                let element = self.entry(kind)["element-type"].as_str().expect("an array has elements");
                let good = self.sample(element);
                for bad in self.attempts(element) {
                    attempts.push(json!([bad.clone()]));
                    attempts.push(json!([good.clone(), bad]));
                }
            }
            Some("alternate") => {
                for branch in self.list(kind, "members") {
                    attempts.extend(self.attempts(branch["type"].as_str().expect("a branch has a type")));
                }
            }
            Some("object") => {
                for (object, members) in self.objects(kind) {
                    attempts.push(Value::Object(with(&object, UNEXPECTED, json!(1))));
                    for member in members {
                        let name = member["name"].as_str().expect("a member has a name");
                        let mut without = object.clone();
                        without.remove(name);
                        attempts.push(Value::Object(without));
                        for bad in self.attempts(member["type"].as_str().expect("a member has a type")) {
                            attempts.push(Value::Object(with(&object, name, bad)));
                        }
                    }
                }
            }
            _ => {}
        }
        attempts
    }
}

fn with(object: &Map<String, Value>, name: &str, value: Value) -> Map<String, Value> {
    let mut object = object.clone();
    object.insert(name.to_owned(), value);
    object
}

#[test]
fn wrong_arguments_are_refused_alike() {
    let mut generator = Generator::new();
    let mut daemon = Daemon::start();
    let mut differences = Vec::new();
    let mut count = 0;
    for name in schema::command_names().filter(|name| !is_our_command(name)) {
        let arguments = generator.entry(name)["arg-type"].as_str().expect("a command has arguments");
        generator.tried.remove(arguments);
        for attempt in generator.attempts(arguments) {
            let Value::Object(attempt) = attempt else { continue };
            let attempt = with(&attempt, UNEXPECTED, json!(1));
            let theirs = daemon.execute(&json!({ "execute": name, "arguments": attempt }));
            let ours = schema::check_command(name, attempt.clone()).expect_err("a member is unexpected");
            let ours = json!({ "error": ours });
            count += 1;
            if ours != theirs {
                differences.push(format!("{name} {}: ours {ours}, theirs {theirs}", json!(attempt)));
            }
        }
    }
    assert!(count > 5000, "only {count} requests were made");
    assert!(differences.is_empty(), "{} of {count}: {differences:#?}", differences.len());
}
