//! Finding free clusters.
//!
//! A cluster is free if its refcount is 0, nobody has reserved it, and its space isn't just being given back to the filesystem. [`Space`] knows free clusters in three ways, tried in this order:
//! runs that it was told of (freed since the image was opened, or found by the scan); the scan, a cursor that moves once over the
//! refcounts of the file as it was when opened, one slice for each allocation that finds no run, so that even a very large image
//! never makes one request scan it all; and the end of the file.
//!
//! Taking a run out of [`Space`] reserves it, synchronously, so that no two requests get the same clusters; the refcounts are set
//! when their slice is in memory.

use super::cache::{Kind, Slice};
use super::entry::{HostOffset, refcount};
use super::image::Image;
use headwater_block::{DebugEvent, Error, ErrorKind, Result};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

#[cfg(test)]
mod tests;

/// The most runs that [`Space`] remembers. What it forgets is found again when the image is next opened.
const MAX_RUNS: usize = 65536;
/// How many runs are looked at for one that is long enough.
const MAX_TRIES: usize = 32;
/// Clusters from this offset on can't be named by table entries.
const MAX_HOST_OFFSET: u64 = 1 << 56;

/// Which clusters of the file are free, as far as is known. Everything is in cluster numbers.
pub(super) struct Space {
    /// Free runs: start and length.
    runs: BTreeMap<u64, u64>,
    /// Runs that count as free already, but that nobody may have yet.
    held: Vec<Range<u64>>,
    /// Refcounts from here to `scan_end` were not looked at yet.
    scan_at: u64,
    scan_end: u64,
    /// The first cluster that nobody ever used: the end of the file or what lies beyond it and is allocated.
    end: u64,
}

impl Space {
    /// The space of a file of `clusters` clusters, of which nothing is known yet.
    pub(super) fn new(clusters: u64) -> Self {
        Self { runs: BTreeMap::new(), held: Vec::new(), scan_at: 0, scan_end: clusters, end: clusters }
    }

    /// The first cluster that nobody ever used.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Reserves `count` clusters at the end.
    pub(super) fn take_end(&mut self, count: u64) -> u64 {
        let start = self.end;
        self.end += count;
        start
    }

    /// A run of clusters has become free. What the scan will find by itself is left to it.
    pub(super) fn give(&mut self, start: u64, count: u64) {
        let end = start + count;
        let (hidden_from, hidden_to) =
            if self.scan_at < self.scan_end { (self.scan_at, self.scan_end) } else { (end, end) };
        for (from, to) in [(start, end.min(hidden_from)), (start.max(hidden_to), end)] {
            if from < to {
                self.insert(from, to - from);
            }
        }
    }

    /// Keeps runs whose refcounts have just become 0 from everybody, until each is [let go](Space::let_go).
    pub(super) fn hold(&mut self, runs: &[Range<u64>]) {
        self.held.extend_from_slice(runs);
    }

    /// A run that was held is free.
    pub(super) fn let_go(&mut self, run: Range<u64>) {
        self.held.retain(|held| *held != run);
        self.give(run.start, run.end - run.start);
    }

    /// The scan has found a run of clusters that count as free.
    fn found(&mut self, run: Range<u64>) {
        let mut at = run.start;
        while at < run.end {
            let holds = |held: &&Range<u64>| at < held.end && held.start < run.end;
            let next = self.held.iter().filter(holds).min_by_key(|held| held.start).cloned();
            let next = next.unwrap_or(run.end..run.end);
            if at < next.start {
                self.give(at, next.start - at);
            }
            at = next.end;
        }
    }

    fn insert(&mut self, start: u64, count: u64) {
        let (mut from, mut to) = (start, start + count);
        // Runs that touch this one become one with it. None overlaps, unless a damaged image freed a cluster twice.
        while let Some((&before, &len)) = self.runs.range(..=to).next_back()
            && before + len >= from
        {
            self.runs.remove(&before);
            from = from.min(before);
            to = to.max(before + len);
        }
        if self.runs.len() < MAX_RUNS {
            self.runs.insert(from, to - from);
        }
    }

    /// Reserves up to `want` clusters of a known run: of the first that is long enough, or else of the first, if `short` runs will do.
    /// None reaches over a multiple of `chunk`.
    fn take_run(&mut self, want: u64, chunk: u64, short: bool) -> Option<(u64, u64)> {
        let usable = |start: u64, len: u64| len.min(chunk - start % chunk);
        let fits = self.runs.iter().take(MAX_TRIES).find(|(start, len)| usable(**start, **len) >= want);
        let (start, len) =
            fits.or_else(|| self.runs.first_key_value().filter(|_| short)).map(|(s, l)| (*s, *l))?;
        let count = usable(start, len).min(want);
        self.runs.remove(&start);
        if count < len {
            self.runs.insert(start + count, len - count);
        }
        Some((start, count))
    }
}

/// Clusters that are allocated but that nothing refers to yet.
///
/// Dropped without [`Allocation::keep`] or [`Allocation::free`] they leak, which is what must happen when a write may still be going on.
#[must_use]
pub(super) struct Allocation {
    /// Where they start in the file.
    pub(super) start: HostOffset,
    /// How many there are.
    pub(super) count: u64,
    /// They lie beyond what the file ever held, so that they read as zeroes.
    pub(super) fresh: bool,
    /// The slice with their refcounts; none if they need none.
    slice: Option<Rc<Slice>>,
    settled: bool,
}

impl Allocation {
    /// Clusters that need no refcounts, because they are in an external data file.
    pub(super) fn external(start: u64, count: u64) -> Self {
        Self { start: HostOffset(start), count, fresh: false, slice: None, settled: true }
    }

    /// Something refers to the clusters now.
    pub(super) fn keep(mut self) {
        self.settled = true;
    }

    /// Gives them back. Nothing may be writing to them any more, and no table may refer to them.
    pub(super) fn free(mut self, image: &Image) {
        self.settled = true;
        let Some(slice) = self.slice.take() else { return };
        let first = self.start.0 >> image.geometry.cluster_bits;
        image.store_refcounts(&slice, first..first + self.count, 0);
        image.space.borrow_mut().give(first, self.count);
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if !self.settled {
            tracing::warn!(
                offset = self.start.0,
                clusters = self.count,
                "clusters of an abandoned write leak until the image is repaired"
            );
        }
    }
}

/// One way to get clusters.
enum Taken {
    Known(u64, u64),
    End(u64, u64),
}

impl Image {
    /// Allocates one to `want` neighbouring clusters (`want` > 0). Their refcounts are set to 1 in memory; what they hold is arbitrary.
    pub(super) async fn allocate(self: &Rc<Self>, want: u64) -> Result<Allocation> {
        self.events.tell(DebugEvent::ClusterAlloc);
        loop {
            match self.reserve(want).await? {
                Taken::Known(start, count) => match self.refcount_slice(start).await {
                    Ok(slice) => {
                        if let Some(allocation) = self.settle(slice, start, count, false)? {
                            return Ok(allocation);
                        }
                    }
                    Err(err) => {
                        self.space.borrow_mut().give(start, count);
                        return Err(err);
                    }
                },
                Taken::End(start, count) => {
                    let slice = self.refcount_slice(start).await?;
                    if let Some(allocation) = self.settle(slice, start, count, true)? {
                        return Ok(allocation);
                    }
                }
            }
        }
    }

    async fn reserve(self: &Rc<Self>, want: u64) -> Result<Taken> {
        let chunk = self.refcounts_per_slice();
        loop {
            let known = self.space.borrow_mut().take_run(want, chunk, false);
            if let Some((start, count)) = known {
                return Ok(Taken::Known(start, count));
            }
            self.scan_step().await?;
            let known = self.space.borrow_mut().take_run(want, chunk, true);
            if let Some((start, count)) = known {
                return Ok(Taken::Known(start, count));
            }
            let end = self.space.borrow().end;
            if (end + want) << self.geometry.cluster_bits > MAX_HOST_OFFSET {
                return Err(self.full());
            }
            let index = self.block_index(end);
            let table_stored = self.refcount_table.borrow().stored();
            if index >= table_stored || self.refcount_block(index)?.is_none() {
                self.grow_refcounts().await?;
                continue;
            }
            let count = want.min(chunk - end % chunk);
            return Ok(Taken::End(self.space.borrow_mut().take_end(count), count));
        }
    }

    /// Sets the refcounts of a reserved run, of which clusters that turn out to be in use are left out. That happens beyond the end
    /// of a file whose last clusters were allocated, but never written before the power failed.
    fn settle(&self, slice: Rc<Slice>, start: u64, count: u64, fresh: bool) -> Result<Option<Allocation>> {
        let free = self.free_runs(&slice, start..start + count);
        let Some(first) = free.first().cloned() else { return Ok(None) };
        for run in &free[1..] {
            self.space.borrow_mut().give(run.start, run.end - run.start);
        }
        if let Some(used) = first.clone().find(|cluster| self.metadata.borrow().contains(cluster)) {
            let offset = used << self.geometry.cluster_bits;
            let err = self.corrupt(format_args!(
                "the cluster at file offset {offset:#x} holds metadata, but has refcount 0"
            ));
            return Err(self.fail(err));
        }
        self.store_refcounts(&slice, first.clone(), 1);
        Ok(Some(Allocation {
            start: HostOffset(first.start << self.geometry.cluster_bits),
            count: first.end - first.start,
            fresh,
            slice: Some(slice),
            settled: false,
        }))
    }

    /// The runs of refcount 0 among `clusters`, which one slice covers.
    pub(super) fn free_runs(&self, slice: &Slice, clusters: Range<u64>) -> Vec<Range<u64>> {
        let per_slice = self.refcounts_per_slice();
        let mut runs: Vec<Range<u64>> = Vec::new();
        slice.with(|bytes| {
            for cluster in clusters {
                if refcount(bytes, (cluster % per_slice) as usize, self.geometry.refcount_order) != 0 {
                    continue;
                }
                match runs.last_mut() {
                    Some(run) if run.end == cluster => run.end += 1,
                    _ => runs.push(cluster..cluster + 1),
                }
            }
        });
        runs
    }

    /// Looks at the next slice of refcounts for free clusters.
    async fn scan_step(&self) -> Result<()> {
        let per_slice = self.refcounts_per_slice();
        let (at, scan_end) = {
            let mut space = self.space.borrow_mut();
            // What has no refcount block is free, but using it needs a new block in the midst of the file: not worth it.
            let block_clusters = 1u64 << self.geometry.refcount_block_bits();
            let table = self.refcount_table.borrow();
            while space.scan_at < space.scan_end && table.get((space.scan_at / block_clusters) as usize) == 0
            {
                space.scan_at = (space.scan_at / block_clusters + 1) * block_clusters;
            }
            (space.scan_at, space.scan_end)
        };
        if at >= scan_end {
            return Ok(());
        }
        let slice = self.refcount_slice(at).await?;
        if self.space.borrow().scan_at != at {
            return Ok(());
        }
        let stop = ((at / per_slice + 1) * per_slice).min(scan_end);
        let free = self.free_runs(&slice, at..stop);
        let mut space = self.space.borrow_mut();
        space.scan_at = stop;
        free.into_iter().for_each(|run| space.found(run));
        Ok(())
    }

    #[cold]
    pub(super) fn full(&self) -> Error {
        let text = format!(
            "{}: the image file can't grow any further (its tables are as large as the format allows); convert it to an image with larger \
             clusters",
            self.name
        );
        Error::new(ErrorKind::NoSpace, text)
    }

    /// The slice with the refcount of `cluster`. Its block must exist.
    pub(super) async fn refcount_slice(&self, cluster: u64) -> Result<Rc<Slice>> {
        let index = self.block_index(cluster);
        let Some(block) = self.refcount_block(index)? else {
            let offset = cluster << self.geometry.cluster_bits;
            return Err(self.corrupt(format_args!(
                "the cluster at file offset {offset:#x} is in use, but has no refcount"
            )));
        };
        let in_block = cluster & ((1 << self.geometry.refcount_block_bits()) - 1);
        let byte = (in_block << self.geometry.refcount_order) >> 3;
        let offset = block.0 + (byte & !(self.cache.slice_len() as u64 - 1));
        self.cache.load(offset, Kind::Refcounts).await
    }
}
