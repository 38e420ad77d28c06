//! The table of internal snapshots: reading it, and making the bytes of another one. `snapshot` changes it.

use super::header::Header;
use headwater_block::{BufferMut, Error, ErrorKind, Node, Result};
use serde::Serialize;
use std::ops::Range;
use std::time::Duration;

/// The fixed part of an entry, in bytes.
const FIXED: usize = 40;
/// How much extra data an entry may have, in bytes.
const MAX_EXTRA: usize = 1024;
/// How large the table may be, in bytes.
const MAX_TABLE: u64 = 64 << 20;
/// How many bytes of an identifier and of a name are shown; QEMU makes none that are longer.
const MAX_ID: usize = 127;
pub(super) const MAX_NAME: usize = 255;
/// The most snapshots that an image may have.
pub(super) const MAX_SNAPSHOTS: u32 = 65536;
/// The extra data of a new entry, in bytes: the state's size, the disk's size, and a count of instructions that isn't known.
const EXTRA: u32 = 24;

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
    /// How many instructions the guest had executed, if that was counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icount: Option<u64>,
    /// The disk's size in bytes at that time, if it was recorded.
    #[serde(skip)]
    pub disk_size: Option<u64>,
}

/// A snapshot that is to be.
#[derive(Debug, Clone)]
pub struct NewSnapshot {
    /// The name: not empty, at most 255 bytes, and no other snapshot's.
    pub name: String,
    /// When it is made: since 1970.
    pub date: Duration,
    /// How long the guest has been running.
    pub vm_clock: Duration,
}

impl NewSnapshot {
    /// Its entry in the table.
    pub(super) fn encode(&self, id: &str, disk_size: u64, l1: (u64, u32)) -> Vec<u8> {
        let mut entry = Vec::new();
        entry.extend(l1.0.to_be_bytes());
        entry.extend(l1.1.to_be_bytes());
        entry.extend((id.len() as u16).to_be_bytes());
        entry.extend((self.name.len() as u16).to_be_bytes());
        entry.extend((self.date.as_secs() as u32).to_be_bytes());
        entry.extend(self.date.subsec_nanos().to_be_bytes());
        entry.extend(u64::try_from(self.vm_clock.as_nanos()).unwrap_or(u64::MAX).to_be_bytes());
        entry.extend(0_u32.to_be_bytes());
        entry.extend(EXTRA.to_be_bytes());
        entry.extend(0_u64.to_be_bytes());
        entry.extend(disk_size.to_be_bytes());
        entry.extend(u64::MAX.to_be_bytes());
        entry.extend(id.bytes());
        entry.extend(self.name.bytes());
        entry
    }

    /// What the table then tells of it.
    pub(super) fn info(&self, id: String, disk_size: u64) -> SnapshotInfo {
        SnapshotInfo {
            id,
            name: self.name.clone(),
            vm_state_size: 0,
            date_sec: self.date.as_secs() as u32,
            date_nsec: self.date.subsec_nanos(),
            vm_clock_sec: self.vm_clock.as_secs(),
            vm_clock_nsec: self.vm_clock.subsec_nanos().into(),
            icount: None,
            disk_size: Some(disk_size),
        }
    }
}

/// A snapshot, and where things are in the file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) info: SnapshotInfo,
    /// The L1 table: offset in bytes, and number of entries.
    pub(super) l1: (u64, u32),
    /// The entry itself, in bytes.
    pub(super) place: Range<u64>,
}

/// Reads the list.
///
/// # Errors
/// `Corrupt`, and those of the file.
pub async fn list(file: &dyn Node, header: &Header) -> Result<Vec<SnapshotInfo>> {
    Ok(entries(file, header).await?.into_iter().map(|entry| entry.info).collect())
}

/// Reads the table.
pub(super) async fn entries(file: &dyn Node, header: &Header) -> Result<Vec<Entry>> {
    let mut snapshots = Vec::new();
    let mut reader = Reader::new(file);
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
        if position - header.snapshots_offset > MAX_TABLE {
            return Err(corrupt("is further from its start than any table is long"));
        }
        let entry: [u8; FIXED] = reader.bytes(position, FIXED).await?.try_into().unwrap_or([0; FIXED]);
        let u16_at = |at: usize| usize::from(u16::from_be_bytes([entry[at], entry[at + 1]]));
        let number =
            |at: usize, len: usize| entry[at..at + len].iter().fold(0, |n, b| n << 8 | u64::from(*b));
        let (id_len, name_len, extra_len) = (u16_at(12), u16_at(14), number(36, 4) as usize);
        if extra_len > MAX_EXTRA {
            return Err(corrupt("has too much extra data"));
        }
        let mut at = position + FIXED as u64;
        let extra = reader.bytes(at, extra_len).await?;
        let extra_number = |at: usize| {
            extra.get(at..at + 8).map(|bytes| bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b)))
        };
        let (vm_state_size, disk_size) = (extra_number(0).unwrap_or(number(32, 4)), extra_number(8));
        let icount = extra_number(16).filter(|count| *count != u64::MAX);
        at += extra_len as u64;
        let id = text(reader.bytes(at, id_len.min(MAX_ID)).await?);
        at += id_len as u64;
        let name = text(reader.bytes(at, name_len.min(MAX_NAME)).await?);
        at += name_len as u64;
        let clock = number(24, 8);
        let info = SnapshotInfo {
            id,
            name,
            vm_state_size,
            date_sec: number(16, 4) as u32,
            date_nsec: number(20, 4) as u32,
            vm_clock_sec: clock / 1_000_000_000,
            vm_clock_nsec: clock % 1_000_000_000,
            icount,
            disk_size,
        };
        snapshots.push(Entry { info, l1: (number(0, 8), number(8, 4) as u32), place: position..at });
        position = at.next_multiple_of(8);
    }
    Ok(snapshots)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Reads a table that is full of small things in larger pieces: it may have 65536 entries.
pub(super) struct Reader<'a> {
    file: &'a dyn Node,
    piece: BufferMut,
    /// Where in the file that lies.
    start: u64,
}

impl<'a> Reader<'a> {
    /// The size of a piece in bytes.
    const PIECE: usize = 64 << 10;

    pub(super) fn new(file: &'a dyn Node) -> Self {
        Self { file, piece: BufferMut::new(0), start: 0 }
    }

    /// The bytes at an offset of the file, at most a piece. Those past its end are zero.
    pub(super) async fn bytes(&mut self, offset: u64, len: usize) -> Result<&[u8]> {
        let inside = |start: u64, piece: &BufferMut| {
            let skip = offset.checked_sub(start).and_then(|skip| usize::try_from(skip).ok())?;
            (skip.checked_add(len)? <= piece.len()).then_some(skip..skip + len)
        };
        let range = match inside(self.start, &self.piece) {
            Some(range) => range,
            None => {
                self.piece = self.file.read(offset, BufferMut::new(len.max(Self::PIECE))).await?;
                self.start = offset;
                0..len
            }
        };
        Ok(&self.piece[range])
    }
}
