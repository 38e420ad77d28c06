//! Records: back and forth, and refused when they are anything else.

use super::*;
use proptest::prelude::*;

fn record() -> Record {
    let marks = |name: &str, value: &str| [(name.to_owned(), value.to_owned())].into();
    let mut arguments = Map::new();
    arguments.insert("device".into(), "disk".into());
    Record {
        command: "block-stream".into(),
        id: "fill".into(),
        arguments,
        speed: 7,
        paused: true,
        weight: Some(300),
        hold: Some("90".into()),
        boot_trace: Some("headwater boot trace 1\n0 0 4096\n".into()),
        link: LinkChange { was: Some("base.raw".into()), becomes: None },
        written: vec![Storage { name: "d".into(), object: marks("inode", "1"), ..Storage::default() }],
        read: vec![Storage {
            name: "s".into(),
            size: Some(9),
            contents: marks("ETag", "\"x\""),
            ..Storage::default()
        }],
    }
}

fn refused(text: &str) -> (ErrorKind, String) {
    let err = Record::decode(text.as_bytes(), "DIR/fill.job").unwrap_err();
    assert!(err.to_string().starts_with("DIR/fill.job: "), "{err}");
    (err.kind(), err.to_string())
}

#[test]
fn what_is_written_is_read_back() {
    let record = record();
    assert_eq!(Record::decode(&record.encode(), "x").unwrap(), record);
}

#[test]
fn every_part_is_needed_and_nothing_else_is_taken() {
    let Ok(Value::Object(whole)) = serde_json::from_slice(&record().encode()) else { panic!("an object") };
    for key in whole.keys() {
        let mut less = whole.clone();
        less.remove(key);
        let less = Value::Object(less).to_string();
        let without = match key.as_str() {
            "weight" => Record { weight: None, ..record() },
            "hold" => Record { hold: None, ..record() },
            "boot-trace" => Record { boot_trace: None, ..record() },
            _ => {
                assert_eq!(refused(&less).0, ErrorKind::Corrupt, "without {key}");
                continue;
            }
        };
        assert_eq!(Record::decode(less.as_bytes(), "x").expect("it need not have been set"), without);
    }
    for key in whole.keys() {
        let mut other = whole.clone();
        other.insert(key.clone(), Value::Array(vec![Value::Null]));
        assert_eq!(refused(&Value::Object(other).to_string()).0, ErrorKind::Corrupt, "with another {key}");
    }
    let mut more = whole.clone();
    more.insert("later".into(), Value::Null);
    refused(&Value::Object(more).to_string());
    let mut newer = whole;
    newer.insert("version".into(), 2.into());
    let (kind, text) = refused(&Value::Object(newer).to_string());
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(text.contains("version 2") && text.contains("version 1"), "{text}");
}

#[test]
fn foreign_files_are_told_from_damaged_ones() {
    assert!(refused("[1]").1.contains("isn't a state file of headwater"));
    assert!(refused("{\"format\": \"other\", \"version\": 1}").1.contains("isn't a state file of headwater"));
    assert!(refused("").1.contains("damaged") && refused("\0\0\0").1.contains("damaged"));
}

proptest! {
    #[test]
    fn a_part_of_a_record_is_refused(cut in 0usize..1000) {
        let whole = record().encode();
        // The last byte is the end of the line.
        let cut = cut % (whole.len() - 1);
        prop_assert!(Record::decode(&whole[..cut], "x").is_err());
    }

    #[test]
    fn garbage_is_refused_and_never_worse(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Record::decode(&bytes, "x").is_err());
    }

    #[test]
    fn a_changed_record_is_refused_or_sound(at in 0usize..1000, byte in any::<u8>()) {
        let mut bytes = record().encode();
        let at = at % bytes.len();
        bytes[at] = byte;
        // What still is a record can be written and read again.
        if let Ok(read) = Record::decode(&bytes, "x") {
            prop_assert_eq!(Record::decode(&read.encode(), "x").unwrap(), read);
        }
    }

    #[test]
    fn all_texts_and_numbers_survive(
        id in ".*", name in ".*", was in proptest::option::of(".*"), becomes in proptest::option::of(".*"),
        speed in any::<u64>(), paused in any::<bool>(), size in proptest::option::of(any::<u64>()),
    ) {
        let mut record = record();
        (record.id, record.speed, record.paused) = (id, speed, paused);
        record.link = LinkChange { was, becomes };
        record.read[0] = Storage { name, size, ..Storage::default() };
        prop_assert_eq!(Record::decode(&record.encode(), "x").unwrap(), record);
    }
}
