//! Which files the operator names, in a message of QMP or in options.
//!
//! By the keys of the schema that hold names of files. The values of others may be anything (ids, texts): to take each of them for a file
//! would grant the data plane what nobody meant, a directory `etc` because a node is called so.

use headwater_image::open_gate::Location;
use headwater_nbd::{NbdAddress, NbdUri};
use headwater_sandbox::Word;
use serde_json::{Map, Value};
use std::path::PathBuf;

/// What `value` names, wherever in it.
pub(super) fn of_value(value: &Value) -> Vec<Word> {
    let mut words = Vec::new();
    walk(value, &mut words);
    words
}

/// What options name.
pub(super) fn of_options(options: &Map<String, Value>) -> Vec<Word> {
    let mut words = Vec::new();
    walk_object(options, &mut words);
    words
}

/// What the value of `--allow-backing` names.
pub(super) fn of_allowed(name: &str) -> Option<Word> {
    match Location::of_operator(name) {
        Location::Path(path) => Some(Word::Allowed(path)),
        Location::Uri(uri) => match uri.parse::<NbdUri>().ok()?.address {
            NbdAddress::Unix { path } => Some(Word::File(path)),
            NbdAddress::Tcp { .. } => None,
        },
    }
}

fn walk(value: &Value, words: &mut Vec<Word>) {
    match value {
        Value::Object(object) => walk_object(object, words),
        Value::Array(values) => values.iter().for_each(|value| walk(value, words)),
        _ => {}
    }
}

fn walk_object(object: &Map<String, Value>, words: &mut Vec<Word>) {
    for (key, value) in object {
        match value {
            Value::String(text) => words.extend(of_text(key, text)),
            _ => walk(value, words),
        }
    }
}

fn of_text(key: &str, text: &str) -> Option<Word> {
    let path = PathBuf::from(text);
    match key {
        "filename" | "snapshot-file" => Some(Word::Image(path)),
        "path" | "file" | "config" => Some(Word::File(path)),
        "backing-file" => Some(Word::Backing(path)),
        "dir" => Some(Word::Directory(path)),
        "mountpoint" => Some(Word::MountPoint(path)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn files_are_found_wherever_they_stand_and_other_texts_are_none() {
        let command = json!({"execute": "transaction", "id": "/etc", "arguments": {"actions": [
            {"type": "blockdev-snapshot-sync", "data": {"node-name": "/root", "snapshot-file": "over"}},
            {"type": "x", "data": {"file": {"driver": "file", "filename": "/images/disk"}, "backing-file": "base"}},
            {"type": "y", "data": {"addr": {"type": "unix", "path": "/run/nbd"}, "dir": "certs", "filename": 5}},
            {"type": "z", "data": {"type": "fuse", "mountpoint": "/run/disk"}},
        ]}});
        let words = of_value(&command);
        let expected = [
            Word::Image("over".into()),
            Word::Image("/images/disk".into()),
            Word::Backing("base".into()),
            Word::File("/run/nbd".into()),
            Word::Directory("certs".into()),
            Word::MountPoint("/run/disk".into()),
        ];
        assert_eq!(words.len(), expected.len(), "{words:?}");
        assert!(expected.iter().all(|word| words.contains(word)), "{words:?}");
    }

    #[test]
    fn images_may_name_paths_and_local_servers() {
        assert_eq!(of_allowed("/images"), Some(Word::Allowed("/images".into())));
        assert_eq!(of_allowed("nbd+unix:///disk?socket=/run/nbd"), Some(Word::File("/run/nbd".into())));
        assert_eq!(of_allowed("nbd://host/disk"), None);
    }
}
