//! One test for each window in which two operations can meet: it holds the window open and lets them meet there.

mod common;

use common::{Shape, World, small_options};
use headwater_block::{DiskOptions, ErrorKind};
use headwater_job::{JobHandle, Outcome, Status, StreamOptions, stream};
use headwater_sim::{Fault, Fill, Op, Sim, Task};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 16 << 10;

/// Runs a test on a disk of 16 clusters over a full source, under a few seeds.
fn with_world<F: Future<Output = ()> + 'static>(copy_on_read: bool, test: impl Fn(Sim, Rc<World>) -> F) {
    for seed in 0..25 {
        let sim = Sim::new(seed);
        let options = DiskOptions { copy_on_read, ..DiskOptions::default() };
        let world = Rc::new(World::full(&sim, &Shape { options, ..Shape::plain(SIZE) }));
        sim.run(test(sim.clone(), world));
    }
}

fn start(sim: &Sim, world: &World, options: StreamOptions) -> (JobHandle, Task<Outcome>) {
    let (job, work) = stream(world.disk.clone(), options);
    (job, sim.spawn("job", work))
}

fn is_completed(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Completed)
}

fn is_cancelled(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Cancelled)
}

/// Long enough for everything that can happen to have happened.
async fn settle(sim: &Sim) {
    sim.sleep(Duration::from_millis(50)).await;
}

// race-test: copy-up-fetch
#[test]
fn what_guests_do_while_the_source_is_read_wins_and_does_not_wait() {
    with_world(false, |sim, world| async move {
        world.source.stall(&[Op::Read]);
        let (_, work) = start(&sim, &world, small_options());
        world.source.holds(4).await;
        // All of this completes while the source gives nothing.
        world.write(0..1024, 7).await.unwrap();
        world.zero(1024..2048, true).await.unwrap();
        let before = world.top.unallocated();
        world.discard(2048..3072).await.unwrap();
        if world.top.unallocated() < before {
            // It was taken: the bytes are zeroes from now on.
            world.model.begin(2048..3072, Fill::Zero).done();
        }
        world.source.release();
        assert!(is_completed(&work.await));
        world.check_all().await;
    });
}

// race-test: copy-up-store
#[test]
fn what_guests_began_before_a_copy_is_stored_wins() {
    with_world(false, |sim, world| async move {
        world.top.data().stall(&[Op::Write]);
        let guest = {
            let world = world.clone();
            sim.spawn("guest", async move { world.write(0..1024, 7).await.unwrap() })
        };
        world.top.data().holds(1).await;
        let (_, work) = start(&sim, &world, small_options());
        // By now every copy has its data, and the first waits for the guest.
        settle(&sim).await;
        assert_eq!(world.source.most_reads(0..1024), 1);
        world.top.data().release();
        guest.await;
        assert!(is_completed(&work.await));
        world.check_all().await;
    });
}

#[test]
fn what_guests_do_while_a_copy_is_stored_comes_after_it() {
    with_world(false, |sim, world| async move {
        world.top.data().stall(&[Op::Write]);
        let (_, work) = start(&sim, &world, small_options());
        world.top.data().holds(4).await;
        let guests: Vec<_> = (0..4)
            .map(|n| {
                let world = world.clone();
                let range = n * 1024 + 100..n * 1024 + 600;
                sim.spawn("guest", async move {
                    match n {
                        0 => world.write(range, 7).await.unwrap(),
                        1 => world.zero(range, false).await.unwrap(),
                        2 => world.discard(2048..3072).await.unwrap(),
                        _ => world.read(range).await.unwrap(),
                    }
                })
            })
            .collect();
        settle(&sim).await;
        world.top.data().release();
        for guest in guests {
            guest.await;
        }
        assert!(is_completed(&work.await));
        world.check_all().await;
    });
}

// race-test: copy-on-read-store
#[test]
fn a_write_that_overtakes_a_copy_on_read_wins() {
    with_world(true, |sim, world| async move {
        world.source.stall(&[Op::Read]);
        let reader = {
            let world = world.clone();
            sim.spawn("reader", async move { world.read(100..900).await.unwrap() })
        };
        world.source.holds(1).await;
        world.write(0..1024, 7).await.unwrap();
        world.source.release();
        reader.await;
        world.read(0..1024).await.unwrap();
        world.check_all().await;
    });
}

#[test]
fn a_guest_gets_its_data_even_if_they_cannot_be_kept() {
    with_world(true, |_, world| async move {
        world.top.data().fail(Fault::always(&[Op::Write], ErrorKind::NoSpace));
        world.read(100..900).await.unwrap();
        assert_eq!(world.disk.stats().copy_on_read_failures.get(), 1);
        assert_eq!(world.top.holding_data(), 0);
        world.check_all().await;
    });
}

// race-test: write-access-changed
#[test]
fn a_write_in_place_finds_its_cluster_gone_when_its_turn_comes() {
    with_world(false, |sim, world| async move {
        world.write(0..1024, 3).await.unwrap();
        world.top.stall(&[Op::WriteZeroes]);
        let zeroes = {
            let world = world.clone();
            sim.spawn("zeroes", async move { world.zero(0..1024, true).await.unwrap() })
        };
        world.top.holds(1).await;
        // These lie in one cluster, which holds data as yet: they ask for no more than their own bytes.
        let writers: Vec<_> = [0..512, 512..1024, 100..200, 600..700]
            .into_iter()
            .enumerate()
            .map(|(n, range)| {
                let world = world.clone();
                sim.spawn("writer", async move { world.write(range, 10 + n as u8).await.unwrap() })
            })
            .collect();
        settle(&sim).await;
        world.top.release();
        zeroes.await;
        for writer in writers {
            writer.await;
        }
        world.check_all().await;
    });
}

// race-test: copy-up-meets-drain
#[test]
fn a_drain_gets_past_a_read_that_waits_for_a_copy() {
    with_world(true, |sim, world| async move {
        world.source.stall(&[Op::Read]);
        let (_, work) = start(&sim, &world, small_options());
        world.source.holds(4).await;
        let reader = {
            let world = world.clone();
            sim.spawn("reader", async move { world.read(100..900).await.unwrap() })
        };
        settle(&sim).await;
        let drain = {
            let (sim, world) = (sim.clone(), world.clone());
            sim.clone().spawn("drain", async move {
                let drained = world.disk.drain().await;
                assert_eq!(world.disk.stats().in_flight.get(), 0);
                let written = world.top.started(Op::Write);
                sim.sleep(Duration::from_millis(5)).await;
                assert_eq!(
                    world.top.started(Op::Write),
                    written,
                    "a copy was stored while all was held back"
                );
                drop(drained);
            })
        };
        settle(&sim).await;
        world.source.release();
        reader.await;
        drain.await;
        assert!(is_completed(&work.await));
        world.check_all().await;
    });
}

// race-test: commit-point
#[test]
fn a_cancel_before_the_commit_point_wins_and_one_after_it_has_lost() {
    with_world(false, |sim, world| async move {
        world.top.stall(&[Op::Flush]);
        let (job, work) = start(&sim, &world, small_options());
        world.top.holds(1).await;
        job.request_cancel().unwrap();
        world.top.release();
        assert!(is_cancelled(&work.await));
        assert!(world.top.links().is_empty());

        world.top.stall(&[Op::Header]);
        let (job, work) = start(&sim, &world, small_options());
        world.top.holds(1).await;
        assert_eq!(job.status(), Status::Pending);
        let cancel = {
            let job = job.clone();
            sim.spawn("cancel", async move { job.cancel().await })
        };
        settle(&sim).await;
        world.top.release();
        assert!(is_completed(&cancel.await.unwrap()), "it came too late, and is told so");
        assert!(is_completed(&work.await));
        assert!(job.cancel().await.is_err(), "a job that is over can't be cancelled");
        world.check_all().await;
    });
}

#[test]
fn a_commit_that_fails_leaves_the_link_and_tells_the_cancel() {
    with_world(false, |sim, world| async move {
        world.top.fail(Fault::nth(&[Op::Header], 0, ErrorKind::Io));
        world.top.stall(&[Op::Header]);
        let (job, work) = start(&sim, &world, small_options());
        world.top.holds(1).await;
        let cancel = sim.spawn("cancel", async move { job.cancel().await });
        settle(&sim).await;
        world.top.release();
        assert!(matches!(cancel.await, Ok(Outcome::Failed(_))));
        assert!(matches!(work.await, Outcome::Failed(_)));
        assert!(world.top.links().is_empty());
        world.check_all().await;
    });
}

// race-test: engine-withdraw
#[test]
fn pause_and_cancel_do_not_wait_for_the_source() {
    with_world(false, |sim, world| async move {
        world.source.stall(&[Op::Read]);
        let (job, work) = start(&sim, &world, small_options());
        world.source.holds(4).await;
        let before = headwater_block::Clock::now(&*sim.clock());
        job.pause().unwrap();
        job.wait_for(|status| status == Status::Paused).await;
        assert_eq!(headwater_block::Clock::now(&*sim.clock()), before, "no time has passed");
        let asked = world.source.started(Op::Read);
        world.write(0..1024, 7).await.unwrap();
        settle(&sim).await;
        assert_eq!(world.source.started(Op::Read), asked, "a paused job leaves the source alone");

        job.resume().unwrap();
        world.source.holds(3).await;
        assert!(is_cancelled(&job.cancel().await.unwrap()), "the source never answers");
        assert!(is_cancelled(&work.await));
        world.source.release();
        world.check_all().await;

        let (_, work) = start(&sim, &world, small_options());
        assert!(is_completed(&work.await), "what was given up is copied by the next job");
        world.check_all().await;
    });
}

#[test]
fn pause_and_cancel_complete_what_is_being_stored() {
    with_world(false, |sim, world| async move {
        world.top.data().stall(&[Op::Write]);
        let (job, work) = start(&sim, &world, small_options());
        world.top.data().holds(4).await;
        job.pause().unwrap();
        settle(&sim).await;
        assert_eq!(job.status(), Status::Running, "it isn't paused while it still writes");
        job.request_cancel().unwrap();
        settle(&sim).await;
        assert!(!work.is_over());
        world.top.data().release();
        assert!(is_cancelled(&work.await));
        world.check_all().await;
    });
}

#[test]
fn the_source_is_asked_once() {
    with_world(true, |sim, world| async move {
        let (_, work) = start(&sim, &world, small_options());
        let readers: Vec<_> = (0..20)
            .map(|_| {
                let world = world.clone();
                let range = sim.rng().byte_range(SIZE, 5000, 1024);
                sim.spawn("reader", async move { world.read(range).await.unwrap() })
            })
            .collect();
        for reader in readers {
            reader.await;
        }
        assert!(is_completed(&work.await));
        assert_eq!(world.source.most_reads(0..SIZE), 1);
    });
}
