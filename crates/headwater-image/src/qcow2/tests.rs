//! The image as a whole: random operations on random geometries against a flat model, and what other programs say of the result.

mod compressed;
mod faults;
mod model;
mod races;
mod rules;
mod snapshots;

use super::check::{CheckOptions, check};
use super::create::{CreateOptions, Preallocation, create};
use super::header::Compression;
use super::node::{Children, Qcow2Node, Qcow2Options};
use crate::probe::Format;
use headwater_block::memory::MemoryNode;
use headwater_block::{BufferMut, Node};
use headwater_sim::Rng;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

/// The largest disk, in bytes, to begin with.
const MAX_SIZE: u64 = 1 << 20;

/// A random kind of image.
#[derive(Debug, Clone)]
struct Kind {
    create: CreateOptions,
    backing: Option<Vec<u8>>,
    options: Qcow2Options,
}

impl Kind {
    fn random(rng: &Rng) -> Self {
        let version = if rng.one_in(5) { 2 } else { 3 };
        let cluster_bits = *rng.pick(&[9, 9, 10, 11, 12, 12, 14, 14, 16, 16, 17, 21]);
        let cluster_size = 1u64 << cluster_bits;
        let clusters = 200;
        // Small clusters get more of them, so that tables grow; sizes end anywhere in a cluster.
        let size = rng.range(1..(clusters * cluster_size / 512 + 2).min(MAX_SIZE / 512)) * 512;
        let mut create = CreateOptions::new(size);
        create.version = version;
        create.cluster_size = cluster_size;
        if version == 3 {
            create.refcount_bits = 1 << rng.range(0..7);
            create.compression = *rng.pick(&[Compression::Zlib, Compression::Zstd]);
            create.extended_l2 = cluster_bits >= 14 && rng.one_in(2);
        }
        let backing = rng.one_in(2).then(|| random_backing(rng, size));
        if backing.is_some() {
            create.backing = Some(("base.raw".into(), Format::Raw));
        }
        if (backing.is_none() || create.extended_l2) && rng.one_in(4) {
            create.preallocation = Preallocation::Metadata;
        }
        let cache_size = *rng.pick(&[0, 64 << 10, 32 << 20]);
        Self { create, backing, options: Qcow2Options { cache_size, ..Qcow2Options::default() } }
    }

    fn backing_node(&self) -> Option<Rc<dyn Node>> {
        let bytes = self.backing.clone()?;
        let node = MemoryNode::new("base.raw", bytes);
        node.set_read_only(true);
        Some(node)
    }

    fn children(&self) -> Children {
        Children { data_file: None, backing: self.backing_node() }
    }

    /// What the disk reads as when it is new.
    fn content(&self) -> Vec<u8> {
        let mut content = self.backing.clone().unwrap_or_default();
        content.resize(self.create.size as usize, 0);
        content
    }
}

/// Data with holes, of a size that is smaller or larger than the overlay's, or the same.
fn random_backing(rng: &Rng, size: u64) -> Vec<u8> {
    let len = match rng.range(0..3) {
        0 => size,
        1 => rng.range(1..size / 512 + 1) * 512,
        _ => size + rng.range(0..200) * 512,
    };
    let mut bytes = vec![0; len as usize];
    for chunk in bytes.chunks_mut(3000) {
        if !rng.one_in(3) {
            chunk.fill(rng.range(1..256) as u8);
        }
    }
    bytes
}

async fn read_all(node: &dyn Node) -> Vec<u8> {
    let size = node.size() as usize;
    let mut all = Vec::with_capacity(size);
    while all.len() < size {
        let len = (size - all.len()).min(1 << 20);
        all.extend_from_slice(&node.read(all.len() as u64, BufferMut::new(len)).await.unwrap());
    }
    all
}

#[track_caller]
fn assert_same(got: &[u8], expected: &[u8], what: &str) {
    if got == expected {
        return;
    }
    if let Some(at) = (0..expected.len().max(got.len())).find(|at| got.get(*at) != expected.get(*at)) {
        panic!("{what}: byte {at} is {:?}, not {:?}", got.get(at), expected.get(at));
    }
}

/// Our own check finds no error, and no leak if there must be none.
async fn check_clean(file: Rc<dyn Node>, leaks_allowed: bool, what: &str) {
    let report = check(file, CheckOptions::default()).await.unwrap();
    assert!(report.corruptions == 0 && (leaks_allowed || report.leaks == 0), "{what}: {report:?}");
}

fn qemu_img(dir: &Path, args: &[&str]) -> (bool, String) {
    let out = Command::new("qemu-img").current_dir(dir).args(args).output().expect("qemu-img is installed");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.success(), text)
}

/// qemu-img finds neither error nor leak, and reads what `content` says.
fn check_with_qemu(kind: &Kind, image: &[u8], content: &[u8], what: &str) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("image.qcow2"), image).unwrap();
    std::fs::write(dir.path().join("model.raw"), content).unwrap();
    if let Some(backing) = &kind.backing {
        std::fs::write(dir.path().join("base.raw"), backing).unwrap();
    }
    let (ok, text) = qemu_img(dir.path(), &["check", "-f", "qcow2", "image.qcow2"]);
    assert!(ok, "{what}: qemu-img check: {text}");
    let (ok, text) =
        qemu_img(dir.path(), &["compare", "-f", "qcow2", "-F", "raw", "image.qcow2", "model.raw"]);
    assert!(ok, "{what}: qemu-img compare: {text}");
}

async fn open(kind: &Kind, file: Rc<dyn Node>) -> Rc<Qcow2Node> {
    Qcow2Node::open(file, kind.children(), kind.options).await.unwrap()
}
