//! Tests of check and repair, with qemu-img as the second opinion.

use super::*;
use futures_util::FutureExt;
use headwater_block::memory::MemoryNode;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::path::Path;
use std::process::Command;

mod cuts;
mod fuzz;

/// The result of a future that never has to wait, as those over memory.
fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("memory never waits")
}

/// Checks the image in `bytes` and returns the report, and the image as it is afterwards.
fn check_bytes(bytes: Vec<u8>, repair: Repair, memory: u64) -> (Result<CheckReport>, Vec<u8>) {
    let file = MemoryNode::new("disk.qcow2", bytes);
    let report = now(check(file.clone(), CheckOptions { repair, memory }));
    (report, file.contents())
}

/// The report on an image that can be checked.
fn report_on(bytes: &[u8]) -> CheckReport {
    check_bytes(bytes.to_vec(), Repair::None, 1 << 20).0.unwrap()
}

/// Runs a program that must succeed.
fn run(dir: &Path, program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).current_dir(dir).output().expect(program);
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// What qemu-img says of an image: the exit code, and the numbers of leaks and corruptions (0, 0 if it could not tell).
fn qemu_verdict(dir: &Path, name: &str) -> (i32, u64, u64) {
    let out = Command::new("qemu-img")
        .args(["check", "--output=json", name])
        .current_dir(dir)
        .output()
        .expect("qemu-img");
    let text = String::from_utf8_lossy(&out.stdout);
    let number = |key: &str| {
        let rest = text.split(&format!("\"{key}\": ")).nth(1).unwrap_or("0");
        rest.split(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).unwrap_or(0)
    };
    (out.status.code().unwrap_or(-1), number("leaks"), number("corruptions"))
}

/// Images with everything that a check must understand, made by QEMU: (name, bytes).
fn samples(dir: &Path) -> Vec<(&'static str, Vec<u8>)> {
    let kinds: [(&'static str, &str, &[&str]); 14] = [
        ("plain", "cluster_size=4k", &[]),
        ("tiny", "cluster_size=512,refcount_bits=64", &[]),
        ("one-bit", "refcount_bits=1", &[]),
        ("two-bits", "refcount_bits=2,cluster_size=4k", &["snapshot", "snapshot"]),
        ("wide", "refcount_bits=32,cluster_size=2k", &["snapshot"]),
        ("old", "compat=0.10,cluster_size=4k", &["snapshot"]),
        ("subclusters", "extended_l2=on,cluster_size=16k", &[]),
        ("subclusters and more", "extended_l2=on,cluster_size=32k", &["packed", "snapshot", "bitmap"]),
        ("snapshots", "cluster_size=8k", &["snapshot", "snapshot"]),
        ("bitmaps", "cluster_size=4k", &["bitmap"]),
        ("many bitmaps", "cluster_size=4k", &["bitmap", "disabled", "merged", "snapshot", "bitmap"]),
        ("packed", "cluster_size=16k", &["packed", "snapshot", "packed"]),
        ("zstd", "cluster_size=64k,compression_type=zstd", &["packed", "snapshot"]),
        ("data file", "cluster_size=4k,data_file=external.raw", &["bitmap"]),
    ];
    let mut made = Vec::new();
    for (name, options, extras) in kinds {
        let file = format!("{name}.qcow2");
        run(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, &file, "20M"]);
        let mut commands = vec!["write -P 1 0 300k".to_owned(), "write -P 2 5M 1M".to_owned()];
        commands.push("write -z 6M 200k".to_owned());
        commands.push("discard 5100k 100k".to_owned());
        for i in 0..10 {
            commands.push(format!("write -P 3 {}k 3k", i * 1777));
        }
        if !["tiny", "one-bit", "two-bits", "data file"].contains(&name) {
            commands.push("write -c -P 4 10M 64k".to_owned());
        }
        qemu_io(dir, &file, &commands);
        for (i, extra) in extras.iter().enumerate() {
            let bitmap = format!("bits {i}");
            match *extra {
                "snapshot" => run(dir, "qemu-img", &["snapshot", "-c", &format!("snapshot {i}"), &file]),
                "bitmap" => run(dir, "qemu-img", &["bitmap", "--add", "-g", "4k", &file, &bitmap]),
                "disabled" => run(dir, "qemu-img", &["bitmap", "--add", "--disable", &file, &bitmap]),
                "merged" => run(dir, "qemu-img", &["bitmap", "--merge", "bits 0", &file, "bits 1"]),
                _ => {
                    let packed = (0..8).map(|n| format!("write -c -P {n} {}k 64k", 16640 + 512 * i + 64 * n));
                    qemu_io(dir, &file, &packed.collect::<Vec<_>>());
                }
            }
            qemu_io(
                dir,
                &file,
                &[format!("write -P 9 {}k 150k", 100 + i * 50), "write -P 8 15M 64k".to_owned()],
            );
        }
        made.push((name, std::fs::read(dir.join(&file)).unwrap()));
    }
    made
}

fn qemu_io(dir: &Path, file: &str, commands: &[String]) {
    let mut args = Vec::new();
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(file);
    run(dir, "qemu-io", &args);
}

#[test]
fn sound_images_are_found_sound_and_measured_as_qemu_does() {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in samples(dir.path()) {
        let report = report_on(&bytes);
        assert!(report.is_clean(), "{name}: {report:#?}");
        let in_windows = check_bytes(bytes, Repair::None, 0).0.unwrap();
        assert_eq!(report, in_windows, "{name}");
        let file = format!("{name}.qcow2");
        let out = Command::new("qemu-img")
            .args(["check", "--output=json", &file])
            .current_dir(dir.path())
            .output()
            .unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        for (key, value) in [
            ("image-end-offset", report.image_end),
            ("total-clusters", report.total_clusters),
            ("allocated-clusters", report.allocated_clusters),
            ("compressed-clusters", report.compressed_clusters),
            ("fragmented-clusters", report.fragmented_clusters),
        ] {
            let said = text.contains(&format!("\"{key}\": {value}"));
            assert!(said || value == 0 && !text.contains(key), "{name}: {key} {value} in {text}");
        }
    }
}

#[test]
fn a_cluster_that_leaked_a_reference_may_be_written_in_place_again() {
    use crate::qcow2::create::{CreateOptions, create};
    use crate::qcow2::{Children, Qcow2Node, Qcow2Options};
    let file = MemoryNode::new("disk.qcow2", Vec::new());
    now(create(&*file, &CreateOptions::new(1 << 20))).unwrap();
    let node = now(Qcow2Node::open(file.clone(), Children::default(), Qcow2Options::default())).unwrap();
    let data = headwater_block::Buffer::copy_of(&[7; 65536]);
    now(node.write(0, data, headwater_block::WriteFlags::default())).unwrap();
    now(node.close()).unwrap();
    // What a snapshot leaves that was deleted half-way: the entry has no flag, and the count is one too high.
    let mut bytes = file.contents();
    let (block, l2, data) = (2 << 16, 4 << 16, 5);
    assert_eq!(bytes[l2], 0x80);
    bytes[l2] = 0;
    bytes[block + 2 * data + 1] = 2;
    let report = report_on(&bytes);
    assert_eq!((report.corruptions, report.leaks), (0, 1), "{report:#?}");
    let (repaired, bytes) = check_bytes(bytes, Repair::Leaks, 1 << 20);
    assert!(repaired.unwrap().is_clean());
    assert!(report_on(&bytes).is_clean());
    assert_eq!(bytes[l2], 0x80);
}

#[test]
fn a_short_table_right_behind_a_file_of_odd_length_is_not_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let samples = samples(dir.path());
    let (_, whole) = samples.iter().find(|(name, _)| *name == "plain").unwrap();
    // The L1 table moves to the cluster behind the end. A repair that takes it to be there would put new refcounts in its place.
    let mut bytes = whole[..whole.len() - 100].to_vec();
    bytes[40..48].copy_from_slice(&(whole.len() as u64).to_be_bytes());
    bytes[36..40].copy_from_slice(&1u32.to_be_bytes());
    bytes[24..32].copy_from_slice(&(1u64 << 20).to_be_bytes());
    let report = report_on(&bytes);
    assert!(report.findings.iter().any(|f| f.message.contains("L1 table, 8 bytes")), "{report:#?}");
    let (after, repaired) = check_bytes(bytes.clone(), Repair::All, 1 << 20);
    assert_eq!(after.unwrap().corruptions, report.corruptions);
    assert!(repaired[..bytes.len()] == bytes, "a repair changed what it can't follow");
}
