//! New reference counts for an image whose refcount structures can't be corrected where they are.
//!
//! The new ones are written behind everything else in the file and made durable; then one write to the header's first sector makes
//! them the image's. A crash before that leaves the image as it was, but for a longer file; after it, the old structures are free space.

use super::counts::Counts;
use super::layout::{Geometry, Layout};
use super::medium::Medium;
use super::walk::Walk;
use crate::qcow2::entry::set_refcount;
use crate::qcow2::header::MAX_REFCOUNT_TABLE_BYTES;
use headwater_block::{Error, ErrorKind, Result};
use std::collections::BTreeMap;

/// Where the header holds the offset of the refcount table and its number of clusters: 12 bytes.
const TABLE_FIELDS: u64 = 48;

/// Writes new refcount structures for all references that can be followed.
pub(super) async fn rebuild(
    medium: &Medium,
    geometry: &Geometry,
    layout: &mut Layout,
    memory: u64,
) -> Result<()> {
    let mut builder = Builder {
        medium,
        geometry,
        base: medium.size().div_ceil(geometry.cluster_size()),
        written: BTreeMap::new(),
        last: BTreeMap::new(),
    };
    let mut counts = Counts::new(memory, geometry.file_clusters(), geometry.block_entries());
    loop {
        counts.next_window();
        Walk::new(medium, geometry, &mut counts, None).run(layout, false).await?;
        builder.window(&counts).await?;
        if counts.is_last() {
            break;
        }
    }
    builder.finish().await
}

struct Builder<'a> {
    medium: &'a Medium,
    geometry: &'a Geometry,
    /// The first cluster behind everything: where the new structures start.
    base: u64,
    /// The offsets of the blocks written so far, by their index.
    written: BTreeMap<u64, u64>,
    /// The references of clusters whose block also covers new structures, so that it must wait.
    last: BTreeMap<u64, u64>,
}

impl Builder<'_> {
    /// The cluster at which the next block will be written.
    fn next_cluster(&self) -> u64 {
        self.base + self.written.len() as u64
    }

    /// Writes the blocks that the clusters of a window need.
    async fn window(&mut self, counts: &Counts) -> Result<()> {
        let per_block = self.geometry.block_entries();
        let last_block = self.base / per_block;
        let mut from = counts.window().start;
        while let Some(first) = counts.next_referenced(from..u64::MAX) {
            let index = first / per_block;
            from = (index + 1) * per_block;
            let mut references = BTreeMap::new();
            let mut next = Some(first);
            while let Some(cluster) = next {
                references.insert(cluster, counts.get(cluster).references);
                next = counts.next_referenced(cluster + 1..from);
            }
            if index >= last_block {
                self.last.append(&mut references);
            } else {
                self.block(index, &references).await?;
            }
        }
        Ok(())
    }

    async fn block(&mut self, index: u64, references: &BTreeMap<u64, u64>) -> Result<()> {
        let geometry = self.geometry;
        let mut block = vec![0; geometry.cluster_size() as usize];
        let max = u64::MAX >> (64 - (1_u32 << geometry.refcount_order));
        for (cluster, references) in references {
            // More references than fit stay a corruption that the next check reports.
            let i = (cluster % geometry.block_entries()) as usize;
            set_refcount(&mut block, i, geometry.refcount_order, (*references).min(max));
        }
        let offset = self.next_cluster() * geometry.cluster_size();
        self.medium.patch(offset, &block).await?;
        self.written.insert(index, offset);
        Ok(())
    }

    /// Writes what covers the new structures themselves, and the table; then switches over.
    async fn finish(mut self) -> Result<()> {
        let geometry = self.geometry;
        let per_block = geometry.block_entries();
        let first_block = self.base / per_block;
        let before = self.written.len() as u64;
        let (mut blocks, mut table_clusters) = (1, 1);
        loop {
            let end = self.base + before + blocks + table_clusters;
            let needed = end.div_ceil(per_block) - first_block;
            let table = ((first_block + needed) * 8).div_ceil(geometry.cluster_size());
            if (needed, table) == (blocks, table_clusters) {
                break;
            }
            (blocks, table_clusters) = (needed.max(blocks), table.max(table_clusters));
        }
        if table_clusters * geometry.cluster_size() > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{}: the file is too large for a new refcount table; copy the disk to a new image, for example with qemu-img convert",
                    geometry.name
                ),
            ));
        }
        let table_at = self.base + before + blocks;
        for cluster in self.base..table_at + table_clusters {
            self.last.insert(cluster, 1);
        }
        let mut last = std::mem::take(&mut self.last);
        for index in first_block..first_block + blocks {
            let rest = last.split_off(&((index + 1) * per_block));
            self.block(index, &last).await?;
            last = rest;
        }
        let mut table = vec![0; (table_clusters * geometry.cluster_size()) as usize];
        for (index, offset) in &self.written {
            table[*index as usize * 8..][..8].copy_from_slice(&offset.to_be_bytes());
        }
        let table_offset = table_at * geometry.cluster_size();
        self.medium.patch(table_offset, &table).await?;
        self.medium.flush().await?;

        let mut fields = table_offset.to_be_bytes().to_vec();
        fields.extend_from_slice(&(table_clusters as u32).to_be_bytes());
        self.medium.patch(TABLE_FIELDS, &fields).await?;
        self.medium.flush().await
    }
}
