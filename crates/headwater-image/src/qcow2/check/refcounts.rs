//! Comparing the stored reference counts with the references that were counted, and correcting them.

use super::Fix;
use super::counts::Counts;
use super::layout::{Geometry, Layout};
use super::medium::Medium;
use super::report::CheckReport;
use super::walk::read_tables;
use crate::qcow2::entry::{refcount, set_refcount};
use futures_util::stream::StreamExt;
use headwater_block::Result;

/// What a comparison of a window found, beyond what it reports.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Counts can't be corrected where they are, but only by writing new refcount structures.
    pub(super) rebuild: bool,
    /// Things other than refcount structures lie in the same place.
    pub(super) overlap: bool,
    /// Flags in L2 entries contradict the stored counts.
    pub(super) flags_wrong: bool,
    /// The highest cluster that is in use.
    pub(super) last_used: Option<u64>,
}

/// Compares the counts of a window, corrects what `fix` says, and notes in `counts` which clusters have a stored count of one.
pub(super) async fn compare(
    medium: &Medium,
    geometry: &Geometry,
    layout: &Layout,
    counts: &mut Counts,
    fix: Fix,
    report: &mut CheckReport,
) -> Result<Outcome> {
    let window = counts.window();
    let per_block = geometry.block_entries();
    let mut outcome = Outcome::default();
    let blocks: Vec<(usize, u64)> = layout
        .blocks
        .iter()
        .enumerate()
        .filter(|(i, offset)| **offset != 0 && window.contains(&(*i as u64).saturating_mul(per_block)))
        .map(|(i, offset)| (i, *offset))
        .collect();

    overlaps(geometry, layout, counts, report, &mut outcome);
    let mut compared = window.start;
    let mut tables = read_tables(medium, geometry, blocks);
    while let Some((index, block)) = tables.next().await {
        let mut block = block?;
        let first = index as u64 * per_block;
        uncounted(geometry, counts, compared..first, report, &mut outcome);
        compared = first + per_block;
        let mut changed = false;
        for i in 0..per_block {
            let cluster = first + i;
            let stored = refcount(&block, i as usize, geometry.refcount_order);
            let count = counts.get(cluster);
            let expected = count.references;
            let mut now = stored;
            if stored != expected {
                let fits = expected <= max_refcount(geometry);
                let fix = if stored > expected { fix.lower } else { fix.raise && fits };
                tell(geometry, report, cluster, stored, expected);
                if fix {
                    set_refcount(&mut block, i as usize, geometry.refcount_order, expected);
                    (changed, now) = (true, expected);
                }
            }
            outcome.flags_wrong |= if now == 1 { count.unflagged } else { count.flagged };
            if now > 0 || expected > 0 {
                outcome.last_used = outcome.last_used.max(Some(cluster));
            }
            if now == 1 && expected > 0 {
                counts.mark_stored_once(cluster);
            }
        }
        if changed {
            medium.patch(layout.blocks[index], &block).await?;
        }
    }
    drop(tables);
    uncounted(geometry, counts, compared..window.end, report, &mut outcome);
    Ok(outcome)
}

/// The largest refcount that the image can store.
fn max_refcount(geometry: &Geometry) -> u64 {
    u64::MAX >> (64 - (1_u32 << geometry.refcount_order))
}

fn tell(geometry: &Geometry, report: &mut CheckReport, cluster: u64, stored: u64, expected: u64) {
    let offset = cluster << geometry.cluster_bits;
    if stored > expected {
        report.leak(|| {
            format!("cluster {cluster} at {offset:#x}: reference count {stored}, but {expected} references")
        });
    } else if expected > max_refcount(geometry) {
        report.corruption(|| {
            format!(
                "cluster {cluster} at {offset:#x}: {expected} references, more than reference counts of {} bits can tell",
                1 << geometry.refcount_order
            )
        });
    } else {
        report.corruption(|| {
            format!("cluster {cluster} at {offset:#x}: reference count {stored}, but {expected} references")
        });
    }
}

/// Reports clusters that are referred to although no refcount block tells of them.
fn uncounted(
    geometry: &Geometry,
    counts: &Counts,
    clusters: std::ops::Range<u64>,
    report: &mut CheckReport,
    outcome: &mut Outcome,
) {
    let mut from = clusters.start;
    while let Some(cluster) = counts.next_referenced(from..clusters.end) {
        tell(geometry, report, cluster, 0, counts.get(cluster).references);
        outcome.rebuild = true;
        outcome.flags_wrong |= counts.get(cluster).flagged;
        outcome.last_used = outcome.last_used.max(Some(cluster));
        from = cluster + 1;
    }
}

/// Reports things that lie in the same place but must not.
fn overlaps(
    geometry: &Geometry,
    layout: &Layout,
    counts: &Counts,
    report: &mut CheckReport,
    outcome: &mut Outcome,
) {
    let mut refcounts: Vec<u64> =
        layout.blocks.iter().map(|offset| offset >> geometry.cluster_bits).collect();
    let table = geometry.reftable;
    refcounts.extend(geometry.clusters(table.offset, table.entries * 8).into_iter().flatten());
    refcounts.sort_unstable();
    for cluster in counts.overlaps() {
        let is_refcounts = refcounts.binary_search(&cluster).is_ok();
        // New refcount structures elsewhere resolve this one.
        outcome.rebuild |= is_refcounts;
        outcome.overlap |= !is_refcounts;
        report.corruption(|| {
            let is_at = |start, len| geometry.clusters(start, len).is_some_and(|c| c.contains(&cluster));
            let region = layout.sole.iter().find(|region| is_at(region.offset, region.len));
            let what = match region {
                Some(region) => region.what.as_str(),
                None if is_refcounts => "a refcount block",
                None => "a table",
            };
            let offset = cluster << geometry.cluster_bits;
            format!("cluster {cluster} at {offset:#x}: {what} and something else lie in the same place")
        });
    }
}
