//! Writing.
//!
//! Bytes whose units of allocation have data already are written where they are. Everything else is written to new clusters (or to
//! units of a cluster that have no data yet), whole units at a time: what the request doesn't cover is filled with what was there,
//! from the old cluster, the backing, or zeroes. **The L2 entry is changed, in memory, only after all data of its cluster were
//! written**, so that no commit cycle can make an entry durable whose data may be missing.
//!
//! The range lock is held: nobody else changes the mapping of the request's clusters, or reads them while it changes.

use super::alloc::Allocation;
use super::cache::Slice;
use super::entry::{Cluster, L2Entry};
use super::image::Image;
use super::map::Target;
use futures_util::stream::{FuturesUnordered, StreamExt};
use headwater_block::node::{Access, Change};
use headwater_block::{
    Buffer, BufferMut, DebugEvent, Error, ErrorKind, LocalFuture, Result, WriteFlags, ZeroFlags,
};
use std::ops::Range;
use std::rc::Rc;

/// The longest stretch of zeroes beside a request's data that is written along with them; longer ones are zeroed by the file.
const MAX_INLINE_ZEROES: u64 = 64 << 10;

/// One thing to do for a write.
enum Step {
    /// The bytes of this range of the disk are at this offset of the data node.
    InPlace(Range<u64>, u64),
    /// The clusters of this range must be allocated, or units of them filled.
    Allocate(Range<u64>),
}

/// Bytes of one allocated run of clusters to be written: `filled` is `payload` and what lies beside it in the same units.
struct Fill {
    payload: Range<u64>,
    filled: Range<u64>,
    /// What to add to an offset of the disk to get one of the data node, wrapping.
    shift: u64,
    /// The clusters read as zeroes where nothing is written.
    fresh: bool,
}

impl Image {
    /// Checks that a change may be made at all. `end` may lie beyond the disk, but not beyond its last sector or unit of writing.
    pub(super) fn check_change(&self, offset: u64, len: u64) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, format!("{} is open for reading only", self.name)));
        }
        self.check_failed()?;
        let alignment = u64::from(self.write_alignment());
        let limit = self.size.get().checked_next_multiple_of(alignment);
        if offset.checked_add(len).is_none_or(|end| limit.is_some_and(|limit| end > limit)) {
            let text = format!(
                "{}: {len} bytes at {offset} lie beyond the disk's {} bytes",
                self.name,
                self.size.get()
            );
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        Ok(())
    }

    /// [`headwater_block::Node::access`].
    pub(super) fn access(&self, range: Range<u64>, change: Change) -> Access {
        let end = range.end.max(range.start);
        let size = self.geometry.cluster_size();
        let clusters = self.cluster_start(range.start)..end.checked_next_multiple_of(size).unwrap_or(end);
        if change != Change::Write {
            // What is compressed always goes to a new place.
            return Access::Exclusive(clusters);
        }
        let mut at = range.start;
        while at < range.end {
            let table = self.l2_table((at >> self.geometry.l2_coverage_bits()) as usize);
            let Ok(Some(table)) = table else { return Access::Exclusive(clusters) };
            let Some((slice, first)) = self.cached_l2_slice(table, at) else {
                return Access::Exclusive(clusters);
            };
            for index in first..self.l2_slice_entries() {
                let stop = range.end.min(self.cluster_start(at) + size);
                match self.l2_entry(&slice, index, at) {
                    Ok(entry) if self.in_place(entry, at..stop).is_some() => at = stop,
                    _ => return Access::Exclusive(clusters),
                }
                if at >= range.end {
                    break;
                }
            }
        }
        Access::Shared
    }

    /// Where `range`, within one cluster, can be written in place.
    fn in_place(&self, entry: L2Entry, range: Range<u64>) -> Option<u64> {
        let L2Entry::Standard(cluster) = entry else { return None };
        let host = cluster.writable_host()?;
        let start = self.cluster_start(range.start);
        let touched = self.geometry.units_touched(range.start - start, range.end - start);
        (touched & !cluster.data == 0).then_some(host.0 + (range.start - start))
    }

    /// [`headwater_block::Node::write`], without FUA.
    pub(super) async fn write(self: &Rc<Self>, offset: u64, data: Buffer) -> Result<()> {
        self.check_change(offset, data.len() as u64)?;
        if data.is_empty() {
            return Ok(());
        }
        self.prepare_header().await?;
        // The usual case by itself, because it needs no memory.
        match self.cached_in_place(offset..offset + data.len() as u64) {
            Some(host) => {
                self.events.tell(DebugEvent::WriteAio);
                self.data_node().write(host, data, WriteFlags::default()).await
            }
            None => self.write_unchecked(offset, data).await,
        }
    }

    /// Where a range can be written in place in one piece, from memory alone.
    fn cached_in_place(&self, range: Range<u64>) -> Option<u64> {
        let table = self.l2_table((range.start >> self.geometry.l2_coverage_bits()) as usize).ok()??;
        let (slice, first) = self.cached_l2_slice(table, range.start)?;
        let mut at = range.start;
        let mut start = None;
        for index in first..self.l2_slice_entries() {
            let stop = range.end.min(self.cluster_start(at) + self.geometry.cluster_size());
            let host = self.in_place(self.l2_entry(&slice, index, at).ok()?, at..stop)?;
            if *start.get_or_insert(host) + (at - range.start) != host {
                return None;
            }
            at = stop;
            if at >= range.end {
                return start;
            }
        }
        None
    }

    /// Writes within the last cluster of the disk or before it.
    pub(super) async fn write_unchecked(self: &Rc<Self>, offset: u64, data: Buffer) -> Result<()> {
        let steps = self.plan(offset..offset + data.len() as u64).await?;
        let part =
            |range: &Range<u64>| data.slice((range.start - offset) as usize..(range.end - offset) as usize);
        let running: FuturesUnordered<LocalFuture<'_, Result<()>>> = FuturesUnordered::new();
        for step in steps {
            match step {
                Step::InPlace(range, host) => {
                    self.events.tell(DebugEvent::WriteAio);
                    running.push(self.data_node().write(host, part(&range), WriteFlags::default()));
                }
                Step::Allocate(range) => {
                    running.push(Box::pin(self.write_allocating(range.clone(), part(&range))))
                }
            }
        }
        drive(running).await
    }

    async fn plan(&self, range: Range<u64>) -> Result<Vec<Step>> {
        let mut steps: Vec<Step> = Vec::new();
        let coverage = self.geometry.l2_coverage_bits();
        let mut at = range.start;
        while at < range.end {
            let Some(table) = self.l2_table((at >> coverage) as usize)? else {
                let stop = range.end.min(((at >> coverage) + 1) << coverage);
                add_step(&mut steps, at..stop, None);
                at = stop;
                continue;
            };
            // A table that moves meanwhile holds the same entries at its new place, for the clusters of this request.
            let (slice, first) = self.l2_slice(table, at).await?;
            if self.l2_table((at >> coverage) as usize)? != Some(table) {
                continue;
            }
            for index in first..self.l2_slice_entries() {
                let stop = range.end.min(self.cluster_start(at) + self.geometry.cluster_size());
                let entry = self.l2_entry(&slice, index, at)?;
                add_step(&mut steps, at..stop, self.in_place(entry, at..stop));
                at = stop;
                if at >= range.end {
                    break;
                }
            }
        }
        Ok(steps)
    }

    /// Writes `data` over `range`, one slice of L2 entries after the other.
    async fn write_allocating(self: &Rc<Self>, range: Range<u64>, data: Buffer) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let mut at = range.start;
        while at < range.end {
            self.relieve_pressure().await?;
            let (slice, first) = self.writable_l2_slice(at).await?;
            let left = (self.l2_slice_entries() - first) as u64;
            let stop = range.end.min(((at >> bits) + left) << bits);
            let part = data.slice((at - range.start) as usize..(stop - range.start) as usize);
            self.write_in_slice(&slice, first, at..stop, part).await?;
            at = stop;
        }
        Ok(())
    }

    async fn write_in_slice(
        self: &Rc<Self>,
        slice: &Rc<Slice>,
        first: usize,
        range: Range<u64>,
        data: Buffer,
    ) -> Result<()> {
        let size = self.geometry.cluster_size();
        let part = |part: &Range<u64>| {
            data.slice((part.start - range.start) as usize..(part.end - range.start) as usize)
        };
        let running: FuturesUnordered<LocalFuture<'_, Result<()>>> = FuturesUnordered::new();
        let mut new: Option<(usize, Range<u64>)> = None;
        let mut at = range.start;
        for index in first.. {
            if at >= range.end {
                break;
            }
            let stop = range.end.min(self.cluster_start(at) + size);
            // Nothing has started when this fails.
            let entry = self.l2_entry(slice, index, at)?;
            let reusable = match entry {
                L2Entry::Standard(cluster) if cluster.writable_host().is_some() => Some(cluster),
                _ => None,
            };
            match (reusable, &mut new) {
                (None, Some((_, run))) => run.end = stop,
                (None, None) => new = Some((index, at..stop)),
                (Some(cluster), _) => {
                    if let Some((first, run)) = new.take() {
                        running.push(Box::pin(self.write_new(slice, first, run.clone(), part(&run))));
                    }
                    running.push(Box::pin(self.write_units(
                        slice,
                        index,
                        cluster,
                        at..stop,
                        part(&(at..stop)),
                    )));
                }
            }
            at = stop;
        }
        if let Some((first, run)) = new {
            running.push(Box::pin(self.write_new(slice, first, run.clone(), part(&run))));
        }
        drive(running).await
    }

    /// Writes to units without data of a cluster that is there: one that is preallocated, or has other subclusters.
    async fn write_units(
        self: &Rc<Self>,
        slice: &Rc<Slice>,
        index: usize,
        cluster: Cluster,
        payload: Range<u64>,
        data: Buffer,
    ) -> Result<()> {
        let Some(host) = cluster.writable_host() else { unreachable!("the caller has looked") };
        let start = self.cluster_start(payload.start);
        let mut filled = self.whole_units(&payload);
        let has_data = |offset: u64| cluster.data >> ((offset - start) >> self.geometry.unit_bits()) & 1 == 1;
        // Units that have data need no filling.
        if has_data(payload.start) {
            filled.start = payload.start;
        }
        if has_data(payload.end - 1) {
            filled.end = payload.end;
        }
        let touched = self.geometry.units_touched(payload.start - start, payload.end - start);
        let fill = Fill { payload, filled, shift: host.0.wrapping_sub(start), fresh: false };
        self.write_fill(&fill, data).await?;
        let new = Cluster { data: cluster.data | touched, zero: cluster.zero & !touched, ..cluster };
        if new != cluster {
            self.set_l2_entry(slice, index, L2Entry::Standard(cluster), new);
        }
        Ok(())
    }

    /// Writes to clusters that get new host clusters.
    async fn write_new(
        self: &Rc<Self>,
        slice: &Rc<Slice>,
        first: usize,
        payload: Range<u64>,
        data: Buffer,
    ) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let mut at = payload.start;
        let mut index = first;
        while at < payload.end {
            let want = ((payload.end - 1) >> bits) - (at >> bits) + 1;
            let allocation = match self.data_file {
                Some(_) => Allocation::external(self.cluster_start(at), want),
                None => self.allocate(want).await?,
            };
            let count = allocation.count;
            let stop = payload.end.min(((at >> bits) + count) << bits);
            let part = data.slice((at - payload.start) as usize..(stop - payload.start) as usize);
            self.write_allocation(slice, index, at..stop, part, allocation).await?;
            index += count as usize;
            at = stop;
        }
        Ok(())
    }

    async fn write_allocation(
        self: &Rc<Self>,
        slice: &Rc<Slice>,
        first: usize,
        payload: Range<u64>,
        data: Buffer,
        allocation: Allocation,
    ) -> Result<()> {
        let size = self.geometry.cluster_size();
        let start = self.cluster_start(payload.start);
        let last = first + allocation.count as usize - 1;
        // A cluster whose old data stay with a snapshot, or are compressed, is copied as a whole.
        let copied_whole = |entry: &L2Entry| match entry {
            L2Entry::Compressed { .. } => true,
            L2Entry::Standard(cluster) => cluster.data != 0,
        };
        let mut filled = self.whole_units(&payload);
        let prepared = (|| {
            if copied_whole(&self.l2_entry(slice, first, payload.start)?) {
                filled.start = start;
            }
            if copied_whole(&self.l2_entry(slice, last, payload.end - 1)?) {
                filled.end = self.cluster_start(payload.end - 1) + size;
            }
            Ok(())
        })();
        if let Err(err) = prepared {
            allocation.free(self);
            return Err(err);
        }
        let shift = allocation.start.0.wrapping_sub(start);
        let fill = Fill { payload, filled: filled.clone(), shift, fresh: allocation.fresh };
        if let Err(err) = self.write_fill(&fill, data).await {
            // All writes have ended, and no table refers to the clusters.
            allocation.free(self);
            return Err(err);
        }
        for index in first..=last {
            let cluster_start = start + (index - first) as u64 * size;
            let old = self.l2_entry(slice, index, cluster_start)?;
            let zero = match old {
                L2Entry::Standard(cluster) => cluster.zero,
                L2Entry::Compressed { .. } => 0,
            };
            let from = filled.start.max(cluster_start) - cluster_start;
            let to = filled.end.min(cluster_start + size) - cluster_start;
            let data = self.geometry.units_touched(from, to);
            let host = super::entry::HostOffset(cluster_start.wrapping_add(shift));
            let new = Cluster { host: Some(host), copied: true, data, zero: zero & !data };
            self.set_l2_entry(slice, index, old, new);
        }
        allocation.keep();
        Ok(())
    }

    fn whole_units(&self, range: &Range<u64>) -> Range<u64> {
        let unit = 1u64 << self.geometry.unit_bits();
        range.start & !(unit - 1)..range.end.next_multiple_of(unit)
    }

    /// Writes a payload and what fills its units: neighbouring old data in one write with it, so that there is one write per
    /// partial cluster and one for all whole ones.
    async fn write_fill(&self, fill: &Fill, data: Buffer) -> Result<()> {
        let Fill { payload, filled, shift, fresh } = fill;
        let size = self.geometry.cluster_size();
        let host = |offset: u64| offset.wrapping_add(*shift);
        let running: FuturesUnordered<LocalFuture<'_, Result<()>>> = FuturesUnordered::new();

        // What of the gaps on both sides goes into a buffer with data.
        let mut inline = payload.clone();
        let (head, tail) = (filled.start..payload.start, payload.end..filled.end);
        let head_zero = self.reads_as_zero(head.clone()).await?;
        let tail_zero = self.reads_as_zero(tail.clone()).await?;
        for (gap, zero, is_head) in [(head, head_zero, true), (tail, tail_zero, false)] {
            if gap.is_empty() || zero && *fresh {
                continue;
            }
            if zero && gap.end - gap.start > MAX_INLINE_ZEROES {
                self.events.tell(DebugEvent::ClusterAllocSpace);
                let flags = ZeroFlags::default();
                running.push(self.data_node().write_zeroes(host(gap.start), gap.end - gap.start, flags));
            } else if is_head {
                inline.start = gap.start;
            } else {
                inline.end = gap.end;
            }
        }

        // The payload's parts: with the head gap, straight from the request, with the tail gap.
        let head_end = if inline.start < payload.start {
            payload.end.min(self.cluster_start(payload.start) + size)
        } else {
            payload.start
        };
        let tail_start = if inline.end > payload.end {
            payload.start.max(self.cluster_start(payload.end - 1))
        } else {
            payload.end
        };
        let part = |range: Range<u64>| {
            data.slice((range.start - payload.start) as usize..(range.end - payload.start) as usize)
        };
        let write = |range: Range<u64>, bytes: Range<u64>| -> LocalFuture<'_, Result<()>> {
            let bytes_part = part(bytes.clone());
            Box::pin(async move {
                let whole = self.surround(range.clone(), bytes, bytes_part).await?;
                self.events.tell(DebugEvent::WriteAio);
                self.data_node().write(range.start.wrapping_add(*shift), whole, WriteFlags::default()).await
            })
        };
        if head_end > tail_start {
            running.push(write(inline.clone(), payload.clone()));
        } else {
            if head_end > payload.start {
                running.push(write(inline.start..head_end, payload.start..head_end));
            }
            if tail_start > head_end {
                let straight = part(head_end..tail_start);
                self.events.tell(DebugEvent::WriteAio);
                running.push(self.data_node().write(host(head_end), straight, WriteFlags::default()));
            }
            if tail_start < payload.end {
                running.push(write(tail_start..inline.end, tail_start..payload.end));
            }
        }
        drive(running).await
    }

    /// The bytes of `range`: `data` over `payload`, and what reads there now around it.
    pub(super) async fn surround(
        &self,
        range: Range<u64>,
        payload: Range<u64>,
        data: Buffer,
    ) -> Result<Buffer> {
        let mut head = BufferMut::new((range.end - range.start) as usize);
        let mut middle = head.split_off((payload.start - range.start) as usize);
        let tail = middle.split_off(data.len());
        middle.copy_from_slice(&data);
        self.events.tell(DebugEvent::CowRead);
        let (head, tail) =
            futures_util::future::try_join(self.read(range.start, head), self.read(payload.end, tail))
                .await?;
        Ok(head.join(middle).join(tail).freeze())
    }

    /// True if a range reads as zeroes without any data being read.
    pub(super) async fn reads_as_zero(&self, range: Range<u64>) -> Result<bool> {
        let end = range.end.min(self.size.get());
        let mut at = range.start;
        while at < end {
            let run = self.run(at..end).await?;
            let zero = match run.target {
                Target::Zero => true,
                Target::Unallocated => {
                    self.backing.borrow().as_ref().is_none_or(|backing| backing.size() <= at)
                }
                _ => false,
            };
            if !zero {
                return Ok(false);
            }
            at += run.len;
        }
        Ok(true)
    }
}

fn add_step(steps: &mut Vec<Step>, range: Range<u64>, host: Option<u64>) {
    match (steps.last_mut(), host) {
        (Some(Step::Allocate(last)), None) => last.end = range.end,
        (Some(Step::InPlace(last, start)), Some(host)) if *start + (range.start - last.start) == host => {
            last.end = range.end;
        }
        (_, None) => steps.push(Step::Allocate(range)),
        (_, Some(host)) => steps.push(Step::InPlace(range, host)),
    }
}

/// Runs all to their ends, whatever becomes of some; returns the first error.
pub(super) async fn drive(mut running: FuturesUnordered<LocalFuture<'_, Result<()>>>) -> Result<()> {
    let mut result = Ok(());
    while let Some(done) = running.next().await {
        result = result.and(done);
    }
    result
}
