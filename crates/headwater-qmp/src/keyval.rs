//! `key=value,nested.key=value,list.0=value`: the syntax of most options, as a tree.
//!
//! Keys are names joined by dots; a part that is a number is an index of a list. A comma within a value is doubled. What a
//! leaf means, only its type can say, so leaves are strings: [`crate::schema::check_type`] converts them.
//!
//! A tree is built in two passes. The first takes numbers for names like others. The second turns objects with
//! numbers for names into lists, which then must be complete.

use serde_json::{Map, Value};

use crate::error::QmpError;

/// Longest part of a key, in bytes.
const MAX_FRAGMENT: usize = 127;

/// Most parts of a key. JSON may be nested as deeply.
const MAX_DEPTH: usize = 1024;

/// What an option says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Keyval {
    /// The values by their keys; leaves are strings.
    pub tree: Map<String, Value>,
    /// Whether `help` or `?` stood among them.
    pub help: bool,
}

/// Reads an option.
///
/// If there is an `implied_key`, the first value may stand alone and belongs to it. Such a value can't contain a comma.
pub fn parse(text: &str, implied_key: Option<&str>) -> Result<Keyval, QmpError> {
    let mut result = Keyval::default();
    let mut rest = text;
    let mut implied_key = implied_key;
    while !rest.is_empty() {
        rest = parameter(rest, implied_key.take(), &mut result)?;
    }
    let mut tree = Value::Object(result.tree);
    listify(&mut tree, "")?;
    if let Value::Object(tree) = tree {
        return Ok(Keyval { tree, help: result.help });
    }
    // Keys begin with a name, so that the whole is no list.
    Err(QmpError::invalid_parameter(text))
}

/// Reads one parameter at the start of `text`; returns what follows it.
fn parameter<'a>(text: &'a str, implied_key: Option<&str>, result: &mut Keyval) -> Result<&'a str, QmpError> {
    let end = text.find([',', '=']).unwrap_or(text.len());
    let (word, after) = text.split_at(end);
    if !word.is_empty() && !after.starts_with('=') {
        if matches!(word, "help" | "?") {
            result.help = true;
            return Ok(after.strip_prefix(',').unwrap_or(after));
        }
        if let Some(key) = implied_key {
            insert(&mut result.tree, key, word.to_owned())?;
            return Ok(after.strip_prefix(',').unwrap_or(after));
        }
    }
    check_key(word)?;
    let Some(after) = after.strip_prefix('=') else {
        return Err(QmpError::generic(format!("Expected '=' after parameter '{word}'")));
    };
    let (value, rest) = unescape_value(after);
    insert(&mut result.tree, word, value)?;
    Ok(rest)
}

/// The value at the start of `text`, with doubled commas made single, and what follows the comma that ends it.
pub(crate) fn unescape_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(',') {
        value.push_str(before);
        match after.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, after),
        }
    }
    value.push_str(rest);
    (value, "")
}

/// `value` with its commas doubled, so that it can stand in an option.
pub fn escape_value(value: &str) -> String {
    value.replace(',', ",,")
}

fn check_key(key: &str) -> Result<(), QmpError> {
    let mut rest = key;
    let mut depth = 1;
    loop {
        let first = rest.len() == key.len();
        let length = match index_length(rest) {
            0 => name_length(rest),
            digits if !first => digits,
            _ => 0,
        };
        let (fragment, after) = rest.split_at(length);
        if fragment.is_empty() || !(after.is_empty() || after.starts_with('.')) {
            return Err(QmpError::invalid_parameter(key));
        }
        if fragment.len() > MAX_FRAGMENT {
            let part = if first && after.is_empty() { "" } else { " fragment" };
            return Err(QmpError::generic(format!("Parameter{part} '{fragment}' is too long")));
        }
        if depth > MAX_DEPTH {
            return Err(QmpError::generic(format!("Parameter '{key}' is nested too deeply")));
        }
        match after.strip_prefix('.') {
            Some(after) => rest = after,
            None => return Ok(()),
        }
        depth += 1;
    }
}

fn index_length(text: &str) -> usize {
    text.bytes().take_while(u8::is_ascii_digit).count()
}

/// Length of the name at the start of `text`: letters, digits, `-` and `_`, a letter first, perhaps after a prefix with the
/// domain of a vendor, as in `__com.example_name`. Zero if there is none.
fn name_length(text: &str) -> usize {
    let prefix = match text.strip_prefix("__") {
        None => 0,
        Some(domain) => {
            let length =
                domain.bytes().take_while(|&b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.').count();
            if length == 0 || domain.as_bytes().get(length) != Some(&b'_') {
                return 0;
            }
            "__".len() + length + "_".len()
        }
    };
    let name = &text.as_bytes()[prefix..];
    if !name.first().is_some_and(u8::is_ascii_alphabetic) {
        return 0;
    }
    prefix + name.iter().take_while(|&&b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_').count()
}

/// Puts a leaf where its key says. The last value of a key counts.
fn insert(tree: &mut Map<String, Value>, key: &str, value: String) -> Result<(), QmpError> {
    let mut at = tree;
    let mut start = 0;
    loop {
        let end = fragment_end(key, start);
        let fragment = &key[start..end];
        if end == key.len() {
            return match at.insert(fragment.to_owned(), Value::String(value)) {
                Some(Value::Object(_)) => Err(inconsistent(key)),
                _ => Ok(()),
            };
        }
        let inner = at.entry(fragment).or_insert_with(|| Value::Object(Map::new()));
        at = match inner {
            Value::Object(inner) => inner,
            _ => return Err(inconsistent(&key[..end])),
        };
        start = end + 1;
    }
}

/// Where the part of a checked key that begins at `start` ends. A vendor's domain may have dots.
fn fragment_end(key: &str, start: usize) -> usize {
    let rest = &key[start..];
    start + index_length(rest).max(name_length(rest)).max(1).min(rest.len())
}

fn inconsistent(prefix: &str) -> QmpError {
    QmpError::generic(format!("Parameters '{prefix}.*' used inconsistently"))
}

/// Makes lists of the objects in `value` that are meant as such. `prefix` is the key of `value`, with a dot after it.
fn listify(value: &mut Value, prefix: &str) -> Result<(), QmpError> {
    let Value::Object(members) = value else { return Ok(()) };
    for (name, member) in members.iter_mut() {
        if member.is_object() {
            listify(member, &format!("{prefix}{name}."))?;
        }
    }
    let indices = members.keys().filter(|name| name.starts_with(|c: char| c.is_ascii_digit())).count();
    if indices == 0 {
        return Ok(());
    }
    if indices < members.len() {
        return Err(inconsistent(prefix.trim_end_matches('.')));
    }
    // Several keys may stand for one index, with zeros before it. An index beyond the list shows as one that is missing.
    let mut items = vec![None; indices];
    let mut length = 0;
    for (name, member) in std::mem::take(members) {
        let index = name.parse().unwrap_or(usize::MAX);
        length = length.max(index.saturating_add(1)).min(indices);
        if let Some(item) = items.get_mut(index) {
            *item = Some(member);
        }
    }
    items.truncate(length);
    let mut list = Vec::with_capacity(length);
    for (index, item) in items.into_iter().enumerate() {
        let missing = || QmpError::generic(format!("Parameter '{prefix}{index}' missing"));
        list.push(item.ok_or_else(missing)?);
    }
    *value = Value::Array(list);
    Ok(())
}

#[cfg(test)]
mod tests;
