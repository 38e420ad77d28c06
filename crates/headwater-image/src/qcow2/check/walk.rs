//! Counting references: a walk over everything that refers to a cluster.

use super::bitmaps::bitmap_entry;
use super::counts::{Counts, Owner};
use super::layout::{self, COPIED, Geometry, L2, Layout, REACH_BITS};
use super::medium::Medium;
use super::report::CheckReport;
use futures_util::stream::{self, StreamExt};
use headwater_block::{BufferMut, Result};

/// How many bytes of tables are read ahead, and how many tables at most.
const READ_AHEAD: u64 = 4 << 20;
const MOST_READS: u64 = 64;

/// The bit of an L2 entry that says that the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// The bit that says that it reads as zeroes, where there are no subclusters.
const ZERO: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The bits of an entry that isn't compressed that must be zero.
const RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// An L2 entry as it stands there, sound or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    /// Nothing here refers to a host cluster.
    None,
    /// Refers to the host cluster at this offset in bytes.
    Cluster(u64),
    /// Refers to compressed data at this offset, of at most this length, in bytes.
    Compressed(u64, u64),
}

impl Entry {
    pub(super) fn of(word: u64, geometry: &Geometry) -> Self {
        if word & COMPRESSED != 0 {
            let offset_bits = 62 - (geometry.cluster_bits - 8);
            let offset = word & ((1 << offset_bits) - 1);
            let sectors = (word & !(COMPRESSED | COPIED)) >> offset_bits;
            return Entry::Compressed(offset, (sectors + 1) * 512 - offset % 512);
        }
        let offset = word & OFFSET;
        // In an external data file, offset 0 is a cluster like any other.
        if offset == 0 && !(geometry.data_file && word & COPIED != 0) {
            Entry::None
        } else {
            Entry::Cluster(offset)
        }
    }
}

/// What is wrong with an entry in itself, wherever it points.
fn problem(word: u64, bitmap: u64, geometry: &Geometry) -> Option<&'static str> {
    let (data, zero) = (bitmap as u32, (bitmap >> 32) as u32);
    if word & COMPRESSED != 0 {
        return if word & COPIED != 0 {
            Some("is compressed and marked as writable in place")
        } else if geometry.data_file {
            Some("is compressed, in an image with an external data file")
        } else if bitmap != 0 {
            Some("is compressed and has a subcluster bitmap")
        } else {
            None
        };
    }
    if word & RESERVED != 0 {
        Some("has reserved bits set")
    } else if geometry.extended_l2 && word & ZERO != 0 {
        Some("has the zero flag set, which subclusters replace")
    } else if geometry.version < 3 && word & ZERO != 0 {
        Some("has the zero flag set, which version 2 doesn't have")
    } else if data & zero != 0 {
        Some("has subclusters marked both as data and as zeroes")
    } else if data != 0 && Entry::of(word, geometry) == Entry::None {
        Some("has subclusters marked as data, but no host cluster")
    } else {
        None
    }
}

/// The words of the entries of an L2 table: the entry, and its subcluster bitmap or 0.
pub(super) fn words<'a>(table: &'a [u8], geometry: &Geometry) -> impl Iterator<Item = (u64, u64)> + use<'a> {
    let size = geometry.l2_entry_size() as usize;
    table
        .chunks_exact(size)
        .map(|entry| (layout::be64(entry), layout::be64(entry.get(8..).unwrap_or_default())))
}

/// A walk that fills the counts of one window.
pub(super) struct Walk<'a> {
    pub(super) medium: &'a Medium,
    pub(super) geometry: &'a Geometry,
    pub(super) counts: &'a mut Counts,
    /// Where to report what is wrong; only the first walk does.
    pub(super) report: Option<&'a mut CheckReport>,
    /// Where the previous cluster of the same active table ends in the file, to notice fragmentation.
    expected: Option<u64>,
    /// Some flags are wrong whatever the counts are.
    pub(super) flags_wrong: bool,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        medium: &'a Medium,
        geometry: &'a Geometry,
        counts: &'a mut Counts,
        report: Option<&'a mut CheckReport>,
    ) -> Self {
        Self { medium, geometry, counts, report, expected: None, flags_wrong: false }
    }

    /// Counts every reference, those of the refcount structures only if `with_refcounts`.
    pub(super) async fn run(&mut self, layout: &mut Layout, with_refcounts: bool) -> Result<()> {
        let geometry = self.geometry;
        for region in &layout.sole {
            let is_refcounts = region.offset == geometry.reftable.offset;
            if with_refcounts || !is_refcounts {
                self.add(region.offset, region.len, 1, Owner::Sole);
            }
        }
        if with_refcounts {
            for block in layout.blocks.iter().filter(|block| **block != 0) {
                self.add(*block, geometry.cluster_size(), 1, Owner::Sole);
            }
        }
        self.bitmaps(layout).await?;
        for l2 in &layout.l2 {
            self.add(l2.offset, geometry.cluster_size(), u64::from(l2.references), Owner::L2);
        }
        self.l2_tables(layout).await
    }

    /// Adds references to a region; false if it isn't within the file.
    fn add(&mut self, offset: u64, len: u64, references: u64, owner: Owner) -> bool {
        let Some(clusters) = self.geometry.clusters(offset, len) else { return false };
        for cluster in clusters {
            self.counts.add(cluster, references, owner);
        }
        true
    }

    fn corruption(&mut self, message: impl FnOnce() -> String) {
        if let Some(report) = &mut self.report {
            report.corruption(message);
        }
    }

    async fn bitmaps(&mut self, layout: &mut Layout) -> Result<()> {
        for table in &layout.bitmap_tables {
            for (first, piece) in layout::pieces(table.entries) {
                let bytes = self.medium.read(table.offset + first * 8, piece * 8).await?;
                for (i, entry) in layout::entries_of(&bytes).enumerate() {
                    let (cluster, sound) = bitmap_entry(self.geometry, entry);
                    if let Some(cluster) = cluster {
                        self.counts.add(cluster, 1, Owner::Sole);
                    }
                    if !sound {
                        layout.lost_references = true;
                        let index = first + i as u64;
                        self.corruption(|| {
                            format!(
                                "entry {index} of the bitmap table at {:#x}, {entry:#x}, is invalid",
                                table.offset
                            )
                        });
                    }
                }
            }
        }
        Ok(())
    }

    async fn l2_tables(&mut self, layout: &mut Layout) -> Result<()> {
        let first_walk = self.report.is_some();
        let window = self.counts.window();
        let mut offsets = Vec::new();
        for (i, l2) in layout.l2.iter().enumerate() {
            let (low, high) = (u64::from(l2.reach.0) << REACH_BITS, u64::from(l2.reach.1));
            if first_walk || high >= window.start >> REACH_BITS && low < window.end {
                offsets.push((i, l2.offset));
            } else if low >= window.end {
                self.counts.pass_over(low);
            }
        }
        let mut tables = read_tables(self.medium, self.geometry, offsets);
        while let Some((index, table)) = tables.next().await {
            let table = table?;
            let l2 = &mut layout.l2[index];
            let (reach, lost) = self.l2_table(l2, &table);
            l2.reach = reach;
            layout.lost_references |= lost;
        }
        Ok(())
    }

    /// Counts what one table refers to. Returns its reach, and whether it has references that can't be followed.
    fn l2_table(&mut self, l2: &L2, table: &[u8]) -> ((u32, u32), bool) {
        let geometry = self.geometry;
        let mut found = Reach { low: u64::MAX, high: 0, lost: false };
        self.expected = None;
        // Nearly all entries are of this kind: a whole cluster, with nothing to find fault with.
        let odd = COMPRESSED | RESERVED | ZERO | OFFSET & (geometry.cluster_size() - 1);
        let plain = !geometry.extended_l2 && !geometry.data_file && l2.is_active();
        let end = geometry.file_size;
        for (i, (word, bitmap)) in words(table, geometry).enumerate() {
            let offset = word & OFFSET;
            if plain && word & odd == 0 && offset != 0 && offset < end {
                self.statistics(offset, false);
                let cluster = offset >> geometry.cluster_bits;
                self.counts.add_active(cluster, u64::from(l2.references), word & COPIED != 0);
                found.add(cluster, cluster);
            } else if word | bitmap != 0 {
                self.entry(l2, i, word, bitmap, &mut found);
            }
        }
        let (low, high) = (found.low >> REACH_BITS, found.high >> REACH_BITS);
        ((low.try_into().unwrap_or(u32::MAX), high.try_into().unwrap_or(u32::MAX)), found.lost)
    }

    /// Counts what the entry `i` of a table refers to, whatever it is.
    fn entry(&mut self, l2: &L2, i: usize, word: u64, bitmap: u64, found: &mut Reach) {
        let (geometry, at) = (self.geometry, l2.offset);
        if let Some(problem) = problem(word, bitmap, geometry) {
            self.corruption(|| format!("entry {i} of the L2 table at {at:#x}, {word:#x}, {problem}"));
        }
        let (offset, len) = match Entry::of(word, geometry) {
            Entry::None => return,
            Entry::Cluster(offset) => (offset, geometry.cluster_size()),
            Entry::Compressed(offset, len) => (offset, len),
        };
        let compressed = word & COMPRESSED != 0;
        if !compressed && !geometry.is_aligned(offset) {
            self.corruption(|| {
                format!("entry {i} of the L2 table at {at:#x}, {word:#x}, is not aligned to a cluster")
            });
        }
        if l2.is_active() {
            self.statistics(offset, compressed);
        }
        if geometry.data_file && !compressed {
            // Its clusters have no counts; each has one reference.
            self.flags_wrong |= l2.is_active() && word & COPIED == 0;
            if l2.is_active() && geometry.data_file_raw {
                let index =
                    u64::from(l2.l1_index) * (geometry.l2_coverage() >> geometry.cluster_bits) + i as u64;
                if offset != index << geometry.cluster_bits {
                    self.corruption(|| {
                        format!("entry {i} of the L2 table at {at:#x}, {word:#x}, breaks the rule that the data file is a raw image")
                    });
                }
            }
            return;
        }
        let references = u64::from(l2.references);
        let Some(clusters) = geometry.clusters(offset, len) else {
            found.lost = true;
            self.corruption(|| {
                format!("entry {i} of the L2 table at {at:#x}, {word:#x}, points past the end of the file")
            });
            return;
        };
        found.add(*clusters.start(), *clusters.end());
        if l2.is_active() && !compressed && geometry.is_aligned(offset) {
            self.counts.add_active(*clusters.start(), references, word & COPIED != 0);
            return;
        }
        for cluster in clusters {
            self.counts.add(cluster, references, Owner::Data);
        }
    }

    #[inline]
    fn statistics(&mut self, offset: u64, compressed: bool) {
        let Some(report) = &mut self.report else { return };
        report.allocated_clusters += 1;
        if compressed {
            report.compressed_clusters += 1;
            report.fragmented_clusters += 1;
        } else {
            report.fragmented_clusters += u64::from(self.expected.is_some_and(|expected| expected != offset));
            self.expected = offset.checked_add(self.geometry.cluster_size());
        }
    }
}

/// The host clusters that a table refers to.
struct Reach {
    low: u64,
    high: u64,
    /// It has references that can't be followed.
    lost: bool,
}

impl Reach {
    #[inline]
    fn add(&mut self, first: u64, last: u64) {
        self.low = self.low.min(first);
        self.high = self.high.max(last);
    }
}

/// Reads L2 tables, several at once, in the order given; each comes with the index that was given with its offset.
pub(super) fn read_tables<'a>(
    medium: &'a Medium,
    geometry: &'a Geometry,
    offsets: Vec<(usize, u64)>,
) -> impl StreamExt<Item = (usize, Result<BufferMut>)> + Unpin + 'a {
    let reads = offsets.into_iter().map(move |(index, offset)| async move {
        (index, medium.read(offset, geometry.cluster_size()).await)
    });
    let depth = (READ_AHEAD / geometry.cluster_size()).clamp(2, MOST_READS);
    Box::pin(stream::iter(reads).buffered(depth as usize))
}
