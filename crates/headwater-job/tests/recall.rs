//! A cancel while the target is out of reach: the job ends, and guests who waited for its copy go on.

mod common;

use common::layers::Layers;
use common::{SMALL, Shape};
use headwater_block::{Disk, DiskOptions};
use headwater_job::{
    BackupOptions, Group, JobHandle, MirrorOptions, OnError, OnErrors, Outcome, Status, backup, mirror,
};
use headwater_sim::{Op, Pages, Sim, SimFile, Task};
use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 16 << 10;

/// A disk that is full, and a target beside it that may go out of reach.
struct World {
    layers: Rc<Layers>,
    file: Rc<SimFile>,
    target: Rc<Disk>,
}

fn with_world<F: Future<Output = ()> + 'static>(test: impl Fn(Sim, World) -> F) {
    for seed in 0..25 {
        let sim = Sim::new(seed);
        sim.run(test(sim.clone(), World::new(&sim)));
    }
}

impl World {
    fn new(sim: &Sim) -> Self {
        let layers = Rc::new(Layers::plain(sim, &Shape::plain(SIZE)));
        let file = SimFile::new(sim, "copy", Pages::new(SIZE, 512));
        file.set_recallable();
        let target = Disk::new(file.clone(), sim.clock(), DiskOptions::default());
        Self { layers, file, target }
    }

    fn guest_writes(&self, at: u64) -> Task<bool> {
        let layers = self.layers.clone();
        self.layers.sim.spawn("guest", async move { layers.write(at..at + 512, 7).await.is_ok() })
    }

    /// A backup that reports every error.
    async fn backup(&self, sim: &Sim, group: Option<Rc<Group>>) -> (JobHandle, Task<Outcome>) {
        let point = self.layers.disk.begin_point_in_time(&self.target, 1024, None).await;
        let (job, work) =
            backup(point, BackupOptions { group, bounds: Some(SMALL), ..BackupOptions::default() });
        (job, sim.spawn("job", work))
    }

    /// A mirror that pauses at every error.
    fn mirror(&self, sim: &Sim, through: bool) -> (JobHandle, Task<Outcome>) {
        let options = MirrorOptions {
            granularity: Some(1024),
            write_through: Rc::new(Cell::new(through)),
            on_error: OnErrors { source: OnError::Stop, target: OnError::Stop },
            bounds: Some(SMALL),
            hold_guests: Some(self.layers.hold_guests()),
            ..MirrorOptions::default()
        };
        let (job, work) = mirror(self.layers.disk.clone(), self.target.clone(), options);
        (job, sim.spawn("job", work))
    }

    /// Nothing has come of the job but its end, and the target can be used again.
    async fn is_as_if_nothing_had_been(&self) {
        self.layers.check_all().await;
        self.file.release();
        self.target.write_zeroes(0, SIZE, headwater_block::ZeroFlags::default()).await.unwrap();
        self.target.flush().await.unwrap();
    }
}

async fn settle(sim: &Sim) {
    sim.sleep(Duration::from_millis(500)).await;
}

/// No error was told of: the job was cancelled, and that is all.
fn told_no_error(job: &JobHandle) {
    while let Some(event) = job.try_event() {
        assert!(!matches!(event, headwater_job::Event::Error { .. }), "{event:?}");
    }
}

// race-test: cancel-recalls
#[test]
fn a_backup_ends_and_guests_that_save_go_on() {
    with_world(|sim, world| async move {
        world.file.stall(&[Op::Write, Op::WriteZeroes]);
        let (job, work) = world.backup(&sim, None).await;
        world.file.holds(1).await;
        let guests: Vec<_> = (0..SIZE / 1024).map(|at| world.guest_writes(at * 1024)).collect();
        settle(&sim).await;
        assert!(!work.is_over() && guests.iter().all(|guest| !guest.is_over()));
        job.request_cancel().unwrap();
        assert!(matches!(work.await, Outcome::Cancelled));
        for guest in guests {
            assert!(guest.await, "nobody needs what it would have saved");
        }
        told_no_error(&job);
        world.is_as_if_nothing_had_been().await;
    });
}

#[test]
fn a_mirror_ends_and_guests_whose_changes_go_through_go_on() {
    with_world(|sim, world| async move {
        let (job, work) = world.mirror(&sim, true);
        job.wait_for(|status| status == Status::Ready).await;
        world.file.stall(&[Op::Write, Op::WriteZeroes]);
        let guest = world.guest_writes(2048);
        world.file.holds(1).await;
        settle(&sim).await;
        assert!(!guest.is_over());
        job.request_cancel().unwrap();
        assert!(matches!(work.await, Outcome::Cancelled));
        assert!(guest.await, "its change is in the source");
        told_no_error(&job);
        world.is_as_if_nothing_had_been().await;
    });
}

#[test]
fn a_mirror_that_flushes_its_target_at_the_end_lets_its_guests_go() {
    with_world(|sim, world| async move {
        let (job, work) = world.mirror(&sim, false);
        job.wait_for(|status| status == Status::Ready).await;
        world.file.stall(&[Op::Flush]);
        job.complete().unwrap();
        world.file.holds(1).await;
        let guest = world.guest_writes(0);
        settle(&sim).await;
        assert!(!guest.is_over(), "it is held back while the job settles");
        job.request_cancel().unwrap();
        assert!(matches!(work.await, Outcome::Cancelled));
        assert!(guest.await);
        told_no_error(&job);
        world.is_as_if_nothing_had_been().await;
    });
}

#[test]
fn those_that_end_together_are_recalled_together() {
    with_world(|sim, one| async move {
        let two = World::new(&sim);
        two.file.stall(&[Op::Write, Op::WriteZeroes]);
        let group = Group::new();
        let (first, first_work) = one.backup(&sim, Some(group.clone())).await;
        let (_second, second_work) = two.backup(&sim, Some(group)).await;
        two.file.holds(1).await;
        first.wait_for(|status| status == Status::Waiting).await;
        first.request_cancel().unwrap();
        assert!(matches!(first_work.await, Outcome::Cancelled));
        assert!(matches!(second_work.await, Outcome::Cancelled));
        two.is_as_if_nothing_had_been().await;
    });
}

#[test]
fn a_pause_recalls_nothing() {
    with_world(|sim, world| async move {
        world.file.stall(&[Op::Write, Op::WriteZeroes]);
        let (job, work) = world.mirror(&sim, false);
        world.file.holds(1).await;
        job.pause().unwrap();
        settle(&sim).await;
        assert!(job.status() == Status::Running, "what has begun is completed first");
        world.file.release();
        job.wait_for(|status| status == Status::Paused).await;
        job.resume().unwrap();
        job.wait_for(|status| status == Status::Ready).await;
        job.request_soft_cancel().unwrap();
        assert!(matches!(work.await, Outcome::Completed));
        assert_eq!(
            world.target.read(0, SIZE).await.unwrap()[..],
            world.layers.disk.read(0, SIZE).await.unwrap()[..]
        );
    });
}
