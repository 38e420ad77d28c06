//! Entries survive encoding, and bad ones are refused.

use super::*;

fn geometry(extended_l2: bool, data_file: bool) -> Geometry {
    Geometry { version: 3, cluster_bits: 16, refcount_order: 4, extended_l2, data_file }
}

#[test]
fn standard_entries_survive_encoding() {
    let g = geometry(false, false);
    let host = Some(HostOffset(0x50000));
    for cluster in [
        Cluster::UNALLOCATED,
        Cluster { host: None, copied: false, data: 0, zero: 1 },
        Cluster { host, copied: true, data: 0, zero: 1 },
        Cluster { host, copied: true, data: 1, zero: 0 },
        Cluster { host, copied: false, data: 1, zero: 0 },
    ] {
        let (word, bitmap) = L2Entry::Standard(cluster).encode(&g);
        assert_eq!(L2Entry::decode(word, bitmap, &g), Ok(L2Entry::Standard(cluster)));
    }
    let g = geometry(true, false);
    for cluster in [
        Cluster { host: None, copied: false, data: 0, zero: 0x8000_0001 },
        Cluster { host, copied: true, data: 0xff00_0000, zero: 0x0000_00ff },
        Cluster { host, copied: true, data: 0, zero: 0 },
    ] {
        let (word, bitmap) = L2Entry::Standard(cluster).encode(&g);
        assert_eq!(L2Entry::decode(word, bitmap, &g), Ok(L2Entry::Standard(cluster)));
    }
    let g = geometry(false, true);
    let first = Cluster { host: Some(HostOffset(0)), copied: true, data: 1, zero: 0 };
    let (word, _) = L2Entry::Standard(first).encode(&g);
    assert_eq!(L2Entry::decode(word, 0, &g), Ok(L2Entry::Standard(first)));
}

#[test]
fn compressed_entries_tell_offset_and_length() {
    // 64 KiB clusters: 54 bits of offset, 8 bits of further sectors.
    let word = COMPRESSED | 3 << 54 | 0x12345;
    assert_eq!(
        L2Entry::decode(word, 0, &geometry(false, false)),
        Ok(L2Entry::Compressed { offset: HostOffset(0x12345), len: 4 * 512 - 0x145 })
    );
    assert_eq!(
        L2Entry::decode(word | COPIED, 0, &geometry(false, false)),
        L2Entry::decode(word, 0, &geometry(false, false))
    );
    assert!(L2Entry::decode(word, 0, &geometry(false, true)).is_err());
    assert!(L2Entry::decode(word, 1, &geometry(true, false)).is_err());
}

#[test]
fn invalid_entries_are_refused() {
    let (std, sub) = (geometry(false, false), geometry(true, false));
    assert!(L2Entry::decode(0x50000 | 1 << 56, 0, &std).is_err());
    assert!(L2Entry::decode(0x50200, 0, &std).is_err());
    assert!(L2Entry::decode(0x50001, 0, &sub).is_err(), "the zero bit is reserved with subclusters");
    assert!(L2Entry::decode(0x50000, 1 << 32 | 1, &sub).is_err());
    assert!(L2Entry::decode(0, 1, &sub).is_err());
    assert!(L2Entry::decode(1, 0, &Geometry { version: 2, ..std }).is_err());
    assert!(L1Entry(0x50001).table(&std).is_err());
    assert!(L1Entry(0x50200).table(&std).is_err());
    assert!(RefcountTableEntry(0x50200).block(&std).is_err());
}

#[test]
fn units_touched_are_those_of_the_bytes() {
    let g = geometry(true, false); // subclusters of 2 KiB
    assert_eq!(g.units_touched(0, 1), 1);
    assert_eq!(g.units_touched(2047, 2049), 3);
    assert_eq!(g.units_touched(0, 65536), u32::MAX);
    assert_eq!(g.units_touched(65535, 65536), 1 << 31);
    assert_eq!(geometry(false, false).units_touched(5, 65536), 1);
}

#[test]
fn refcounts_of_all_widths_are_independent() {
    for order in 0..=6 {
        let max = u64::MAX >> (64 - (1u32 << order));
        let count = (64 * 8) >> order;
        let mut block = vec![0u8; 64];
        for index in 0..count {
            set_refcount(&mut block, index, order, max);
            assert_eq!(refcount(&block, index, order), max);
            for other in 0..count {
                assert_eq!(refcount(&block, other, order) != 0, other <= index, "width 2^{order}");
            }
        }
        set_refcount(&mut block, 3, order, 1);
        assert_eq!(refcount(&block, 3, order), 1);
        assert_eq!(refcount(&block, 2, order), max);
    }
    // One bit wide: the first refcount is the lowest bit of the first byte.
    assert_eq!(refcount(&[0b10], 1, 0), 1);
    assert_eq!(refcount(&[0x12, 0x34], 0, 4), 0x1234);
}
