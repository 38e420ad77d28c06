//! Jobs that end together: all complete or none does, in whatever order they work, wait, fail and are commanded.

mod common;

use common::layers::Layers;
use common::{SMALL, Shape, busy};
use headwater_block::{Disk, DiskOptions, ErrorKind};
use headwater_job::{BackupOptions, Group, JobHandle, Outcome, Status, backup};
use headwater_sim::{Fault, Op, Pages, Sim, SimFile, Task, for_seeds};
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 16 << 10;

/// A disk and where it is copied to.
struct Copying {
    layers: Rc<Layers>,
    file: Rc<SimFile>,
    target: Rc<Disk>,
}

impl Copying {
    fn new(sim: &Sim) -> Self {
        let layers = Rc::new(Layers::plain(sim, &Shape::plain(SIZE)));
        let file = SimFile::new(sim, "copy", Pages::new(SIZE, 512));
        let target = Disk::new(file.clone(), sim.clock(), DiskOptions::default());
        Self { layers, file, target }
    }

    /// Starts a job that is one of `group`.
    async fn start(
        &self,
        sim: &Sim,
        group: &Rc<Group>,
        wait_for_finalize: bool,
    ) -> (JobHandle, Task<Outcome>) {
        let point = self.layers.disk.begin_point_in_time(&self.target, 1024, None).await;
        let (group, bounds) = (Some(group.clone()), Some(SMALL));
        let options = BackupOptions { group, bounds, wait_for_finalize, ..BackupOptions::default() };
        let (job, work) = backup(point, options);
        (job, sim.spawn("job", work))
    }
}

fn with_two<F: Future<Output = ()> + 'static>(test: impl Fn(Sim, Copying, Copying) -> F) {
    for seed in 0..25 {
        let sim = Sim::new(seed);
        let (one, two) = (Copying::new(&sim), Copying::new(&sim));
        sim.run(test(sim.clone(), one, two));
    }
}

async fn settle(sim: &Sim) {
    sim.sleep(Duration::from_millis(500)).await;
}

#[test]
fn the_first_waits_for_the_last() {
    with_two(|sim, one, two| async move {
        two.file.stall(&[Op::Flush]);
        let group = Group::new();
        let (first, ends) = one.start(&sim, &group, false).await;
        let (second, ends_too) = two.start(&sim, &group, false).await;
        two.file.holds(1).await;
        settle(&sim).await;
        assert_eq!((first.status(), second.status()), (Status::Waiting, Status::Running));
        assert!(first.pause().is_err() && first.finalize().is_err());
        two.file.release();
        assert!(matches!(ends.await, Outcome::Completed));
        assert!(matches!(ends_too.await, Outcome::Completed));
    });
}

#[test]
fn one_that_fails_takes_the_one_that_waits_along() {
    with_two(|sim, one, two| async move {
        two.file.fail(Fault::nth(&[Op::Flush], 0, ErrorKind::Io));
        let group = Group::new();
        let (_first, ends) = one.start(&sim, &group, false).await;
        let (_second, ends_too) = two.start(&sim, &group, false).await;
        assert!(matches!(ends_too.await, Outcome::Failed(_)));
        assert!(matches!(ends.await, Outcome::Cancelled));
    });
}

#[test]
fn one_that_is_cancelled_takes_the_others_along_even_if_they_are_paused() {
    with_two(|sim, one, two| async move {
        let group = Group::new();
        two.file.stall(&[Op::Write]);
        let (first, ends) = one.start(&sim, &group, true).await;
        let (second, ends_too) = two.start(&sim, &group, false).await;
        two.file.holds(1).await;
        second.pause().unwrap();
        two.file.release();
        settle(&sim).await;
        assert_eq!((first.status(), second.status()), (Status::Waiting, Status::Paused));
        first.request_cancel().unwrap();
        assert!(matches!(ends.await, Outcome::Cancelled));
        assert!(matches!(ends_too.await, Outcome::Cancelled));
    });
}

#[test]
fn who_finalises_one_finalises_all() {
    with_two(|sim, one, two| async move {
        let group = Group::new();
        let (first, ends) = one.start(&sim, &group, true).await;
        let (second, ends_too) = two.start(&sim, &group, false).await;
        settle(&sim).await;
        assert_eq!((first.status(), second.status()), (Status::Pending, Status::Pending));
        second.finalize().unwrap();
        assert!(matches!(ends.await, Outcome::Completed));
        assert!(matches!(ends_too.await, Outcome::Completed));
    });
}

// race-test: group-commit-point
#[test]
fn a_cancel_that_comes_after_the_commit_point_of_another_has_lost() {
    with_two(|sim, one, two| async move {
        let group = Group::new();
        let (first, ends) = one.start(&sim, &group, true).await;
        let (second, ends_too) = two.start(&sim, &group, true).await;
        settle(&sim).await;
        first.finalize().unwrap();
        // Whichever of them comes to the commit point passes it for both. The other may not have noticed.
        while ![&first, &second].iter().any(|job| job.status().is_over()) {
            sim.yield_now().await;
        }
        let _too_late = [&first, &second].map(|job| job.request_cancel());
        assert!(matches!(ends.await, Outcome::Completed));
        assert!(matches!(ends_too.await, Outcome::Completed));
    });
}

#[test]
fn all_complete_or_none_whatever_happens() {
    let (mut completed, mut given_up) = (0, 0);
    for_seeds(300, |seed| {
        let sim = Sim::new(seed);
        let rng = sim.rng().clone();
        let all: Vec<_> = (0..rng.range(1..4)).map(|_| Copying::new(&sim)).collect();
        let inner = sim.clone();
        let outcomes = sim.run(async move {
            let sim = inner;
            let group = Group::new();
            let mut jobs = Vec::new();
            let mut guests = Vec::new();
            for one in &all {
                if rng.one_in(4) {
                    let ops = *rng.pick(&[&[Op::Write][..], &[Op::Flush]]);
                    one.file.fail(Fault::nth(ops, rng.range(0..3), ErrorKind::Io));
                }
                guests.push(sim.spawn("guest", busy(one.layers.guest.clone(), 5)));
                let waits = rng.one_in(3);
                jobs.push(one.start(&sim, &group, waits).await);
            }
            for _ in 0..rng.range(1..6) {
                sim.sleep(rng.duration(Duration::ZERO, Duration::from_millis(2))).await;
                let (job, _) = &jobs[rng.index(jobs.len())];
                // What isn't legal now changes nothing.
                let _ = match rng.range(0..8) {
                    0 => job.request_cancel(),
                    1..3 => job.pause(),
                    3..5 => job.resume(),
                    _ => job.finalize(),
                };
            }
            let mut outcomes = Vec::new();
            // Whoever is paused holds up all.
            while jobs.iter().any(|(_, ends)| !ends.is_over()) {
                for (job, _) in &jobs {
                    let _ = job.resume();
                    let _ = job.finalize();
                }
                sim.sleep(Duration::from_millis(1)).await;
            }
            for (_, ends) in jobs {
                outcomes.push(ends.await);
            }
            for guest in guests {
                guest.await;
            }
            for one in &all {
                one.file.repair();
                one.layers.check_all().await;
            }
            outcomes
        });
        let well = outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Completed)).count();
        assert!(well == 0 || well == outcomes.len(), "some completed and some did not: {outcomes:?}");
        if well > 0 { completed += 1 } else { given_up += 1 }
    });
    let few = completed + given_up < 100;
    assert!(few || (completed > 20 && given_up > 20), "{completed} completed, {given_up} were given up");
}
