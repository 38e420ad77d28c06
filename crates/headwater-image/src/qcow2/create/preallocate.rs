//! Space that a new disk has from the beginning, instead of when it is written to.
//!
//! The tables of such an image map the whole disk, to clusters that lie in order behind them: what is written later goes to its place without a change of
//! metadata. With subclusters the tables only say where data will be, so that a backing still shows through.

use super::super::entry::{Cluster, Geometry, HostOffset, L1Entry, L2Entry};
use super::{PIECE, Plan, write};
use headwater_block::{BufferMut, Error, ErrorKind, Node, Result, WriteFlags, ZeroFlags};
use std::ops::Range;

#[cfg(test)]
mod tests;

/// How much of a new disk is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Its place in the file: the tables are there, and the file is as long as it will be, with holes for the data.
    Metadata,
    /// Its place, and the file system's promise of space for it.
    Falloc,
    /// Its place, with zeroes written to all of it.
    Full,
}

impl Preallocation {
    /// The mode of this name, as QEMU's tools have it.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "off" => Some(Self::Off),
            "metadata" => Some(Self::Metadata),
            "falloc" => Some(Self::Falloc),
            "full" => Some(Self::Full),
            _ => None,
        }
    }
}

/// Makes `node` a disk of `size` bytes: cut if it is longer, but for a preallocated one; grown if it is shorter, with the new bytes allocated as `mode` says.
/// What it holds up to there stays.
///
/// # Errors
/// Those of the storage. `Unsupported` where its size is fixed and too small.
pub async fn set_size(node: &dyn Node, size: u64, mode: Preallocation) -> Result<()> {
    let old = node.size();
    if size > old || size < old && mode == Preallocation::Off {
        match node.resize(size).await {
            Err(err) if err.kind() == ErrorKind::Unsupported && size < old => {}
            other => other?,
        }
    }
    allocate(node, old.min(size)..size, mode, false).await
}

/// Allocates `range`, which lies within `node` and reads as zeroes, unless it is `stale`: then it does afterwards.
pub(super) async fn allocate(
    node: &dyn Node,
    range: Range<u64>,
    mode: Preallocation,
    stale: bool,
) -> Result<()> {
    match mode {
        Preallocation::Off => Ok(()),
        Preallocation::Metadata if !stale => Ok(()),
        Preallocation::Metadata => {
            let flags = ZeroFlags { unmap: true, ..ZeroFlags::default() };
            in_pieces(range, 1 << 30, |at, len| node.write_zeroes(at, len, flags)).await
        }
        Preallocation::Falloc => {
            in_pieces(range, 1 << 30, |at, len| node.write_zeroes(at, len, ZeroFlags::default())).await
        }
        Preallocation::Full => {
            let zeroes = BufferMut::zeroed(PIECE as usize).freeze();
            in_pieces(range, PIECE, |at, len| {
                node.write(at, zeroes.slice(0..len as usize), WriteFlags::default())
            })
            .await
        }
    }
}

async fn in_pieces<'a>(
    range: Range<u64>,
    piece: u64,
    change: impl Fn(u64, u64) -> headwater_block::LocalFuture<'a, Result<()>>,
) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        let len = piece.min(range.end - at);
        change(at, len).await?;
        at += len;
    }
    Ok(())
}

/// Writes the tables that map the whole disk to the clusters of `plan`.
pub(super) async fn write_tables(file: &dyn Node, geometry: &Geometry, plan: &Plan) -> Result<()> {
    let cluster_size = geometry.cluster_size();
    let entry = |index: u64| {
        let host = if geometry.data_file { index } else { plan.first_data() + index };
        let host = HostOffset(host * cluster_size);
        // Subclusters have no data yet, a cluster without them is either here or not.
        let data = if geometry.extended_l2 { 0 } else { 1 };
        let cluster = Cluster { host: Some(host), copied: true, data, zero: 0 };
        L2Entry::Standard(cluster).encode(geometry)
    };
    let l2 = Array { offset: plan.first_l2() * cluster_size, entries: plan.mapped_clusters };
    if geometry.extended_l2 {
        l2.write(file, cluster_size, 16, |index, out| {
            let (word, bitmap) = entry(index);
            out[..8].copy_from_slice(&word.to_be_bytes());
            out[8..].copy_from_slice(&bitmap.to_be_bytes());
        })
        .await?;
    } else {
        l2.write(file, cluster_size, 8, |index, out| out.copy_from_slice(&entry(index).0.to_be_bytes()))
            .await?;
    }
    let l1 = Array { offset: plan.first_l1() * cluster_size, entries: plan.l2_tables };
    l1.write(file, cluster_size, 8, |index, out| {
        let table = HostOffset((plan.first_l2() + index) * cluster_size);
        out.copy_from_slice(&L1Entry::new(table).0.to_be_bytes());
    })
    .await
}

/// Entries that follow one another in a file.
struct Array {
    offset: u64,
    entries: u64,
}

impl Array {
    /// Writes all, each of `len` bytes as `fill` says.
    async fn write(
        &self,
        file: &dyn Node,
        cluster_size: u64,
        len: u64,
        fill: impl Fn(u64, &mut [u8]),
    ) -> Result<()> {
        let per_piece = PIECE / len;
        let mut first = 0;
        while first < self.entries {
            let count = per_piece.min(self.entries - first);
            let mut bytes = vec![0; (count * len) as usize];
            for (index, out) in (first..).zip(bytes.chunks_exact_mut(len as usize)) {
                fill(index, out);
            }
            write(file, self.offset + first * len, &bytes, cluster_size).await?;
            first += count;
        }
        Ok(())
    }
}

/// Refuses what can't be preallocated because its clusters couldn't be counted, or named.
pub(super) fn check(plan: &Plan, geometry: &Geometry, most_table_bytes: u64, name: &str) -> Result<()> {
    let table_bytes = plan.table_clusters * geometry.cluster_size();
    let end = plan.clusters().checked_mul(geometry.cluster_size());
    if table_bytes <= most_table_bytes && end.is_some_and(|end| end < 1 << 56) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        format!(
            "{name}: cannot create the image: clusters of {} bytes are too small for a preallocated disk of this size; choose larger clusters, or \
             leave the preallocation off",
            geometry.cluster_size()
        ),
    ))
}
