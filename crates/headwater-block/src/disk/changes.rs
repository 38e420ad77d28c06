//! Telling jobs which parts of a disk were changed, and saving for them what will be.

use super::Disk;
use crate::copy_before_write::PointInTime;
use crate::dirty_map::DirtyMap;
use crate::error::{Error, ErrorKind, Result};
use crate::follow::{Changed, Follower, Following};
use crate::node::Node;
use crate::recall;
use std::ops::Range;
use std::rc::{Rc, Weak};

impl Disk {
    /// Marks in a map, clean at first, what is changed from now on, until the map is dropped. A change that is under way marks as well.
    /// Meanwhile the disk's size stays as it is.
    pub async fn track_changes(&self, granularity: u64) -> Rc<DirtyMap> {
        // Nobody who changes the size is in the middle of it when the gate lets others in.
        let _pass = self.gate.enter().await;
        let map = Rc::new(DirtyMap::new(self.size(), granularity));
        self.trackers.borrow_mut().push(Rc::downgrade(&map));
        map
    }

    /// As [`Disk::track_changes`], for a job that copies to `target`, as `how` says.
    pub async fn follow(
        self: &Rc<Self>,
        target: &Rc<Disk>,
        granularity: u64,
        how: Following,
    ) -> Rc<Follower> {
        let map = self.track_changes(granularity).await;
        let follower = Rc::new(Follower::new(self, target, map, how));
        let mut followers = self.followers.borrow_mut();
        followers.retain(|follower| follower.strong_count() > 0);
        followers.push(Rc::downgrade(&follower));
        follower
    }

    /// Those who want changes to go through, of now.
    pub(super) fn followers_through(&self) -> Vec<Rc<Follower>> {
        let followers = self.followers.borrow();
        followers.iter().filter_map(Weak::upgrade).filter(|follower| follower.goes_through()).collect()
    }

    /// What this disk holds now goes to `target`, a disk of the same size, before it is changed, until the answer is dropped: all of it, or
    /// what lies above the node `above`. In parts of at least `granularity` bytes, and of what the target allocates, rounded up to a power
    /// of two. Waits for changes that are under way. Meanwhile the disk's size stays as it is.
    pub async fn begin_point_in_time(
        self: &Rc<Self>,
        target: &Rc<Disk>,
        granularity: u64,
        above: Option<Rc<dyn Node>>,
    ) -> Rc<PointInTime> {
        let _drained = self.drain().await;
        let point = PointInTime::new(self, target, granularity, above);
        self.points.borrow_mut().push(Rc::downgrade(&point));
        point
    }

    /// What a change of `range` must have for itself, because something is to be saved there.
    pub(super) fn needs_to_save(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let points = self.points.borrow();
        let needed = points.iter().filter_map(|point| point.upgrade()?.needs(range));
        needed.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))
    }

    /// Saves what is to be saved of `range` before it is changed. The caller holds what [`Disk::needs_to_save`] said.
    ///
    /// # Errors
    /// If that is impossible: then it must not be changed.
    pub(super) async fn save_before_change(&self, range: &Range<u64>) -> Result<()> {
        if self.points.borrow().is_empty() {
            return Ok(());
        }
        self.points.borrow_mut().retain(|point| point.strong_count() > 0);
        let points: Vec<_> = self.points.borrow().iter().filter_map(Weak::upgrade).collect();
        for point in points {
            // Apart, because its state is many times that of the change. Whoever recalls the change, the moment isn't his.
            Box::pin(recall::shielded(point.before_change(range))).await?;
        }
        Ok(())
    }

    fn is_tracked(&self) -> bool {
        self.trackers.borrow().iter().any(|map| map.strong_count() > 0)
            || self.points.borrow().iter().any(|point| point.strong_count() > 0)
    }

    /// Checks that nobody counts on the size.
    pub(super) fn check_not_tracked(&self) -> Result<()> {
        if self.is_tracked() {
            let message =
                format!("{} is being copied by a job; its size can change when that is over", self.name());
            return Err(Error::new(ErrorKind::InUse, message));
        }
        Ok(())
    }

    /// Checks a change against the disk's bounds, and that it may be changed at all.
    pub(super) fn check_change(&self, offset: u64, len: u64) -> Result<Range<u64>> {
        let range = self.check(offset, len)?;
        self.check_writable()?;
        if range.end > self.size() {
            self.check_not_tracked()?;
        }
        Ok(range)
    }

    /// A change of `range` starts; when the guard goes, it is marked.
    pub(super) fn changing(&self, range: &Range<u64>) -> Changing<'_> {
        Changing { disk: self, range: range.clone(), passed_on: Vec::new() }
    }
}

/// A change that runs. Its end is marked whatever became of it: one that failed may have changed something as well.
#[must_use = "dropping it tells that the change is over"]
pub(super) struct Changing<'a> {
    disk: &'a Disk,
    range: Range<u64>,
    /// Those who need no mark.
    passed_on: Vec<Rc<DirtyMap>>,
}

impl Changing<'_> {
    /// The change has succeeded: lets it go through to those for whom it was let in like that.
    pub(super) async fn pass_on(mut self, followers: &[Rc<Follower>], changed: Changed) {
        for follower in followers {
            // Apart, because its state is many times that of the change.
            if Box::pin(follower.pass_on(&self.range, changed.clone())).await {
                self.passed_on.push(follower.map().clone());
            }
        }
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        let mut trackers = self.disk.trackers.borrow_mut();
        trackers.retain(|map| {
            let map = map.upgrade();
            let marked = map.iter().filter(|map| !self.passed_on.iter().any(|other| Rc::ptr_eq(other, map)));
            marked.for_each(|map| map.mark(self.range.clone()));
            map.is_some()
        });
    }
}
