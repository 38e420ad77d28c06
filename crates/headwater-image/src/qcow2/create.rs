//! Making a new image.
//!
//! Nothing but the header, the reference counts of the first clusters and an empty L1 table is written, so that an image of any size
//! comes into being in milliseconds, unless space is asked for (`preallocate`). The header is written last, after everything else is durable: an interrupted
//! creation leaves a file that is no image.

use super::entry::{Geometry, set_refcount};
use super::extensions::{self, Extension};
use super::header::{
    AUTOCLEAR_RAW_DATA, COMPAT_LAZY_REFCOUNTS, Compression, Header, INCOMPAT_COMPRESSION, INCOMPAT_DATA_FILE,
    INCOMPAT_EXTENDED_L2, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, Place,
};
use crate::probe::Format;
use headwater_block::{Buffer, BufferMut, Error, ErrorKind, Node, Result, WriteFlags, ZeroFlags};

mod preallocate;

pub use preallocate::{Preallocation, set_size};

#[cfg(test)]
mod tests;

/// Sizes are rounded up to this, in bytes: other programs can't use the rest of a disk of an odd size.
const SECTOR: u64 = 512;

/// How much zeroed memory is written at once, in bytes.
const PIECE: u64 = 1 << 20;

/// What a new image is like. The defaults are those of qemu-img.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// The disk's size in bytes; rounded up to a multiple of 512.
    pub size: u64,
    /// The cluster size in bytes: a power of two from 512 to 2 MiB; with subclusters at least 16 KiB.
    pub cluster_size: u64,
    /// The version of the format: 3 ("compat 1.1"), or 2 ("compat 0.10") for programs from before 2012.
    pub version: u32,
    /// The width of reference counts in bits: a power of two from 1 to 64; version 2 has 16 only.
    pub refcount_bits: u32,
    /// Allocate in subclusters, 32 to a cluster. Version 3 only.
    pub extended_l2: bool,
    /// How compressed clusters are to be compressed, when somebody writes some. Version 2 has zlib only.
    pub compression: Compression,
    /// The name of the image that supplies what this one lacks, as the header is to spell it, and its format.
    pub backing: Option<(String, Format)>,
    /// The name of the file that is to hold the guest's data, as the header is to spell it. Version 3 only.
    pub data_file: Option<String>,
    /// The data file is by itself a raw image of the disk, and must stay one. Its clusters are mapped from the beginning then, whatever `preallocation` says.
    pub data_file_raw: bool,
    /// Other programs may leave refcounts out of date while they use the image. Version 3 only.
    pub lazy_refcounts: bool,
    /// How much of the disk has its space from the beginning. With a backing only where there are subclusters, because the backing is hidden otherwise.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// The defaults for a disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            cluster_size: 64 << 10,
            version: 3,
            refcount_bits: 16,
            extended_l2: false,
            compression: Compression::Zlib,
            backing: None,
            data_file: None,
            data_file_raw: false,
            lazy_refcounts: false,
            preallocation: Preallocation::Off,
        }
    }

    /// How much is allocated, after all.
    pub fn preallocated(&self) -> Preallocation {
        match self.preallocation {
            Preallocation::Off if self.data_file_raw => Preallocation::Metadata,
            mode => mode,
        }
    }

    /// The reason why no image can be like this, if there is one.
    fn problem(&self) -> Option<String> {
        let Self { cluster_size, version, refcount_bits, .. } = *self;
        if !cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&cluster_size) {
            Some(format!("the cluster size {cluster_size} is not a power of two from 512 to 2097152 (2 MiB)"))
        } else if !(2..=3).contains(&version) {
            Some(format!("version {version} is not 2 or 3"))
        } else if !refcount_bits.is_power_of_two() || refcount_bits > 64 {
            Some(format!(
                "reference counts of {refcount_bits} bits are not possible; choose a power of two from 1 to 64"
            ))
        } else if version == 2 && refcount_bits != 16 {
            Some(format!(
                "version 2 (compat 0.10) has reference counts of 16 bits only, not {refcount_bits}; choose version 3"
            ))
        } else if version == 2
            && (self.extended_l2
                || self.data_file.is_some()
                || self.compression != Compression::Zlib
                || self.lazy_refcounts)
        {
            Some("version 2 (compat 0.10) has no subclusters, data files, zstd or lazy refcounts; choose version 3 (compat 1.1)".to_owned())
        } else if self.extended_l2 && cluster_size < 16 << 10 {
            Some(format!("subclusters need clusters of at least 16384 bytes (16 KiB), not {cluster_size}"))
        } else if self.data_file.as_deref().is_some_and(|name| name.is_empty() || name.contains('\0')) {
            Some("the name of the data file is empty or contains a zero byte".to_owned())
        } else if self.backing.as_ref().is_some_and(|(name, _)| name.is_empty() || name.contains('\0')) {
            Some("the name of the backing file is empty or contains a zero byte".to_owned())
        } else if self.data_file_raw && self.data_file.is_none() {
            Some("a raw data file is asked for, but no data file".to_owned())
        } else if self.backing.is_some() && self.data_file_raw {
            Some("what a backing supplies can't be seen in a raw data file; choose one of the two".to_owned())
        } else if self.backing.is_some() && self.preallocation != Preallocation::Off && !self.extended_l2 {
            Some("preallocated clusters would hide the backing; choose subclusters (extended_l2), or one of the two".to_owned())
        } else {
            None
        }
    }

    /// The header of the new image, with no table placed yet.
    fn header(&self, name: &str) -> Result<Header> {
        let refuse = |why: String| {
            Error::new(ErrorKind::InvalidInput, format!("{name}: cannot create the image: {why}"))
        };
        if let Some(why) = self.problem() {
            return Err(refuse(why));
        }
        let size = self.size.checked_next_multiple_of(SECTOR).filter(|size| *size <= i64::MAX as u64);
        let size = size.ok_or_else(|| refuse(format!("the size {} is too large", self.size)))?;
        let mut incompatible = 0;
        let mut list = Vec::new();
        if self.extended_l2 {
            incompatible |= INCOMPAT_EXTENDED_L2;
        }
        if self.compression != Compression::Zlib {
            incompatible |= INCOMPAT_COMPRESSION;
        }
        if let Some((_, format)) = &self.backing {
            list.push(Extension {
                kind: extensions::BACKING_FORMAT,
                data: format.as_str().as_bytes().to_vec(),
            });
        }
        if let Some(data_file) = &self.data_file {
            incompatible |= INCOMPAT_DATA_FILE;
            list.push(Extension { kind: extensions::DATA_FILE, data: data_file.as_bytes().to_vec() });
        }
        if self.version >= 3 {
            list.push(extensions::feature_name_table());
        }
        let mut header = Header {
            version: self.version,
            cluster_bits: self.cluster_size.trailing_zeros(),
            size,
            l1_size: 0,
            l1_table_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible,
            compatible: if self.lazy_refcounts { COMPAT_LAZY_REFCOUNTS } else { 0 },
            autoclear: if self.data_file_raw { AUTOCLEAR_RAW_DATA } else { 0 },
            refcount_order: self.refcount_bits.trailing_zeros(),
            compression: self.compression,
            header_length: Header::default_length(self.version),
            unknown_fields: Vec::new(),
            extensions: list,
            backing_name: self.backing.as_ref().map(|(name, _)| name.clone()),
            backing_place: Place::default(),
            extensions_end: 0,
        };
        if header.encode().is_err() {
            // Small clusters have no room for the names of features, which only serve messages.
            header.extensions.retain(|extension| extension.kind != extensions::FEATURE_NAMES);
        }
        let l1_entries = Geometry::of(&header).l1_entries_for(size);
        if l1_entries * 8 > MAX_L1_BYTES {
            let most = (MAX_L1_BYTES / 8) << Geometry::of(&header).l2_coverage_bits();
            return Err(refuse(format!(
                "clusters of {} bytes make disks of at most {most} bytes, not {size}; choose larger clusters",
                self.cluster_size
            )));
        }
        header.l1_size = l1_entries as u32;
        Ok(header)
    }
}

/// Where the first clusters of a new image lie, in clusters.
struct Plan {
    table_clusters: u64,
    blocks: u64,
    l1_clusters: u64,
    l2_tables: u64,
    /// How many clusters of the disk the L2 tables map.
    mapped_clusters: u64,
    /// How many of these lie in the file.
    data_clusters: u64,
}

impl Plan {
    fn of(header: &Header, preallocation: Preallocation) -> Self {
        let geometry = Geometry::of(header);
        let l1_clusters = (u64::from(header.l1_size) * 8).div_ceil(geometry.cluster_size());
        let mapped = preallocation != Preallocation::Off;
        let mapped_clusters = if mapped { header.size.div_ceil(geometry.cluster_size()) } else { 0 };
        let mut plan = Plan {
            table_clusters: 1,
            blocks: 1,
            l1_clusters,
            l2_tables: if mapped { u64::from(header.l1_size) } else { 0 },
            mapped_clusters,
            data_clusters: if geometry.data_file { 0 } else { mapped_clusters },
        };
        loop {
            // The table and the blocks are counted by the blocks, too.
            let blocks = plan.clusters().div_ceil(1 << geometry.refcount_block_bits());
            let table_clusters = (blocks * 8).div_ceil(geometry.cluster_size());
            if (blocks, table_clusters) == (plan.blocks, plan.table_clusters) {
                return plan;
            }
            plan = Plan { table_clusters, blocks, ..plan };
        }
    }

    fn clusters(&self) -> u64 {
        self.first_data() + self.data_clusters
    }

    fn first_block(&self) -> u64 {
        1 + self.table_clusters
    }

    fn first_l1(&self) -> u64 {
        self.first_block() + self.blocks
    }

    fn first_l2(&self) -> u64 {
        self.first_l1() + self.l1_clusters
    }

    fn first_data(&self) -> u64 {
        self.first_l2() + self.l2_tables
    }
}

/// Makes `file` an empty image. What it held is lost. An external data file is the caller's to make, and to give its size ([`set_size`]).
///
/// Fails with `InvalidInput`, before anything is changed, if there can be no such image.
pub async fn create(file: &dyn Node, options: &CreateOptions) -> Result<()> {
    let mut header = options.header(file.name())?;
    let geometry = Geometry::of(&header);
    let cluster_size = geometry.cluster_size();
    let preallocation = options.preallocated();
    let plan = Plan::of(&header, preallocation);
    preallocate::check(&plan, &geometry, MAX_REFCOUNT_TABLE_BYTES, file.name())?;
    header.refcount_table_offset = cluster_size;
    header.refcount_table_clusters = plan.table_clusters as u32;
    header.l1_table_offset = plan.first_l1() * cluster_size;
    let head = header.encode().map_err(|err| err.context(file.name()))?;

    if u64::from(file.limits().write_alignment) > cluster_size {
        file.use_buffered()?;
    }
    let data = plan.first_data() * cluster_size..plan.clusters() * cluster_size;
    let stale = clear(file, data.start, data.end).await?;
    preallocate::allocate(file, data, preallocation, stale).await?;
    if plan.l2_tables > 0 {
        preallocate::write_tables(file, &geometry, &plan).await?;
    }
    let table: Vec<u8> = (0..plan.blocks)
        .flat_map(|block| ((plan.first_block() + block) * cluster_size).to_be_bytes())
        .collect();
    write(file, cluster_size, &table, cluster_size).await?;
    let per_block = 1 << geometry.refcount_block_bits();
    for index in 0..plan.blocks {
        let used = (plan.clusters() - index * per_block).min(per_block);
        let mut block = BufferMut::zeroed(cluster_size as usize);
        for i in 0..used as usize {
            set_refcount(&mut block, i, header.refcount_order, 1);
        }
        file.write((plan.first_block() + index) * cluster_size, block.freeze(), WriteFlags::default())
            .await?;
    }
    file.flush().await?;
    write(file, 0, &head, cluster_size).await?;
    file.flush().await
}

/// Makes `file` have `len` bytes, or more where its size is fixed. The first `tables` of them are zero; true if the rest may not be.
async fn clear(file: &dyn Node, tables: u64, len: u64) -> Result<bool> {
    let resized = match file.resize(0).await {
        Ok(()) => file.resize(len).await,
        Err(err) => Err(err),
    };
    match resized {
        Err(err) if err.kind() == ErrorKind::Unsupported && file.size() >= len => {
            // A block device. The old header goes first, so that it can't be taken for that of the new image.
            for offset in (0..tables).step_by(PIECE as usize) {
                let piece = PIECE.min(tables - offset);
                file.write_zeroes(offset, piece, ZeroFlags::default()).await?;
            }
            file.flush().await?;
            Ok(true)
        }
        other => other.map(|()| false),
    }
}

/// Writes `bytes`, padded with zeroes to whole units that the file can write and that the space has room for.
async fn write(file: &dyn Node, offset: u64, bytes: &[u8], room: u64) -> Result<()> {
    let unit = u64::from(file.limits().write_alignment).min(room);
    let len = (bytes.len() as u64).next_multiple_of(unit.max(1));
    let mut padded = BufferMut::zeroed(len as usize);
    padded[..bytes.len()].copy_from_slice(bytes);
    let data: Buffer = padded.freeze();
    file.write(offset, data, WriteFlags::default()).await
}
