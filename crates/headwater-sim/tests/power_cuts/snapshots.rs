//! Internal snapshots that are taken and deleted in a run, and what must be left of them.

use crate::case::Step;
use crate::promise::words;
use crate::world::{as_snapshots, read, text};
use headwater_block::Disk;
use headwater_image::qcow2::Qcow2Node;
use headwater_image::qcow2::check::{CheckReport, Severity};
use headwater_image::qcow2::snapshots::NewSnapshot;
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

/// From when on it was being done, and when it was done.
type Span = Range<usize>;

/// One snapshot.
pub(crate) struct Snapshot {
    id: String,
    name: String,
    content: Vec<u64>,
    taken: Span,
    deleted: Option<Span>,
}

/// All that were taken in a run.
#[derive(Default)]
pub(crate) struct Snapshots(Vec<Snapshot>);

impl Snapshots {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// True if one was being taken or deleted at a moment.
    pub(crate) fn change_at(&self, moment: usize) -> bool {
        let spans = self.0.iter().flat_map(|one| [Some(&one.taken), one.deleted.as_ref()]);
        spans.flatten().any(|span| span.contains(&moment))
    }

    /// How many beginnings and ends lie before a moment: between two of them the same is asked of every state.
    pub(crate) fn stage(&self, moment: usize) -> usize {
        let spans = self.0.iter().flat_map(|one| [Some(&one.taken), one.deleted.as_ref()]);
        spans.flatten().map(|span| usize::from(span.start <= moment) + usize::from(span.end <= moment)).sum()
    }

    /// Holds an image that was left at `moment` against what was done until then.
    pub(crate) fn check(&self, image: &[u8], moment: usize) -> Result<(), String> {
        let left = as_snapshots(image)?;
        for one in &self.0 {
            let found = left.iter().find(|(name, _)| *name == one.name);
            let may_be_gone = one.deleted.as_ref().is_some_and(|deleted| deleted.start <= moment);
            let is_gone = one.deleted.as_ref().is_some_and(|deleted| deleted.end <= moment);
            match found {
                None if one.taken.end <= moment && !may_be_gone => {
                    return Err(format!("{} is gone", one.name));
                }
                Some(_) if one.taken.start > moment || is_gone => {
                    return Err(format!("{} is there", one.name));
                }
                Some((_, node)) if read(&**node)? != one.content => {
                    return Err(format!("{} has changed", one.name));
                }
                _ => {}
            }
        }
        let unknown = left.iter().find(|(name, _)| !self.0.iter().any(|one| one.name == *name));
        unknown.map_or(Ok(()), |(name, _)| Err(format!("nobody has taken {name}")))
    }
}

/// Takes or deletes one, while the guest does nothing.
pub(crate) async fn step(
    disk: &Rc<Disk>,
    image: &Rc<Qcow2Node>,
    step: &Step,
    snapshots: &RefCell<Snapshots>,
    now: impl Fn() -> usize,
) -> Result<(), String> {
    let began = now();
    match step {
        Step::DeleteSnapshot(which) => {
            let id = {
                let snapshots = snapshots.borrow();
                let there: Vec<_> = snapshots.0.iter().filter(|one| one.deleted.is_none()).collect();
                if there.is_empty() {
                    return Ok(());
                }
                there[*which as usize % there.len()].id.clone()
            };
            disk.alone(image.delete_snapshot(&id)).await.map_err(text)?;
            let mut snapshots = snapshots.borrow_mut();
            let one = snapshots.0.iter_mut().find(|one| one.id == id && one.deleted.is_none());
            one.expect("it was there").deleted = Some(began..now());
        }
        _ => {
            let content = disk.read(0, disk.size()).await.map_err(text)?;
            let name = format!("snapshot {}", snapshots.borrow().0.len());
            let new =
                NewSnapshot { name: name.clone(), date: Duration::from_secs(1), vm_clock: Duration::ZERO };
            let made = disk.alone(image.take_snapshot(&new)).await.map_err(text)?;
            let (id, content) = (made.id, words(&content)?);
            snapshots.borrow_mut().0.push(Snapshot { id, name, content, taken: began..now(), deleted: None });
        }
    }
    Ok(())
}

/// True if nothing is wrong but marks that could be there and aren't: that is what a change of snapshots leaves when it is cut off.
pub(crate) fn only_lacks_marks(report: &CheckReport) -> bool {
    let wrong: Vec<_> =
        report.findings.iter().filter(|found| found.severity == Severity::Corruption).collect();
    wrong.len() as u64 == report.corruptions
        && wrong.iter().all(|found| found.message.contains("not marked as writable in place"))
}
