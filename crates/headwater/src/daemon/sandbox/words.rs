//! Which files the operator names, in a message of QMP or in options.
//!
//! By the keys of the schema that hold names of files. The values of others may be anything (ids, texts): to take each of them for a file
//! would grant the data plane what nobody meant, a directory `etc` because a node is called so.
//!
//! Where `drive-backup` and `drive-mirror` write to is a file's name, too, and they are the only ones of whose `target` that is so: those of their kin are
//! nodes, and have the same key.
//!
//! A node over an object store also names the files that the credentials of its kind may come from.
//!
//! A file under a raw node has no header, unless an image is read from that node: its first bytes are the guest's, and name nothing.

use crate::daemon::jobs::drive;
use crate::daemon::object_sources;
use headwater_image::open_gate::Location;
use headwater_nbd::{NbdAddress, NbdUri};
use headwater_sandbox::Word;
use headwater_storage::object::{ObjectLocation, Service, credential_files};
use serde_json::{Map, Value};
use std::path::PathBuf;

/// What `value` names, wherever in it.
pub(super) fn of_value(value: &Value) -> Vec<Word> {
    let mut words = Vec::new();
    walk(value, Above::Unknown, &mut words);
    words
}

/// What options name.
pub(super) fn of_options(options: &Map<String, Value>) -> Vec<Word> {
    let mut words = Vec::new();
    walk_object(options, Above::Unknown, &mut words);
    words
}

/// What reads a file: the node whose `file` it is, or a node above that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Above {
    /// Nothing that is known here. A node that is added later may be an image.
    Unknown,
    /// An image with a header.
    Image,
    /// Nobody but a guest.
    Raw,
}

impl Above {
    /// For what is below `key` of a node with this driver.
    fn below(self, driver: Option<&str>, key: &str) -> Self {
        match (key, driver) {
            ("file", Some("qcow2")) => Self::Image,
            ("file", Some("raw")) if self == Self::Unknown => Self::Raw,
            // Filters have other names for what they pass requests to.
            ("file" | "image" | "test" | "children", _) => self,
            ("data-file", _) => Self::Raw,
            _ => Self::Unknown,
        }
    }
}

/// What the value of `--allow-backing` names.
pub(super) fn of_allowed(name: &str) -> Vec<Word> {
    match Location::of_operator(name) {
        Location::Path(path) => vec![Word::Allowed(path)],
        Location::Uri(uri) if ObjectLocation::is_object(&uri) => {
            // It may be the beginning of an address only.
            let service = Service::of_address(&uri);
            service.into_iter().flat_map(of_service).collect()
        }
        Location::Uri(uri) => match uri.parse::<NbdUri>().map(|uri| uri.address) {
            Ok(NbdAddress::Unix { path }) => vec![Word::File(path)],
            _ => Vec::new(),
        },
    }
}

fn of_service(service: Service) -> impl Iterator<Item = Word> {
    credential_files(service).into_iter().map(Word::Readable)
}

fn walk(value: &Value, above: Above, words: &mut Vec<Word>) {
    match value {
        Value::Object(object) => walk_object(object, above, words),
        Value::Array(values) => values.iter().for_each(|value| walk(value, above, words)),
        _ => {}
    }
}

fn walk_object(object: &Map<String, Value>, above: Above, words: &mut Vec<Word>) {
    let driver = object.get("driver").and_then(Value::as_str);
    words.extend(driver.and_then(object_sources::service).into_iter().flat_map(of_service));
    words.extend(target(object).into_iter().flat_map(of_target));
    words.extend(recorded_into(object).map(|file| Word::Replaced(file.into())));
    for (key, value) in object {
        match value {
            Value::String(text) => words.extend(of_text(key, text, above)),
            _ => walk(value, above.below(driver, key), words),
        }
    }
}

/// The target of a command, or of an action in a transaction, that opens it by its name.
fn target(object: &Map<String, Value>) -> Option<&str> {
    let (what, arguments) = match object.get("execute").or_else(|| object.get("exec-oob")) {
        Some(command) => (command, object.get("arguments")),
        None => (object.get("type")?, object.get("data")),
    };
    matches!(what.as_str()?, "drive-backup" | "drive-mirror").then_some(())?;
    arguments?.get("target")?.as_str()
}

/// The file that a command records a boot trace into.
fn recorded_into(object: &Map<String, Value>) -> Option<&str> {
    let command = object.get("execute").or_else(|| object.get("exec-oob"))?;
    (command == "headwater-record-boot-trace").then_some(())?;
    object.get("arguments")?.get("file")?.as_str()
}

fn of_target(name: &str) -> Vec<Word> {
    match drive::location(name) {
        Location::Path(path) => vec![Word::Image(path)],
        Location::Uri(_) => match drive::file_options(name) {
            Ok(options) => of_options(&options),
            Err(_) => Vec::new(),
        },
    }
}

fn of_text(key: &str, text: &str, above: Above) -> Option<Word> {
    let path = PathBuf::from(text);
    match key {
        "filename" if above == Above::Raw => Some(Word::Raw(path)),
        "filename" | "snapshot-file" => Some(Word::Image(path)),
        "path" | "file" | "config" | "manifest" => Some(Word::File(path)),
        "x-headwater-boot-trace" => Some(Word::Readable(path)),
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
    fn a_target_is_a_file_where_it_is_opened_by_its_name() {
        let target = |command: &str, name: &str| {
            of_value(
                &json!({"execute": command, "arguments": {"device": "disk", "target": name, "sync": "full"}}),
            )
        };
        assert_eq!(target("drive-mirror", "copy"), [Word::Image("copy".into())]);
        assert_eq!(target("drive-backup", "file:copy"), [Word::Image("copy".into())]);
        assert_eq!(
            target("drive-mirror", "nbd+unix:///disk?socket=/run/nbd"),
            [Word::File("/run/nbd".into())]
        );
        assert_eq!(
            target("drive-mirror", "nbd:unix:/run/nbd:exportname=disk"),
            [Word::File("/run/nbd".into())]
        );
        assert_eq!(target("drive-mirror", "nbd:host:10809:exportname=/etc"), []);
        assert_eq!(target("blockdev-mirror", "copy"), []);
        let action = |kind: &str| {
            of_value(
                &json!({"execute": "transaction", "arguments": {"actions": [{"type": kind, "data": {"target": "copy"}}]}}),
            )
        };
        assert_eq!(action("drive-backup"), [Word::Image("copy".into())]);
        assert_eq!(action("blockdev-backup"), []);
    }

    #[test]
    fn boot_traces_are_read_and_replaced() {
        let stream = json!({"execute": "block-stream", "arguments": {"device": "disk", "x-headwater-boot-trace": "trace"}});
        assert_eq!(of_value(&stream), [Word::Readable("trace".into())]);
        let arguments = json!({"node-name": "disk", "file": "trace"});
        let record = json!({"execute": "headwater-record-boot-trace", "arguments": arguments});
        assert!(of_value(&record).contains(&Word::Replaced("trace".into())));
        assert!(
            !of_value(&json!({"execute": "other", "arguments": arguments}))
                .contains(&Word::Replaced("trace".into()))
        );
    }

    #[test]
    fn a_file_under_a_raw_node_has_no_header_unless_an_image_is_above() {
        let file = json!({"driver": "file", "filename": "x"});
        let under = |driver: &str, below: &Value| json!({"driver": driver, "file": below});
        let raw = under("raw", &file);
        for (options, header) in [
            (file.clone(), true),
            (under("qcow2", &file), true),
            (under("qcow2", &raw), true),
            (under("qcow2", &under("throttle", &raw)), true),
            (under("qcow2", &json!({"driver": "blkdebug", "image": raw})), true),
            (raw.clone(), false),
            (under("throttle", &raw), false),
            (under("raw", &under("throttle", &file)), false),
            (json!({"driver": "qcow2", "file": "node", "backing": raw}), false),
            (json!({"driver": "qcow2", "file": "node", "backing": under("qcow2", &file)}), true),
            (json!({"driver": "qcow2", "file": "node", "data-file": file}), false),
        ] {
            let names = of_value(&json!({"execute": "blockdev-add", "arguments": options}));
            let word = if header { Word::Image("x".into()) } else { Word::Raw("x".into()) };
            assert!(names.contains(&word), "{options}: {names:?}");
        }
    }

    #[test]
    fn images_may_name_paths_and_local_servers() {
        assert_eq!(of_allowed("/images"), [Word::Allowed("/images".into())]);
        assert_eq!(of_allowed("nbd+unix:///disk?socket=/run/nbd"), [Word::File("/run/nbd".into())]);
        assert_eq!(of_allowed("nbd://host/disk"), []);
    }

    #[test]
    fn files_of_credentials_are_named_by_nodes_that_need_them_only() {
        let readable = |driver: &str| {
            let node = json!({"execute": "blockdev-add", "arguments": {"driver": driver, "bucket": "b", "key": "k"}});
            of_value(&node).into_iter().filter(|word| matches!(word, Word::Readable(_))).count()
        };
        assert_eq!(readable("s3"), credential_files(Service::S3).len());
        assert_eq!(readable("http"), 0);
        assert_eq!(of_allowed("s3://bucket/").len(), credential_files(Service::S3).len());
    }
}
