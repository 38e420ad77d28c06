//! Changing the size of the disk.
//!
//! The header's size changes last when the disk grows, after the new range has been made to read as zeroes, and first when it shrinks.
//! A power cut leaves the old size or the new one, and the bytes of both are what they should be.

use super::header::MAX_L1_BYTES;
use super::image::Image;
use super::zero_discard::Become;
use headwater_block::{DebugEvent, Error, ErrorKind, Result, ZeroFlags};
use std::rc::Rc;

impl Image {
    /// [`headwater_block::Node::resize`]. Nothing else is under way.
    pub(super) async fn resize(self: &Rc<Self>, size: u64) -> Result<()> {
        self.check_change(0, 0)?;
        let old = self.size.get();
        if size == old {
            return Ok(());
        }
        self.prepare_header().await?;
        if size > old { self.grow(old, size).await } else { self.shrink(old, size).await }
    }

    async fn grow(self: &Rc<Self>, old: u64, size: u64) -> Result<()> {
        let entries = self.geometry.l1_entries_for(size);
        // The last cluster must have an end that can be named.
        let too_large = size > i64::MAX as u64 - self.geometry.cluster_size();
        if too_large || entries * 8 > MAX_L1_BYTES {
            let text = format!(
                "{}: {size} bytes are more than an image with clusters of {} bytes can have; convert it to one with larger clusters",
                self.name,
                self.geometry.cluster_size()
            );
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        if entries > self.l1.borrow().len() as u64 {
            let clusters = (entries * 8).div_ceil(self.geometry.cluster_size());
            self.events.tell(DebugEvent::L1GrowAllocTable);
            let start = self.allocate_table(clusters).await?;
            self.metadata.borrow_mut().extend(start..start + clusters);
            let mut l1 = self.l1.borrow_mut();
            l1.extend(entries as usize);
            l1.move_to(start << self.geometry.cluster_bits);
        }
        self.grow_data_file(old, size).await?;
        self.zero_beyond(old, size).await?;
        // The zeroes are durable before the header shows them.
        self.commit().await?;
        self.store_size(size).await?;
        self.size.set(size);
        Ok(())
    }

    async fn shrink(self: &Rc<Self>, old: u64, size: u64) -> Result<()> {
        if self.header.borrow().header.nb_snapshots > 0 {
            let text = format!(
                "{}: a disk with internal snapshots can't be made smaller; delete the snapshots first (qemu-img snapshot -d)",
                self.name
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        self.store_size(size).await?;
        self.size.set(size);
        let cluster = self.geometry.cluster_size();
        let (start, end) = (size.next_multiple_of(cluster), old.next_multiple_of(cluster));
        if start < end {
            self.change_clusters(start..end, Become::Unallocated).await?;
        }
        self.events.tell(DebugEvent::L1ShrinkFreeL2Clusters);
        self.drop_tables(self.geometry.l1_entries_for(size) as usize);
        self.commit().await?;
        match &self.data_file {
            Some(data_file) if data_file.size() > size => match data_file.resize(size).await {
                // A device is as long as it is.
                Err(err) if err.kind() == ErrorKind::Unsupported => Ok(()),
                resized => resized,
            },
            _ => Ok(()),
        }
    }

    /// Makes the external data file as long as the disk will be; one that is a raw image by itself has zeroes there.
    async fn grow_data_file(&self, old: u64, size: u64) -> Result<()> {
        let Some(data_file) = &self.data_file else { return Ok(()) };
        let was = data_file.size();
        if self.data_file_is_raw && was > old {
            let flags = ZeroFlags { unmap: true, ..ZeroFlags::default() };
            data_file.write_zeroes(old, was.min(size) - old, flags).await?;
        }
        if was < size { data_file.resize(size).await } else { Ok(()) }
    }

    /// Drops the L2 tables from an L1 index on, all of whose entries are empty.
    fn drop_tables(&self, first: usize) {
        let bits = self.geometry.cluster_bits;
        let count = self.l1.borrow().len();
        for index in first..count {
            // Tables whose entries are damaged are left to a repair.
            if let Ok(Some(table)) = self.l2_table(index) {
                let cluster = table.0 >> bits;
                self.l1.borrow_mut().set(index, 0);
                self.metadata.borrow_mut().remove(&cluster);
                self.drop_later(cluster..cluster + 1);
            }
        }
    }

    async fn store_size(self: &Rc<Self>, size: u64) -> Result<()> {
        self.set_header_size(size);
        let result = self.commit().await;
        if result.is_err() {
            self.forget_header_size();
        }
        result
    }
}
