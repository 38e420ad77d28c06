//! The codecs of qcow2 images and the recognition of formats.
//!
//! Input: the first cluster of an image.
//!
//! Asserted: a header that is accepted survives encoding, laid out afresh and as it was; a list of extensions does, too; entries of tables,
//! which are taken from the same bytes, survive it in every geometry.

use crate::Target;
use headwater_image::qcow2::create::CreateOptions;
use headwater_image::qcow2::entry::{
    Geometry, HostOffset, L1Entry, L2Entry, RefcountTableEntry, refcount, set_refcount,
};
use headwater_image::qcow2::extensions;
use headwater_image::qcow2::header::{Compression, Header};
use headwater_image::{Format, probe};

/// See the module.
pub const TARGET: Target = Target { name: "qcow2_header", run, seeds, max_len: 4096 };

const NAME: &str = "fuzzed.qcow2";

fn run(data: &[u8]) {
    match probe::probe(data, NAME) {
        Ok(Format::Qcow2) => assert!(data.starts_with(b"QFI\xfb")),
        Ok(Format::Raw) => assert!(!data.starts_with(b"QFI\xfb")),
        Err(error) => assert!(error.to_string().contains(NAME)),
    }
    match Header::parse(data, NAME) {
        Ok(header) => check_header(data, header),
        Err(error) => assert!(error.to_string().contains(NAME), "{error} doesn't name the image"),
    }
    if let Ok((list, end)) = extensions::parse(data, 0, data.len(), NAME) {
        assert!(end <= data.len());
        let bytes = extensions::encode(&list);
        let (again, end) = extensions::parse(&bytes, 0, bytes.len(), NAME).expect("what was encoded");
        assert_eq!((again, end), (list, bytes.len()));
    }
    check_entries(data);
}

fn check_header(data: &[u8], header: Header) {
    let fixed = header.encode_fixed();
    assert_eq!(fixed.len(), header.header_length);
    // The flags of version 2, and the padding, may hold anything; the rest is as it was.
    let known = fixed.len().min(72).min(data.len());
    assert!(fixed[..8] == data[..8] && fixed[16..known] == data[16..known], "the header changed");
    let mut encoded = header.clone();
    if let Ok(bytes) = encoded.encode() {
        let again = Header::parse(&bytes, NAME).expect("what was encoded");
        assert_eq!(again, encoded);
        assert_eq!(again.backing_name, header.backing_name);
        assert_eq!(again.extensions, header.extensions);
        assert_eq!(again.backing_format(), header.backing_format());
    }
}

/// Takes the bytes for entries of tables of every kind.
fn check_entries(data: &[u8]) {
    let mut words = data.chunks_exact(8).take(64).map(|word| word.try_into().map_or(0, u64::from_be_bytes));
    let (Some(kind), mut previous) = (words.next(), 0) else { return };
    let geometry = Geometry {
        version: 2 + (kind & 1) as u32,
        cluster_bits: 9 + (kind >> 8) as u32 % 13,
        refcount_order: (kind >> 16) as u32 % 7,
        extended_l2: kind & 2 != 0,
        data_file: kind & 4 != 0,
    };
    // Subclusters need clusters of 16 KiB, and version 3.
    let geometry = Geometry {
        extended_l2: geometry.extended_l2 && geometry.cluster_bits >= 14 && geometry.version == 3,
        ..geometry
    };
    let mask = geometry.cluster_size() - 1;
    for word in words {
        if let Ok(Some(HostOffset(offset))) = L1Entry(word).table(&geometry) {
            assert!(offset & mask == 0 && offset < 1 << 56);
            let again = L1Entry::new(HostOffset(offset));
            assert!(again.is_copied() && again.table(&geometry) == Ok(Some(HostOffset(offset))));
        }
        if let Ok(Some(HostOffset(offset))) = RefcountTableEntry(word).block(&geometry) {
            assert_eq!(offset & mask, 0);
        }
        let bitmap = if geometry.extended_l2 { previous } else { 0 };
        match L2Entry::decode(word, bitmap, &geometry) {
            Ok(entry @ L2Entry::Standard(cluster)) => {
                let (first, second) = entry.encode(&geometry);
                assert_eq!(L2Entry::decode(first, second, &geometry), Ok(entry));
                assert!(cluster.data & cluster.zero == 0);
                assert!((cluster.data | cluster.zero) & !geometry.all_units() == 0);
                assert!(cluster.host.is_none_or(|host| host.0 & mask == 0));
            }
            Ok(L2Entry::Compressed { offset, len }) => {
                assert!(!geometry.data_file && offset.0 > 0 && offset.0 < 1 << 56);
                assert!(len > 0 && len <= 2 * geometry.cluster_size().max(512));
            }
            Err(_) => {}
        }
        previous = word;
    }
    let mut block = data.to_vec();
    let per_block = (data.len() * 8) >> geometry.refcount_order;
    for index in 0..per_block.min(256) {
        let value = refcount(data, index, geometry.refcount_order);
        assert!(value <= geometry.max_refcount());
        set_refcount(&mut block, index, geometry.refcount_order, value);
    }
    assert!(block == data, "refcounts changed when they were written as they were read");
}

fn seeds() -> Vec<Vec<u8>> {
    let plain = CreateOptions { cluster_size: 4096, ..CreateOptions::new(1 << 20) };
    let kinds = [
        plain.clone(),
        CreateOptions { version: 2, ..plain.clone() },
        CreateOptions { backing: Some(("base.raw".to_owned(), Format::Raw)), ..plain.clone() },
        CreateOptions { data_file: Some("data.raw".to_owned()), refcount_bits: 1, ..plain.clone() },
        CreateOptions { compression: Compression::Zstd, cluster_size: 512, ..plain.clone() },
        CreateOptions { extended_l2: true, cluster_size: 16 << 10, refcount_bits: 64, ..plain },
    ];
    let mut seeds: Vec<_> = kinds.iter().map(super::image::created).collect();
    for seed in &mut seeds {
        seed.truncate(640);
    }
    seeds.push(b"# Disk DescriptorFile".to_vec());
    seeds
}
