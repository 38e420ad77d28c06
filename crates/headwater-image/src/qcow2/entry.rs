//! Offsets, and the entries of L1, L2 and refcount tables: typed, checked, and without I/O.

use super::header::Header;

#[cfg(test)]
mod tests;

/// The bit of L1 and standard L2 entries that says that what they point to has a refcount of exactly one.
const COPIED: u64 = 1 << 63;
/// The bit of L2 entries that says that the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// The bit of standard L2 entries that says that the cluster reads as zeroes (version 3, without subclusters).
const ZERO: u64 = 1;
/// The bits of an entry that hold the offset of a cluster.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The bits of a refcount table entry that hold the offset of a block.
const REFCOUNT_BLOCK_OFFSET: u64 = !0x1ff;

/// An offset in bytes on the guest's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(pub u64);

/// An offset in bytes in the file that holds an image's clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(pub u64);

/// The numbers of an image that never change while it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// 2 or 3.
    pub version: u32,
    /// The cluster size as a power of two.
    pub cluster_bits: u32,
    /// The width of refcounts in bits as a power of two.
    pub refcount_order: u32,
    /// L2 entries have 16 bytes and 32 subclusters.
    pub extended_l2: bool,
    /// Guest data are in another file, at their guest offset.
    pub data_file: bool,
}

impl Geometry {
    /// The geometry that a header describes.
    pub fn of(header: &Header) -> Self {
        Self {
            version: header.version,
            cluster_bits: header.cluster_bits,
            refcount_order: header.refcount_order,
            extended_l2: header.has_extended_l2(),
            data_file: header.has_data_file(),
        }
    }

    /// The cluster size in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The size of an L2 entry in bytes, as a power of two.
    pub fn l2_entry_bits(&self) -> u32 {
        if self.extended_l2 { 4 } else { 3 }
    }

    /// How many entries an L2 table has, as a power of two.
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.l2_entry_bits()
    }

    /// How many bytes of the disk one L2 table maps, as a power of two.
    pub fn l2_coverage_bits(&self) -> u32 {
        self.cluster_bits + self.l2_bits()
    }

    /// How many units of allocation a cluster has: 32 subclusters, or 1.
    pub fn units(&self) -> u32 {
        if self.extended_l2 { 32 } else { 1 }
    }

    /// The size in bytes of the unit of allocation, a subcluster or a cluster, as a power of two.
    pub fn unit_bits(&self) -> u32 {
        if self.extended_l2 { self.cluster_bits - 5 } else { self.cluster_bits }
    }

    /// The mask of all units of a cluster.
    pub fn all_units(&self) -> u32 {
        if self.extended_l2 { u32::MAX } else { 1 }
    }

    /// The mask of the units that the bytes `start..end` of a cluster touch; `start < end <= cluster size`.
    pub fn units_touched(&self, start: u64, end: u64) -> u32 {
        let first = start >> self.unit_bits();
        let last = (end - 1) >> self.unit_bits();
        ((u64::MAX >> (63 - (last - first))) << first) as u32
    }

    /// How many L1 entries a disk of `size` bytes needs.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        let bits = self.l2_coverage_bits();
        (size >> bits) + u64::from(size & ((1 << bits) - 1) != 0)
    }

    /// How many bits of the entry of a compressed cluster hold its offset; the others hold its length.
    pub fn compressed_offset_bits(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// How many refcounts a refcount block holds, as a power of two.
    pub fn refcount_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// The largest refcount that can be stored.
    pub fn max_refcount(&self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.refcount_order))
    }
}

/// Why an entry is not valid; the caller adds which one it is.
pub type EntryResult<T> = std::result::Result<T, &'static str>;

/// An entry of an L1 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// An entry for a table at `table` that nothing else refers to.
    pub fn new(table: HostOffset) -> Self {
        Self(table.0 | COPIED)
    }

    /// Where the L2 table lies; `None` if there is none.
    pub fn table(self, geometry: &Geometry) -> EntryResult<Option<HostOffset>> {
        let offset = self.0 & OFFSET;
        if self.0 & !(OFFSET | COPIED) != 0 {
            return Err("reserved bits are set");
        }
        if offset & (geometry.cluster_size() - 1) != 0 {
            return Err("the L2 table is not at a cluster boundary");
        }
        Ok((offset != 0).then_some(HostOffset(offset)))
    }

    /// The table belongs to the active L1 table alone, and may be changed.
    pub fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The entry with or without the mark that this is the only reference.
    pub fn with_copied(self, copied: bool) -> Self {
        Self(if copied { self.0 | COPIED } else { self.0 & !COPIED })
    }
}

/// An entry of the refcount table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefcountTableEntry(pub u64);

impl RefcountTableEntry {
    /// Where the refcount block lies; `None` if there is none, so that all its refcounts are 0.
    pub fn block(self, geometry: &Geometry) -> EntryResult<Option<HostOffset>> {
        let offset = self.0 & REFCOUNT_BLOCK_OFFSET;
        if self.0 & !REFCOUNT_BLOCK_OFFSET != 0 {
            return Err("reserved bits are set");
        }
        if offset & (geometry.cluster_size() - 1) != 0 {
            return Err("the refcount block is not at a cluster boundary");
        }
        Ok((offset != 0).then_some(HostOffset(offset)))
    }
}

/// A cluster that isn't compressed. `data` and `zero` have one bit for each unit of allocation, from bit 0: 32 with
/// subclusters, otherwise 1; no unit is in both, and those in neither are unallocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cluster {
    /// The host cluster, which may be there although no unit has data.
    pub host: Option<HostOffset>,
    /// The host cluster's refcount is exactly one, so that it may be written in place.
    pub copied: bool,
    /// Which units have their data in the host cluster.
    pub data: u32,
    /// Which units read as zeroes.
    pub zero: u32,
}

impl Cluster {
    /// Nothing is here: the backing decides.
    pub const UNALLOCATED: Self = Self { host: None, copied: false, data: 0, zero: 0 };

    /// The host cluster, if it may be written in place.
    pub fn writable_host(&self) -> Option<HostOffset> {
        self.host.filter(|_| self.copied)
    }
}

/// An entry of an L2 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L2Entry {
    /// A cluster that isn't compressed, or isn't there.
    Standard(Cluster),
    /// A compressed cluster.
    Compressed {
        /// Where the compressed bytes start; any alignment.
        offset: HostOffset,
        /// At most how many bytes they have: up to the end of their last sector.
        len: u64,
    },
}

impl L2Entry {
    /// Decodes an entry; `bitmap` is its second word with subclusters, else 0.
    pub fn decode(word: u64, bitmap: u64, geometry: &Geometry) -> EntryResult<Self> {
        if word & COMPRESSED != 0 {
            return Self::decode_compressed(word, bitmap, geometry);
        }
        let reserved = if geometry.extended_l2 { !(OFFSET | COPIED) } else { !(OFFSET | COPIED | ZERO) };
        if word & reserved != 0 {
            return Err("reserved bits are set");
        }
        let offset = word & OFFSET;
        let copied = word & COPIED != 0;
        if offset & (geometry.cluster_size() - 1) != 0 {
            return Err("the cluster is not at a cluster boundary");
        }
        // Offset 0 is the image's header, so that it means "none"; but in an external data file it is a cluster like others.
        let host = (offset != 0 || (geometry.data_file && copied)).then_some(HostOffset(offset));
        let (data, zero) = if geometry.extended_l2 {
            (bitmap as u32, (bitmap >> 32) as u32)
        } else if word & ZERO != 0 {
            (0, 1)
        } else {
            (u32::from(host.is_some()), 0)
        };
        if geometry.version < 3 && zero != 0 {
            return Err("a zero cluster in an image of version 2");
        }
        if data & zero != 0 {
            return Err("a subcluster is marked both as data and as zeroes");
        }
        if data != 0 && host.is_none() {
            return Err("subclusters are marked as data, but there is no host cluster");
        }
        Ok(Self::Standard(Cluster { host, copied: copied && host.is_some(), data, zero }))
    }

    fn decode_compressed(word: u64, bitmap: u64, geometry: &Geometry) -> EntryResult<Self> {
        if geometry.data_file {
            return Err("a compressed cluster in an image with an external data file");
        }
        if bitmap != 0 {
            return Err("a compressed cluster has a subcluster bitmap");
        }
        let offset_bits = geometry.compressed_offset_bits();
        let offset = word & ((1 << offset_bits) - 1);
        // The bit that marks clusters as writable in place means nothing here; old programs have set it.
        let more_sectors = (word & !(COMPRESSED | COPIED)) >> offset_bits;
        if offset == 0 || offset >> 56 != 0 {
            return Err("the offset of the compressed data is out of range");
        }
        Ok(Self::Compressed { offset: HostOffset(offset), len: (more_sectors + 1) * 512 - (offset & 511) })
    }

    /// The entry's words; the second is 0 without subclusters.
    pub fn encode(self, geometry: &Geometry) -> (u64, u64) {
        let cluster = match self {
            L2Entry::Standard(cluster) => cluster,
            L2Entry::Compressed { offset, len } => {
                let offset_bits = geometry.compressed_offset_bits();
                let more_sectors = ((offset.0 & 511) + len - 1) / 512;
                debug_assert!(offset.0 >> offset_bits == 0 && more_sectors >> (62 - offset_bits) == 0);
                return (COMPRESSED | more_sectors << offset_bits | offset.0, 0);
            }
        };
        debug_assert!(cluster.data & cluster.zero == 0 && (cluster.data == 0 || cluster.host.is_some()));
        let copied = if cluster.copied { COPIED } else { 0 };
        let word = cluster.host.map_or(0, |host| host.0 | copied);
        if geometry.extended_l2 {
            (word, u64::from(cluster.zero) << 32 | u64::from(cluster.data))
        } else {
            (word | if cluster.zero != 0 { ZERO } else { 0 }, 0)
        }
    }
}

/// The refcount at `index` of the bytes of a refcount block (or a part of one whose first refcount has index 0).
/// Widths below 8 bits are packed from the low bits of each byte.
#[inline]
pub fn refcount(block: &[u8], index: usize, order: u32) -> u64 {
    // The width that nearly all images have.
    if order == 4 {
        return u64::from(u16::from_be_bytes([block[index * 2], block[index * 2 + 1]]));
    }
    if order < 3 {
        let bits = 1usize << order;
        let at = index * bits;
        return u64::from(block[at / 8] >> (at % 8)) & ((1 << bits) - 1);
    }
    let bytes = 1usize << (order - 3);
    block[index * bytes..][..bytes].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Sets the refcount at `index`; see [`refcount`].
///
/// # Panics
/// If `value` doesn't fit.
pub fn set_refcount(block: &mut [u8], index: usize, order: u32, value: u64) {
    let bits = 1usize << order;
    assert!(value <= u64::MAX >> (64 - bits), "refcount {value} in {bits} bits");
    if order < 3 {
        let at = index * bits;
        let mask = ((1u16 << bits) - 1) as u8;
        let byte = &mut block[at / 8];
        *byte = *byte & !(mask << (at % 8)) | (value as u8) << (at % 8);
    } else {
        let bytes = bits / 8;
        block[index * bytes..][..bytes].copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
    }
}
