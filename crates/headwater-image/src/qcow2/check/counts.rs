//! How often each cluster of the file is referred to, in bounded memory.
//!
//! Counts are kept for one window of clusters at a time. A window starts as everything that is left; whenever memory runs out it
//! loses its upper end, and the next pass over the tables starts there. An image up to the bound (the default suffices for 4 TiB in
//! clusters of 64 KiB) is counted in one pass, a larger one in a few.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

/// Clusters per piece of the map; a power of two. Tests want small images to take several windows.
const CHUNK: u64 = if cfg!(test) { 64 } else { 16 << 10 };
const CHUNK_BYTES: u64 = CHUNK * size_of::<u16>() as u64;

/// The low bits of a cell count references; this value says that [`Counts::large`] does.
const COUNT_MASK: u16 = 0x03ff;
/// The bit of a cell that says that the image stores a count of one.
const STORED_ONCE: u16 = 0x1000;
/// The bits that say that some active L2 entry for the cluster has the flag for "exactly one reference", or lacks it.
const FLAGGED: u16 = 0x0800;
const UNFLAGGED: u16 = 0x0400;

/// How many clusters may have so many references that their cell doesn't suffice.
const MAX_LARGE: usize = 1 << 20;

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
    chunks: BTreeMap<u64, Box<[u16]>>,
    large: BTreeMap<u64, u64>,
    window: Range<u64>,
    max_chunks: usize,
    /// Windows end at multiples of this many clusters.
    align: u64,
    /// There was no room for all large counts.
    overflow: bool,
}

impl Counts {
    /// Counts of no cluster yet, in about `memory` bytes. Windows cover whole groups of `group` clusters, a power of two.
    pub(super) fn new(memory: u64, group: u64) -> Self {
        let align = group.max(CHUNK);
        // A window must have room for a group, and for one chunk more before it shrinks.
        let max_chunks = (memory / CHUNK_BYTES).max(2 * align / CHUNK) as usize;
        Self {
            chunks: BTreeMap::new(),
            large: BTreeMap::new(),
            window: 0..0,
            max_chunks,
            align,
            overflow: false,
        }
    }

    /// Starts over with the clusters from the end of the last window on.
    pub(super) fn next_window(&mut self) {
        self.chunks.clear();
        self.large.clear();
        self.window = self.window.end..u64::MAX;
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

    /// Adds references to a cluster; one outside the window is left for another pass.
    pub(super) fn add(&mut self, cluster: u64, references: u64, owner: Owner) {
        if !self.window.contains(&cluster) || references == 0 {
            return;
        }
        let key = cluster / CHUNK;
        if let Entry::Vacant(vacant) = self.chunks.entry(key) {
            vacant.insert(vec![0; CHUNK as usize].into_boxed_slice());
            if self.chunks.len() > self.max_chunks {
                self.shrink();
            }
        }
        let Some(chunk) = self.chunks.get_mut(&key) else { return };
        let cell = &mut chunk[(cluster % CHUNK) as usize];
        let so_far = *cell & COUNT_MASK;
        let total = match self.large.get(&cluster) {
            Some(large) => large.saturating_add(references),
            None => u64::from(so_far).saturating_add(references),
        };
        *cell |= owner.flag();
        if total < u64::from(COUNT_MASK) {
            *cell = (*cell & !COUNT_MASK) | total as u16;
            return;
        }
        *cell |= COUNT_MASK;
        if self.large.len() < MAX_LARGE || self.large.contains_key(&cluster) {
            self.large.insert(cluster, total);
        } else {
            self.overflow = true;
        }
    }

    /// Gives up the upper end of the window.
    fn shrink(&mut self) {
        let Some((&last, _)) = self.chunks.last_key_value() else { return };
        let end = last * CHUNK / self.align * self.align;
        self.window.end = end;
        self.chunks.split_off(&(end / CHUNK));
        self.large.split_off(&end);
    }

    /// Notes whether an active L2 entry for a cluster has the flag for "exactly one reference".
    pub(super) fn note_flag(&mut self, cluster: u64, flag: bool) {
        if let Some(chunk) = self.chunks.get_mut(&(cluster / CHUNK)) {
            chunk[(cluster % CHUNK) as usize] |= if flag { FLAGGED } else { UNFLAGGED };
        }
    }

    /// What is known of a cluster of the window.
    pub(super) fn get(&self, cluster: u64) -> Count {
        let cell = self.chunks.get(&(cluster / CHUNK)).map_or(0, |chunk| chunk[(cluster % CHUNK) as usize]);
        self.decode(cluster, cell)
    }

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
    pub(super) fn mark_stored_once(&mut self, cluster: u64) {
        if let Some(chunk) = self.chunks.get_mut(&(cluster / CHUNK)) {
            chunk[(cluster % CHUNK) as usize] |= STORED_ONCE;
        }
    }

    /// What [`Counts::mark_stored_once`] noted.
    pub(super) fn is_stored_once(&self, cluster: u64) -> bool {
        let chunk = self.chunks.get(&(cluster / CHUNK));
        chunk.is_some_and(|chunk| chunk[(cluster % CHUNK) as usize] & STORED_ONCE != 0)
    }

    /// The clusters of the window that are referred to, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, Count)> + '_ {
        self.chunks.iter().flat_map(move |(key, chunk)| {
            let cells = chunk.iter().enumerate().filter(|(_, cell)| **cell != 0);
            cells.map(move |(i, cell)| {
                let cluster = key * CHUNK + i as u64;
                (cluster, self.decode(cluster, *cell))
            })
        })
    }

    /// The first cluster at or after `from` in the window that is referred to.
    pub(super) fn next_referenced(&self, from: u64) -> Option<u64> {
        self.chunks.range(from / CHUNK..).find_map(|(key, chunk)| {
            let skip = if *key == from / CHUNK { (from % CHUNK) as usize } else { 0 };
            let i = chunk[skip..].iter().position(|cell| *cell != 0)?;
            Some(key * CHUNK + (skip + i) as u64)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(memory: u64, group: u64, references: &[(u64, u64)]) -> (BTreeMap<u64, u64>, usize) {
        let mut counts = Counts::new(memory, group);
        let mut found = BTreeMap::new();
        for pass in 1.. {
            counts.next_window();
            for (cluster, n) in references {
                counts.add(*cluster, *n, Owner::Data);
            }
            assert!(counts.chunks.len() <= counts.max_chunks);
            found.extend(counts.iter().map(|(cluster, count)| (cluster, count.references)));
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
        let (one, passes) = all(1 << 30, 1, &references);
        assert_eq!((&one, passes), (&expected, 1));
        for group in [1, 64, 1 << 16] {
            let (many, passes) = all(400 * CHUNK_BYTES, group, &references);
            assert_eq!(many, expected);
            assert!(passes > 3 && passes < 200, "{passes}");
        }
    }

    #[test]
    fn what_lies_in_the_same_place_is_noticed() {
        let mut counts = Counts::new(1 << 20, 1);
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
        assert_eq!((counts.next_referenced(2), counts.next_referenced(4)), (Some(2), None));
    }
}
