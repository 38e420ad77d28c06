//! The table of internal snapshots, as a check reads it: leniently, telling what is wrong.

use super::layout::{Geometry, Table, be32, be64};
use super::medium::Medium;
use super::report::CheckReport;
use crate::qcow2::snapshots::Reader;
use headwater_block::Result;

/// The fixed part of an entry, in bytes.
const FIXED: usize = 40;
/// How much extra data version 3 requires, and how much anybody may have.
const EXTRA_NEEDED: u32 = 16;
const MAX_EXTRA: u32 = 1024;
/// The largest table that is read, in bytes, and the largest L1 table that a snapshot may have.
const MAX_TABLE: u64 = 64 << 20;
const MAX_L1: u64 = (32 << 20) / 8;
/// The largest number of snapshots.
const MAX_SNAPSHOTS: u32 = 65536;

/// What a check needs of a snapshot.
#[derive(Debug)]
pub(super) struct Snapshot {
    /// Its number and identifier, for messages.
    pub(super) label: String,
    pub(super) l1: Table,
}

/// The table as far as it could be read.
#[derive(Debug)]
pub(super) struct SnapshotTable {
    pub(super) snapshots: Vec<Snapshot>,
    /// Its length in bytes.
    pub(super) len: u64,
    /// All snapshots are there.
    pub(super) complete: bool,
}

/// Reads the table and reports what is wrong with it.
pub(super) async fn read(
    medium: &Medium,
    geometry: &Geometry,
    report: &mut CheckReport,
) -> Result<SnapshotTable> {
    let mut table = SnapshotTable { snapshots: Vec::new(), len: 0, complete: false };
    let mut position = 0_u64;
    let mut reader = Reader::new(medium.file());
    for index in 0..geometry.snapshot_count {
        let start = geometry.snapshots_offset.saturating_add(position);
        let past_end = start.checked_add(FIXED as u64).is_none_or(|end| end > geometry.file_size);
        if past_end || position > MAX_TABLE || index >= MAX_SNAPSHOTS {
            report.corruption(|| {
                format!(
                    "the snapshot table ends, or is too large, at entry {index} of {}",
                    geometry.snapshot_count
                )
            });
            table.len = position;
            return Ok(table);
        }
        let entry: [u8; FIXED] = reader.bytes(start, FIXED).await?.try_into().unwrap_or([0; FIXED]);
        let extra = be32(&entry[36..40]);
        let id_len = u64::from(u16::from_be_bytes([entry[12], entry[13]]));
        let name_len = u64::from(u16::from_be_bytes([entry[14], entry[15]]));
        let id = reader.bytes(start + FIXED as u64 + u64::from(extra), id_len.min(64) as usize).await?;
        let label = format!("{index} ({})", String::from_utf8_lossy(id));
        if extra > MAX_EXTRA {
            report.corruption(|| format!("snapshot {label} has too much extra data, {extra} bytes"));
        } else if geometry.version >= 3 && extra < EXTRA_NEEDED {
            report.corruption(|| {
                format!("snapshot {label} has only {extra} of {EXTRA_NEEDED} bytes of extra data")
            });
        }
        let entries = u64::from(be32(&entry[8..12]));
        if entries > MAX_L1 {
            report.corruption(|| format!("the L1 table of snapshot {label} is too large, {entries} entries"));
        }
        let l1 = Table { offset: be64(&entry[0..8]), entries: entries.min(MAX_L1) };
        table.snapshots.push(Snapshot { label, l1 });
        position = (position + FIXED as u64 + u64::from(extra) + id_len + name_len).next_multiple_of(8);
    }
    table.len = position;
    table.complete = true;
    Ok(table)
}
