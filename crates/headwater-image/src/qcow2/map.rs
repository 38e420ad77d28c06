//! From offsets of the disk to where the bytes are.

use super::cache::Slice;
use super::entry::L2Entry;
use super::image::Image;
use headwater_block::{Extent, ExtentKind, Resolved, Result};
use std::ops::Range;
use std::rc::Rc;

/// How many slices of tables one question for a status looks through: more would keep the thread from other requests.
const MAX_STATUS_RUNS: u32 = 256;

/// Where a run of the disk's bytes is, in this layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// At this offset of the data node.
    Data(u64),
    /// Nowhere: zeroes.
    Zero,
    /// Nowhere: the backing decides.
    Unallocated,
    /// In one compressed cluster, at this offset of the file, of at most this length.
    Compressed { offset: u64, len: u64 },
}

/// A run of bytes with one target.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) target: Target,
    /// In bytes, never 0.
    pub(super) len: u64,
}

impl Image {
    /// The run at the start of `range` (not empty, within the disk or the last cluster), from memory alone; `None` if the slice that maps it isn't there.
    #[inline]
    pub(super) fn cached_run(&self, range: Range<u64>) -> Option<Result<Run>> {
        let coverage = self.geometry.l2_coverage_bits();
        let mut l1_index = (range.start >> coverage) as usize;
        match self.l2_table(l1_index) {
            Err(err) => Some(Err(err)),
            Ok(Some(table)) => {
                let (slice, index) = self.cached_l2_slice(table, range.start)?;
                Some(self.run_in_slice(&slice, index, range))
            }
            Ok(None) => {
                let l1 = self.l1.borrow();
                let mut end;
                // The first entry says nothing, but needn't be zero: it may have its flag set.
                loop {
                    l1_index += 1;
                    end = ((l1_index as u64) << coverage).min(range.end);
                    if end == range.end || l1.get(l1_index) != 0 {
                        break;
                    }
                }
                Some(Ok(Run { target: Target::Unallocated, len: end - range.start }))
            }
        }
    }

    /// As [`Image::cached_run`], reading what isn't in memory.
    pub(super) async fn run(&self, range: Range<u64>) -> Result<Run> {
        loop {
            if let Some(run) = self.cached_run(range.clone()) {
                return run;
            }
            // Held while looking again: so it can't be evicted in between. The L1 entry is looked up again too, because
            // another request may have moved the table.
            let _slice = match self.l2_table((range.start >> self.geometry.l2_coverage_bits()) as usize)? {
                Some(table) => self.l2_slice(table, range.start).await?,
                None => continue,
            };
            if let Some(run) = self.cached_run(range.clone()) {
                return run;
            }
        }
    }

    fn run_in_slice(&self, slice: &Slice, first: usize, range: Range<u64>) -> Result<Run> {
        let g = &self.geometry;
        let mut at = range.start;
        let mut found = None;
        for index in first..self.l2_slice_entries() {
            let cluster_start = self.cluster_start(at);
            let cluster = match self.l2_entry(slice, index, at) {
                Ok(L2Entry::Standard(cluster)) => cluster,
                Ok(L2Entry::Compressed { offset, len }) => {
                    found.get_or_insert_with(|| {
                        at = range.end.min(cluster_start + g.cluster_size());
                        Target::Compressed { offset: offset.0, len }
                    });
                    break;
                }
                Err(err) if found.is_none() => return Err(err),
                Err(_) => break,
            };
            let unit = ((at - cluster_start) >> g.unit_bits()) as u32;
            let in_cluster = at - cluster_start;
            let (target, mask) = match cluster.host {
                Some(host) if cluster.data >> unit & 1 == 1 => {
                    (Target::Data(host.0 + in_cluster), cluster.data)
                }
                _ if cluster.zero >> unit & 1 == 1 => (Target::Zero, cluster.zero),
                _ => (Target::Unallocated, !(cluster.data | cluster.zero)),
            };
            let goes_on = match (found, target) {
                (None, _) => true,
                (Some(Target::Data(start)), Target::Data(host)) => start + (at - range.start) == host,
                (Some(before), target) => before == target,
            };
            if !goes_on {
                break;
            }
            found.get_or_insert(target);
            let units = (mask >> unit).trailing_ones().min(g.units() - unit);
            let cluster_end = cluster_start + g.cluster_size();
            at = cluster_start + (u64::from(unit + units) << g.unit_bits());
            if at >= range.end || at < cluster_end {
                at = at.min(range.end);
                break;
            }
        }
        Ok(Run {
            target: found.expect("a slice has an entry for each cluster that it maps"),
            len: at - range.start,
        })
    }

    /// [`headwater_block::Node::resolve`].
    pub(super) fn resolve(&self, range: Range<u64>) -> Resolved {
        let size = self.size.get();
        if range.start >= size {
            return Resolved::Zero { len: range.end - range.start, depth: 0 };
        }
        if self.events.are_heard() {
            // A read straight from the file would go untold.
            return Resolved::Ask;
        }
        let Some(Ok(run)) = self.cached_run(range.start..range.end.min(size)) else { return Resolved::Ask };
        match run.target {
            Target::Data(offset) => {
                Resolved::At { node: self.data_node().clone(), offset, len: run.len, depth: 0 }
            }
            Target::Zero => Resolved::Zero { len: run.len, depth: 0 },
            Target::Compressed { .. } => Resolved::Ask,
            Target::Unallocated => self.resolve_in_backing(range.start..range.start + run.len),
        }
    }

    fn resolve_in_backing(&self, range: Range<u64>) -> Resolved {
        let backing = self.backing.borrow();
        let Some(backing) = backing.as_ref().filter(|backing| backing.size() > range.start) else {
            return Resolved::Zero { len: range.end - range.start, depth: 1 };
        };
        match backing.resolve(range.start..range.end.min(backing.size())) {
            Resolved::At { node, offset, len, depth } => Resolved::At { node, offset, len, depth: depth + 1 },
            Resolved::Zero { len, depth } => Resolved::Zero { len, depth: depth + 1 },
            Resolved::Ask => Resolved::Ask,
        }
    }

    /// [`headwater_block::Node::status`]. The extent may end before the status does where more tables would have to be read.
    pub(super) async fn status(self: &Rc<Self>, range: Range<u64>) -> Result<Extent> {
        let size = self.size.get();
        if range.start >= size {
            return Ok(Extent::new(range.start, range.end - range.start, ExtentKind::Zero));
        }
        let end = range.end.min(size);
        let first = self.run(range.start..end).await?;
        let mut len = first.len;
        // What lies in tables that are in memory anyway belongs to the same answer.
        let mut steps = 0..MAX_STATUS_RUNS;
        while range.start + len < end
            && steps.next().is_some()
            && let Some(Ok(next)) = self.cached_run(range.start + len..end)
        {
            let goes_on = match (first.target, next.target) {
                (Target::Data(start), Target::Data(host)) => start + len == host,
                (Target::Compressed { .. }, _) => false,
                (before, target) => before == target,
            };
            if !goes_on {
                break;
            }
            len += next.len;
        }
        let kind = match first.target {
            Target::Data(_) | Target::Compressed { .. } => ExtentKind::Data,
            Target::Zero => ExtentKind::Zero,
            Target::Unallocated => ExtentKind::Unallocated,
        };
        let mut extent = Extent::new(range.start, len, kind);
        extent.compressed = matches!(first.target, Target::Compressed { .. });
        if let Target::Data(offset) = first.target {
            extent.host_offset = Some(offset);
        }
        Ok(extent)
    }
}
