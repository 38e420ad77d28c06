//! The windows of a backup, one test for each: it holds the window open and lets two operations meet there.

mod common;

use common::layers::Layers;
use common::{SMALL, Shape};
use headwater_block::{Disk, DiskOptions, ErrorKind, PointInTime};
use headwater_job::{BackupOptions, JobHandle, OnError, OnErrors, Outcome, Status, backup};
use headwater_sim::{Fault, Fill, Op, Pages, Sim, SimFile, Task};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 16 << 10;

struct World {
    layers: Rc<Layers>,
    file: Rc<SimFile>,
    target: Rc<Disk>,
}

/// Runs a test on a disk that is full, and a target beside it, under a few seeds.
fn with_world<F: Future<Output = ()> + 'static>(test: impl Fn(Sim, World) -> F) {
    for seed in 0..25 {
        let sim = Sim::new(seed);
        let layers = Rc::new(Layers::plain(&sim, &Shape::plain(SIZE)));
        let file = SimFile::new(&sim, "copy", Pages::new(SIZE, 512));
        let target = Disk::new(file.clone(), sim.clock(), DiskOptions::default());
        sim.run(test(sim.clone(), World { layers, file, target }));
    }
}

impl World {
    async fn begin(&self) -> Rc<PointInTime> {
        self.layers.disk.begin_point_in_time(&self.target, 1024, None).await
    }

    fn write(&self, at: u64) -> Task<bool> {
        let layers = self.layers.clone();
        self.layers.sim.spawn("guest", async move { layers.write(at..at + 512, 7).await.is_ok() })
    }

    /// The copy is what the disk was in the beginning.
    async fn check_copy(&self) {
        let copy = self.target.read(0, SIZE).await.expect("the copy can be read");
        assert!(copy[..] == Fill::Pattern(1).bytes(0..SIZE)[..]);
        self.layers.check_all().await;
    }
}

fn start(sim: &Sim, point: Rc<PointInTime>, on_error: OnErrors) -> (JobHandle, Task<Outcome>) {
    let options = BackupOptions { on_error, bounds: Some(SMALL), ..BackupOptions::default() };
    let (job, work) = backup(point, options);
    (job, sim.spawn("job", work))
}

/// Long enough for everything that can happen to have happened.
async fn settle(sim: &Sim) {
    sim.sleep(Duration::from_millis(500)).await;
}

#[test]
fn the_moment_comes_when_changes_that_are_under_way_have_ended() {
    with_world(|sim, world| async move {
        world.layers.top.data().stall(&[Op::Write]);
        let guest = world.write(0);
        world.layers.top.data().holds(1).await;
        let world = Rc::new(world);
        let inner = world.clone();
        let beginning = sim.spawn("begin", async move { inner.begin().await });
        settle(&sim).await;
        assert!(!beginning.is_over());
        world.layers.top.data().release();
        assert!(guest.await);
        let point = beginning.await;
        let (_job, work) = start(&sim, point, OnErrors::default());
        assert!(matches!(work.await, Outcome::Completed));
        let copy = world.target.read(0, SIZE).await.unwrap();
        assert_eq!(copy[..512], Fill::Pattern(7).bytes(0..512)[..], "it was before the moment");
        world.layers.check_all().await;
    });
}

// race-test: point-in-time-second-look
#[test]
fn what_a_guest_has_saved_while_the_job_waited_is_not_copied_again() {
    with_world(|sim, world| async move {
        let point = world.begin().await;
        world.file.stall(&[Op::Write]);
        let guest = world.write(0);
        world.file.holds(1).await;
        let (_job, work) = start(&sim, point, OnErrors::default());
        settle(&sim).await;
        world.file.release();
        assert!(guest.await);
        assert!(matches!(work.await, Outcome::Completed));
        assert!(world.file.started(Op::Flush) > 0, "it is durable when the job is done");
        world.check_copy().await;
    });
}

// race-test: point-in-time-read-then-write
#[test]
fn a_guest_waits_for_a_copy_of_the_same_bytes_and_for_no_other() {
    with_world(|sim, world| async move {
        let point = world.begin().await;
        world.file.stall(&[Op::Write]);
        let options = BackupOptions {
            bounds: Some(headwater_job::window::Bounds { most: 4096, start: 4096, ..SMALL }),
            ..BackupOptions::default()
        };
        let (job, work) = backup(point, options);
        let work = sim.spawn("job", work);
        world.file.holds(1).await;
        world.layers.read(0..512).await.unwrap();
        let guest = world.write(0);
        settle(&sim).await;
        assert!(!guest.is_over(), "its bytes are on their way to the copy");
        job.pause().unwrap();
        world.file.release();
        assert!(guest.await);
        job.wait_for(|status| status == Status::Paused).await;
        // Whoever pauses the job doesn't pause the guests.
        assert!(world.write(SIZE - 512).await);
        job.resume().unwrap();
        assert!(matches!(work.await, Outcome::Completed));
        world.check_copy().await;
    });
}

// race-test: point-in-time-ends
#[test]
fn a_cancel_waits_for_a_guest_that_saves_and_lets_it_write() {
    with_world(|sim, world| async move {
        let point = world.begin().await;
        world.file.stall(&[Op::Write]);
        let guest = world.write(0);
        world.file.holds(1).await;
        let (job, work) = start(&sim, point, OnErrors::default());
        job.pause().unwrap();
        settle(&sim).await;
        job.request_cancel().unwrap();
        settle(&sim).await;
        assert!(!work.is_over() && !guest.is_over());
        // Even if it can't be saved: nobody needs it any more.
        world.file.fail(Fault::always(&[Op::Write], ErrorKind::Io));
        world.file.release();
        assert!(matches!(work.await, Outcome::Cancelled));
        assert!(guest.await);
        assert!(world.write(4096).await, "nobody touches the target now");
        world.layers.check_all().await;
    });
}

#[test]
fn a_change_that_cannot_be_saved_fails_and_changes_nothing() {
    with_world(|sim, world| async move {
        let point = world.begin().await;
        world.file.fail(Fault::always(&[Op::Write], ErrorKind::NoSpace));
        assert!(!world.write(1024).await);
        let seen = world.layers.disk.read(0, SIZE).await.unwrap();
        assert!(seen[..] == Fill::Pattern(1).bytes(0..SIZE)[..]);
        // The job meets the same error by itself, on the target's side.
        let stop = OnErrors { source: OnError::Report, target: OnError::Stop };
        let (job, work) = start(&sim, point, stop);
        job.wait_for(|status| status == Status::Paused).await;
        assert_eq!(job.trouble().map(|error| error.kind()), Some(ErrorKind::NoSpace));
        world.file.repair();
        assert!(world.write(1024).await);
        job.resume().unwrap();
        assert!(matches!(work.await, Outcome::Completed));
        world.check_copy().await;
    });
}
