//! Tests of preallocated images, with qemu-img and our own check as the judges.

use super::*;
use crate::probe::Format;
use crate::qcow2::check::{CheckOptions, check};
use crate::qcow2::create::{CreateOptions, create};
use crate::qcow2::node::{Children, Qcow2Node, Qcow2Options};
use crate::raw::{RawNode, RawOptions};
use futures_util::FutureExt;
use headwater_block::memory::MemoryNode;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("memory never waits")
}

fn qemu_img(dir: &Path, args: &[&str]) -> String {
    let out = Command::new("qemu-img").args(args).current_dir(dir).output().expect("qemu-img runs");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "qemu-img {args:?}: {text}");
    text
}

fn read(node: &dyn Node) -> Vec<u8> {
    now(node.read(0, BufferMut::new(node.size() as usize))).unwrap().to_vec()
}

#[test]
fn the_tables_map_the_whole_disk_and_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new.qcow2");
    for (cluster_bits, version, refcount_bits, extended_l2) in
        [(9, 2, 16, false), (9, 3, 64, false), (16, 3, 16, false), (14, 3, 16, true), (21, 3, 1, false)]
    {
        for size in [0, 512, (1 << 20) + 512] {
            for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
                if preallocation != Preallocation::Metadata && cluster_bits != 16 {
                    continue;
                }
                let options = CreateOptions {
                    cluster_size: 1 << cluster_bits,
                    version,
                    refcount_bits,
                    extended_l2,
                    preallocation,
                    ..CreateOptions::new(size)
                };
                let file = MemoryNode::new("new.qcow2", b"what was here before".repeat(5000));
                now(create(&*file, &options)).unwrap();
                let report = now(check(file.clone(), CheckOptions::default())).unwrap();
                assert_eq!((report.corruptions, report.leaks), (0, 0), "{options:?}: {report:?}");
                if preallocation == Preallocation::Metadata {
                    std::fs::write(&path, file.contents()).unwrap();
                    qemu_img(dir.path(), &["check", "-q", "new.qcow2"]);
                }
                let before = file.contents().len();
                let image =
                    now(Qcow2Node::open(file.clone(), Children::default(), Qcow2Options::default())).unwrap();
                assert!(read(&*image).iter().all(|byte| *byte == 0), "{options:?}: not zeroes");
                if size > 0 && !extended_l2 {
                    let data = vec![7; size as usize];
                    now(image.write(0, headwater_block::Buffer::copy_of(&data), WriteFlags::default()))
                        .unwrap();
                    now(image.flush()).unwrap();
                    assert_eq!(read(&*image), data);
                    assert_eq!(file.contents().len(), before, "{options:?}: writing took new clusters");
                }
                now(image.close()).unwrap();
            }
        }
    }
}

#[test]
fn a_backing_shows_through_subclusters_that_are_only_placed() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.raw"), vec![5; 1 << 20]).unwrap();
    let options = CreateOptions {
        extended_l2: true,
        preallocation: Preallocation::Falloc,
        backing: Some(("base.raw".to_owned(), Format::Raw)),
        ..CreateOptions::new(1 << 20)
    };
    let file = MemoryNode::new("new.qcow2", Vec::new());
    now(create(&*file, &options)).unwrap();
    std::fs::write(dir.path().join("new.qcow2"), file.contents()).unwrap();
    qemu_img(dir.path(), &["check", "-q", "new.qcow2"]);
    qemu_img(dir.path(), &["compare", "-q", "new.qcow2", "base.raw"]);
    let plain = CreateOptions { extended_l2: false, ..options };
    let err = now(create(&*file, &plain)).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::InvalidInput);
    assert!(err.to_string().contains("extended_l2"), "{err}");
}

#[test]
fn a_raw_data_file_is_mapped_and_keeps_what_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let size = (1 << 20) + 512;
    let data = MemoryNode::new("disk.raw", vec![9; 1 << 20]);
    let options = CreateOptions {
        data_file: Some("disk.raw".to_owned()),
        data_file_raw: true,
        lazy_refcounts: true,
        ..CreateOptions::new(size)
    };
    let file = MemoryNode::new("new.qcow2", Vec::new());
    now(create(&*file, &options)).unwrap();
    now(set_size(&*data, size, options.preallocated())).unwrap();
    assert_eq!(data.contents().len() as u64, size);
    std::fs::write(dir.path().join("new.qcow2"), file.contents()).unwrap();
    std::fs::write(dir.path().join("disk.raw"), data.contents()).unwrap();
    qemu_img(dir.path(), &["check", "-q", "new.qcow2"]);
    qemu_img(dir.path(), &["compare", "-q", "-F", "raw", "new.qcow2", "disk.raw"]);
    let info = qemu_img(dir.path(), &["info", "new.qcow2"]);
    for expected in ["data file raw: true", "lazy refcounts: true"] {
        assert!(info.contains(expected), "no {expected} in {info}");
    }
    // It stays one when the disk changes its size.
    let children = Children { data_file: Some(data.clone()), backing: None };
    let image = now(Qcow2Node::open(file, children, Qcow2Options::default())).unwrap();
    for new in [3 << 20, 1 << 19, 1 << 20] {
        now(image.resize(new)).unwrap();
        assert_eq!(read(&*image), data.contents(), "{new}");
    }
}

#[test]
fn what_a_disk_of_fixed_size_held_is_not_shown() {
    for preallocation in
        [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full]
    {
        let memory = MemoryNode::new("device", vec![0xee; 4 << 20]);
        let window = RawOptions { read_only: false, offset: 0, size: Some(4 << 20) };
        let device: Rc<dyn Node> = RawNode::new(memory.clone(), window).unwrap();
        let options = CreateOptions { preallocation, ..CreateOptions::new(1 << 20) };
        now(create(&*device, &options)).unwrap();
        assert_eq!(memory.contents().len(), 4 << 20);
        let image = now(Qcow2Node::open(device, Children::default(), Qcow2Options::default())).unwrap();
        assert!(read(&*image).iter().all(|byte| *byte == 0), "{preallocation:?}");
    }
}

#[test]
fn a_disk_whose_clusters_could_not_be_counted_is_refused() {
    let options = CreateOptions {
        cluster_size: 512,
        refcount_bits: 64,
        preallocation: Preallocation::Metadata,
        ..CreateOptions::new(100 << 30)
    };
    let file = MemoryNode::new("new.qcow2", vec![7; 100]);
    let err = now(create(&*file, &options)).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::InvalidInput);
    assert!(err.to_string().contains("larger clusters"), "{err}");
    assert_eq!(file.contents(), vec![7; 100]);
}
