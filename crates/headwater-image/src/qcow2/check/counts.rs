//! How often each cluster of the file is referred to, in bounded memory.
//!
//! Counts are kept for one window of clusters at a time. A window starts as everything that is left; whenever memory runs out it
//! loses its upper end, and the next pass over the tables starts there. An image up to the bound (the default suffices for 4 TiB in
//! clusters of 64 KiB) is counted in one pass, a larger one in a few.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;

/// Clusters per piece of the map; a power of two. Tests want small images to take several windows.
const CHUNK: u64 = if cfg!(test) { 64 } else { 16 << 10 };
const CHUNK_BYTES: u64 = CHUNK * size_of::<u16>() as u64;

/// How many pieces a window may span, most of them empty: 4 MiB of directory. Tests want sparse files to take several windows, too.
const MAX_SPAN: u64 = if cfg!(test) { 1 << 12 } else { 1 << 20 };

/// The low bits of a cell count references; this value says that [`Counts::large`] does.
const COUNT_MASK: u16 = 0x03ff;
/// The bit of a cell that says that the image stores a count of one.
const STORED_ONCE: u16 = 0x1000;
/// The bits that say that some active L2 entry for the cluster has the flag for "exactly one reference", or lacks it.
const FLAGGED: u16 = 0x0800;
const UNFLAGGED: u16 = 0x0400;

/// How many clusters of a window may have so many references that their cell doesn't suffice; about 32 MiB.
const MAX_LARGE: usize = if cfg!(test) { 256 } else { 1 << 20 };

/// What refers to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// A table that only one place may refer to: the header, the L1 tables, reference counts, snapshots, bitmaps.
    Sole,
    /// An L2 table, which snapshots share.
    L2,
    /// The guest's data, which snapshots share.
    Data,
}

impl Owner {
    fn flag(self) -> u16 {
        match self {
            Owner::Sole => 0x8000,
            Owner::L2 => 0x4000,
            Owner::Data => 0x2000,
        }
    }
}

/// What is known of one cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Count {
    /// How many references there are.
    pub(super) references: u64,
    /// Things lie here that must not lie in the same place.
    pub(super) overlap: bool,
    /// Some active L2 entry for it has the flag for "exactly one reference".
    pub(super) flagged: bool,
    /// Some active L2 entry for it lacks that flag.
    pub(super) unflagged: bool,
}

/// The counts of a window of clusters.
pub(super) struct Counts {
    /// The pieces of the map that there are, in no order.
    chunks: Vec<Box<[u16]>>,
    /// Those that nobody uses.
    free: Vec<u32>,
    /// For each piece of the span that starts at `base` (in pieces) its index in `chunks` plus one; 0 where there is none.
    directory: Vec<u32>,
    base: u64,
    /// The piece that was looked up last, and its index in `chunks`.
    last: Cell<(u64, u32)>,
    large: BTreeMap<u64, u64>,
    window: Range<u64>,
    /// The lowest cluster with references above the window, as far as that is known.
    above: u64,
    /// The number of clusters of the file.
    clusters: u64,
    max_chunks: usize,
    /// Windows end at multiples of this many clusters.
    align: u64,
    /// There was no room for all large counts.
    overflow: bool,
}

impl Counts {
    /// Counts of no cluster yet, in about `memory` bytes, for a file of `clusters`. Windows cover whole groups of `group` clusters, a
    /// power of two.
    pub(super) fn new(memory: u64, clusters: u64, group: u64) -> Self {
        let align = group.max(CHUNK);
        // A window must have room for two groups, so that it has one when it shrinks.
        let max_chunks = (memory / CHUNK_BYTES).max(2 * align / CHUNK) as usize;
        Self {
            chunks: Vec::new(),
            free: Vec::new(),
            directory: Vec::new(),
            base: 0,
            last: Cell::new((u64::MAX, 0)),
            large: BTreeMap::new(),
            window: 0..0,
            above: 0,
            clusters,
            max_chunks,
            align,
            overflow: false,
        }
    }

    /// Starts over with the clusters from the end of the last window on.
    pub(super) fn next_window(&mut self) {
        self.large.clear();
        self.free = (0..self.chunks.len() as u32).collect();
        let start = self.window.end;
        let base = start.max(self.above.min(self.clusters) / self.align * self.align);
        let span = (MAX_SPAN * CHUNK).max(2 * self.align);
        let end = base.saturating_add(span);
        self.window = start..if end < self.clusters { end } else { u64::MAX };
        self.base = base / CHUNK;
        self.directory.clear();
        let pieces = self.clusters.min(end).saturating_sub(base).div_ceil(CHUNK);
        self.directory.resize(pieces as usize, 0);
        self.last.set((u64::MAX, 0));
        self.above = u64::MAX;
    }

    /// The clusters that are counted; after a pass over everything, those whose counts are complete.
    pub(super) fn window(&self) -> Range<u64> {
        self.window.clone()
    }

    /// True if nothing lies above the window.
    pub(super) fn is_last(&self) -> bool {
        self.window.end == u64::MAX
    }

    /// True if some counts are too low because too many are large.
    pub(super) fn overflowed(&self) -> bool {
        self.overflow
    }

    /// Tells of references to `cluster` and others above it, none of which are in the window.
    pub(super) fn pass_over(&mut self, cluster: u64) {
        self.above = self.above.min(cluster);
    }

    /// Adds references to a cluster of the file; one outside the window is left for another pass.
    #[inline]
    pub(super) fn add(&mut self, cluster: u64, references: u64, owner: Owner) {
        if let Some(cell) = self.cell(cluster) {
            *cell |= owner.flag();
            self.add_to_cell(cluster, references);
        }
    }

    /// The same for an active L2 entry, which has the flag for "exactly one reference" or hasn't.
    #[inline]
    pub(super) fn add_active(&mut self, cluster: u64, references: u64, flag: bool) {
        if let Some(cell) = self.cell(cluster) {
            *cell |= Owner::Data.flag() | if flag { FLAGGED } else { UNFLAGGED };
            self.add_to_cell(cluster, references);
        }
    }

    /// Adds to the count of a cluster whose piece was looked up last.
    #[inline]
    fn add_to_cell(&mut self, cluster: u64, references: u64) {
        let cell = &mut self.chunks[self.last.get().1 as usize][(cluster % CHUNK) as usize];
        let total = u64::from(*cell & COUNT_MASK).saturating_add(references);
        if total < u64::from(COUNT_MASK) {
            *cell = *cell & !COUNT_MASK | total as u16;
        } else {
            self.add_large(cluster, references);
        }
    }

    #[cold]
    fn add_large(&mut self, cluster: u64, references: u64) {
        let cell = &mut self.chunks[self.last.get().1 as usize][(cluster % CHUNK) as usize];
        let total = match self.large.get(&cluster) {
            Some(large) => large.saturating_add(references),
            None => u64::from(*cell & COUNT_MASK).saturating_add(references),
        };
        *cell |= COUNT_MASK;
        if self.large.len() >= MAX_LARGE && !self.large.contains_key(&cluster) {
            let middle = self.large.keys().nth(MAX_LARGE / 2).copied().unwrap_or(0);
            self.overflow |= !self.cut(middle);
            if self.overflow || cluster >= self.window.end {
                return;
            }
        }
        self.large.insert(cluster, total);
    }

    /// The cell of a cluster, if that is in the window, which may shrink by it.
    #[inline]
    fn cell(&mut self, cluster: u64) -> Option<&mut u16> {
        let key = cluster / CHUNK;
        let (last, mut index) = self.last.get();
        if key != last {
            index = self.look_up(cluster)?;
        }
        Some(&mut self.chunks[index as usize][(cluster % CHUNK) as usize])
    }

    fn look_up(&mut self, cluster: u64) -> Option<u32> {
        if cluster >= self.window.end {
            self.above = self.above.min(cluster);
            return None;
        }
        let key = cluster / CHUNK;
        let place = self.directory.get_mut(usize::try_from(key.checked_sub(self.base)?).ok()?)?;
        if *place == 0 {
            let index = match self.free.pop() {
                Some(index) => {
                    self.chunks[index as usize].fill(0);
                    index
                }
                None => {
                    self.chunks.push(vec![0; CHUNK as usize].into_boxed_slice());
                    self.chunks.len() as u32 - 1
                }
            };
            *place = index + 1;
            if self.chunks.len() - self.free.len() > self.max_chunks {
                self.shrink();
                if cluster >= self.window.end {
                    return None;
                }
            }
            self.last.set((key, index));
            return Some(index);
        }
        let index = *place - 1;
        self.last.set((key, index));
        Some(index)
    }

    /// Gives up the upper end of the window: an eighth of what is in memory, so that it isn't done for each piece.
    fn shrink(&mut self) {
        let many = (self.max_chunks / 8).max(1);
        let used = self.directory.iter().enumerate().rev().filter(|(_, place)| **place != 0);
        if let Some((lowest, _)) = used.take(many).last() {
            self.cut((self.base + lowest as u64) * CHUNK);
        }
    }

    /// Makes the window end at `end` or a little before; false if it can't.
    fn cut(&mut self, end: u64) -> bool {
        let end = end / self.align * self.align;
        if end <= self.window.start {
            return false;
        }
        self.window.end = end;
        let kept = (end / CHUNK).saturating_sub(self.base) as usize;
        for (i, place) in self.directory.iter_mut().enumerate().skip(kept).filter(|(_, place)| **place != 0) {
            self.free.push(*place - 1);
            *place = 0;
            self.above = self.above.min((self.base + i as u64) * CHUNK);
        }
        self.directory.truncate(kept);
        self.large.split_off(&end);
        self.last.set((u64::MAX, 0));
        true
    }

    /// The piece of the map that a cluster is in, if it is there.
    #[inline]
    fn chunk(&self, cluster: u64) -> Option<usize> {
        let key = cluster / CHUNK;
        let (last, index) = self.last.get();
        if key == last {
            return Some(index as usize);
        }
        let place = *self.directory.get(usize::try_from(key.checked_sub(self.base)?).ok()?)?;
        let index = place.checked_sub(1)?;
        self.last.set((key, index));
        Some(index as usize)
    }

    /// What is known of a cluster of the window.
    #[inline]
    pub(super) fn get(&self, cluster: u64) -> Count {
        let cell = self.chunk(cluster).map_or(0, |chunk| self.chunks[chunk][(cluster % CHUNK) as usize]);
        self.decode(cluster, cell)
    }

    #[inline]
    fn decode(&self, cluster: u64, cell: u16) -> Count {
        let references = match cell & COUNT_MASK {
            COUNT_MASK => self.large.get(&cluster).copied().unwrap_or(u64::from(COUNT_MASK)),
            small => u64::from(small),
        };
        let sole = cell & Owner::Sole.flag() != 0 && references > 1;
        let mixed = cell & Owner::L2.flag() != 0 && cell & Owner::Data.flag() != 0;
        let (flagged, unflagged) = (cell & FLAGGED != 0, cell & UNFLAGGED != 0);
        Count { references, overlap: sole || mixed, flagged, unflagged }
    }

    /// Notes that the image stores a count of one for a cluster that is referred to.
    #[inline]
    pub(super) fn mark_stored_once(&mut self, cluster: u64) {
        if let Some(chunk) = self.chunk(cluster) {
            self.chunks[chunk][(cluster % CHUNK) as usize] |= STORED_ONCE;
        }
    }

    /// What [`Counts::mark_stored_once`] noted.
    #[inline]
    pub(super) fn is_stored_once(&self, cluster: u64) -> bool {
        let chunk = self.chunk(cluster);
        chunk.is_some_and(|chunk| self.chunks[chunk][(cluster % CHUNK) as usize] & STORED_ONCE != 0)
    }

    /// The pieces that are there, in order, with the first cluster of each.
    fn pieces(&self, from: u64) -> impl Iterator<Item = (u64, &[u16])> {
        let skip = usize::try_from((from / CHUNK).saturating_sub(self.base)).unwrap_or(usize::MAX);
        let there = self.directory.iter().enumerate().skip(skip).filter(|(_, place)| **place != 0);
        there.map(|(i, place)| ((self.base + i as u64) * CHUNK, &*self.chunks[*place as usize - 1]))
    }

    /// The clusters of the window in which things lie that must not lie in the same place, in order.
    pub(super) fn overlaps(&self) -> impl Iterator<Item = u64> {
        self.pieces(0).flat_map(move |(first, cells)| {
            let several = referenced(cells, 0).filter(|(_, cell)| *cell & COUNT_MASK > 1);
            let clusters = several.map(move |(i, cell)| (first + i as u64, cell));
            clusters
                .filter(|(cluster, cell)| self.decode(*cluster, *cell).overlap)
                .map(|(cluster, _)| cluster)
        })
    }

    /// The first cluster of `clusters` in the window that is referred to.
    pub(super) fn next_referenced(&self, clusters: Range<u64>) -> Option<u64> {
        self.pieces(clusters.start).take_while(|(first, _)| *first < clusters.end).find_map(
            |(first, cells)| {
                let skip = clusters.start.saturating_sub(first) as usize;
                let (i, _) = referenced(cells, skip).next()?;
                Some(first + i as u64).filter(|cluster| *cluster < clusters.end)
            },
        )
    }
}

/// The cells of a piece that aren't zero, from one on, with their indices.
fn referenced(cells: &[u16], from: usize) -> impl Iterator<Item = (usize, u16)> {
    // Much of a sparse file's pieces is zero, and compared quickly.
    const GROUP: usize = 64;
    let groups = cells.chunks(GROUP).enumerate().skip(from / GROUP);
    let groups = groups.filter(|(_, group)| **group != [0; GROUP][..group.len()]);
    let cells =
        groups.flat_map(|(g, group)| group.iter().enumerate().map(move |(i, cell)| (g * GROUP + i, *cell)));
    cells.filter(move |(i, cell)| *i >= from && *cell != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(memory: u64, group: u64, references: &[(u64, u64)]) -> (BTreeMap<u64, u64>, usize) {
        let mut counts = Counts::new(memory, 1 << 40, group);
        let mut found = BTreeMap::new();
        for pass in 1.. {
            counts.next_window();
            for (cluster, n) in references {
                counts.add(*cluster, *n, Owner::Data);
            }
            assert!(counts.chunks.len() <= counts.max_chunks + 1 && counts.large.len() <= MAX_LARGE);
            assert!(!counts.overflowed());
            let mut from = counts.window().start;
            while let Some(cluster) = counts.next_referenced(from..u64::MAX) {
                assert!(counts.window().contains(&cluster));
                assert_eq!(found.insert(cluster, counts.get(cluster).references), None);
                from = cluster + 1;
            }
            if counts.is_last() {
                return (found, pass);
            }
            assert!(counts.window().end.is_multiple_of(group) && !counts.window().is_empty());
        }
        unreachable!()
    }

    #[test]
    fn windows_together_count_what_one_would() {
        let references: Vec<_> =
            (0..20_000).map(|i| ((i * 7919) % 9973 * 1000 + (i * 31) % 7, 1 + (i % 3) * 5000)).collect();
        let mut expected = BTreeMap::new();
        for (cluster, n) in &references {
            *expected.entry(*cluster).or_insert(0) += n;
        }
        // Whatever makes windows small: memory, the span of the directory, and how many large counts there are.
        let few_large: Vec<_> = references.iter().map(|(cluster, n)| (cluster % 100_000, n % 100)).collect();
        let (found, passes) = all(1 << 30, 1, &few_large);
        // The second one finds that there is nothing in the rest of the file.
        assert_eq!((found.values().sum::<u64>(), passes), (20_000, 2));
        for (memory, group) in [(1 << 30, 1), (400 * CHUNK_BYTES, 1), (400 * CHUNK_BYTES, 64), (0, 1 << 16)] {
            let (found, passes) = all(memory, group, &references);
            assert!(found == expected, "{memory}, {group}");
            assert!(passes > 3 && passes < 1000, "{passes}");
        }
    }

    #[test]
    fn what_lies_in_the_same_place_is_noticed() {
        let mut counts = Counts::new(1 << 20, 100, 1);
        counts.next_window();
        counts.add(1, 2, Owner::Data);
        counts.add(2, 2, Owner::L2);
        counts.add(3, 1, Owner::Sole);
        for cluster in 1..4 {
            assert!(!counts.get(cluster).overlap, "{cluster}");
        }
        counts.add(1, 1, Owner::L2);
        counts.add(3, 1, Owner::Data);
        assert!(counts.get(1).overlap && counts.get(3).overlap);
        assert_eq!((counts.get(4).references, counts.get(4).overlap), (0, false));
        assert_eq!((counts.next_referenced(2..9), counts.next_referenced(4..9)), (Some(2), None));
        assert_eq!(counts.overlaps().collect::<Vec<_>>(), [1, 3]);
    }
}
