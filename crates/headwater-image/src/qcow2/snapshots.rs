//! The list of internal snapshots, for those who want to see it. An open image only preserves them.

use super::header::Header;
use headwater_block::{BufferMut, Error, ErrorKind, Node, Result};
use serde::Serialize;

/// The fixed part of an entry, in bytes.
const FIXED: usize = 40;
/// How much extra data an entry may have, in bytes.
const MAX_EXTRA: usize = 1024;

/// One internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// The identifier, mostly a number.
    pub id: String,
    /// The name that the user gave.
    pub name: String,
    /// The size in bytes of the machine's state that was saved with it.
    pub vm_state_size: u64,
    /// When it was made: seconds since 1970, and nanoseconds.
    pub date_sec: u32,
    /// See `date_sec`.
    pub date_nsec: u32,
    /// How long the guest had been running: seconds, and nanoseconds.
    pub vm_clock_sec: u64,
    /// See `vm_clock_sec`.
    pub vm_clock_nsec: u64,
    /// The disk's size in bytes at that time, if it was recorded.
    #[serde(skip)]
    pub disk_size: Option<u64>,
}

/// Reads the list.
pub async fn list(file: &dyn Node, header: &Header) -> Result<Vec<SnapshotInfo>> {
    let mut snapshots = Vec::new();
    let mut position = header.snapshots_offset;
    for index in 0..header.nb_snapshots {
        let corrupt = |what: &str| {
            let name = file.name();
            Error::new(
                ErrorKind::Corrupt,
                format!(
                    "{name}: entry {index} of the snapshot table, at {position:#x}, {what}; check the image"
                ),
            )
        };
        if position.checked_add(FIXED as u64).is_none_or(|end| end > file.size()) {
            return Err(corrupt("lies past the end of the file"));
        }
        let entry = file.read(position, BufferMut::new(FIXED)).await?;
        let u16_at = |at: usize| usize::from(u16::from_be_bytes([entry[at], entry[at + 1]]));
        let number =
            |at: usize, len: usize| entry[at..at + len].iter().fold(0, |n, b| n << 8 | u64::from(*b));
        let (id_len, name_len, extra) = (u16_at(12), u16_at(14), number(36, 4) as usize);
        if extra > MAX_EXTRA {
            return Err(corrupt("has too much extra data"));
        }
        let rest = file.read(position + FIXED as u64, BufferMut::new(extra + id_len + name_len)).await?;
        let text = |at: usize, len: usize| String::from_utf8_lossy(&rest[at..at + len]).into_owned();
        let extra_number = |at: usize| rest[at..at + 8].iter().fold(0, |n, b| n << 8 | u64::from(*b));
        let clock = number(24, 8);
        snapshots.push(SnapshotInfo {
            id: text(extra, id_len),
            name: text(extra + id_len, name_len),
            vm_state_size: if extra >= 8 { extra_number(0) } else { number(32, 4) },
            date_sec: number(16, 4) as u32,
            date_nsec: number(20, 4) as u32,
            vm_clock_sec: clock / 1_000_000_000,
            vm_clock_nsec: clock % 1_000_000_000,
            disk_size: (extra >= 16).then(|| extra_number(8)),
        });
        position = (position + (FIXED + rest.len()) as u64).next_multiple_of(8);
    }
    Ok(snapshots)
}
