//! Images that somebody damaged, or made to do harm. Each must end in an error that names the image, soon and in little memory; none may
//! panic, hang, or have its metadata overwritten by a guest's write.

use futures_util::FutureExt;
use headwater_block::memory::MemoryNode;
use headwater_block::{Buffer, BufferMut, Error, ErrorKind, Node, Result, WriteFlags};
use headwater_image::qcow2::check::{CheckOptions, CheckReport, Repair, check};
use headwater_image::qcow2::create::{CreateOptions, create};
use headwater_image::qcow2::header::Compression;
use headwater_image::qcow2::{Children, Qcow2Node, Qcow2Options};
use std::rc::Rc;
use std::time::Duration;

const CLUSTER: usize = 65536;
/// Where the tables of a sound image lie; see [`sound`].
const REFTABLE: usize = CLUSTER;
const REFBLOCK: usize = 2 * CLUSTER;
const L1: usize = 3 * CLUSTER;
const L2: usize = 4 * CLUSTER;
const DATA: usize = 5 * CLUSTER;

/// Flags of table entries.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// The result of a future that never has to wait, as those over memory.
fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("memory never waits")
}

/// An image of 1 MiB with data in its first cluster.
fn sound(options: &CreateOptions) -> Vec<u8> {
    let file = MemoryNode::new("bad.qcow2", Vec::new());
    now(create(&*file, options)).unwrap();
    let node = now(Qcow2Node::open(file.clone(), Children::default(), Qcow2Options::default())).unwrap();
    now(node.write(0, Buffer::copy_of(&[7; CLUSTER]), WriteFlags::default())).unwrap();
    now(node.close()).unwrap();
    let bytes = file.contents();
    assert_eq!(be64(&bytes, L1) & !COPIED, L2 as u64);
    assert_eq!(be64(&bytes, L2) & !COPIED, DATA as u64);
    bytes
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn put(bytes: &mut Vec<u8>, at: usize, value: &[u8]) {
    if bytes.len() < at + value.len() {
        bytes.resize(at + value.len(), 0);
    }
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn put64(bytes: &mut Vec<u8>, at: usize, value: u64) {
    put(bytes, at, &value.to_be_bytes());
}

fn put32(bytes: &mut Vec<u8>, at: usize, value: u32) {
    put(bytes, at, &value.to_be_bytes());
}

/// What happened to an image.
struct Outcome {
    opened: Option<Error>,
    read: Option<Error>,
    written: Option<Error>,
    checked: Result<CheckReport>,
}

/// Opens the image, reads all of it, writes some clusters, and checks the original and, if it was repaired, that it got no worse.
fn try_all(bytes: &[u8]) -> Outcome {
    let file = MemoryNode::new("bad.qcow2", bytes.to_vec());
    let checked = now(check(file.clone(), CheckOptions::default()));
    let repaired = MemoryNode::new("bad.qcow2", bytes.to_vec());
    let _ = now(check(repaired, CheckOptions { repair: Repair::All, ..CheckOptions::default() }));
    let options = Qcow2Options { read_only: true, ..Qcow2Options::default() };
    let (mut read, mut written) = (None, None);
    let opened = match now(Qcow2Node::open(file.clone(), Children::default(), options)) {
        Err(err) => Some(err),
        Ok(node) => {
            read = (0..16).find_map(|i| now(node.read(i * CLUSTER as u64, BufferMut::new(CLUSTER))).err());
            let _ = now(node.status(0..1 << 20));
            None
        }
    };
    if let Ok(node) = now(Qcow2Node::open(file, Children::default(), Qcow2Options::default())) {
        written = [0, 3, 15].into_iter().find_map(|i| {
            now(node.write(
                i * CLUSTER as u64,
                Buffer::copy_of(&[1; CLUSTER]),
                WriteFlags { fua: true, ..WriteFlags::default() },
            ))
            .err()
        });
        let _ = now(node.close());
    }
    Outcome { opened, read, written, checked }
}

/// Fails unless the image is refused or found damaged, in time, with errors that name it and say `expected`.
fn bad(what: &str, expected: &str, bytes: &[u8]) {
    #[expect(clippy::disallowed_methods, reason = "a test of how long it takes")]
    let start = std::time::Instant::now();
    let Outcome { opened, read, written, checked } = try_all(bytes);
    assert!(start.elapsed() < Duration::from_secs(5), "{what}: took {:?}", start.elapsed());
    let mut said = Vec::new();
    for err in [opened, read, written, checked.as_ref().err().cloned()].into_iter().flatten() {
        assert!(err.to_string().contains("bad.qcow2"), "{what}: doesn't name the image: {err}");
        let fits = matches!(
            err.kind(),
            ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::Closed | ErrorKind::ReadOnly
        );
        assert!(fits, "{what}: {err:?}");
        said.push(err.to_string());
    }
    if let Ok(report) = checked {
        said.extend(report.findings.iter().map(|finding| finding.message.clone()));
    }
    assert!(
        said.iter().any(|text| text.contains(expected)),
        "{what}: nobody says {expected:?}, but {said:#?}"
    );
}

/// As [`bad`], after `damage` to a sound image.
fn damaged(what: &str, expected: &str, damage: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = sound(&CreateOptions::new(1 << 20));
    damage(&mut bytes);
    bad(what, expected, &bytes);
}

#[test]
fn truncated_images() {
    let whole = sound(&CreateOptions::new(1 << 20));
    for len in [0, 3, 4, 71, 72] {
        bad(&format!("cut to {len} bytes"), "", &whole[..len]);
    }
    bad("cut after the header", "beyond the end", &whole[..CLUSTER]);
    bad("cut before the L1 table", "beyond the end", &whole[..L1]);
    bad("cut before the L2 table", "past the end", &whole[..L2]);
    bad("cut before the data", "past the end", &whole[..DATA]);
}

#[test]
fn absurd_headers() {
    for version in [0, 1, 4, u32::MAX] {
        damaged("version", "version", |b| put32(b, 4, version));
    }
    for bits in [0, 8, 22, 64, u32::MAX] {
        damaged("cluster bits", "cluster", |b| put32(b, 20, bits));
    }
    for size in [1 << 50, u64::MAX, u64::MAX - 511] {
        damaged("size", "L1 table", |b| put64(b, 24, size));
    }
    for method in [1, 2, 3] {
        damaged("encryption", "encrypt", |b| put32(b, 32, method));
    }
    damaged("gigantic L1 table", "L1 table", |b| put32(b, 36, u32::MAX));
    damaged("an L1 table of 32 MiB that isn't there", "L1 table", |b| put32(b, 36, (32 << 20) / 8));
    for offset in [0, 1, 512, 1 << 60, u64::MAX - 65535] {
        damaged("L1 offset", "L1 table", |b| put64(b, 40, offset));
        damaged("refcount table offset", "refcount table", |b| put64(b, 48, offset));
    }
    for clusters in [0, 1 << 20, u32::MAX] {
        damaged("refcount table size", "refcount table", |b| put32(b, 56, clusters));
    }
    damaged("snapshots", "snapshots", |b| put32(b, 60, u32::MAX));
    damaged("snapshots without a table", "snapshot table", |b| put32(b, 60, 1));
    damaged("snapshots in the header", "snapshot", |b| {
        put32(b, 60, 65536);
        put64(b, 64, CLUSTER as u64);
    });
    damaged("refcount width", "refcount", |b| put32(b, 96, 7));
    for len in [0, 50, 103, 105, u32::MAX] {
        damaged("header length", "header length", |b| put32(b, 100, len));
    }
    damaged("unknown feature", "", |b| put64(b, 72, 1 << 63));
    damaged("compression without its feature", "compression", |b| put(b, 104, &[1]));
    damaged("unknown compression", "compression", |b| {
        put64(b, 72, 1 << 3);
        put(b, 104, &[9]);
    });
    damaged("backing name outside", "backing file", |b| {
        put64(b, 8, 1 << 40);
        put32(b, 16, 10);
    });
    damaged("backing name too long", "backing file", |b| {
        put64(b, 8, 1024);
        put32(b, 16, u32::MAX);
    });
    damaged("backing name that isn't text", "UTF-8", |b| {
        put64(b, 8, 1024);
        put32(b, 16, 4);
        put(b, 1024, &[0xff, 0xfe, 0, 1]);
    });
    damaged("extension without an end", "extension", |b| put32(b, 112 + 4, u32::MAX));
    let clusters = CreateOptions { cluster_size: 4096, ..CreateOptions::new(1 << 20) };
    let file = MemoryNode::new("bad.qcow2", Vec::new());
    now(create(&*file, &clusters)).unwrap();
    let mut bytes = file.contents();
    put64(&mut bytes, 72, 1 << 4);
    bad("subclusters of 128 bytes", "subclusters", &bytes);
}

#[test]
fn tables_that_lead_nowhere_or_in_circles() {
    for (what, to) in [("itself", L1), ("the refcount table", REFTABLE), ("a refcount block", REFBLOCK)] {
        damaged(&format!("an L1 table that leads to {what}"), "same place", |b| {
            put64(b, L1, to as u64 | COPIED)
        });
        damaged(&format!("an L2 table that leads to {what}"), "same place", |b| {
            put64(b, L2, to as u64 | COPIED)
        });
    }
    damaged("an L2 table that leads to itself", "same place", |b| put64(b, L2, L2 as u64 | COPIED));
    damaged("a refcount table that leads to itself", "same place", |b| put64(b, REFTABLE, REFTABLE as u64));
    damaged("a refcount table that leads to the L2 table", "same place", |b| {
        put64(b, REFTABLE + 8, L2 as u64)
    });
    for to in [513, 1 << 40, (1 << 56) - (1 << 16), 0x7f << 56] {
        damaged("an L1 entry", "L1", |b| put64(b, L1, to | COPIED));
        damaged("an L2 entry", "L2", |b| put64(b, L2, to | COPIED));
        damaged("a refcount table entry", "refcount table entry 0", |b| put64(b, REFTABLE, to));
    }
    damaged("an L1 entry that has only its flag", "not where", |b| put64(b, L1, COPIED));
    damaged("every L2 entry leads to the same cluster", "references", |b| {
        for i in 0..CLUSTER / 8 {
            put64(b, L2 + i * 8, DATA as u64 | COPIED);
        }
    });
}

#[test]
fn refcounts_that_lie() {
    // The guest writes to clusters that need allocation; what seems to be free are the header and the tables.
    let mut bytes = sound(&CreateOptions::new(1 << 20));
    bytes[REFBLOCK..L1].fill(0);
    bad("all refcounts are zero", "reference count 0", &bytes);
    let file = MemoryNode::new("bad.qcow2", bytes.clone());
    let node = now(Qcow2Node::open(file.clone(), Children::default(), Qcow2Options::default())).unwrap();
    for i in 1..16 {
        let _ = now(node.write(i * CLUSTER as u64, Buffer::copy_of(&[0xaa; CLUSTER]), WriteFlags::default()));
    }
    let _ = now(node.close());
    let after = file.contents();
    assert_eq!(after[..112], bytes[..112], "the header was overwritten");
    assert_eq!(
        after[DATA..DATA + CLUSTER],
        bytes[DATA..DATA + CLUSTER],
        "the first cluster's data were overwritten"
    );
    for table in [REFTABLE, REFBLOCK, L1, L2] {
        assert!(
            after[table..table + CLUSTER].iter().any(|b| *b != 0xaa),
            "the table at {table:#x} was overwritten"
        );
    }
    let wide = CreateOptions { refcount_bits: 64, ..CreateOptions::new(1 << 20) };
    let mut bytes = sound(&wide);
    put64(&mut bytes, REFBLOCK + 5 * 8, u64::MAX);
    bad("the largest refcount", "reference count 18446744073709551615", &bytes);
}

#[test]
fn compressed_clusters_that_are_none() {
    /// A compressed cluster of `sectors` sectors after the first at `offset`.
    fn descriptor(offset: usize, sectors: u64) -> u64 {
        COMPRESSED | sectors << (62 - 8) | offset as u64
    }
    for (what, data) in [("zeroes", [0; 512]), ("noise", [0xa5; 512]), ("ones", [0xff; 512])] {
        damaged(&format!("compressed {what}"), "compressed", |b| {
            put(b, DATA, &data);
            put64(b, L2, descriptor(DATA, 0));
        });
    }
    damaged("compressed data behind the end", "past the end", |b| put64(b, L2, descriptor(1 << 40, 100)));
    damaged("compressed data at the start", "", |b| put64(b, L2, descriptor(0, 127)));
    // A bomb: deflate's stored zeroes, a thousand times a cluster.
    let mut bomb = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    std::io::Write::write_all(&mut bomb, &vec![0; 1000 * CLUSTER]).unwrap();
    let bomb = bomb.finish().unwrap();
    let mut bytes = sound(&CreateOptions::new(1 << 20));
    put(&mut bytes, DATA, &bomb);
    bytes.resize(DATA + 2 * CLUSTER, 0);
    put64(&mut bytes, L2, descriptor(DATA, 127));
    try_all(&bytes);
    // The same as a zstd frame, and a frame that claims to need a window of 2 GiB.
    let zstd = CreateOptions { compression: Compression::Zstd, ..CreateOptions::new(1 << 20) };
    let bomb = zstd::bulk::compress(&vec![0; 1000 * CLUSTER], 1).unwrap();
    let window = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0x00, 0x00];
    for data in [bomb.as_slice(), &window] {
        let mut bytes = sound(&zstd);
        put(&mut bytes, DATA, data);
        bytes.resize(DATA + 2 * CLUSTER, 0);
        put64(&mut bytes, L2, descriptor(DATA, 127));
        try_all(&bytes);
    }
}

#[test]
fn random_bytes_and_random_damage() {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    let whole = sound(&CreateOptions::new(1 << 20));
    for seed in 0..60 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut bytes = whole.clone();
        for _ in 0..rng.random_range(1..20) {
            // Where the metadata are.
            let region = [0, REFTABLE, REFBLOCK, L1, L2][rng.random_range(0..5)];
            let at = region + rng.random_range(0..if region == 0 { 160 } else { 64 });
            bytes[at] = rng.random();
        }
        if rng.random_bool(0.1) {
            bytes.truncate(rng.random_range(0..bytes.len()));
        }
        // Nothing may panic or hang; what is said is tested elsewhere.
        let node = MemoryNode::new("bad.qcow2", bytes.clone());
        let file: Rc<dyn Node> = node;
        let _ = now(headwater_image::qcow2::header::Header::read(&*file));
        try_all(&bytes);
    }
}

#[test]
fn memory_stays_bounded() {
    // Everything that happens in this process, other tests included.
    truncated_images();
    compressed_clusters_that_are_none();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 512 << 10, "peak memory {kib} KiB");
}
