//! The metadata writer: the only place from which tables and the header reach the disk while an image is in use.
//!
//! # Rules (argued in docs/on-disk.md)
//! Metadata change in memory, at once and between awaits. A **commit cycle** takes a snapshot of everything that is dirty, at one
//! instant, and writes it in ranks, with a barrier (a flush of the file and of the external data file) between one rank and the next:
//!
//! 1. slices of refcount blocks;
//! 2. entries of the refcount table; if the table has moved, the whole table, a barrier, and the header's pointer to it;
//! 3. slices of L2 tables, always after a barrier, because new entries refer to guest data, which must be durable first;
//! 4. entries of the L1 table; if the table has moved, the whole table, a barrier, and the header's pointer to it; the disk's size.
//!
//! - A write of one rank refers only to what lower ranks, or writes that completed before the snapshot, have put there.
//! - Refcounts go up in memory before anything refers to a cluster, so a snapshot never holds a reference without its refcount.
//! - Refcounts go down only after a barrier has covered the cycle that removes the last reference ([`Image::release`]); only then may the
//!   cluster be used again.
//! - What fails stays dirty and is written again by the next cycle. A barrier that fails ends all changes ([`Image::fail`]): what
//!   it covered may be lost, and no later barrier could tell.
//!
//! Cycles never overlap, but for their **last barriers**. A cycle is over when all is written; the barrier that makes it durable is made by those who need that,
//! or is whatever barrier comes next, be it one of a later cycle. Who needs durability joins the next cycle that hasn't taken its snapshot; all who wait for one
//! cycle drive it, so none of them can stop it by going away.

use super::cache::{Kind, Slice};
use super::image::Image;
use super::refcount::Growth;
use super::shared::Shared;
use super::tables::{Piece, TakenTable};
use futures_util::stream::{FuturesUnordered, StreamExt};
use headwater_block::{BufferMut, DebugEvent, Result, WriteFlags};
use std::future::Future;
use std::ops::Range;
use std::rc::Rc;

/// How many metadata writes of one rank are in flight.
const DEPTH: usize = 32;
/// The shortest run of freed bytes that is given back to the filesystem.
const MIN_PUNCH: u64 = 32 << 10;

/// What is on its way to the disk.
#[derive(Default)]
pub(super) struct Writer {
    /// The last operation of the queue: each waits for the one before.
    tail: Option<Shared<()>>,
    /// The last commit cycle, if it hasn't taken its snapshot yet.
    next: Option<Cycle>,
    /// The writes of the last one that has.
    running: Option<Shared<()>>,
    /// How many cycles there were, which numbers them.
    cycles: u64,
    /// The last cycle of which all is written.
    written: u64,
    /// The last one that a barrier has covered since.
    durable: u64,
    /// Clusters whose last reference is gone in memory.
    dropped: Vec<Range<u64>>,
    /// Those whose last reference is gone in the file, and the cycle that saw to it. Their refcounts go down when it is durable.
    gone: Vec<(u64, Range<u64>)>,
    /// Clusters whose last reference is durably gone.
    released: Vec<Range<u64>>,
    /// A disk size that the header shall get.
    new_size: Option<u64>,
    pub(super) growth: Growth,
}

/// A commit cycle, for those who wait for it.
#[derive(Clone)]
struct Cycle {
    /// Ends when all is written.
    written: Shared<()>,
    /// Ends when all is durable.
    durable: Shared<()>,
}

/// What one cycle writes.
struct Snapshot {
    refcounts: Vec<Rc<Slice>>,
    refcount_pieces: Vec<Piece>,
    refcount_table: TakenTable,
    l2: Vec<Rc<Slice>>,
    l2_pieces: Vec<Piece>,
    l1: TakenTable,
    new_size: Option<u64>,
    dropped: Vec<Range<u64>>,
}

impl Image {
    /// A reference to clusters (by number) was removed from a table in memory.
    pub(super) fn drop_later(&self, clusters: Range<u64>) {
        let mut writer = self.writer.borrow_mut();
        match writer.dropped.last_mut() {
            Some(last) if last.end == clusters.start => last.end = clusters.end,
            _ => writer.dropped.push(clusters),
        }
    }

    /// Clusters (by number) that were counted for references have got none after all. The counts go down with the next cycle.
    pub(super) fn release_later(&self, clusters: Range<u64>) {
        self.writer.borrow_mut().released.push(clusters);
    }

    /// Sets the disk's size in the header with the next cycle.
    pub(super) fn set_header_size(&self, size: u64) {
        self.writer.borrow_mut().new_size = Some(size);
    }

    /// Takes [`Image::set_header_size`] back, after it has failed.
    pub(super) fn forget_header_size(&self) {
        self.writer.borrow_mut().new_size = None;
    }

    /// Makes everything that completed before this call durable.
    pub(super) fn commit(self: &Rc<Self>) -> Shared<()> {
        self.next_cycle().durable
    }

    /// The next commit cycle, which hasn't taken its snapshot.
    fn next_cycle(self: &Rc<Self>) -> Cycle {
        if let Some(next) = self.writer.borrow().next.clone() {
            return next;
        }
        let number = {
            let mut writer = self.writer.borrow_mut();
            writer.cycles += 1;
            writer.cycles
        };
        let image = self.clone();
        let written = self.enqueue(async move { image.write_cycle(number).await });
        let (image, before) = (self.clone(), written.clone());
        let durable = Shared::new(async move {
            before.await?;
            image.end_cycle(number).await
        });
        let cycle = Cycle { written, durable };
        self.writer.borrow_mut().next = Some(cycle.clone());
        cycle
    }

    /// Waits until the file holds the L2 entries of `range` as they are now, and whatever leads to them: for the writes of a cycle, not for its durability.
    pub(super) async fn settle_entries(self: &Rc<Self>, range: Range<u64>) -> Result<()> {
        // Nobody needs another cycle for what this one has taken.
        let running = self.writer.borrow().running.clone().filter(|_| self.is_taken(range));
        if let Some(running) = running
            && running.await.is_ok()
        {
            return Ok(());
        }
        self.next_cycle().written.await
    }

    /// Runs `work` when no commit cycle runs; later cycles wait for it. It must not wait for a cycle.
    pub(super) fn enqueue(&self, work: impl Future<Output = Result<()>> + 'static) -> Shared<()> {
        let mut writer = self.writer.borrow_mut();
        let before = writer.tail.take();
        let queued = Shared::new(async move {
            if let Some(before) = before {
                // Who asked for that one gets its error.
                let _ = before.await;
            }
            work.await
        });
        writer.tail = Some(queued.clone());
        queued
    }

    /// Waits for a commit cycle if too much of the cache is dirty.
    pub(super) async fn relieve_pressure(self: &Rc<Self>) -> Result<()> {
        if self.cache.is_pressed() { self.next_cycle().written.await } else { Ok(()) }
    }

    /// True if a cycle would have something to do beyond a barrier.
    pub(super) fn is_dirty(&self) -> bool {
        let writer = self.writer.borrow();
        self.cache.has_dirty()
            || self.l1.borrow().is_dirty()
            || self.refcount_table.borrow().is_dirty()
            || !writer.dropped.is_empty()
            || !writer.gone.is_empty()
            || !writer.released.is_empty()
            || writer.new_size.is_some()
    }

    fn snapshot(&self) -> Snapshot {
        let refcounts = self.cache.take_dirty(Kind::Refcounts);
        let l2 = self.cache.take_dirty(Kind::L2);
        let copy =
            |slices: &[Rc<Slice>]| slices.iter().map(|slice| (slice.offset, slice.snapshot())).collect();
        let mut writer = self.writer.borrow_mut();
        writer.running = writer.next.take().map(|cycle| cycle.written);
        Snapshot {
            refcount_pieces: copy(&refcounts),
            refcounts,
            refcount_table: self.refcount_table.borrow_mut().take_dirty(),
            l2_pieces: copy(&l2),
            l2,
            l1: self.l1.borrow_mut().take_dirty(),
            new_size: writer.new_size.take(),
            dropped: std::mem::take(&mut writer.dropped),
        }
    }

    /// Does a cycle's work, all but the barrier that makes it durable.
    async fn write_cycle(self: &Rc<Self>, number: u64) -> Result<()> {
        // Before the snapshot, which then has the lower refcounts.
        self.release_or_warn().await;
        self.check_failed()?;
        // The snapshot: one instant, no await within.
        let mut snapshot = self.snapshot();
        match self.write_ranks(&mut snapshot).await {
            Ok(()) => self.cycle_written(number, snapshot).await,
            Err(err) => {
                self.put_back(snapshot);
                Err(err)
            }
        }
    }

    /// Makes a cycle durable that is written, unless it is already.
    async fn end_cycle(&self, number: u64) -> Result<()> {
        let durable = self.writer.borrow().durable;
        if durable < number {
            self.barrier().await?;
        }
        self.release_or_warn().await;
        Ok(())
    }

    async fn write_ranks(&self, snapshot: &mut Snapshot) -> Result<()> {
        // True while something was written that no barrier has covered. At first that is the guest's data.
        let mut unflushed = true;
        let barrier = async |unflushed: &mut bool| {
            if std::mem::take(unflushed) { self.barrier().await } else { Ok(()) }
        };

        // Rank 1 refers to nothing, so it may be written at any time.
        self.write_pieces(&snapshot.refcount_pieces, DebugEvent::RefblockUpdatePart).await?;
        snapshot.refcount_pieces.clear();

        if !snapshot.refcount_table.pieces.is_empty() {
            barrier(&mut unflushed).await?;
            let moved = snapshot.refcount_table.has_moved();
            let event =
                if moved { DebugEvent::RefblockAllocWriteTable } else { DebugEvent::RefblockAllocHookup };
            self.write_pieces(&snapshot.refcount_table.pieces, event).await?;
            unflushed = true;
            if moved {
                barrier(&mut unflushed).await?;
                self.events.tell(DebugEvent::RefblockAllocSwitchTable);
                let (offset, entries) = snapshot.refcount_table.place;
                let bits = self.geometry.cluster_bits;
                self.write_header(|header| {
                    header.refcount_table_offset = offset;
                    header.refcount_table_clusters = ((entries as u64 * 8) >> bits) as u32;
                })
                .await?;
                unflushed = true;
            }
        }

        if !snapshot.l2_pieces.is_empty() {
            barrier(&mut unflushed).await?;
            self.write_pieces(&snapshot.l2_pieces, DebugEvent::L2Update).await?;
            snapshot.l2_pieces.clear();
            unflushed = true;
        }

        if !snapshot.l1.pieces.is_empty() || snapshot.new_size.is_some() {
            barrier(&mut unflushed).await?;
            let moved = snapshot.l1.has_moved();
            let event = if moved { DebugEvent::L1GrowWriteTable } else { DebugEvent::L1Update };
            self.write_pieces(&snapshot.l1.pieces, event).await?;
            unflushed = true;
            if moved || snapshot.new_size.is_some() {
                barrier(&mut unflushed).await?;
                if moved {
                    self.events.tell(DebugEvent::L1GrowActivateTable);
                }
                let (offset, entries) = snapshot.l1.place;
                let size = snapshot.new_size;
                self.write_header(|header| {
                    header.l1_table_offset = offset;
                    header.l1_size = entries as u32;
                    header.size = size.unwrap_or(header.size);
                })
                .await?;
            }
        }
        Ok(())
    }

    /// All of the cycle is written. What it made unreachable may be used again when it is durable.
    async fn cycle_written(&self, number: u64, snapshot: Snapshot) -> Result<()> {
        self.cache.written(&snapshot.l2);
        {
            let mut writer = self.writer.borrow_mut();
            writer.written = number;
            writer.gone.extend(snapshot.dropped.into_iter().map(|clusters| (number, clusters)));
        }
        if snapshot.refcount_table.has_moved() || snapshot.l1.has_moved() {
            // The next cycle shall not find them on the move.
            self.barrier().await?;
            let old_refcount_tables = self.refcount_table.borrow_mut().done(&snapshot.refcount_table);
            let old_l1_tables = self.l1.borrow_mut().done(&snapshot.l1);
            let tables = old_refcount_tables.into_iter().chain(old_l1_tables).filter(|(_, len)| *len > 0);
            for (offset, len) in tables {
                let bits = self.geometry.cluster_bits;
                let clusters = offset >> bits..(offset + len).div_ceil(self.geometry.cluster_size());
                for cluster in clusters.clone() {
                    self.metadata.borrow_mut().remove(&cluster);
                }
                self.writer.borrow_mut().released.push(clusters);
            }
        }
        Ok(())
    }

    /// As [`Image::release`]; what was asked for doesn't depend on it.
    async fn release_or_warn(&self) {
        if let Err(err) = self.release().await {
            // The clusters leak until a later cycle gets hold of their refcounts.
            tracing::warn!(image = self.name, error = %err, "freed clusters can't be reused yet");
        }
    }

    /// Takes the refcounts of clusters down whose last reference is durably gone, and gives the clusters to the allocator.
    async fn release(&self) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        loop {
            let Some(clusters) = self.writer.borrow_mut().released.pop() else { return Ok(()) };
            // A step at a time, so that an error loses track of nothing that was counted down.
            let per_slice = self.refcounts_per_slice();
            let stop = ((clusters.start / per_slice + 1) * per_slice).min(clusters.end);
            self.events.tell(DebugEvent::ClusterFree);
            let free = match self.drop_references(clusters.start..stop).await {
                Ok(free) => free,
                Err(err) => {
                    self.writer.borrow_mut().released.push(clusters);
                    return Err(err);
                }
            };
            if stop < clusters.end {
                self.writer.borrow_mut().released.push(stop..clusters.end);
            }
            // At once, before anything is awaited: the scan for free clusters must not find those whose space is still being given back, because that
            // would take what has been written there since.
            self.space.borrow_mut().hold(&free);
            for run in free {
                let (start, len) = (run.start << bits, (run.end - run.start) << bits);
                self.cache.forget(start..start + len);
                if len >= MIN_PUNCH
                    && let Err(err) = self.file.discard(start, len).await
                {
                    tracing::debug!(image = self.name, error = %err, "space can't be given back to the filesystem");
                }
                self.space.borrow_mut().let_go(run);
            }
        }
    }

    fn put_back(&self, snapshot: Snapshot) {
        for slice in snapshot.refcounts.iter().chain(&snapshot.l2) {
            self.cache.mark_dirty(slice);
        }
        self.refcount_table.borrow_mut().put_back(snapshot.refcount_table);
        self.l1.borrow_mut().put_back(snapshot.l1);
        let mut writer = self.writer.borrow_mut();
        writer.dropped.extend(snapshot.dropped);
        writer.new_size = writer.new_size.or(snapshot.new_size);
    }

    /// Writes pieces of metadata, several at once. All have completed when it returns.
    async fn write_pieces(&self, pieces: &[Piece], event: DebugEvent) -> Result<()> {
        let mut pieces = coalesce(pieces).into_iter();
        let mut running = FuturesUnordered::new();
        let mut result = Ok(());
        loop {
            while running.len() < DEPTH
                && result.is_ok()
                && let Some((offset, data)) = pieces.next()
            {
                self.events.tell(event);
                running.push(self.file.write(offset, data, WriteFlags::default()));
            }
            match running.next().await {
                Some(done) => result = result.and(done),
                None => return result,
            }
        }
    }

    /// Makes everything durable that has been written so far. If that fails, nobody knows what is: the image takes no more changes.
    pub(super) async fn barrier(&self) -> Result<()> {
        self.events.tell(DebugEvent::FlushToDisk);
        let covered = self.writer.borrow().written;
        let data = async {
            match &self.data_file {
                Some(data_file) => data_file.flush().await,
                None => Ok(()),
            }
        };
        let (file, data) = futures_util::future::join(self.file.flush(), data).await;
        file.and(data).map_err(|err| self.fail(err))?;
        let mut writer = self.writer.borrow_mut();
        let Writer { durable, gone, released, .. } = &mut *writer;
        *durable = covered.max(*durable);
        released.extend(gone.extract_if(.., |(cycle, _)| *cycle <= *durable).map(|(_, clusters)| clusters));
        Ok(())
    }

    /// Changes fields of the header proper with one write of the first sector, which is atomic. On error the header on the disk is
    /// the old or the new one; what is in memory stays the old one.
    pub(super) async fn write_header(&self, change: impl FnOnce(&mut super::header::Header)) -> Result<()> {
        let (header, sector) = {
            let disk = self.header.borrow();
            let mut header = disk.header.clone();
            change(&mut header);
            let mut sector = BufferMut::copy_of(&disk.cluster[..disk.sector]);
            let fixed = header.encode_fixed();
            // Only known fields change, and they are within the first sector.
            let len = fixed.len().min(sector.len());
            sector[..len].copy_from_slice(&fixed[..len]);
            (header, sector.freeze())
        };
        self.file.write(0, sector.clone(), WriteFlags::default()).await?;
        let mut disk = self.header.borrow_mut();
        disk.header = header;
        disk.cluster[..sector.len()].copy_from_slice(&sector);
        Ok(())
    }
}

/// Joins pieces that lie one after the other into larger writes.
fn coalesce(pieces: &[Piece]) -> Vec<Piece> {
    const MAX: usize = 1 << 20;
    let mut joined = Vec::new();
    let mut at = 0;
    while at < pieces.len() {
        let start = pieces[at].0;
        let mut len = pieces[at].1.len();
        let mut next = at + 1;
        while next < pieces.len() && pieces[next].0 == start + len as u64 && len + pieces[next].1.len() <= MAX
        {
            len += pieces[next].1.len();
            next += 1;
        }
        if next == at + 1 {
            joined.push(pieces[at].clone());
        } else {
            let mut whole = BufferMut::new(len);
            let mut to = 0;
            for (_, piece) in &pieces[at..next] {
                whole[to..to + piece.len()].copy_from_slice(piece);
                to += piece.len();
            }
            joined.push((start, whole.freeze()));
        }
        at = next;
    }
    joined
}
