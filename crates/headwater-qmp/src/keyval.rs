//! Options on a command line.
//!
//! Two syntaxes, both of keys and values between commas, where `,,` is a comma in a value:
//! - [`parse`]: `driver=qcow2,file.driver=file,file.filename=a.img`: dots make a tree, numbers in a key make lists, and a first value without a key
//!   has a key that is implied. Its leaves are strings; the schema says what they mean.
//! - [`parse_opts`]: the older one, flat, where a key alone means `on` and `nokey` means `off`.

use crate::error::QmpError;
use crate::json;
use serde_json::{Map, Value};

/// The longest key, in bytes.
const MAX_KEY: usize = 127;

/// The most elements that a list may have.
const MAX_LIST: usize = 4096;

/// Reads an option's value that is JSON: an object.
///
/// # Errors
/// If it is none.
pub fn parse_json(text: &str) -> Result<Value, QmpError> {
    match json::from_text(text).map_err(|err| QmpError::generic(err.to_string()))? {
        object @ Value::Object(_) => Ok(object),
        _ => Err(QmpError::generic("JSON object expected")),
    }
}

/// Cuts off the text up to the next comma that isn't doubled, with doubled ones made single.
fn value(text: &str) -> (String, &str) {
    let mut taken = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(',') {
        taken.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        match rest.strip_prefix(',') {
            Some(after) => {
                taken.push(',');
                rest = after;
            }
            None => return (taken, rest),
        }
    }
    taken.push_str(rest);
    (taken, "")
}

/// Reads keys and values into a tree whose leaves are strings. The last of several values for one key counts.
///
/// # Errors
/// Says which key is malformed, or what contradicts what.
pub fn parse(text: &str, implied: Option<&str>) -> Result<Value, QmpError> {
    let mut root = Map::new();
    let mut rest = text;
    let mut first = true;
    while !rest.is_empty() {
        let end = rest.find([',', '=']).unwrap_or(rest.len());
        let (key, text) = match (rest[end..].starts_with('='), implied) {
            (false, Some(implied)) if first => {
                let (text, after) = value(rest);
                rest = after;
                (implied.to_owned(), text)
            }
            (false, _) => {
                let key = &rest[..end];
                return Err(if key.is_empty() {
                    QmpError::generic(format!("Invalid parameter '{rest}'"))
                } else {
                    QmpError::generic(format!("Expected '=' after parameter '{key}'"))
                });
            }
            (true, _) => {
                let key = rest[..end].to_owned();
                let (text, after) = value(&rest[end + 1..]);
                rest = after;
                (key, text)
            }
        };
        first = false;
        insert(&mut root, &key, text)?;
    }
    lists(Value::Object(root), "")
}

/// Puts a leaf where the fragments of `key` lead.
fn insert(root: &mut Map<String, Value>, key: &str, text: String) -> Result<(), QmpError> {
    let mut at = root;
    let mut fragments = key.split('.').peekable();
    let mut path = String::new();
    while let Some(fragment) = fragments.next() {
        let index = !fragment.is_empty() && fragment.bytes().all(|b| b.is_ascii_digit());
        let name = fragment.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && fragment.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        // A list can't be at the top.
        if !(name || index && !path.is_empty()) || key.len() > MAX_KEY {
            return Err(QmpError::generic(format!("Invalid parameter '{key}'")));
        }
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(fragment);
        if fragments.peek().is_none() {
            if at.get(fragment).is_some_and(Value::is_object) {
                return Err(QmpError::generic(format!("Parameters '{path}.*' used inconsistently")));
            }
            at.insert(fragment.to_owned(), Value::String(text));
            return Ok(());
        }
        let child = at.entry(fragment).or_insert_with(|| Value::Object(Map::new()));
        match child {
            Value::Object(object) => at = object,
            _ => return Err(QmpError::generic(format!("Parameters '{path}.*' used inconsistently"))),
        }
    }
    Ok(())
}

/// Makes lists of objects whose keys are numbers.
fn lists(tree: Value, path: &str) -> Result<Value, QmpError> {
    let Value::Object(object) = tree else { return Ok(tree) };
    let is_index = |key: &String| key.bytes().all(|b| b.is_ascii_digit());
    let indices = object.keys().filter(|key| is_index(key)).count();
    let inside = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    if indices == 0 {
        let members = object.into_iter().map(|(key, value)| {
            let value = lists(value, &inside(&key))?;
            Ok((key, value))
        });
        return Ok(Value::Object(members.collect::<Result<_, QmpError>>()?));
    }
    if indices < object.len() {
        return Err(QmpError::generic(format!("Parameters '{path}.*' used inconsistently")));
    }
    if indices > MAX_LIST {
        return Err(QmpError::generic(format!("Parameter '{path}' has more than {MAX_LIST} elements")));
    }
    let mut elements: Vec<Option<Value>> = vec![None; indices];
    for (key, value) in object {
        let at = key.parse::<usize>().ok().filter(|at| *at < indices);
        let Some(at) = at else {
            let missing = elements.iter().position(Option::is_none).unwrap_or(0);
            return Err(QmpError::generic(format!("Parameter '{path}.{missing}' missing")));
        };
        elements[at] = Some(lists(value, &inside(&key))?);
    }
    match elements.iter().position(Option::is_none) {
        Some(missing) => Err(QmpError::generic(format!("Parameter '{path}.{missing}' missing"))),
        None => Ok(Value::Array(elements.into_iter().flatten().collect())),
    }
}

/// Reads keys and values of the older syntax, in their order: `socket,id=c,server=on,nowait`. The last of several values for one key counts.
///
/// # Errors
/// If a key is empty.
pub fn parse_opts(text: &str, implied: Option<&str>) -> Result<Vec<(String, String)>, QmpError> {
    let mut options = Vec::new();
    let mut rest = text;
    let mut first = true;
    while !rest.is_empty() {
        let end = rest.find([',', '=']).unwrap_or(rest.len());
        let option = if rest[end..].starts_with('=') {
            let key = rest[..end].to_owned();
            let (text, after) = value(&rest[end + 1..]);
            rest = after;
            (key, text)
        } else {
            let (word, after) = value(rest);
            rest = after;
            match (implied, word.strip_prefix("no")) {
                (Some(implied), _) if first => (implied.to_owned(), word),
                (_, Some(off)) if !off.is_empty() && word != "nodelay" => (off.to_owned(), "off".to_owned()),
                _ => (word, "on".to_owned()),
            }
        };
        first = false;
        if option.0.is_empty() {
            return Err(QmpError::generic(format!("Invalid parameter '{text}'")));
        }
        options.push(option);
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn dots_make_trees_numbers_make_lists_and_doubled_commas_are_commas() {
        let tree = parse("qcow2,file.driver=file,file.filename=a,,b=c,rules.0.x=1,rules.1.x=2,x=", Some("driver"));
        let expected = json!({
            "driver": "qcow2",
            "file": {"driver": "file", "filename": "a,b=c"},
            "rules": [{"x": "1"}, {"x": "2"}],
            "x": "",
        });
        assert_eq!(tree.unwrap(), expected);
        assert_eq!(parse("a=1,a=2", None).unwrap(), json!({"a": "2"}));
        assert_eq!(parse("", Some("driver")).unwrap(), json!({}));
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        for (text, desc) in [
            ("a", "Expected '=' after parameter 'a'"),
            ("0=a", "Invalid parameter '0'"),
            ("a.=b", "Invalid parameter 'a.'"),
            ("a=1,a.b=2", "Parameters 'a.*' used inconsistently"),
            ("a.b=2,a=1", "Parameters 'a.*' used inconsistently"),
            ("a.0=2,a.b=1", "Parameters 'a.*' used inconsistently"),
            ("a.1=2", "Parameter 'a.0' missing"),
            ("=x", "Invalid parameter ''"),
        ] {
            assert_eq!(parse(text, None).unwrap_err().desc, desc, "{text}");
        }
    }

    #[test]
    fn the_older_syntax_has_words_for_on_and_off() {
        let options = parse_opts("socket,id=c,path=/a,,b,server,nowait", Some("backend")).unwrap();
        let expected =
            [("backend", "socket"), ("id", "c"), ("path", "/a,b"), ("server", "on"), ("wait", "off")];
        assert!(options.iter().map(|(k, v)| (k.as_str(), v.as_str())).eq(expected));
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "[a-c0-2.=,{}]{0,40}") {
            let _ = (parse(&text, None), parse(&text, Some("driver")), parse_opts(&text, Some("x")));
        }

        #[test]
        fn values_survive(value in ".{0,30}") {
            let text = format!("a.b={}", value.replace(',', ",,"));
            prop_assert_eq!(parse(&text, None).unwrap(), json!({"a": {"b": value}}));
        }
    }
}
