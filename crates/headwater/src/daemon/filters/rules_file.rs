//! blkdebug's `config`: rules in a file, in the notation of QEMU's configuration files.
//!
//! ```text
//! # A comment.
//! [inject-error]
//! event = "read_aio"
//! errno = "5"
//!
//! [set-state]
//! event = "write_aio"
//! state = "1"
//! new_state = "2"
//! ```
//!
//! Every section is a rule. The file becomes the options that could have been given in its place, and whatever it says else is an error.

use super::super::failure::{Refusal, errno_text, generic};
use super::super::graph::open::Options;
use serde_json::Value;
use std::io::Read;

/// The longest file that is read, in bytes.
const MOST: u64 = 256 << 10;

/// The rules of a file, as the options of the same names have them.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Rules {
    pub(super) inject_error: Vec<Options>,
    pub(super) set_state: Vec<Options>,
}

/// What a value is.
#[derive(Clone, Copy)]
enum Kind {
    Text,
    Number,
    Switch,
}

/// Reads the file `path`.
///
/// # Errors
/// If it can't be read, is too long, or isn't what it should be.
pub(super) fn read(path: &str) -> Result<Rules, Refusal> {
    let cannot = |err: std::io::Error| {
        let why = err.raw_os_error().map_or_else(|| err.to_string(), errno_text);
        generic(format!("Could not read blkdebug config file: {why}"))
    };
    let file = std::fs::File::open(path).map_err(cannot)?;
    let mut bytes = Vec::new();
    file.take(MOST + 1).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() as u64 > MOST {
        return Err(generic(format!("{path}: a file of rules for blkdebug has at most {MOST} bytes")));
    }
    let text = String::from_utf8(bytes).map_err(|_| generic(format!("{path}: not a text file")))?;
    parse(&text, path)
}

/// Takes the text of the file `path` apart.
fn parse(text: &str, path: &str) -> Result<Rules, Refusal> {
    let mut rules = Rules::default();
    // The section that is being read.
    let mut errors = None;
    for (number, line) in (1..).zip(text.lines()) {
        let wrong = |why: String| generic(format!("{path}:{number}: {why}"));
        let line = line.trim_end();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[') {
            let name = name.strip_suffix(']').unwrap_or_default();
            // A rule may have a name, which nothing refers to.
            let name = name.split_once(' ').map_or(name, |(name, _)| name);
            let list = match name {
                "inject-error" => &mut rules.inject_error,
                "set-state" => &mut rules.set_state,
                _ => {
                    return Err(wrong(format!(
                        "There is no option group '{name}': there are inject-error and set-state"
                    )));
                }
            };
            list.push(Options::new());
            errors = Some(name == "inject-error");
            continue;
        }
        let (key, value) =
            setting(line).ok_or_else(|| wrong("parse error: expected KEY = \"VALUE\"".to_owned()))?;
        let (rule, keys): (_, &[(&str, Kind)]) = match errors {
            Some(true) => (rules.inject_error.last_mut(), &INJECT_ERROR),
            Some(false) => (rules.set_state.last_mut(), &SET_STATE),
            None => {
                return Err(wrong(
                    "no group defined: the first rule starts with [inject-error] or [set-state]".to_owned(),
                ));
            }
        };
        let kind = keys.iter().find(|(known, _)| *known == key).map(|(_, kind)| *kind);
        let value = kind.ok_or_else(|| wrong(format!("Invalid parameter '{key}'"))).and_then(|kind| {
            value_of(kind, value).ok_or_else(|| wrong(format!("'{key}' can't be '{value}'")))
        })?;
        if let Some(rule) = rule {
            rule.insert(key.to_owned(), value);
        }
    }
    for rule in rules.inject_error.iter().chain(&rules.set_state) {
        if !rule.contains_key("event") {
            return Err(generic(format!("{path}: Missing event name for rule")));
        }
    }
    Ok(rules)
}

const INJECT_ERROR: [(&str, Kind); 7] = [
    ("event", Kind::Text),
    ("state", Kind::Number),
    ("iotype", Kind::Text),
    ("errno", Kind::Number),
    ("sector", Kind::Number),
    ("once", Kind::Switch),
    ("immediately", Kind::Switch),
];

const SET_STATE: [(&str, Kind); 3] =
    [("event", Kind::Text), ("state", Kind::Number), ("new_state", Kind::Number)];

/// The two sides of `KEY = "VALUE"`.
fn setting(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once('=')?;
    let (key, value) = (key.trim(), value.trim().strip_prefix('"')?.strip_suffix('"')?);
    (!key.is_empty() && !value.contains('"')).then_some((key, value))
}

fn value_of(kind: Kind, text: &str) -> Option<Value> {
    match kind {
        Kind::Text => Some(text.into()),
        Kind::Number => match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok().map(Value::from),
            None => text.parse::<u64>().ok().map(Value::from),
        },
        Kind::Switch => match text {
            "on" | "yes" | "true" | "y" => Some(true.into()),
            "off" | "no" | "false" | "n" => Some(false.into()),
            _ => None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_section_becomes_the_options_of_a_rule() {
        let text = "# rules\n\n[inject-error]\nevent = \"read_aio\"\n state=\"2\"\nerrno = \"0x5\"\nsector = \"8\"\nonce = \"on\"\n\
                    [set-state \"first\"]\nevent = \"write_aio\"\nnew_state = \"3\"  \n[inject-error]\nevent = \"l2_load\"\n";
        let rules = parse(text, "rules").unwrap();
        assert_eq!(
            json!(rules.inject_error),
            json!([
                {"event": "read_aio", "state": 2, "errno": 5, "sector": 8, "once": true},
                {"event": "l2_load"},
            ])
        );
        assert_eq!(json!(rules.set_state), json!([{"event": "write_aio", "new_state": 3}]));
        assert_eq!(parse("", "rules").unwrap(), Rules::default());
    }

    #[test]
    fn what_is_no_rule_is_an_error_that_says_where() {
        for (text, expected) in [
            ("event = \"read_aio\"\n", "rules:1: no group"),
            ("[inject-error]\nevent = read_aio\n", "rules:2: parse error"),
            ("[inject-error]\nevent = \"a\" \"b\"\n", "rules:2: parse error"),
            ("\n[drive]\n", "rules:2: There is no option group 'drive'"),
            ("[inject-error\n", "rules:1: There is no option group"),
            ("[set-state]\nonce = \"on\"\n", "Invalid parameter 'once'"),
            ("[inject-error]\nevent = \"none\"\nerrno = \"-1\"\n", "rules:3: 'errno' can't be '-1'"),
            ("[inject-error]\nerrno = \"5\"\n", "Missing event name"),
        ] {
            let refusal = parse(text, "rules").unwrap_err();
            assert!(refusal.desc.contains(expected), "{text:?}: {}", refusal.desc);
        }
    }

    #[test]
    fn a_file_that_is_no_use_is_refused() {
        assert!(read("/nowhere/rules").unwrap_err().desc.contains("No such file or directory"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rules");
        std::fs::write(&path, vec![b'#'; MOST as usize + 1]).unwrap();
        assert!(read(&path.to_string_lossy()).unwrap_err().desc.contains("at most"));
        std::fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(read(&path.to_string_lossy()).unwrap_err().desc.contains("not a text file"));
    }
}
