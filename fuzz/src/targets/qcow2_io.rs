//! Sound qcow2 images of every geometry, with compressed clusters of whatever bytes, in the hands of a guest.
//!
//! Input: three bytes that choose the geometry, the disk's size in sectors (2 bytes), the number of compressed clusters (1 byte), for each where
//! it is (1 byte), how long (2 bytes) and its bytes; then the guest's program (see `guest`).
//!
//! Asserted: the image is clean before, and what `guest` asserts of sound images. A cluster that zlib or zstd can unpack by themselves reads as what they
//! say.

use super::guest::Guest;
use super::image::{created, now};
use crate::Target;
use crate::capped::CappedNode;
use arbitrary::{Result, Unstructured};
use headwater_image::Format;
use headwater_image::qcow2::Qcow2Options;
use headwater_image::qcow2::check::{CheckOptions, Repair, check};
use headwater_image::qcow2::create::CreateOptions;
use headwater_image::qcow2::header::Compression;
use std::io::Read;

/// See the module.
pub const TARGET: Target = Target { name: "qcow2_io", run, seeds, max_len: 4096 };

/// The largest disk, in bytes.
const MAX_SIZE: u64 = 256 << 10;

fn run(data: &[u8]) {
    // The input ends where it ends.
    let _ = attempt(&mut Unstructured::new(data));
}

fn attempt(input: &mut Unstructured<'_>) -> Result<()> {
    let (kind, options) = kind(input)?;
    let mut image = created(&kind);
    let count = input.arbitrary::<u8>()? % 4;
    let mut packed = Vec::new();
    for _ in 0..count {
        let (place, len): (u8, u16) = (input.arbitrary()?, input.arbitrary()?);
        let most = (2 * kind.cluster_size) as usize;
        let bytes = input.bytes(usize::from(len).min(most).min(input.len()))?;
        // There are none where the data are in another file.
        if !bytes.is_empty() && kind.data_file.is_none() {
            packed.push((u64::from(place) % kind.size.div_ceil(kind.cluster_size), bytes));
        }
    }
    for (cluster, bytes) in &packed {
        put_compressed(&mut image, &kind, *cluster, bytes);
    }
    if !packed.is_empty() {
        image = counted(image);
    }
    let mut guest = Guest::open(image, options).expect("a sound image opens");
    assert!(guest.is_sound(), "what was made isn't sound");
    for (cluster, _) in &packed {
        // The last one with the same place counts.
        let Some((_, bytes)) = packed.iter().rev().find(|(other, _)| other == cluster) else { continue };
        if let Some(expected) = unpacked(kind.compression, bytes, kind.cluster_size as usize) {
            let at = cluster * kind.cluster_size;
            let len = (kind.size - at).min(kind.cluster_size) as usize;
            guest.expect(at, &expected[..len]);
        }
    }
    guest.act(input)?;
    guest.close();
    Ok(())
}

/// What kind of image, and how it is opened.
fn kind(input: &mut Unstructured<'_>) -> Result<(CreateOptions, Qcow2Options)> {
    let (shape, width, more): (u8, u8, u8) = (input.arbitrary()?, input.arbitrary()?, input.arbitrary()?);
    let sectors: u16 = input.arbitrary()?;
    let cluster_bits = [9, 9, 10, 11, 12, 13, 14, 16][usize::from(shape & 7)];
    let version = if shape & 0x18 == 0x18 { 2 } else { 3 };
    let size = 512 * u64::from(sectors).clamp(1, MAX_SIZE / 512);
    let mut kind = CreateOptions { cluster_size: 1 << cluster_bits, version, ..CreateOptions::new(size) };
    if version == 3 {
        kind.refcount_bits = 1 << (width % 7);
        kind.extended_l2 = cluster_bits >= 14 && shape & 0x20 != 0;
        if shape & 0x40 != 0 {
            kind.compression = Compression::Zstd;
        }
        if more & 1 != 0 {
            kind.data_file = Some("data.raw".to_owned());
        }
    }
    if shape & 0x80 != 0 {
        kind.backing = Some(("base.raw".to_owned(), Format::Raw));
    }
    let cache_size = [0, 4096, 64 << 10, Qcow2Options::DEFAULT_CACHE_SIZE][usize::from(more >> 1 & 3)];
    Ok((kind, Qcow2Options { read_only: more & 0xc0 == 0xc0, cache_size, ..Qcow2Options::default() }))
}

/// Puts a compressed cluster at the end of the image, without counting the reference.
fn put_compressed(image: &mut Vec<u8>, kind: &CreateOptions, cluster: u64, bytes: &[u8]) {
    let unit = kind.cluster_size as usize;
    let entry_size = if kind.extended_l2 { 16 } else { 8 };
    let per_table = unit as u64 / entry_size;
    image.resize(image.len().next_multiple_of(unit), 0);
    let l1_entry = be64(image, 40) as usize + (cluster / per_table) as usize * 8;
    let mut table = (be64(image, l1_entry) & 0x00ff_ffff_ffff_fe00) as usize;
    if table == 0 {
        table = image.len();
        image.resize(table + unit, 0);
        put64(image, l1_entry, table as u64 | 1 << 63);
    }
    let data = image.len();
    image.extend_from_slice(bytes);
    image.resize(image.len().next_multiple_of(512), 0);
    let sectors = (image.len() - data) as u64 / 512;
    let offset_bits = 62 - (kind.cluster_size.trailing_zeros() - 8);
    let entry = 1 << 62 | (sectors - 1) << offset_bits | data as u64;
    put64(image, table + (cluster % per_table * entry_size) as usize, entry);
    image.resize(image.len().next_multiple_of(unit), 0);
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// The image with all references counted.
fn counted(image: Vec<u8>) -> Vec<u8> {
    let file = CappedNode::new("fuzzed.qcow2", image);
    let options = CheckOptions { repair: Repair::All, ..CheckOptions::default() };
    let report = now(check(file.clone(), options)).expect("only references aren't counted");
    assert!(report.is_clean(), "references that aren't counted can't be repaired: {report:#?}");
    file.contents()
}

/// What a cluster holds, said by others; `None` unless it is just one cluster.
fn unpacked(compression: Compression, bytes: &[u8], cluster_size: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; 2 * cluster_size];
    let len = match compression {
        Compression::Zlib => {
            let mut stream = flate2::Decompress::new(false);
            let status = stream.decompress(bytes, &mut out, flate2::FlushDecompress::Finish).ok()?;
            if status != flate2::Status::StreamEnd {
                return None;
            }
            stream.total_out() as usize
        }
        Compression::Zstd => zstd::bulk::decompress_to_buffer(bytes, &mut out).ok()?,
    };
    out.truncate(len);
    (len == cluster_size).then_some(out)
}

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (shape, width, more) in [
        (0u8, 4u8, 6u8),
        (0x80, 0, 0),
        (0x98, 4, 2),
        (0x42, 6, 6),
        (0xc4, 3, 4),
        (0x26, 4, 6),
        (0xe7, 5, 0),
        (0x83, 4, 1),
    ] {
        let cluster = 1usize << [9, 9, 10, 11, 12, 13, 14, 16][usize::from(shape & 7)];
        let content: Vec<u8> = (0..cluster).map(|at| (at / 100) as u8).collect();
        let packed = if shape & 0x40 != 0 {
            zstd::bulk::compress(&content, 1).unwrap_or_default()
        } else {
            let mut encoder =
                flate2::read::DeflateEncoder::new(content.as_slice(), flate2::Compression::fast());
            let mut packed = Vec::new();
            encoder.read_to_end(&mut packed).map(|_| packed).unwrap_or_default()
        };
        let mut seed = vec![shape, width, more, 100, 0, 2];
        for place in [2, 9] {
            seed.push(place);
            seed.extend_from_slice(&(packed.len() as u16).to_le_bytes());
            seed.extend_from_slice(&packed);
        }
        for step in 0..16u8 {
            seed.extend_from_slice(&[
                step,
                step.wrapping_mul(97),
                step * 3,
                0,
                0,
                step.wrapping_mul(41),
                step / 2,
                step,
            ]);
        }
        seeds.push(seed);
    }
    seeds
}
