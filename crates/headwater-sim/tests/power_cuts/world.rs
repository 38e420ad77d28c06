//! The images that a workload begins with: made from its seed, in memory.

use crate::promise::{self, SECTOR, word};
use futures_util::FutureExt;
use headwater_block::memory::MemoryNode;
use headwater_block::{Buffer, BufferMut, Error, Node, WriteFlags, ZeroFlags};
use headwater_image::Format;
use headwater_image::qcow2::create::{CreateOptions, create};
use headwater_image::qcow2::header::{Compression, Header};
use headwater_image::qcow2::{Children, Qcow2Node, Qcow2Options};
use headwater_sim::Rng;
use std::future::Future;
use std::ops::Range;
use std::rc::Rc;

/// What happens to the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Workload {
    /// A guest on an image by itself.
    Alone,
    /// A guest on an image with a backing file, whose link changes now and then.
    Backed,
    /// The same after an internal snapshot was made, which must stay as it was.
    Snapshot,
    /// Internal snapshots are taken and deleted between the guest's requests.
    Snapshots,
    /// Most of what the guest writes is compressed, over a backing file.
    Compressed,
    /// The guest's data are in an external file.
    DataFile,
    /// Clusters of 512 bytes and refcounts of 64 bits, so that both tables grow.
    Growth,
    /// Clusters of 512 bytes on a disk with nothing in it, so that nearly every write needs a new L2 table.
    Sparse,
    /// A stream of everything, which may be cancelled.
    Stream,
    /// A stream of the layers above the base.
    StreamAbove,
    /// A commit of a layer in the middle of a chain into the lowest one.
    Commit,
    /// A commit of the layer that the guest writes to into the one below.
    CommitActive,
}

impl Workload {
    pub(crate) fn has_job(self) -> bool {
        use Workload::{Commit, CommitActive, Stream, StreamAbove};
        matches!(self, Stream | StreamAbove | Commit | CommitActive)
    }

    /// True if what the change with this number writes is compressed.
    pub(crate) fn compresses(self, tag: u64) -> bool {
        match self {
            Workload::Compressed => !tag.is_multiple_of(4),
            Workload::Snapshots => tag.is_multiple_of(4),
            _ => false,
        }
    }

    fn has_base(self) -> bool {
        use Workload::{Alone, DataFile, Growth, Snapshot, Snapshots, Sparse};
        !matches!(self, Alone | DataFile | Growth | Snapshot | Snapshots | Sparse)
    }
}

/// What a workload begins with.
pub(crate) struct World {
    pub(crate) workload: Workload,
    /// Makes the words of this world different from those of others.
    pub(crate) salt: u64,
    pub(crate) create: CreateOptions,
    pub(crate) cache_size: u64,
    /// What the files' writes are aligned to, in bytes.
    pub(crate) alignment: u32,
    /// Those that the workload writes: the image; after it the data file, or the base that is committed into.
    pub(crate) files: Vec<(&'static str, Vec<u8>)>,
    /// What the disk reads as.
    pub(crate) start: Vec<u64>,
    /// What the internal snapshot holds.
    pub(crate) snapshot: Option<Vec<u64>>,
    base: Option<Rc<MemoryNode>>,
    mid: Option<Vec<u8>>,
}

/// Where the header has its autoclear features, and one that nobody knows: it must be gone before anything else changes.
const AUTOCLEAR_FIELD: usize = 88;
pub(crate) const UNKNOWN_AUTOCLEAR: u64 = 1 << 7;

/// How many sectors of data bring the tables of [`Workload::Growth`] near their ends. One refcount block counts 64 clusters, and one cluster
/// of the table names 64 blocks; the tables themselves need some, too.
const FULL: u64 = 3830;

/// Memory doesn't make anybody wait.
pub(crate) fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("memory makes nobody wait")
}

pub(crate) fn text(err: Error) -> String {
    err.to_string()
}

/// The tags of what is there in the beginning; those of changes begin after them.
const BASE: u64 = 1;
const MID: u64 = 2;
const TOP: u64 = 3;
pub(crate) const FIRST_TAG: u64 = 10;

impl World {
    pub(crate) fn new(workload: Workload, seed: u64, short: bool) -> Self {
        let rng = Rng::new(seed ^ 0x776f_726c_6400);
        let salt = word(seed, workload as u64, u64::from(short)) << 8;
        let growth = workload == Workload::Growth;
        let mut create = options(&rng, workload, short);
        let sectors = create.size / SECTOR;
        let mut start = vec![0; sectors as usize];

        let base = workload.has_base().then(|| {
            // Shorter than the disk, longer, or as long.
            let len = match rng.range(0..3) {
                0 => rng.range(1..sectors + 1),
                1 => sectors + rng.range(0..20),
                _ => sectors,
            };
            let node = MemoryNode::new("base", vec![0; (len * SECTOR) as usize]);
            (len, node)
        });
        let mut random_runs = |layer: &dyn Node, len: u64, tag: u64, share: u64| {
            let mut at = 0;
            while at < len {
                let end = len.min(at + rng.range(1..9));
                if rng.one_in(share) {
                    now(layer.write(
                        at * SECTOR,
                        Buffer::copy_of(&promise::fill(salt, tag, at..end)),
                        WriteFlags::default(),
                    ))
                    .expect("memory takes writes");
                    for sector in at..end.min(sectors) {
                        start[sector as usize] = word(salt, tag, sector);
                    }
                } else if tag != BASE && rng.one_in(6) {
                    let zero = layer.write_zeroes(at * SECTOR, (end - at) * SECTOR, ZeroFlags::default());
                    now(zero).expect("memory takes writes");
                    for sector in at..end.min(sectors) {
                        start[sector as usize] = 0;
                    }
                }
                at = end;
            }
        };
        let cache_size = *rng.pick(&[0, 64 << 10, 32 << 20]);
        let fitting =
            [1, 512, 4096].into_iter().filter(|alignment| u64::from(*alignment) <= create.cluster_size);
        let alignment = *rng.pick(&fitting.collect::<Vec<_>>());
        let mut files = Vec::new();
        let (mut raw_base, mut qcow2_base, mut mid) = (None, None, None);
        if matches!(workload, Workload::Commit | Workload::CommitActive) {
            let mut options = options(&rng, workload, short);
            options.size = create.size;
            let file = MemoryNode::new("base", Vec::new());
            now(self::create(&*file, &options)).expect("memory takes an image");
            let node = open_plain(file.clone(), None, false);
            random_runs(&*node, sectors, BASE, 2);
            now(node.close()).expect("memory takes writes");
            qcow2_base = Some(file);
        } else if let Some((len, node)) = base {
            random_runs(&*node, len, BASE, if short { 1 } else { 2 });
            node.set_read_only(true);
            raw_base = Some(node);
        }
        let mut below: Option<Rc<dyn Node>> = match (&raw_base, &qcow2_base) {
            (Some(base), _) => Some(base.clone()),
            (None, Some(base)) => Some(open_plain(base.clone(), None, true)),
            (None, None) => None,
        };
        if matches!(workload, Workload::StreamAbove | Workload::Commit) {
            let options = CreateOptions {
                cluster_size: 1024,
                backing: Some(("base".into(), Format::Raw)),
                ..CreateOptions::new(create.size)
            };
            let file = MemoryNode::new("mid", Vec::new());
            now(self::create(&*file, &options)).expect("memory takes an image");
            let node = open_plain(file.clone(), below, false);
            random_runs(&*node, sectors, MID, 3);
            now(node.finish()).expect("memory takes writes");
            mid = Some(file.contents());
            below = Some(open_plain(file, node.backing(), true));
            create.backing = Some(("mid".into(), Format::Qcow2));
        } else if below.is_some() {
            create.backing =
                Some(("base".into(), if raw_base.is_some() { Format::Raw } else { Format::Qcow2 }));
        }

        let file = MemoryNode::new("image", Vec::new());
        now(self::create(&*file, &create)).expect("memory takes an image");
        let data = create.data_file.is_some().then(|| MemoryNode::new("data", vec![0; create.size as usize]));
        let open = || {
            let children =
                Children { data_file: data.clone().map(|data| data as Rc<dyn Node>), backing: below.clone() };
            now(Qcow2Node::open(file.clone(), children, Qcow2Options::default())).expect("it opens")
        };
        let node = open();
        // A part of the image is there already; where tables are to grow, nearly as much as they can count.
        if growth && !short {
            random_runs(&*node, FULL - rng.range(0..20), TOP, 1);
        } else if workload != Workload::Sparse && (!short || rng.one_in(2)) {
            random_runs(&*node, sectors, TOP, 4);
        }
        now(node.close()).expect("memory takes writes");
        let mut snapshot = None;
        if workload == Workload::Snapshot {
            take_snapshot(&file);
            snapshot = Some(start.clone());
        }
        let mut image = file.contents();
        if create.version >= 3 && rng.one_in(2) {
            image[AUTOCLEAR_FIELD + 7] |= UNKNOWN_AUTOCLEAR as u8;
        }
        files.push(("image", image));
        files.extend(data.map(|data| ("data", data.contents())));
        files.extend(qcow2_base.map(|base| ("base", base.contents())));
        Self { workload, salt, create, cache_size, alignment, files, start, snapshot, base: raw_base, mid }
    }

    /// How to open the image for a guest.
    pub(crate) fn options(&self) -> Qcow2Options {
        Qcow2Options { read_only: false, cache_size: self.cache_size, ..Qcow2Options::default() }
    }

    /// The nodes that the image needs, if its header is `header`, and what else is recorded are `others`.
    pub(crate) fn children(&self, header: &Header, others: &[Rc<dyn Node>]) -> Result<Children, String> {
        let data_file = self.create.data_file.is_some().then(|| others[0].clone());
        let backing = match header.backing_name.as_deref() {
            None => None,
            Some("mid") => Some(self.mid(self.base(others)?)?),
            // The base has several names.
            Some(name) if name.starts_with("base") => Some(self.base(others)?),
            Some(name) => return Err(format!("the header names {name:?} as the backing file")),
        };
        Ok(Children { data_file, backing })
    }

    /// The lowest layer.
    pub(crate) fn base(&self, others: &[Rc<dyn Node>]) -> Result<Rc<dyn Node>, String> {
        match &self.base {
            Some(base) => Ok(base.clone()),
            None => {
                let node = Qcow2Node::open(others[0].clone(), Children::default(), Qcow2Options::default());
                Ok(now(node).map_err(text)?)
            }
        }
    }

    /// The image of the layer between, if there is one.
    pub(crate) fn mid_bytes(&self) -> Option<Vec<u8>> {
        self.mid.clone()
    }

    /// The layer between, on top of `base`.
    pub(crate) fn mid(&self, base: Rc<dyn Node>) -> Result<Rc<dyn Node>, String> {
        let Some(bytes) = &self.mid else { return Err("there is no layer between".to_string()) };
        let options = Qcow2Options { read_only: true, ..Qcow2Options::default() };
        let children = Children { data_file: None, backing: Some(base) };
        Ok(now(Qcow2Node::open(MemoryNode::new("mid", bytes.clone()), children, options)).map_err(text)?)
    }
}

fn open_plain(file: Rc<MemoryNode>, backing: Option<Rc<dyn Node>>, read_only: bool) -> Rc<Qcow2Node> {
    let options = Qcow2Options { read_only, ..Qcow2Options::default() };
    now(Qcow2Node::open(file, Children { data_file: None, backing }, options)).expect("it opens")
}

/// A random geometry.
fn options(rng: &Rng, workload: Workload, short: bool) -> CreateOptions {
    if workload == Workload::Growth {
        let size = if short { 16 << 10 } else { (FULL + 700) * SECTOR };
        return CreateOptions { cluster_size: 512, refcount_bits: 64, ..CreateOptions::new(size) };
    }
    let bits = if workload == Workload::Compressed {
        // Several to a host cluster.
        if short { *rng.pick(&[10, 11]) } else { *rng.pick(&[9, 10, 11, 12, 12, 13, 14, 14, 16]) }
    } else if short {
        *rng.pick(&[9, 10])
    } else {
        *rng.pick(&[9, 9, 9, 9, 10, 10, 10, 11, 11, 12, 12, 14, 14, 16])
    };
    let clusters = if short { rng.range(2..12) } else { rng.range(4..72) };
    let sectors = (clusters << bits >> 9).clamp(4, 120) - rng.range(0..3);
    let mut create = CreateOptions::new(sectors * SECTOR);
    create.cluster_size = 1 << bits;
    create.version = if workload != Workload::DataFile && rng.one_in(6) { 2 } else { 3 };
    if create.version == 3 {
        let least = match workload {
            Workload::Snapshot => 1,
            Workload::Snapshots => 3,
            _ => 0,
        };
        create.refcount_bits = 1 << rng.range(least..7);
        create.extended_l2 = bits >= 14 && rng.one_in(2);
    }
    if workload == Workload::Compressed && create.version == 3 && rng.one_in(2) {
        create.compression = Compression::Zstd;
    }
    if workload == Workload::DataFile {
        create.data_file = Some("data".into());
    }
    create
}

/// Makes an internal snapshot, with the one program that can.
fn take_snapshot(file: &MemoryNode) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("image.qcow2");
    std::fs::write(&path, file.contents()).expect("it is written");
    let args = ["snapshot", "-c", "before"];
    let out =
        std::process::Command::new("qemu-img").args(args).arg(&path).output().expect("qemu-img is installed");
    assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    let bytes = std::fs::read(&path).expect("it is read");
    now(file.resize(0)).expect("memory can be resized");
    now(file.write(0, Buffer::copy_of(&bytes), WriteFlags::default())).expect("memory takes writes");
}

/// An image as its only internal snapshot has it.
pub(crate) fn as_snapshot(image: &[u8]) -> Result<Rc<Qcow2Node>, String> {
    let mut snapshots = as_snapshots(image)?;
    let (_, node) = snapshots.pop().ok_or("there is no internal snapshot")?;
    Ok(node)
}

/// The names of an image's internal snapshots, and the image as each of them has it: the header leads to the snapshot's table.
pub(crate) fn as_snapshots(image: &[u8]) -> Result<Vec<(String, Rc<Qcow2Node>)>, String> {
    let file = MemoryNode::new("image", image.to_vec());
    let header = now(Header::read(&*file)).map_err(text)?;
    let listed = now(headwater_image::qcow2::snapshots::list(&*file, &header)).map_err(text)?;
    let mut at = header.snapshots_offset;
    let mut snapshots = Vec::new();
    for one in listed {
        let entry = now(file.read(at, BufferMut::new(56))).map_err(text)?;
        let file = MemoryNode::new("snapshot", image.to_vec());
        let put = |at: u64, bytes: &[u8]| {
            now(file.write(at, Buffer::copy_of(bytes), WriteFlags::default())).map_err(text)
        };
        // Offset and length of the L1 table, and the disk's size, which is in the extra data.
        put(40, &entry[0..8])?;
        put(36, &entry[8..12])?;
        put(24, &entry[48..56])?;
        let options = Qcow2Options { read_only: true, ..Qcow2Options::default() };
        let node = now(Qcow2Node::open(file, Children::default(), options)).map_err(text)?;
        snapshots.push((one.name, node));
        let len = |at: usize| entry[at..at + 2].iter().fold(0, |n, byte| n << 8 | u64::from(*byte));
        let extra = entry[36..40].iter().fold(0, |n, byte| n << 8 | u64::from(*byte));
        at = (at + 40 + extra + len(12) + len(14)).next_multiple_of(8);
    }
    Ok(snapshots)
}

/// The words of a whole disk.
pub(crate) fn read(node: &dyn Node) -> Result<Vec<u64>, String> {
    let size = node.size();
    let bytes = now(node.read(0, BufferMut::new(size as usize))).map_err(text)?;
    promise::words(&bytes)
}

/// Sectors of a disk as bytes.
pub(crate) fn bytes_of(sectors: &Range<u64>) -> Range<u64> {
    sectors.start * SECTOR..sectors.end * SECTOR
}
