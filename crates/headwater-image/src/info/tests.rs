//! Tests of what is told about images, compared with qemu-img.

use super::*;
use crate::open::ProtocolOptions;
use futures_util::FutureExt;
use headwater_block::memory::MemoryNode;
use headwater_block::{LocalFuture, Node};
use serde_json::Value;
use std::future::ready;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

struct Copies;

impl ProtocolOpener for Copies {
    fn open<'a>(&'a self, name: &'a str, _: ProtocolOptions) -> LocalFuture<'a, Result<Rc<dyn Node>>> {
        let node = std::fs::read(name).map_err(|err| Error::from_io(err, format!("open {name}")));
        Box::pin(ready(node.map(|bytes| MemoryNode::new(name, bytes) as Rc<dyn Node>)))
    }
}

fn run(dir: &Path, args: &[&str]) -> String {
    let out = Command::new("qemu-img").args(args).current_dir(dir).output().expect("qemu-img runs");
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn info(path: &Path) -> Result<ChainInfo> {
    chain_info(path.to_str().unwrap(), &OpenOptions::default(), &Copies)
        .now_or_never()
        .expect("memory never waits")
}

#[test]
fn the_json_is_that_of_qemu_img() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    std::fs::write(dir.join("base.raw"), vec![1; 100 << 10]).unwrap();
    let create = ["create", "-q", "-f", "qcow2"];
    let images: [(&str, &[&str]); 4] = [
        ("mid.qcow2", &["-o", "compat=0.10", "-b", "base.raw", "-F", "raw"]),
        (
            "top.qcow2",
            &["-o", "extended_l2=on,compression_type=zstd,refcount_bits=8", "-b", "mid.qcow2", "-F", "qcow2"],
        ),
        ("lazy.qcow2", &["-o", "lazy_refcounts=on,cluster_size=4k"]),
        ("data.qcow2", &["-o", "data_file=data.raw,data_file_raw=on"]),
    ];
    for (name, options) in images {
        run(&dir, &[&create, options, &[name, "1M"]].concat());
    }
    run(&dir, &["snapshot", "-c", "first one", "lazy.qcow2"]);
    run(&dir, &["snapshot", "-c", "second", "lazy.qcow2"]);
    for name in ["mid.qcow2", "top.qcow2", "lazy.qcow2", "data.qcow2", "base.raw"] {
        let path = dir.join(name);
        let found = info(&path).unwrap();
        assert!(found.failure.is_none());
        let theirs = run(&dir, &["info", "--backing-chain", "--output=json", path.to_str().unwrap()]);
        let theirs: Value = serde_json::from_str(&theirs).unwrap();
        let ours = serde_json::to_value(&found.images).unwrap();
        let ours = ours.as_array().unwrap();
        assert_eq!(ours.len(), theirs.as_array().unwrap().len());
        for (ours, theirs) in ours.iter().zip(theirs.as_array().unwrap()) {
            compare(name, ours, theirs);
        }
    }
}

/// Everything that headwater tells, QEMU tells as well.
fn compare(what: &str, ours: &Value, theirs: &Value) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            for (key, value) in ours {
                let what = format!("{what}: {key}");
                compare(&what, value, theirs.get(key).unwrap_or(&Value::Null));
            }
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            assert_eq!(ours.len(), theirs.len(), "{what}");
            ours.iter().zip(theirs).for_each(|(ours, theirs)| compare(what, ours, theirs));
        }
        _ => assert_eq!(ours, theirs, "{what}"),
    }
}

#[test]
fn a_broken_chain_is_shown_as_far_as_it_goes() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.raw"), b"x").unwrap();
    run(dir.path(), &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2", "1M"]);
    std::fs::remove_file(dir.path().join("base.raw")).unwrap();
    let found = info(&dir.path().join("top.qcow2")).unwrap();
    assert_eq!(found.images.len(), 1);
    assert_eq!(found.images[0].backing_filename.as_deref(), Some("base.raw"));
    assert!(found.failure.unwrap().to_string().contains("base.raw"));
    assert!(info(&dir.path().join("gone.qcow2")).is_err());
}
