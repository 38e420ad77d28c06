//! Persistent bitmaps: the extension that tells of them, their directory, and their tables.

use super::layout::{Geometry, Reader, Region, Table, be32, be64};
use headwater_block::Result;

/// The bits of an entry of a bitmap's table that must be zero.
const BITMAP_RESERVED: u64 = 0xff00_0000_0000_01fe;
const BITMAP_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The directory of bitmaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bitmaps {
    count: u32,
    directory: Region,
}

impl Bitmaps {
    /// The most bitmaps that an image may have, and the most bytes of their directory.
    const MAX: u32 = 65535;
    const MAX_DIRECTORY: u64 = 64 << 20;

    /// What the header extension says.
    pub(super) fn parse(data: &[u8]) -> std::result::Result<Self, &'static str> {
        let Ok(data): std::result::Result<[u8; 24], _> = data.try_into() else {
            return Err("it doesn't have 24 bytes");
        };
        let (count, reserved) = (be32(&data[0..4]), be32(&data[4..8]));
        let (len, offset) = (be64(&data[8..16]), be64(&data[16..24]));
        if reserved != 0 {
            Err("it has reserved bits set")
        } else if count == 0 || count > Self::MAX {
            Err("it tells of no bitmaps, or of more than 65535")
        } else if len > Self::MAX_DIRECTORY {
            Err("it tells of a directory of more than 64 MiB")
        } else {
            Ok(Self { count, directory: Region { offset, len, what: "the bitmap directory".to_owned() } })
        }
    }
}

impl Reader<'_> {
    /// Reads the directory, and notes what it leads to.
    pub(super) async fn bitmaps(&mut self) -> Result<()> {
        let Bitmaps { count, directory } = match &self.geometry.bitmaps {
            None => return Ok(()),
            Some(Ok(bitmaps)) => bitmaps,
            Some(Err(problem)) => {
                self.report.corruption(|| format!("the header extension of bitmaps is invalid: {problem}"));
                self.layout.lost_references = true;
                return Ok(());
            }
        };
        if !self.geometry.is_aligned(directory.offset) {
            let offset = directory.offset;
            self.report
                .corruption(|| format!("the bitmap directory, at {offset:#x}, is not aligned to a cluster"));
        }
        if !self.region(directory.offset, directory.len, &directory.what) {
            self.layout.lost_references = true;
            return Ok(());
        }
        self.spend(directory.len)?;
        let mut position = 0;
        for index in 0..*count {
            // The fixed part; lengths of what follows are at its end.
            let whole = directory.len.checked_sub(position).is_some_and(|left| left >= 24);
            let entry =
                if whole { Some(self.medium.read(directory.offset + position, 24).await?) } else { None };
            let Some(entry) = entry else {
                self.report
                    .corruption(|| format!("the bitmap directory ends within entry {index} of {count}"));
                self.layout.lost_references = true;
                break;
            };
            let offset = be64(&entry[0..8]);
            let entries = u64::from(be32(&entry[8..12]));
            let tail =
                u64::from(u16::from_be_bytes([entry[18], entry[19]])) + u64::from(be32(&entry[20..24]));
            position += (24 + tail).next_multiple_of(8);
            if let Some(problem) = bitmap_problem(self.geometry, &entry) {
                self.report.corruption(|| format!("bitmap {index}: {problem}"));
            }
            let what = format!("the table of bitmap {index}");
            if !self.geometry.is_aligned(offset) {
                self.report.corruption(|| format!("{what}, at {offset:#x}, is not aligned to a cluster"));
                self.layout.lost_references = true;
            } else if entries > 0 {
                if self.region(offset, entries * 8, &what) {
                    self.spend(entries * 8)?;
                    self.layout.bitmap_tables.push(Table { offset, entries });
                } else {
                    self.layout.lost_references = true;
                }
            }
        }
        Ok(())
    }
}

/// The host cluster that an entry of a bitmap's table refers to, and whether the entry is sound.
pub(super) fn bitmap_entry(geometry: &Geometry, entry: u64) -> (Option<u64>, bool) {
    let offset = entry & BITMAP_OFFSET;
    let sound = entry & BITMAP_RESERVED == 0
        && geometry.is_aligned(offset)
        && (offset == 0 || entry & 1 == 0 && geometry.clusters(offset, geometry.cluster_size()).is_some());
    ((sound && offset != 0).then_some(offset >> geometry.cluster_bits), sound)
}

/// What is wrong with a bitmap's entry in the directory, apart from where its table lies.
fn bitmap_problem(geometry: &Geometry, entry: &[u8]) -> Option<&'static str> {
    /// The flags: not saved properly, kept up to date, can be used without knowing the extra data.
    const IN_USE: u32 = 1;
    const KNOWN_FLAGS: u32 = 7;
    /// The one type: a dirty bitmap.
    const DIRTY_TRACKING: u8 = 1;
    let entries = u64::from(be32(&entry[8..12]));
    let flags = be32(&entry[12..16]);
    let granularity = u32::from(entry[17]);
    let name_len = u16::from_be_bytes([entry[18], entry[19]]);
    // One bit for each unit of granularity; the table has an entry for each cluster of bits.
    let bits = geometry.size.div_ceil(1_u64.checked_shl(granularity).unwrap_or(u64::MAX));
    let expected = bits.div_ceil(8).div_ceil(geometry.cluster_size());
    if entry[16] != DIRTY_TRACKING {
        Some("its type is unknown")
    } else if flags & !KNOWN_FLAGS != 0 {
        Some("it has reserved flags set")
    } else if !(9..=31).contains(&granularity) {
        Some("its granularity is not between 512 bytes and 2 GiB")
    } else if !(1..=1023).contains(&name_len) {
        Some("its name is empty or longer than 1023 bytes")
    } else if entries == 0 || entries > MAX_BITMAP_TABLE {
        Some("its table is empty or too large")
    } else if flags & IN_USE == 0 && entries != expected {
        Some("its table has another size than the disk needs")
    } else {
        None
    }
}

/// The largest number of entries of a bitmap's table.
const MAX_BITMAP_TABLE: u64 = 0x800_0000;
