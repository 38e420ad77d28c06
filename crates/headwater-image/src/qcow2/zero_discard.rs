//! Writing zeroes and discarding.
//!
//! Whole units of allocation change their entry only. A cluster that its entry no longer names goes back to the allocator after the
//! change is durable. Parts of units are written as data.

use super::entry::{Cluster, L2Entry};
use super::image::Image;
use super::map::Target;
use headwater_block::{Buffer, Error, ErrorKind, Result, ZeroFlags};
use std::ops::Range;
use std::rc::Rc;

/// The largest write of zeroes as data, in bytes.
const MAX_DATA: u64 = 1 << 20;

/// What to make of clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Become {
    /// Units read as zeroes; clusters stay allocated unless `unmap`.
    Zero {
        /// Clusters without data are freed.
        unmap: bool,
    },
    /// Whole clusters are in no way mentioned: what is below shows.
    Unallocated,
}

impl Image {
    /// [`headwater_block::Node::write_zeroes`], without FUA.
    pub(super) async fn write_zeroes(self: &Rc<Self>, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.check_change(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        self.prepare_header().await?;
        let range = offset..offset + len;
        let units = self.whole_parts(&range, self.geometry.unit_bits());
        // Version 2 knows no zero clusters, but without a backing an unallocated one reads the same.
        let by_entry = self.geometry.version >= 3 || !self.has_backing();
        let parts = match &units {
            Some(units) if by_entry => [range.start..units.start, units.end.min(range.end)..range.end],
            _ => [range.clone(), range.end..range.end],
        };
        self.check_fast(&parts, flags).await?;
        match units {
            Some(units) if by_entry => {
                if self.data_file_is_raw {
                    let len = range.end.min(units.end) - units.start;
                    self.data_node().write_zeroes(units.start, len, flags).await?;
                }
                let v3 = self.geometry.version >= 3;
                let to = if v3 { Become::Zero { unmap: flags.unmap } } else { Become::Unallocated };
                self.change_clusters(units, to).await?;
            }
            // The clusters shall be in this layer afterwards, even where nothing below has data: that is how a copy-up of zeroes ends.
            Some(_) => return self.write_zero_data(range).await,
            None => {}
        }
        for part in parts {
            if !self.reads_as_zero(part.clone()).await? {
                self.write_zero_data(part).await?;
            }
        }
        Ok(())
    }

    /// [`headwater_block::Node::discard`].
    pub(super) async fn discard(self: &Rc<Self>, offset: u64, len: u64) -> Result<()> {
        self.check_change(offset, len)?;
        self.prepare_header().await?;
        let Some(clusters) = self.whole_parts(&(offset..offset + len), self.geometry.cluster_bits) else {
            return Ok(());
        };
        let to = match (self.has_backing(), self.geometry.version) {
            (false, _) => Become::Unallocated,
            // What the backing holds must not come back, so the cluster has to be mentioned, which version 2 can't.
            (true, 2) => return Ok(()),
            (true, _) => Become::Zero { unmap: true },
        };
        if let Some(data_file) = &self.data_file {
            let len = clusters.end.min(offset + len) - clusters.start;
            if self.data_file_is_raw {
                let flags = ZeroFlags { unmap: true, ..ZeroFlags::default() };
                data_file.write_zeroes(clusters.start, len, flags).await?;
            } else {
                data_file.discard(clusters.start, len).await?;
            }
        }
        self.change_clusters(clusters, to).await
    }

    /// The whole clusters or units within a range, if any. The last of the disk counts as whole if the range reaches the disk's end.
    fn whole_parts(&self, range: &Range<u64>, bits: u32) -> Option<Range<u64>> {
        let size = 1u64 << bits;
        let end = if range.end >= self.size.get() {
            range.end.next_multiple_of(size)
        } else {
            range.end & !(size - 1)
        };
        let start = range.start.checked_next_multiple_of(size)?;
        (start < end).then_some(start..end)
    }

    /// With `fast_only`, fails if any of `parts` would have to be written as data.
    async fn check_fast(&self, parts: &[Range<u64>], flags: ZeroFlags) -> Result<()> {
        for part in parts {
            if flags.fast_only && !self.reads_as_zero(part.clone()).await? {
                let text = format!(
                    "{}: {} bytes at {} can only be zeroed by writing data",
                    self.name,
                    part.end - part.start,
                    part.start
                );
                return Err(Error::new(ErrorKind::Unsupported, text));
            }
        }
        Ok(())
    }

    /// Writes zeroes as data.
    async fn write_zero_data(self: &Rc<Self>, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let stop = range.end.min(at.saturating_add(MAX_DATA) & !(MAX_DATA - 1));
            self.write_unchecked(at, Buffer::zeroed((stop - at) as usize)).await?;
            at = stop;
        }
        Ok(())
    }

    /// Changes all units of a range, which consists of whole units; of whole clusters for [`Become::Unallocated`].
    pub(super) async fn change_clusters(self: &Rc<Self>, range: Range<u64>, to: Become) -> Result<()> {
        let coverage = self.geometry.l2_coverage_bits();
        let size = self.geometry.cluster_size();
        // Where nothing is mentioned and nothing is below, all is as it should be.
        let skip_missing = to == Become::Unallocated || !self.has_backing();
        let mut at = range.start;
        while at < range.end {
            if skip_missing && self.l2_table((at >> coverage) as usize)?.is_none() {
                at = range.end.min(((at >> coverage) + 1) << coverage);
                continue;
            }
            self.relieve_pressure().await?;
            let (slice, first) = self.writable_l2_slice(at).await?;
            for index in first..self.l2_slice_entries() {
                let cluster_start = self.cluster_start(at);
                let stop = range.end.min(cluster_start + size);
                let touched = self.geometry.units_touched(at - cluster_start, stop - cluster_start);
                let old = self.l2_entry(&slice, index, at)?;
                match self.changed(old, touched, to) {
                    Some(new) if L2Entry::Standard(new) != old => self.set_l2_entry(&slice, index, old, new),
                    Some(_) => {}
                    // A part of a compressed cluster: it is unpacked.
                    None => self.write_unchecked(at, Buffer::zeroed((stop - at) as usize)).await?,
                }
                at = stop;
                if at >= range.end {
                    break;
                }
            }
        }
        Ok(())
    }

    /// What becomes of an entry when units are changed; `None` if only writing data will do.
    fn changed(&self, old: L2Entry, touched: u32, to: Become) -> Option<Cluster> {
        let all = touched == self.geometry.all_units();
        let Become::Zero { unmap } = to else {
            debug_assert!(all);
            return Some(Cluster::UNALLOCATED);
        };
        let old = match old {
            L2Entry::Compressed { .. } if !all => return None,
            L2Entry::Compressed { .. } => Cluster::UNALLOCATED,
            L2Entry::Standard(old) => old,
        };
        let unallocated = !(old.data | old.zero);
        // Without a backing, units that aren't there read as zeroes already, unless the entry is to change anyway.
        let needed = if self.has_backing() { touched } else { touched & !unallocated };
        let mut new = Cluster { data: old.data & !touched, zero: old.zero | needed, ..old };
        // A host cluster that a snapshot shares can't be written in place later, so there is no use in keeping it.
        let droppable = self.data_file.is_none() && (unmap || !old.copied);
        if new.data == 0 && droppable {
            new.host = None;
            new.copied = false;
        }
        Some(new)
    }

    /// Makes a range beyond the end of the disk's `old_size` read as zeroes, before the disk grows over it to `new_size`.
    pub(super) async fn zero_beyond(self: &Rc<Self>, old_size: u64, new_size: u64) -> Result<()> {
        let size = self.geometry.cluster_size();
        let backing_size = self.backing.borrow().as_ref().map_or(0, |backing| backing.size());
        // The rest of the last cluster, which holds arbitrary bytes or shows the backing's.
        let first = old_size.next_multiple_of(size);
        let mut at = old_size;
        let mut clean = true;
        while at < first {
            let run = self.run(at..first).await?;
            clean &= match run.target {
                Target::Zero => true,
                Target::Unallocated => backing_size <= at,
                Target::Data(_) | Target::Compressed { .. } => false,
            };
            at += run.len;
        }
        if !clean {
            let start = old_size & !(u64::from(self.write_alignment()) - 1);
            // Reading past the end gives zeroes.
            let rest = self.read(start, headwater_block::BufferMut::new((first - start) as usize)).await?;
            self.write_unchecked(start, rest.freeze()).await?;
        }
        // Whole clusters: hide the backing where it has something; beyond it, remove what was left when the disk shrank.
        let end = new_size.next_multiple_of(size);
        let hidden = backing_size.next_multiple_of(size).clamp(first.min(end), end);
        if first < hidden {
            if self.geometry.version >= 3 {
                self.change_clusters(first..hidden, Become::Zero { unmap: true }).await?;
            } else {
                let mut at = first;
                while at < hidden {
                    let stop = hidden.min(at + size.max(MAX_DATA));
                    self.write_unchecked(at, Buffer::zeroed((stop - at) as usize)).await?;
                    at = stop;
                }
            }
        }
        if first.max(hidden) < end {
            self.change_clusters(first.max(hidden)..end, Become::Unallocated).await?;
        }
        Ok(())
    }
}
