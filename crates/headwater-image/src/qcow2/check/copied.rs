//! The flags that say that a cluster or an L2 table has exactly one reference and may be written in place.

use super::counts::Counts;
use super::layout::{self, COPIED, Geometry, L1_OFFSET, Layout};
use super::medium::Medium;
use super::report::CheckReport;
use super::walk::{Entry, read_tables, words};
use futures_util::stream::StreamExt;
use headwater_block::Result;

/// Compares the flags in the active L2 tables with the stored reference counts of the window that was just compared, and corrects them if
/// `repair`. The counts tell whether this is needed at all.
pub(super) async fn l2_tables(
    medium: &Medium,
    geometry: &Geometry,
    layout: &Layout,
    counts: &Counts,
    repair: bool,
    report: &mut CheckReport,
) -> Result<()> {
    // An external data file has no counts; each of its clusters has one reference.
    let active = layout.l2.iter().enumerate().filter(|(_, l2)| l2.is_active());
    let offsets: Vec<(usize, u64)> = active.map(|(i, l2)| (i, l2.offset)).collect();
    let mut tables = read_tables(medium, geometry, offsets);
    while let Some((index, table)) = tables.next().await {
        let mut table = table?;
        let size = geometry.l2_entry_size() as usize;
        let at = layout.l2[index].offset;
        let mut wrong = Vec::new();
        for (i, (word, _)) in words(&table, geometry).enumerate() {
            let Entry::Cluster(offset) = Entry::of(word, geometry) else { continue };
            let cluster = offset >> geometry.cluster_bits;
            let once = if geometry.data_file {
                true
            } else if counts.window().contains(&cluster) && geometry.is_aligned(offset) {
                counts.is_stored_once(cluster)
            } else {
                continue;
            };
            // Data files are looked at in the first window only.
            let looked_at = !geometry.data_file || counts.window().start == 0;
            if looked_at && (word & COPIED != 0) != once {
                report.corruption(|| {
                    format!("entry {i} of the L2 table at {at:#x}, {word:#x}: {}", what(once))
                });
                wrong.push((i, word ^ COPIED));
            }
        }
        if repair && !wrong.is_empty() {
            for (i, word) in wrong {
                table[i * size..][..8].copy_from_slice(&word.to_be_bytes());
            }
            medium.patch(at, &table).await?;
        }
    }
    Ok(())
}

/// The same for the active L1 table.
pub(super) async fn l1_table(
    medium: &Medium,
    geometry: &Geometry,
    layout: &Layout,
    counts: &Counts,
    repair: bool,
    report: &mut CheckReport,
) -> Result<()> {
    let table = geometry.l1;
    let sound = layout.sole.iter().any(|region| region.offset == table.offset);
    for (first, piece) in layout::pieces(if sound { table.entries } else { 0 }) {
        let mut bytes = medium.read(table.offset + first * 8, piece * 8).await?;
        let mut wrong = Vec::new();
        for (i, word) in layout::entries_of(&bytes).enumerate() {
            let offset = word & L1_OFFSET;
            let cluster = offset >> geometry.cluster_bits;
            if offset == 0 || !geometry.is_aligned(offset) || !counts.window().contains(&cluster) {
                continue;
            }
            let once = counts.is_stored_once(cluster);
            if (word & COPIED != 0) != once {
                report.corruption(|| {
                    format!("entry {} of the L1 table, {word:#x}: {}", first + i as u64, what(once))
                });
                wrong.push((i, word ^ COPIED));
            }
        }
        if repair && !wrong.is_empty() {
            for (i, word) in wrong {
                bytes[i * 8..][..8].copy_from_slice(&word.to_be_bytes());
            }
            medium.patch(table.offset + first * 8, &bytes).await?;
        }
    }
    Ok(())
}

/// What is wrong with a flag whose cluster has (or hasn't) a count of one.
fn what(once: bool) -> &'static str {
    if once {
        "not marked as writable in place, though the reference count is one"
    } else {
        "marked as writable in place, though the reference count isn't one"
    }
}
