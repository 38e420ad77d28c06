//! L2 tables that may be changed: making them, and copying those that snapshots share.

use super::cache::Slice;
use super::entry::{Cluster, HostOffset, L1Entry, L2Entry};
use super::image::Image;
use super::shared::Shared;
use headwater_block::{BufferMut, DebugEvent, Result, WriteFlags, ZeroFlags};
use std::ops::Range;
use std::rc::Rc;

impl Image {
    /// The slice with the L2 entry of `guest`, in a table that belongs to the active L1 table alone, and the index of the entry.
    /// Such a table stays where it is, so the slice may be kept over awaits.
    pub(super) async fn writable_l2_slice(self: &Rc<Self>, guest: u64) -> Result<(Rc<Slice>, usize)> {
        let l1_index = guest >> self.geometry.l2_coverage_bits();
        let table = self.writable_l2_table(l1_index).await?;
        loop {
            let (slice, index) = self.l2_slice(table, guest).await?;
            // Only a slice that is in the cache may be changed: one that was forgotten while it was read is out of date.
            if self.cached_l2_slice(table, guest).is_some_and(|(cached, _)| Rc::ptr_eq(&cached, &slice)) {
                return Ok((slice, index));
            }
        }
    }

    async fn writable_l2_table(self: &Rc<Self>, l1_index: u64) -> Result<HostOffset> {
        loop {
            let table = self.l2_table(l1_index as usize)?;
            if let Some(table) = table
                && L1Entry(self.l1.borrow().get(l1_index as usize)).is_copied()
            {
                return Ok(table);
            }
            let waiting = self.new_tables.borrow().get(&l1_index).and_then(|making| making.upgrade());
            let making = waiting.unwrap_or_else(|| {
                let image = self.clone();
                let making = Shared::new(async move {
                    let result = image.make_l2_table(l1_index as usize).await;
                    image.new_tables.borrow_mut().remove(&l1_index);
                    result
                });
                self.new_tables.borrow_mut().insert(l1_index, making.downgrade());
                making
            });
            making.await?;
        }
    }

    /// Makes an L2 table, or a copy of the one that a snapshot shares. All of it is in the file before the L1 entry refers to it.
    async fn make_l2_table(self: &Rc<Self>, l1_index: usize) -> Result<()> {
        let old = self.l2_table(l1_index)?;
        let bits = self.geometry.cluster_bits;
        let cluster_size = self.geometry.cluster_size();
        let allocation = self.allocate(1).await?;
        let new = allocation.start;
        self.cache.forget(new.0..new.0 + cluster_size);
        let written = match old {
            None => {
                self.events.tell(DebugEvent::L2AllocWrite);
                self.file.write_zeroes(new.0, cluster_size, ZeroFlags::default()).await
            }
            Some(old) => self.copy_table(old, new).await,
        };
        if let Err(err) = written {
            allocation.free(self);
            return Err(err);
        }
        allocation.keep();
        self.l1.borrow_mut().set(l1_index, L1Entry::new(new).0);
        self.metadata.borrow_mut().insert(new.0 >> bits);
        if let Some(old) = old {
            self.metadata.borrow_mut().remove(&(old.0 >> bits));
            self.drop_later(old.0 >> bits..(old.0 >> bits) + 1);
        }
        Ok(())
    }

    async fn copy_table(&self, old: HostOffset, new: HostOffset) -> Result<()> {
        self.events.tell(DebugEvent::L2AllocCowRead);
        let table = self.file.read(old.0, BufferMut::new(self.geometry.cluster_size() as usize)).await?;
        self.events.tell(DebugEvent::L2AllocWrite);
        self.file.write(new.0, table.freeze(), WriteFlags::default()).await
    }

    /// Changes an L2 entry in memory, and drops the reference to what it pointed to if the new one points elsewhere.
    pub(super) fn set_l2_entry(&self, slice: &Rc<Slice>, index: usize, old: L2Entry, new: Cluster) {
        self.store_l2_entry(slice, index, L2Entry::Standard(new));
        self.drop_old(old, new.host);
    }

    /// As [`Image::set_l2_entry`], for a compressed cluster: where it is, and how many bytes it has.
    pub(super) fn set_compressed_entry(&self, slice: &Rc<Slice>, index: usize, old: L2Entry, at: Range<u64>) {
        self.events.tell(DebugEvent::L2UpdateCompressed);
        let new = L2Entry::Compressed { offset: HostOffset(at.start), len: at.end - at.start };
        self.store_l2_entry(slice, index, new);
        self.drop_old(old, None);
    }

    fn store_l2_entry(&self, slice: &Rc<Slice>, index: usize, new: L2Entry) {
        let (word, bitmap) = new.encode(&self.geometry);
        let bits = self.geometry.l2_entry_bits();
        self.cache.change(slice, |bytes| {
            let entry = &mut bytes[index << bits..(index + 1) << bits];
            entry[..8].copy_from_slice(&word.to_be_bytes());
            if bits == 4 {
                entry[8..].copy_from_slice(&bitmap.to_be_bytes());
            }
        });
    }

    fn drop_old(&self, old: L2Entry, keep: Option<HostOffset>) {
        let bits = self.geometry.cluster_bits;
        match old {
            _ if self.data_file.is_some() => {}
            L2Entry::Standard(Cluster { host: Some(host), .. }) if Some(host) != keep => {
                self.drop_later(host.0 >> bits..(host.0 >> bits) + 1);
            }
            L2Entry::Standard(_) => {}
            L2Entry::Compressed { offset, len } => {
                self.drop_later(offset.0 >> bits..((offset.0 + len - 1) >> bits) + 1);
            }
        }
    }
}
