//! Headers survive encoding, and no lie in one does harm.

use super::*;

fn header() -> Header {
    Header {
        version: 3,
        cluster_bits: 16,
        size: 10 << 30,
        l1_size: 20,
        l1_table_offset: 0x30000,
        refcount_table_offset: 0x10000,
        refcount_table_clusters: 1,
        nb_snapshots: 0,
        snapshots_offset: 0,
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        refcount_order: 4,
        compression: Compression::Zlib,
        header_length: 112,
        unknown_fields: Vec::new(),
        extensions: vec![
            Extension { kind: extensions::BACKING_FORMAT, data: b"qcow2".to_vec() },
            Extension { kind: 77, data: b"kept as it is".to_vec() },
            extensions::feature_name_table(),
        ],
        backing_name: Some("base.qcow2".into()),
        backing_place: Place::default(),
        extensions_end: 0,
    }
}

#[test]
fn a_header_survives_encoding() {
    for (version, length, order) in [(3, 112, 4), (3, 104, 6), (3, 160, 0), (2, 72, 4)] {
        let mut header = Header { version, header_length: length, refcount_order: order, ..header() };
        header.unknown_fields = vec![9; length.saturating_sub(112)];
        let bytes = header.encode().unwrap();
        let parsed = Header::parse(&bytes, "t").unwrap();
        assert_eq!(parsed, header);
        assert_eq!(parsed.backing_format().as_deref(), Some("qcow2"));
    }
}

#[test]
fn fields_that_are_not_given_are_zero() {
    let mut header = Header { header_length: 160, extensions: Vec::new(), backing_name: None, ..header() };
    header.unknown_fields = [vec![9; 8], vec![0; 40]].concat();
    let bytes = header.encode().unwrap();
    let parsed = Header::parse(&bytes[..120], "t").unwrap();
    assert_eq!(parsed.unknown_fields, header.unknown_fields);
    assert_eq!(parsed.encode_fixed(), bytes[..160]);
}

#[test]
fn no_single_changed_byte_and_no_truncation_panics() {
    let bytes = header().encode().unwrap();
    for len in 0..bytes.len() {
        let _ = Header::parse(&bytes[..len], "t");
    }
    for at in 0..bytes.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut changed = bytes.clone();
            changed[at] = value;
            let _ = Header::parse(&changed, "t");
        }
    }
}

#[test]
fn unknown_incompatible_features_are_refused_by_name() {
    let mut header = header();
    header.incompatible = 1 << 17 | 1 << 40;
    let mut entry = vec![0u8, 17];
    entry.extend_from_slice(b"time travel");
    entry.resize(48, 0);
    header.extensions.pop();
    header.extensions.push(Extension { kind: extensions::FEATURE_NAMES, data: entry });
    let err = Header::parse(&header.encode().unwrap(), "disk.qcow2").unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Unsupported);
    let text = err.to_string();
    assert!(
        text.contains("disk.qcow2") && text.contains("'time travel' (bit 17)") && text.contains("bit 40"),
        "{text}"
    );
}

#[test]
fn sizes_and_offsets_are_bounded() {
    type Case = (fn(&mut Header), &'static str);
    let cases: [Case; 8] = [
        (|h| h.l1_size = u32::MAX, "L1 table of"),
        (|h| h.l1_size = 19, "doesn't fit an L1 table"),
        (|h| h.refcount_table_clusters = 129, "refcount table has"),
        (|h| h.refcount_table_clusters = 0, "refcount table has"),
        (|h| h.l1_table_offset = 0x30200, "cluster boundary"),
        (|h| h.refcount_table_offset = u64::MAX << 16, "cluster boundary"),
        (|h| h.refcount_order = 7, "refcount order"),
        (|h| h.size = u64::MAX, "doesn't fit an L1 table"),
    ];
    for (change, expected) in cases {
        let mut header = header();
        change(&mut header);
        let err = Header::parse(&header.encode().unwrap(), "t").unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Corrupt);
        assert!(err.to_string().contains(expected), "{err}");
    }
    let mut encrypted = header().encode().unwrap();
    encrypted[35] = 2;
    assert_eq!(Header::parse(&encrypted, "t").unwrap_err().kind(), ErrorKind::Unsupported);
}
