//! Damaged images: bytes of metadata are changed at random, and the verdict is compared with qemu-img's.
//!
//! The verdicts must be of the same kind: sound, leaks only, corrupt. Where they differ on purpose, [`may_differ`] says how and why.

use super::*;

/// How many damaged images are tried unless the environment says otherwise.
const SEEDS: u64 = 80;

/// The regions of an image that hold metadata, (offset, length) in bytes.
fn metadata(bytes: &[u8]) -> Vec<(u64, u64)> {
    let file: Rc<dyn Node> = MemoryNode::new("disk.qcow2", bytes.to_vec());
    let check = now(Check::start(&file, "disk.qcow2", CheckOptions::default())).unwrap();
    let cluster = check.geometry.cluster_size();
    // Only a part of the header cluster is used.
    let mut regions: Vec<_> =
        check.layout.sole.iter().map(|r| (r.offset, if r.offset == 0 { 112 } else { r.len })).collect();
    regions.extend(check.layout.blocks.iter().filter(|block| **block != 0).map(|block| (*block, cluster)));
    regions.extend(check.layout.l2.iter().map(|l2| (l2.offset, cluster)));
    regions.extend(check.layout.bitmap_tables.iter().map(|t| (t.offset, t.entries * 8)));
    regions
}

/// Changes a few bytes of metadata, preferably some that aren't zero.
fn damage(rng: &mut StdRng, bytes: &mut [u8], regions: &[(u64, u64)]) -> String {
    let mut log = String::new();
    for _ in 0..rng.random_range(1..=3) {
        let (offset, len) = regions[rng.random_range(0..regions.len())];
        let mut at = offset + rng.random_range(0..len);
        for _ in 0..200 {
            if bytes[at as usize] != 0 {
                break;
            }
            at = offset + rng.random_range(0..len);
        }
        let old = bytes[at as usize];
        let new = match rng.random_range(0..4) {
            0 => 0,
            1 => old ^ 1 << rng.random_range(0..8),
            2 => old.wrapping_add(1),
            _ => rng.random(),
        };
        bytes[at as usize] = new;
        log += &format!("{at:#x} (in {offset:#x}+{len}): {old:#x} -> {new:#x}; ");
    }
    log
}

/// What the exit code would be.
fn verdict(report: &CheckReport) -> i32 {
    match (report.corruptions, report.leaks) {
        (0, 0) => 0,
        (0, _) => 3,
        _ => 2,
    }
}

/// True if the verdict may be another one than `qemu`, that of qemu-img.
fn may_differ(qemu: i32, report: &CheckReport, clusters: u64) -> bool {
    match (qemu, verdict(report)) {
        // QEMU gives up at the first thing wrong with bitmaps or snapshots, and doesn't look at the rest. Headwater does.
        (1, 2 | 3) => true,
        // QEMU doesn't look at counts of clusters behind the end of the file, nor at several things that don't change a count.
        (0 | 3, 2 | 3) => report.findings.iter().all(|finding| {
            let text = &finding.message;
            let behind = text.strip_prefix("cluster ").and_then(|rest| rest.split(' ').next()?.parse().ok());
            finding.severity == Severity::Leak && (qemu == 3 || behind.is_some_and(|n: u64| n >= clusters))
                || [
                    // It notices overlaps only where counts differ.
                    "lie in the same place",
                    "marked both as data and as zeroes",
                    "which version 2 doesn't have",
                    "subcluster",
                    "bitmap",
                    "snapshot",
                ]
                .iter()
                .any(|kind| text.contains(kind))
        }),
        _ => false,
    }
}

#[test]
fn whatever_qemu_finds_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let samples = samples(dir.path());
    let regions: Vec<_> = samples.iter().map(|(_, bytes)| metadata(bytes)).collect();
    headwater_sim::for_seeds(SEEDS, |seed| {
        let mut rng = StdRng::seed_from_u64(seed);
        let which = rng.random_range(0..samples.len());
        let (name, mut bytes) = samples[which].clone();
        let log = damage(&mut rng, &mut bytes, &regions[which]);
        let what = format!("seed {seed}, {name}, {log}");
        // Every other image is counted in as many windows as possible.
        one(dir.path(), bytes, (seed % 2) << 20, &what);
    });
}

/// Compares verdicts on one image, repairs it, and compares again.
fn one(dir: &Path, bytes: Vec<u8>, memory: u64, what: &str) {
    let path = dir.join("damaged.qcow2");
    std::fs::write(&path, &bytes).unwrap();
    let (code, leaks, corruptions) = qemu_verdict(dir, "damaged.qcow2");
    let qemu = format!("qemu-img: exit {code}, {leaks} leaks, {corruptions} corruptions");
    let report = match check_bytes(bytes.clone(), Repair::None, memory).0 {
        // What can't be opened at all must be something that QEMU refuses or finds damaged, too.
        Err(err) => {
            // The specification wants a multiple of 8; QEMU doesn't care.
            let stricter = err.to_string().contains("header length");
            assert!(stricter || code != 0 && code != 3, "{what}\n{err}\n{qemu}");
            return;
        }
        Ok(report) => report,
    };
    // The last one may be there in part.
    let clusters = bytes.len() as u64 / cluster_size(&bytes) + 1;
    let same = verdict(&report) == code || may_differ(code, &report, clusters);
    assert!(same, "{what}\n{qemu}\n{report:#?}");
    for repair in [Repair::Leaks, Repair::All] {
        let (after, repaired) = check_bytes(bytes.clone(), repair, memory);
        let after = after.unwrap();
        assert!(
            report.corruptions > 0 || after.is_clean(),
            "{what}: leaks are left after {repair:?}: {after:#?}"
        );
        if !after.is_clean() || report.is_clean() {
            continue;
        }
        let before = contents(dir, "damaged.qcow2");
        std::fs::write(dir.join("repaired.qcow2"), repaired).unwrap();
        let verdict = qemu_verdict(dir, "repaired.qcow2");
        // What QEMU refuses to look at (a feature bit that makes no sense, say), it still refuses.
        let expected = if code == 1 && verdict.0 == 1 { verdict } else { (0, 0, 0) };
        assert_eq!(
            verdict, expected,
            "{what}: not sound after {repair:?}\nbefore: {report:#?}\nafter: {after:#?}"
        );
        if before.is_some() {
            assert!(
                before == contents(dir, "repaired.qcow2"),
                "{what}: {repair:?} changed the disk's contents\n{report:#?}"
            );
        }
    }
}

/// The size of clusters that the header of an image tells.
fn cluster_size(bytes: &[u8]) -> u64 {
    1 << bytes[23].clamp(9, 21)
}

/// What the guest reads, if QEMU can read all of it.
fn contents(dir: &Path, image: &str) -> Option<Vec<u8>> {
    let out = Command::new("qemu-img")
        .args(["convert", "-O", "raw", image, "contents.raw"])
        .current_dir(dir)
        .output()
        .expect("qemu-img");
    out.status.success().then(|| std::fs::read(dir.join("contents.raw")).unwrap())
}
