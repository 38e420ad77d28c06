//! A small sound image, to be damaged.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// The size of clusters in bytes.
pub(super) const CLUSTER: u64 = 65536;
/// Where the tables of a sound image lie.
pub(super) const REFTABLE: u64 = CLUSTER;
pub(super) const REFBLOCK: u64 = 2 * CLUSTER;
pub(super) const L1: u64 = 3 * CLUSTER;
pub(super) const L2: u64 = 4 * CLUSTER;
/// Where the first two clusters of the disk lie; the other fourteen have no data.
pub(super) const DATA: u64 = 5 * CLUSTER;
pub(super) const MORE_DATA: u64 = 6 * CLUSTER;
/// The end of the file.
pub(super) const END: u64 = 7 * CLUSTER;
/// How many clusters the disk has.
pub(super) const GUEST_CLUSTERS: u64 = 16;

/// Flags of table entries.
pub(super) const COPIED: u64 = 1 << 63;
pub(super) const COMPRESSED: u64 = 1 << 62;

/// Where the header holds what.
pub(super) mod at {
    pub(crate) const VERSION: u64 = 4;
    pub(crate) const BACKING: u64 = 8;
    pub(crate) const BACKING_LEN: u64 = 16;
    pub(crate) const CLUSTER_BITS: u64 = 20;
    pub(crate) const SIZE: u64 = 24;
    pub(crate) const ENCRYPTION: u64 = 32;
    pub(crate) const L1_SIZE: u64 = 36;
    pub(crate) const L1: u64 = 40;
    pub(crate) const REFTABLE: u64 = 48;
    pub(crate) const REFTABLE_CLUSTERS: u64 = 56;
    pub(crate) const SNAPSHOTS: u64 = 60;
    pub(crate) const SNAPSHOT_TABLE: u64 = 64;
    pub(crate) const INCOMPATIBLE: u64 = 72;
    pub(crate) const AUTOCLEAR: u64 = 88;
    pub(crate) const REFCOUNT_ORDER: u64 = 96;
    pub(crate) const HEADER_LEN: u64 = 100;
    pub(crate) const COMPRESSION: u64 = 104;
    pub(crate) const EXTENSIONS: u64 = 112;
}

/// Types of header extensions.
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
pub(super) const DATA_FILE: u32 = 0x4441_5441;
pub(super) const BITMAPS: u32 = 0x2385_2875;

/// The bytes of an image; what isn't written is a hole.
pub(super) struct Image {
    near: Vec<u8>,
    far: Vec<(u64, Vec<u8>)>,
    len: u64,
    /// Where the next header extension goes.
    extension: u64,
}

impl Image {
    /// A disk of 1 MiB, whose first two clusters are full of 7s and of 8s.
    pub(super) fn sound() -> Self {
        let mut image = Self { near: Vec::new(), far: Vec::new(), len: 0, extension: at::EXTENSIONS };
        image.put(0, b"QFI\xfb");
        image.put32(at::VERSION, 3);
        image.put32(at::CLUSTER_BITS, 16);
        image.put64(at::SIZE, GUEST_CLUSTERS * CLUSTER);
        image.put32(at::L1_SIZE, 1);
        image.put64(at::L1, L1);
        image.put64(at::REFTABLE, REFTABLE);
        image.put32(at::REFTABLE_CLUSTERS, 1);
        image.put32(at::REFCOUNT_ORDER, 4);
        image.put32(at::HEADER_LEN, 112);
        image.put64(REFTABLE, REFBLOCK);
        image.count(0..7, 1);
        image.put64(L1, L2 | COPIED);
        image.put64(L2, DATA | COPIED);
        image.put64(L2 + 8, MORE_DATA | COPIED);
        image.put(DATA, &[7; CLUSTER as usize]);
        image.put(MORE_DATA, &[8; CLUSTER as usize]);
        image
    }

    /// No more than these bytes.
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self { near: bytes.to_vec(), far: Vec::new(), len: bytes.len() as u64, extension: 0 }
    }

    pub(super) fn put(&mut self, offset: u64, bytes: &[u8]) -> &mut Self {
        let end = offset + bytes.len() as u64;
        self.len = self.len.max(end);
        if end > 64 * CLUSTER {
            self.far.push((offset, bytes.to_vec()));
            return self;
        }
        if (self.near.len() as u64) < end {
            self.near.resize(end as usize, 0);
        }
        self.near[offset as usize..end as usize].copy_from_slice(bytes);
        self
    }

    pub(super) fn put32(&mut self, offset: u64, value: u32) -> &mut Self {
        self.put(offset, &value.to_be_bytes())
    }

    pub(super) fn put64(&mut self, offset: u64, value: u64) -> &mut Self {
        self.put(offset, &value.to_be_bytes())
    }

    /// Sets the reference counts of some of the first clusters.
    pub(super) fn count(&mut self, clusters: std::ops::Range<u64>, references: u16) -> &mut Self {
        for cluster in clusters {
            self.put(REFBLOCK + cluster * 2, &references.to_be_bytes());
        }
        self
    }

    /// Adds a header extension.
    pub(super) fn extend(&mut self, kind: u32, data: &[u8]) -> &mut Self {
        let at = self.extension;
        self.put32(at, kind).put32(at + 4, data.len() as u32).put(at + 8, data);
        self.extension += 8 + (data.len() as u64).next_multiple_of(8);
        self
    }

    /// Names a backing file, and its format unless that is empty.
    pub(super) fn backing(&mut self, name: &str, format: &str) -> &mut Self {
        if !format.is_empty() {
            self.extend(BACKING_FORMAT, format.as_bytes());
        }
        self.put64(at::BACKING, 4096).put32(at::BACKING_LEN, name.len() as u32).put(4096, name.as_bytes())
    }

    /// Puts the data into another file.
    pub(super) fn data_file(&mut self, name: &str) -> &mut Self {
        self.put64(at::INCOMPATIBLE, 1 << 2).extend(DATA_FILE, name.as_bytes());
        self.put64(L2, COPIED).put64(L2 + 8, CLUSTER | COPIED).count(5..7, 0)
    }

    /// Makes the file as long as this.
    pub(super) fn resize(&mut self, len: u64) -> &mut Self {
        self.near.truncate(len as usize);
        self.len = len;
        self
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.near
    }

    pub(super) fn write(&self, path: &str) {
        let file = File::create(path).expect("create");
        file.write_all_at(&self.near, 0).expect("write");
        for (offset, bytes) in &self.far {
            file.write_all_at(bytes, *offset).expect("write");
        }
        file.set_len(self.len).expect("set_len");
    }
}
