//! What lies where in the file, as far as the header says, and the list of all tables that it leads to.

use super::bitmaps::Bitmaps;
use super::medium::Medium;
use super::report::CheckReport;
use super::snapshots;
use crate::qcow2::extensions::{self, find};
use crate::qcow2::header::{AUTOCLEAR_BITMAPS, Header};
use headwater_block::{Error, ErrorKind, Result};

/// The bits of an L1 entry that hold the offset of an L2 table, in bytes.
pub(super) const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// The flag in L1 and L2 entries that says that exactly one reference exists.
pub(super) const COPIED: u64 = 1 << 63;

/// The bits of a refcount table entry that must be zero.
const REFTABLE_RESERVED: u64 = 0x1ff;

/// How many bytes of a table are read at once.
pub(super) const PIECE: u64 = 64 << 10;
/// How many bytes of L1 tables, of snapshots or bitmaps included, are followed; beyond it an image isn't checked.
const MAX_TABLES: u64 = 1 << 30;
/// How many different L2 tables are followed.
const MAX_L2: usize = 16 << 20;

/// Where a named piece of metadata lies in the file, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) what: String,
}

/// What a check needs of the header.
#[derive(Debug, Clone)]
pub(super) struct Geometry {
    pub(super) name: String,
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// The guest's disk size in bytes.
    pub(super) size: u64,
    pub(super) l1: Table,
    /// Refcounts are `1 << refcount_order` bits wide.
    pub(super) refcount_order: u32,
    /// The refcount table; `entries` covers whole clusters.
    pub(super) reftable: Table,
    pub(super) snapshots_offset: u64,
    pub(super) snapshot_count: u32,
    /// L2 entries have 16 bytes, with a bitmap of subclusters.
    pub(super) extended_l2: bool,
    /// Data lie in another file, whose clusters are not counted.
    pub(super) data_file: bool,
    /// Where in it each byte lies is where it lies in the guest's disk.
    pub(super) data_file_raw: bool,
    /// The directory of bitmaps, if the image has valid ones, or what is wrong with the extension that tells of it.
    pub(super) bitmaps: Option<std::result::Result<Bitmaps, &'static str>>,
    /// The size of the image's file in bytes.
    pub(super) file_size: u64,
}

/// A table of 8-byte entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) offset: u64,
    pub(super) entries: u64,
}

impl Geometry {
    /// What `header` says of the image `name` in a file of `file_size` bytes.
    pub(super) fn of(header: &Header, name: &str, file_size: u64) -> Self {
        // Bitmaps that a program ignorant of them has outdated are not followed; their clusters are leaks.
        let bitmaps = find(&header.extensions, extensions::BITMAPS)
            .filter(|_| header.autoclear & AUTOCLEAR_BITMAPS != 0)
            .map(Bitmaps::parse);
        let table_bytes = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        Self {
            name: name.to_owned(),
            version: header.version,
            cluster_bits: header.cluster_bits,
            size: header.size,
            l1: Table { offset: header.l1_table_offset, entries: u64::from(header.l1_size) },
            refcount_order: header.refcount_order,
            reftable: Table { offset: header.refcount_table_offset, entries: table_bytes / 8 },
            snapshots_offset: header.snapshots_offset,
            snapshot_count: header.nb_snapshots,
            extended_l2: header.has_extended_l2(),
            data_file: header.has_data_file(),
            data_file_raw: header.data_file_is_raw(),
            bitmaps,
            file_size,
        }
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(super) fn is_aligned(&self, offset: u64) -> bool {
        offset.is_multiple_of(self.cluster_size())
    }

    /// No region that [`Geometry::clusters`] accepts touches a cluster with this number or above.
    pub(super) fn file_clusters(&self) -> u64 {
        self.file_size.saturating_add(self.cluster_size() - 1).div_ceil(self.cluster_size())
    }

    /// How many refcounts a block holds.
    pub(super) fn block_entries(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.refcount_order)
    }

    /// The size of an L2 entry in bytes.
    pub(super) fn l2_entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// The guest bytes that one L2 table maps.
    pub(super) fn l2_coverage(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size() * self.cluster_size()
    }

    /// The clusters that a region touches; `None` if it starts past the end of the file, or reaches further past it than the rest of a
    /// cluster.
    pub(super) fn clusters(&self, offset: u64, len: u64) -> Option<std::ops::RangeInclusive<u64>> {
        let end = offset.checked_add(len)?;
        let limit = self.file_size.checked_add(self.cluster_size() - 1)?;
        if len == 0 || offset >= self.file_size || end > limit {
            return None;
        }
        Some(offset >> self.cluster_bits..=(end - 1) >> self.cluster_bits)
    }
}

/// An L2 table, and how often and from where it is referred to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct L2 {
    pub(super) offset: u64,
    /// Its (first) index in the active L1 table; `u32::MAX` if only snapshots refer to it.
    pub(super) l1_index: u32,
    pub(super) references: u32,
    /// The lowest and highest host cluster that it refers to, in units of `1 << REACH_BITS`; learnt by the first walk.
    pub(super) reach: (u32, u32),
}

/// See [`L2::reach`].
pub(super) const REACH_BITS: u32 = 16;

impl L2 {
    pub(super) fn is_active(&self) -> bool {
        self.l1_index != u32::MAX
    }
}

/// All tables but L2 and below.
#[derive(Debug, Default)]
pub(super) struct Layout {
    /// Metadata that only one place refers to.
    pub(super) sole: Vec<Region>,
    /// The offsets of the refcount blocks by their index; 0 where there is none or its entry is broken.
    pub(super) blocks: Vec<u64>,
    /// Active ones first, in the order of the guest's disk.
    pub(super) l2: Vec<L2>,
    /// Tables of bitmaps.
    pub(super) bitmap_tables: Vec<Table>,
    /// Some references can't be followed: what seems to be unused may be in use.
    pub(super) lost_references: bool,
    /// The refcount table itself is damaged, so that refcounts can't be corrected where they are.
    pub(super) refcounts_damaged: bool,
}

impl Layout {
    /// Reads everything that the header leads to, and reports what is wrong with it.
    pub(super) async fn read(medium: &Medium, geometry: &Geometry, report: &mut CheckReport) -> Result<Self> {
        let mut layout = Layout::default();
        let mut reader = Reader { medium, geometry, report, layout: &mut layout, tables_bytes: 0 };
        reader.region(0, geometry.cluster_size(), "the header");
        reader.refcount_table().await?;
        reader.l1_tables().await?;
        reader.bitmaps().await?;
        Ok(layout)
    }
}

pub(super) struct Reader<'a> {
    pub(super) medium: &'a Medium,
    pub(super) geometry: &'a Geometry,
    pub(super) report: &'a mut CheckReport,
    pub(super) layout: &'a mut Layout,
    /// How many bytes of tables were followed so far.
    pub(super) tables_bytes: u64,
}

impl Reader<'_> {
    /// Notes metadata at `offset`; false, with a report, if it isn't within the file.
    pub(super) fn region(&mut self, offset: u64, len: u64, what: &str) -> bool {
        if self.geometry.clusters(offset, len).is_none() {
            self.report.corruption(|| {
                format!("{what}, {len} bytes at {offset:#x}, reaches past the end of the file")
            });
            return false;
        }
        self.layout.sole.push(Region { offset, len, what: what.to_owned() });
        true
    }

    /// Refuses images whose tables are larger than any real one's.
    pub(super) fn spend(&mut self, bytes: u64) -> Result<()> {
        self.tables_bytes = self.tables_bytes.saturating_add(bytes);
        if self.tables_bytes > MAX_TABLES {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "{}: its L1, snapshot and bitmap tables together have more than {MAX_TABLES} bytes, so the check gives up; a sound image has \
                     a few megabytes of them",
                    self.geometry.name
                ),
            ));
        }
        Ok(())
    }

    async fn refcount_table(&mut self) -> Result<()> {
        let geometry = self.geometry;
        let Table { offset, entries } = geometry.reftable;
        if !self.region(offset, entries * 8, "the refcount table") {
            self.layout.refcounts_damaged = true;
            return Ok(());
        }
        self.spend(entries * 8)?;
        let mut blocks = Vec::new();
        for (first, piece) in pieces(entries) {
            let table = self.medium.read(offset + first * 8, piece * 8).await?;
            for (i, entry) in entries_of(&table).enumerate() {
                let block = self.refcount_block(first + i as u64, entry);
                blocks.push(block.unwrap_or(0));
            }
        }
        while blocks.last() == Some(&0) {
            blocks.pop();
        }
        self.layout.blocks = blocks;
        Ok(())
    }

    /// The offset of a refcount block, if there is one and its entry is sound.
    fn refcount_block(&mut self, index: u64, entry: u64) -> Option<u64> {
        let geometry = self.geometry;
        let damage = if entry == 0 {
            return None;
        } else if entry & REFTABLE_RESERVED != 0 {
            "has reserved bits set"
        } else if !geometry.is_aligned(entry) {
            "is not aligned to a cluster"
        } else if geometry.clusters(entry, geometry.cluster_size()).is_none() {
            "points past the end of the file"
        } else {
            return Some(entry);
        };
        self.report.corruption(|| format!("refcount table entry {index}, {entry:#x}, {damage}"));
        self.layout.refcounts_damaged = true;
        None
    }

    async fn l1_tables(&mut self) -> Result<()> {
        let geometry = self.geometry;
        let mut found = Vec::new();
        if geometry.l1.entries > 0 {
            if self.region(geometry.l1.offset, geometry.l1.entries * 8, "the L1 table") {
                self.l1_table(geometry.l1, true, 1, "the L1 table", &mut found).await?;
            } else {
                self.layout.lost_references = true;
            }
        }
        if geometry.snapshot_count > 0 {
            self.snapshots(&mut found).await?;
        }
        compact(&mut found);
        found.sort_by_key(|l2| (l2.l1_index, l2.offset));
        self.layout.l2 = found;
        Ok(())
    }

    async fn snapshots(&mut self, found: &mut Vec<L2>) -> Result<()> {
        let geometry = self.geometry;
        let table = snapshots::read(self.medium, geometry, self.report).await?;
        self.layout.lost_references |= !table.complete;
        if !self.region(geometry.snapshots_offset, table.len, "the snapshot table") {
            self.layout.lost_references = true;
            return Ok(());
        }
        // Snapshots that claim the same L1 table are followed once: an attacker may write thousands of them.
        let mut tables: Vec<(Table, u32, String)> = Vec::new();
        for snapshot in table.snapshots {
            let what = format!("the L1 table of snapshot {}", snapshot.label);
            if !geometry.is_aligned(snapshot.l1.offset) {
                let offset = snapshot.l1.offset;
                self.report.corruption(|| format!("{what}, at {offset:#x}, is not aligned to a cluster"));
                self.layout.lost_references = true;
            } else if snapshot.l1.entries > 0 {
                if self.region(snapshot.l1.offset, snapshot.l1.entries * 8, &what) {
                    tables.push((snapshot.l1, 1, what));
                } else {
                    self.layout.lost_references = true;
                }
            }
        }
        tables.sort_by_key(|(table, ..)| (table.offset, table.entries));
        tables.dedup_by(|next, first| {
            let same = next.0 == first.0;
            first.1 += u32::from(same) * next.1;
            same
        });
        for (table, references, what) in tables {
            self.l1_table(table, false, references, &what, found).await?;
        }
        Ok(())
    }

    /// Follows the entries of an L1 table that `references` places refer to.
    async fn l1_table(
        &mut self,
        table: Table,
        active: bool,
        references: u32,
        what: &str,
        found: &mut Vec<L2>,
    ) -> Result<()> {
        let geometry = self.geometry;
        self.spend(table.entries * 8)?;
        for (first, piece) in pieces(table.entries) {
            let entries = self.medium.read(table.offset + first * 8, piece * 8).await?;
            for (i, entry) in entries_of(&entries).enumerate().filter(|(_, entry)| *entry != 0) {
                let index = first + i as u64;
                if entry & L1_RESERVED != 0 {
                    self.report
                        .corruption(|| format!("{what}: entry {index}, {entry:#x}, has reserved bits set"));
                }
                let offset = entry & L1_OFFSET;
                let damage = if offset == 0 {
                    "says that there is an L2 table but not where"
                } else if !geometry.is_aligned(offset) {
                    "is not aligned to a cluster"
                } else if geometry.clusters(offset, geometry.cluster_size()).is_none() {
                    "points past the end of the file"
                } else {
                    let l1_index = if active { index as u32 } else { u32::MAX };
                    found.push(L2 { offset, l1_index, references, reach: (0, u32::MAX) });
                    continue;
                };
                self.report.corruption(|| format!("{what}: entry {index}, {entry:#x}, {damage}"));
                self.layout.lost_references = true;
            }
            if found.len() > MAX_L2 {
                compact(found);
            }
            if found.len() > MAX_L2 {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("{}: it has more than {MAX_L2} L2 tables, so the check gives up", geometry.name),
                ));
            }
        }
        Ok(())
    }
}

/// Makes one of all entries for the same L2 table.
fn compact(found: &mut Vec<L2>) {
    found.sort_by_key(|l2| (l2.offset, l2.l1_index));
    found.dedup_by(|next, first| {
        let same = next.offset == first.offset;
        if same {
            first.references = first.references.saturating_add(next.references);
        }
        same
    });
}

/// Splits a table of `entries` into pieces of (first, number) entries.
pub(super) fn pieces(entries: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..entries).step_by(PIECE as usize / 8).map(move |first| (first, (entries - first).min(PIECE / 8)))
}

/// The 8-byte entries of a table.
pub(super) fn entries_of(table: &[u8]) -> impl Iterator<Item = u64> + '_ {
    table.chunks_exact(8).map(be64)
}

/// The big-endian number in 8 bytes.
pub(super) fn be64(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// The big-endian number in 4 bytes.
pub(super) fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).fold(0, |n, byte| n << 8 | u32::from(*byte))
}
