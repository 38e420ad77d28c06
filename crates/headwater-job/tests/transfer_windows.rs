//! The windows of commit and mirror, one test for each: it holds the window open and lets two operations meet there.

mod common;

use common::layers::Layers;
use common::{SMALL, Shape};
use headwater_block::{Buffer, ErrorKind, WriteFlags};
use headwater_job::{
    Finish, HoldGuests, Illegal, JobHandle, MirrorOptions, OnError, Outcome, Status, Verb, commit_active,
};
use headwater_sim::{Fault, Fill, Op, Sim, Task};
use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 16 << 10;

/// Runs a test on a chain with a full base and a top that holds its first half, under a few seeds.
fn with_layers<F: Future<Output = ()> + 'static>(test: impl Fn(Sim, Rc<Layers>) -> F) {
    for seed in 0..25 {
        let sim = Sim::new(seed);
        let layers = Rc::new(Layers::plain(&sim, &Shape::plain(SIZE)));
        let half = 0..SIZE / 2;
        layers.top.preset(half.clone(), Some(&Fill::Pattern(2).bytes(half.clone())));
        layers.model.begin(half, Fill::Pattern(2)).done();
        sim.run(test(sim.clone(), layers));
    }
}

fn options(layers: &Layers) -> MirrorOptions {
    MirrorOptions {
        granularity: Some(1024),
        on_error: OnError::Stop.into(),
        bounds: Some(SMALL),
        hold_guests: Some(layers.hold_guests()),
        finish: Some(layers.pivot(false)),
        ..MirrorOptions::default()
    }
}

fn start(sim: &Sim, layers: &Layers, options: MirrorOptions) -> (JobHandle, Task<Outcome>) {
    let (job, work) = commit_active(layers.disk.clone(), layers.target.clone(), options);
    (job, sim.spawn("job", work))
}

async fn ready(job: &JobHandle) {
    job.wait_for(|status| status == Status::Ready).await;
}

/// Long enough for everything that can happen to have happened.
async fn settle(sim: &Sim) {
    sim.sleep(Duration::from_millis(500)).await;
}

async fn completes(job: &JobHandle, work: Task<Outcome>, layers: &Layers) {
    if job.status() == Status::Ready {
        job.complete().unwrap();
    }
    assert!(matches!(work.await, Outcome::Completed));
    assert!(layers.is_pivoted());
    layers.repair();
    layers.lose_upper_layers();
    layers.check_all().await;
}

fn write(sim: &Sim, layers: &Rc<Layers>, at: u64) -> Task<()> {
    let layers = layers.clone();
    sim.spawn("guest", async move { layers.write(at..at + 1024, 7).await.unwrap() })
}

// race-test: transfer-take
#[test]
fn a_change_that_is_under_way_when_its_part_is_taken_is_copied_when_it_has_ended() {
    with_layers(|sim, layers| async move {
        for at in [0, 12 << 10] {
            layers.top.data().stall(&[Op::Write]);
            let guest = write(&sim, &layers, at);
            layers.top.data().holds(1).await;
            let (job, work) = start(&sim, &layers, options(&layers));
            // What holds its range alone is waited for; what only overwrites is read in the middle of it.
            settle(&sim).await;
            layers.top.data().release();
            guest.await;
            ready(&job).await;
            settle(&sim).await;
            job.request_soft_cancel().unwrap();
            assert!(matches!(work.await, Outcome::Completed));
            layers.check_copy().await;
        }
        layers.check_all().await;
    });
}

// race-test: transfer-read-then-write
#[test]
fn a_change_that_overtakes_a_copy_does_not_wait_and_is_copied_again() {
    with_layers(|sim, layers| async move {
        layers.file.stall(&[Op::Write, Op::WriteZeroes]);
        let (job, work) = start(&sim, &layers, options(&layers));
        layers.file.holds(2).await;
        // The target takes nothing, and guests don't notice.
        layers.write(0..1500, 7).await.unwrap();
        layers.zero(3000..5000, true).await.unwrap();
        layers.discard(6000..8000).await.unwrap();
        layers.file.release();
        ready(&job).await;
        completes(&job, work, &layers).await;
    });
}

#[test]
fn a_guest_waits_for_no_more_than_the_read_of_one_copy() {
    with_layers(|sim, layers| async move {
        layers.top.data().stall(&[Op::Read]);
        let (job, work) = start(&sim, &layers, options(&layers));
        layers.top.data().holds(2).await;
        // A change in place shares its range with the read; one that changes the mapping waits for it, and only there.
        layers.write(0..1024, 7).await.unwrap();
        layers.write(12 << 10..13 << 10, 8).await.unwrap();
        layers.top.data().release();
        ready(&job).await;
        completes(&job, work, &layers).await;
    });
}

// race-test: mirror-holds-guests
#[test]
fn commands_do_not_wait_for_guests_that_cannot_be_held_yet() {
    with_layers(|sim, layers| async move {
        let (job, work) = start(&sim, &layers, options(&layers));
        ready(&job).await;
        layers.top.data().stall(&[Op::Write]);
        let guest = write(&sim, &layers, 0);
        layers.top.data().holds(1).await;
        job.complete().unwrap();
        settle(&sim).await;
        assert_eq!(job.status(), Status::Ready, "it waits for the guest");
        job.pause().unwrap();
        job.wait_for(|status| status == Status::Standby).await;
        // The edge is open again.
        layers.read(8192..9000).await.unwrap();
        job.resume().unwrap();
        settle(&sim).await;
        let other = write(&sim, &layers, 4096);
        settle(&sim).await;
        assert!(!other.is_over(), "it is held back");
        assert!(matches!(job.cancel().await, Ok(Outcome::Cancelled)));
        assert!(matches!(work.await, Outcome::Cancelled));
        layers.top.data().release();
        guest.await;
        other.await;
        assert!(!layers.is_pivoted());
        layers.check_all().await;
    });
}

/// As the chain's own, but somebody changes the disk when the guests are held back, so that something is left to copy.
fn hold_with_a_last_change(layers: &Rc<Layers>) -> HoldGuests {
    let (hold, layers) = (Rc::new(layers.hold_guests()), layers.clone());
    Box::new(move || {
        let (hold, layers) = (hold.clone(), layers.clone());
        Box::pin(async move {
            let held = hold().await;
            let mutation = layers.model.begin(0..1024, Fill::Pattern(99));
            let data = Buffer::copy_of(&Fill::Pattern(99).bytes(0..1024));
            layers.disk.write(0, data, WriteFlags::default()).await.unwrap();
            mutation.done();
            held
        })
    })
}

#[test]
fn a_pause_or_an_error_lets_the_guests_go_that_were_held() {
    for fails in [false, true] {
        with_layers(move |sim, layers| async move {
            let options =
                MirrorOptions { hold_guests: Some(hold_with_a_last_change(&layers)), ..options(&layers) };
            let (job, work) = start(&sim, &layers, options);
            ready(&job).await;
            if fails {
                layers.file.fail(Fault::nth(&[Op::Write], 0, ErrorKind::Io));
            }
            layers.file.stall(&[Op::Write]);
            job.complete().unwrap();
            layers.file.holds(1).await;
            let guest = write(&sim, &layers, 2048);
            settle(&sim).await;
            assert!(!guest.is_over(), "it is held back");
            if !fails {
                job.pause().unwrap();
            }
            layers.file.release();
            job.wait_for(|status| status == Status::Standby).await;
            guest.await;
            job.resume().unwrap();
            completes(&job, work, &layers).await;
        });
    }
}

#[test]
fn a_flush_that_fails_or_a_pause_during_it_lets_the_guests_go() {
    for fails in [false, true] {
        with_layers(move |sim, layers| async move {
            let (job, work) = start(&sim, &layers, options(&layers));
            ready(&job).await;
            if fails {
                layers.file.fail(Fault::nth(&[Op::Flush], 0, ErrorKind::Io));
            }
            layers.file.stall(&[Op::Flush]);
            job.complete().unwrap();
            layers.file.holds(1).await;
            let guest = write(&sim, &layers, 2048);
            if !fails {
                job.pause().unwrap();
            }
            layers.file.release();
            job.wait_for(|status| status == Status::Standby).await;
            guest.await;
            job.resume().unwrap();
            completes(&job, work, &layers).await;
        });
    }
}

// race-test: commit-point
#[test]
fn a_cancel_before_an_active_commits_commit_point_wins_and_one_after_it_has_lost() {
    with_layers(|sim, layers| async move {
        let (job, work) = start(&sim, &layers, options(&layers));
        ready(&job).await;
        layers.file.stall(&[Op::Flush]);
        job.complete().unwrap();
        layers.file.holds(1).await;
        job.request_cancel().unwrap();
        layers.file.release();
        assert!(matches!(work.await, Outcome::Cancelled));
        assert!(!layers.is_pivoted());

        // This finish takes its time.
        let (pivot, may_pivot) = (layers.pivot(false), Rc::new(Cell::new(false)));
        let (clock, now) = (sim.clone(), may_pivot.clone());
        let finish: Finish = Box::new(move || {
            Box::pin(async move {
                while !now.get() {
                    clock.sleep(Duration::from_millis(1)).await;
                }
                pivot().await
            })
        });
        let (job, work) = start(&sim, &layers, MirrorOptions { finish: Some(finish), ..options(&layers) });
        ready(&job).await;
        layers.write(0..1024, 9).await.unwrap();
        job.complete().unwrap();
        job.wait_for(|status| status == Status::Pending).await;
        let cancel = {
            let job = job.clone();
            sim.spawn("cancel", async move { job.cancel().await })
        };
        let guest = write(&sim, &layers, 4096);
        settle(&sim).await;
        let pause = Illegal::State { verb: Verb::Pause, status: Status::Pending };
        assert_eq!((job.pause(), guest.is_over()), (Err(pause), false), "the guests are held back");
        may_pivot.set(true);
        assert!(matches!(cancel.await, Ok(Outcome::Completed)), "it came too late, and is told so");
        guest.await;
        completes(&job, work, &layers).await;
    });
}
