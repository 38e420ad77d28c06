//! Checking an image, and repairing it.
//!
//! A check reads every table that the header leads to (`layout`, `snapshots`), counts how often each cluster is referred to (`walk`,
//! `counts`), and compares that with the stored reference counts (`refcounts`) and with the flags that depend on them (`copied`). It needs
//! the image for itself.
//!
//! A repair changes one thing at a time, and only towards what the tables say: counts first, which then are durable before the flags that
//! rely on them change. Where the refcount structures themselves are damaged, new ones are written (`rebuild`). Contents of tables are
//! never invented; what can't be repaired is left and reported.

mod bitmaps;
mod copied;
mod counts;
mod layout;
mod medium;
mod rebuild;
mod refcounts;
mod report;
mod snapshots;
#[cfg(test)]
mod tests;
mod walk;

pub use report::{CheckReport, Finding, Repair, Severity};

use super::header::{Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY};
use counts::Counts;
use headwater_block::{Error, ErrorKind, Node, Result};
use layout::{Geometry, Layout};
use medium::Medium;
use std::rc::Rc;
use walk::Walk;

/// How a check works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckOptions {
    /// What may be changed.
    pub repair: Repair,
    /// About how much memory the counts of references may take at most, in bytes; the check reads the tables several times if that is too
    /// little for the image. What else it needs is small: a few megabytes, and 24 bytes for each L2 table.
    pub memory: u64,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self { repair: Repair::None, memory: DEFAULT_MEMORY }
    }
}

/// The default of [`CheckOptions::memory`]: enough to count a file of 5 TiB in clusters of 64 KiB at once.
const DEFAULT_MEMORY: u64 = 160 << 20;
/// What an image gets that has few tables, which are soon read again.
const LITTLE_MEMORY: u64 = 32 << 20;

/// Where the header holds the incompatible features.
const INCOMPATIBLE_FIELD: u64 = 72;

/// Checks the qcow2 image in `file`, which nobody else may use meanwhile, and repairs what `options` allow.
///
/// What is wrong with the image is in the report. Fails if the header can't be made sense of, or the file can't be read or written.
pub async fn check(file: Rc<dyn Node>, options: CheckOptions) -> Result<CheckReport> {
    if options.repair != Repair::None && file.is_read_only() {
        let message = format!("{}: a repair needs write access", file.name());
        return Err(Error::new(ErrorKind::ReadOnly, message));
    }
    let name = file.name().to_owned();
    let found = Check::start(&file, &name, options).await?.run(Fix::default()).await?;
    if options.repair == Repair::None {
        return Ok(found.report);
    }
    let repaired = repair(&file, &name, options, &found).await?;
    let left = if repaired {
        Check::start(&file, &name, options).await?.run(Fix::default()).await?.report
    } else {
        found.report.clone()
    };
    if left.corruptions == 0 {
        mark_sound(&file).await?;
    }
    Ok(CheckReport {
        corruptions_fixed: found.report.corruptions.saturating_sub(left.corruptions),
        leaks_fixed: found.report.leaks.saturating_sub(left.leaks),
        findings: found.report.findings,
        omitted: found.report.omitted,
        ..left
    })
}

/// What a run changes.
#[derive(Debug, Clone, Copy, Default)]
struct Fix {
    /// Reference counts that are too low.
    raise: bool,
    /// Those that are too high.
    lower: bool,
    /// Flags that contradict the counts.
    flags: bool,
}

/// Repairs what was found and may be repaired; false if there was nothing to do.
async fn repair(file: &Rc<dyn Node>, name: &str, options: CheckOptions, found: &Found) -> Result<bool> {
    // Where references can't be followed, a cluster that seems unused may hold the data that somebody wants to rescue.
    let lower = !found.lost_references;
    let all = options.repair == Repair::All;
    let new_counts = all && lower && found.rebuild;
    // Damaged refcount structures are not written to: what lies in the same place would be changed, too.
    if found.report.is_clean() || !(all || lower) || (found.rebuild && !new_counts) {
        return Ok(false);
    }
    if new_counts {
        let mut check = Check::start(file, name, options).await?;
        let memory = check.memory();
        rebuild::rebuild(&check.medium, &check.geometry, &mut check.layout, memory).await?;
    }
    // The same holds for the flags in a table that shares its place with something. Where there are only leaks, clusters that get a count
    // of one need their flag, or the repair would leave an image that breaks the rules.
    let flags = (all || found.report.corruptions == 0) && !found.overlap;
    Check::start(file, name, options).await?.run(Fix { raise: all, lower, flags }).await?;
    file.flush().await?;
    Ok(true)
}

/// Takes the marks of an unclean or damaged image from the header.
async fn mark_sound(file: &Rc<dyn Node>) -> Result<()> {
    let header = Header::read(&**file).await?;
    let marks = INCOMPAT_DIRTY | INCOMPAT_CORRUPT;
    if header.incompatible & marks == 0 {
        return Ok(());
    }
    let medium = Medium::new(file.clone());
    medium.flush().await?;
    medium.patch(INCOMPATIBLE_FIELD, &(header.incompatible & !marks).to_be_bytes()).await?;
    medium.flush().await
}

/// What one run found.
struct Found {
    report: CheckReport,
    /// See [`Layout::lost_references`].
    lost_references: bool,
    /// The refcount structures can't be corrected where they are.
    rebuild: bool,
    /// Things other than refcount structures lie in the same place.
    overlap: bool,
}

/// One run over the image.
struct Check {
    medium: Medium,
    geometry: Geometry,
    layout: Layout,
    report: CheckReport,
    memory: u64,
}

impl Check {
    /// Reads the header and the tables that it leads to.
    async fn start(file: &Rc<dyn Node>, name: &str, options: CheckOptions) -> Result<Self> {
        let header = Header::read(&**file).await?;
        if u64::from(file.limits().write_alignment) > header.cluster_size() && options.repair != Repair::None
        {
            file.use_buffered()?;
        }
        let geometry = Geometry::of(&header, name, file.size());
        let medium = Medium::new(file.clone());
        let mut report = CheckReport {
            total_clusters: geometry.size.div_ceil(geometry.cluster_size()),
            ..CheckReport::default()
        };
        let layout = Layout::read(&medium, &geometry, &mut report).await?;
        Ok(Self { medium, geometry, layout, report, memory: options.memory })
    }

    /// The memory for counts. The more there is to read again, the more of it.
    fn memory(&self) -> u64 {
        let tables = self.layout.l2.len() as u64 * self.geometry.cluster_size();
        self.memory.min((tables / 8).max(LITTLE_MEMORY))
    }

    /// Checks everything and corrects what `fix` says.
    async fn run(mut self, fix: Fix) -> Result<Found> {
        let mut counts =
            Counts::new(self.memory(), self.geometry.file_clusters(), self.geometry.block_entries());
        let mut rebuild = self.layout.refcounts_damaged;
        let (mut overlap, mut first) = (false, true);
        loop {
            counts.next_window();
            let report = first.then_some(&mut self.report);
            let mut walk = Walk::new(&self.medium, &self.geometry, &mut counts, report);
            walk.run(&mut self.layout, true).await?;
            let flags_wrong = walk.flags_wrong;
            if counts.overflowed() {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!(
                        "{}: too many clusters have thousands of references, so the check gives up; copy the disk to a new image, for \
                         example with qemu-img convert",
                        self.geometry.name
                    ),
                ));
            }
            let Check { medium, geometry, layout, report, .. } = &mut self;
            let outcome = refcounts::compare(medium, geometry, layout, &mut counts, fix, report).await?;
            rebuild |= outcome.rebuild;
            overlap |= outcome.overlap;
            if let Some(last) = outcome.last_used {
                report.image_end = report.image_end.max((last + 1) << geometry.cluster_bits);
            }
            if fix.flags {
                medium.flush().await?;
            }
            copied::l1_table(medium, geometry, layout, &counts, fix.flags, report).await?;
            if flags_wrong || outcome.flags_wrong {
                copied::l2_tables(medium, geometry, layout, &counts, fix.flags, report).await?;
            }
            if counts.is_last() {
                break;
            }
            first = false;
        }
        Ok(Found { report: self.report, lost_references: self.layout.lost_references, rebuild, overlap })
    }
}
