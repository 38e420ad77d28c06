//! Every state that the header can be in while the link changes is the old link or the new one.

use super::*;
use crate::qcow2::header::Compression;

fn header(cluster_bits: u32, list: Vec<Extension>, backing: Option<&str>) -> (Header, Vec<u8>) {
    let mut header = Header {
        version: 3,
        cluster_bits,
        size: 1 << 20,
        l1_size: 1 << 12,
        l1_table_offset: 3 << cluster_bits,
        refcount_table_offset: 1 << cluster_bits,
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
        extensions: list,
        backing_name: backing.map(str::to_owned),
        backing_place: Place::default(),
        extensions_end: 0,
    };
    let mut cluster = header.encode().unwrap();
    cluster.resize(1 << cluster_bits, 0);
    (Header::parse(&cluster, "t").unwrap(), cluster)
}

fn link_of(cluster: &[u8]) -> Option<(String, Option<String>)> {
    let header = Header::parse(cluster, "t").unwrap();
    header.backing_name.clone().map(|name| (name, header.backing_format()))
}

/// Applies the change as a power cut may leave it: what is written beforehand in any mixture of sectors, then the first sector.
fn check_change(before: &(Header, Vec<u8>), link: Option<(&str, &str)>) {
    let (header, old) = before;
    let change = plan(header, old, link, "t").unwrap();
    let old_link = link_of(old);
    let mut partly = old.clone();
    if let Some(range) = &change.beforehand {
        assert!(range.end <= old.len());
        for sector in range.start / SECTOR..range.end.div_ceil(SECTOR) {
            if sector > 0 {
                let part = sector * SECTOR..(sector + 1) * SECTOR;
                partly[part.clone()].copy_from_slice(&change.cluster[part]);
                assert_eq!(link_of(&partly), old_link, "nothing refers to what is written beforehand");
            }
        }
    }
    partly[..SECTOR].copy_from_slice(&change.cluster[..SECTOR]);
    assert_eq!(link_of(&partly), link.map(|(name, format)| (name.into(), Some(format.into()))));
    let kept = |header: &Header| {
        let no_names =
            |e: &&Extension| ![extensions::BACKING_FORMAT, extensions::FEATURE_NAMES].contains(&e.kind);
        header.extensions.iter().filter(no_names).cloned().collect::<Vec<_>>()
    };
    let new = Header::parse(&partly, "t").unwrap();
    assert_eq!(kept(&new), kept(header), "unknown extensions stay");
    assert_eq!((new.size, new.l1_table_offset), (header.size, header.l1_table_offset));
}

fn format(name: &str) -> Extension {
    Extension { kind: extensions::BACKING_FORMAT, data: name.as_bytes().to_vec() }
}

#[test]
fn the_link_changes_in_one_sector() {
    let unknown = Extension { kind: 0x7777_0001, data: vec![5; 40] };
    let names = extensions::feature_name_table();
    let long = "x".repeat(900);
    for cluster_bits in [12, 16] {
        for list in [
            vec![],
            vec![format("raw")],
            vec![format("qcow2"), names.clone()],
            vec![names.clone(), unknown.clone()],
            vec![unknown.clone(), format("raw"), names.clone()],
            vec![names.clone(), format("raw")],
        ] {
            for backing in [None, Some("old.raw"), Some(&long[..700])] {
                let before = header(cluster_bits, list.clone(), backing);
                check_change(&before, None);
                check_change(&before, Some(("new.qcow2", "qcow2")));
                check_change(&before, Some((&long, "raw")));
            }
        }
    }
}

#[test]
fn a_link_that_does_not_fit_is_refused() {
    let before = header(9, vec![format("raw")], Some("old.raw"));
    check_change(&before, Some(("new", "raw")));
    check_change(&before, None);
    let long = "x".repeat(500);
    let err = plan(&before.0, &before.1, Some((&long, "raw")), "t").map(|_| ()).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::InvalidInput);
    let large = Extension { kind: 0x7777_0001, data: vec![5; 600] };
    let before = header(12, vec![large.clone()], Some("old.raw"));
    let err = plan(&before.0, &before.1, Some(("new", "raw")), "t").map(|_| ()).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Unsupported);
    // Dropping the link needs no room.
    check_change(&before, None);
    // And a format in its old place can change to one as long.
    let before = header(12, vec![format("raw"), large], Some("old.raw"));
    check_change(&before, Some(("new", "qcow2")));
    let bad = plan(&before.0, &before.1, Some(("", "raw")), "t").map(|_| ()).unwrap_err();
    assert_eq!(bad.kind(), ErrorKind::InvalidInput);
}
