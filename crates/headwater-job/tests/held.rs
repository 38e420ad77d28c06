//! A source that can't be reached for a time, and guests: what they ask for is held, and holds nobody up.

mod common;

use common::{Shape, World, busy, small_options};
use headwater_block::{Clock, Disk, DiskOptions, ErrorKind, Patience};
use headwater_job::{Outcome, StreamOptions, stream};
use headwater_sim::{Fault, Op, Pages, Sim, SimFile, Task, for_seeds};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

/// Longer than what takes no waiting.
const AT_ONCE: Duration = Duration::from_millis(10);

/// The longest pause between two attempts, and what an attempt may take.
const LATEST: Duration = Duration::from_millis(2_100);

const OUTAGES: [ErrorKind; 2] = [ErrorKind::Unavailable, ErrorKind::TimedOut];

fn out_of_reach(world: &World) {
    let kind = *world.sim.rng().pick(&OUTAGES);
    world.source.fail(Fault::always(&[Op::Read, Op::Status], kind));
}

/// Runs a test on a disk of clusters of 1 KiB over a full source that can't be reached, under a few seeds, with and without copy-on-read.
fn in_an_outage<F>(patience: Patience, test: impl Fn(Sim, Rc<World>) -> F)
where
    F: Future<Output = ()> + 'static,
{
    for seed in 0..30 {
        let sim = Sim::new(seed);
        let options = DiskOptions { copy_on_read: seed % 2 == 0, patience, ..DiskOptions::default() };
        let world = Rc::new(World::full(&sim, &Shape { options, ..Shape::plain(16 << 10) }));
        out_of_reach(&world);
        sim.run(test(sim.clone(), world));
    }
}

/// A read, or a change of a part of a cluster, that is held.
async fn held(sim: &Sim, world: &Rc<World>, n: u32) -> Task<headwater_block::Result<()>> {
    let guest = world.guest.clone();
    let at = 1024 * u64::from(n);
    let task = sim.spawn(format!("held {n}"), async move {
        match n % 3 {
            0 => guest.read(at..at + 1000).await,
            1 => guest.write(at + 100..at + 300, 7).await,
            _ => guest.zero(at + 100..at + 300, true).await,
        }
    });
    while world.disk.stats().held.get() <= n {
        sim.sleep(Duration::from_millis(1)).await;
    }
    task
}

#[test]
fn requests_wait_for_the_source_and_get_what_it_holds() {
    in_an_outage(Patience::Forever, |sim, world| async move {
        let mut tasks = Vec::new();
        for n in 0..9 {
            tasks.push(held(&sim, &world, n).await);
        }
        sim.sleep(Duration::from_secs(500)).await;
        assert_eq!(world.disk.stats().held.get(), 9);
        world.source.repair();
        let back = sim.clock().now();
        for task in tasks {
            task.await.unwrap();
        }
        assert!(sim.clock().now() - back < LATEST);
        world.check_all().await;
        let stats = world.disk.stats();
        assert_eq!((stats.held.get(), stats.held_in_all.get()), (0, 9));
        assert!(stats.longest_hold.get() > Duration::from_secs(500) && stats.retries.get() > 100);
        assert_eq!(world.disk.outage().outages(), 1);
    });
}

// race-test: request-held
#[test]
fn what_is_held_holds_nobody_up() {
    in_an_outage(Patience::Forever, |sim, world| async move {
        let mut tasks = Vec::new();
        for n in 0..9 {
            tasks.push(held(&sim, &world, n).await);
        }
        let begun = sim.clock().now();
        for _ in 0..20 {
            // At whatever moment of their attempts.
            sim.sleep(sim.rng().duration(Duration::ZERO, Duration::from_millis(300))).await;
            let asked = sim.clock().now();
            drop(world.edge.drain().await);
            drop(world.disk.drain().await);
            // Whole clusters need nothing of the source, also those of which others wait for a part.
            let n = sim.rng().range(0..16);
            world.write(n * 1024..(n + 1) * 1024, 9).await.unwrap();
            world.read(n * 1024..(n + 1) * 1024).await.unwrap();
            world.edge.enter().await.flush().await.unwrap();
            assert!(sim.clock().now() - asked < AT_ONCE, "{:?}", sim.clock().now() - asked);
        }
        assert!(sim.clock().now() - begun < Duration::from_secs(10));
        world.source.repair();
        for task in tasks {
            task.await.unwrap();
        }
        world.check_all().await;
    });
}

// race-test: outage-ends
#[test]
fn one_success_wakes_all() {
    in_an_outage(Patience::Forever, |sim, world| async move {
        let mut tasks = Vec::new();
        for n in 0..12 {
            tasks.push(held(&sim, &world, n).await);
        }
        // Far enough for the pauses to be long.
        sim.sleep(Duration::from_secs(60)).await;
        world.source.repair();
        let back = sim.clock().now();
        let (_job, work) = stream(world.disk.clone(), StreamOptions { ..small_options() });
        let work = sim.spawn("stream", work);
        for task in tasks {
            task.await.unwrap();
        }
        assert!(sim.clock().now() - back < 2 * AT_ONCE, "{:?}", sim.clock().now() - back);
        assert!(matches!(work.await, Outcome::Completed));
        world.check_all().await;
    });
}

#[test]
fn a_guests_success_wakes_the_job() {
    in_an_outage(Patience::Forever, |sim, world| async move {
        let (job, work) =
            stream(world.disk.clone(), StreamOptions { patience: Patience::Forever, ..small_options() });
        let work = sim.spawn("job", work);
        job.wait_for(|_| job.waits_for().is_some()).await;
        sim.sleep(Duration::from_secs(60)).await;
        world.source.repair();
        let back = sim.clock().now();
        world.read(3000..5000).await.unwrap();
        job.wait_for(|_| job.waits_for().is_none()).await;
        assert!(sim.clock().now() - back < AT_ONCE);
        assert!(matches!(work.await, Outcome::Completed));
    });
}

#[test]
fn patience_ends_when_it_says() {
    let bound = Duration::from_secs(30);
    in_an_outage(Patience::For(bound), move |sim, world| async move {
        let mut tasks = Vec::new();
        for n in 0..3 {
            tasks.push(held(&sim, &world, n).await);
        }
        for task in tasks {
            let error = task.await.unwrap_err();
            assert!(error.kind().may_pass() && error.to_string().contains("held for 30"), "{error}");
        }
        assert!(sim.clock().now() >= bound && sim.clock().now() < bound + LATEST);
        // What failed is in doubt until it was read, as the model has it.
        world.source.repair();
        world.check_all().await;
    });
}

#[test]
fn only_what_may_pass_is_held() {
    for (patience, kind) in [
        (Patience::None, ErrorKind::Unavailable),
        (Patience::Forever, ErrorKind::Io),
        (Patience::Forever, ErrorKind::SourceChanged),
        (Patience::Forever, ErrorKind::NotFound),
        (Patience::Forever, ErrorKind::Corrupt),
    ] {
        in_an_outage(patience, move |sim, world| async move {
            world.source.repair();
            world.source.fail(Fault::always(&[Op::Read], kind));
            assert_eq!(world.read(0..1000).await.unwrap_err().kind(), kind);
            assert_eq!(world.write(100..200, 7).await.unwrap_err().kind(), kind);
            assert!(sim.clock().now() < AT_ONCE);
            assert_eq!(world.disk.stats().held_in_all.get(), 0);
        });
    }
}

#[test]
fn an_error_that_does_not_pass_ends_a_hold() {
    in_an_outage(Patience::Forever, |sim, world| async move {
        let reader = held(&sim, &world, 0).await;
        world.source.repair();
        world.source.fail(Fault::always(&[Op::Read], ErrorKind::SourceChanged));
        assert_eq!(reader.await.unwrap_err().kind(), ErrorKind::SourceChanged);
    });
}

#[test]
fn who_leaves_is_held_no_longer() {
    in_an_outage(Patience::Forever, |sim, world| async move {
        let tasks = [held(&sim, &world, 0).await, held(&sim, &world, 1).await, held(&sim, &world, 2).await];
        let stalls = sim.rng().one_in(2);
        if stalls {
            // Now the attempt of the moment gets no answer.
            world.source.repair();
            world.source.stall(&[Op::Read, Op::Status]);
        }
        sim.sleep(sim.rng().duration(Duration::ZERO, Duration::from_secs(10))).await;
        let left = sim.clock().now();
        world.leaves.abort();
        for task in tasks {
            assert!(task.await.is_err());
        }
        assert!(sim.clock().now() - left < AT_ONCE, "{:?}", sim.clock().now() - left);
        assert_eq!(world.disk.stats().held.get(), 0);
        drop(world.edge.drain().await);
        drop(world.disk.drain().await);
        world.source.release();
        world.source.repair();
    });
}

#[test]
fn what_is_held_goes_to_the_disk_that_comes_in_its_place() {
    in_an_outage(Patience::Forever, |sim, world| async move {
        let reader = held(&sim, &world, 0).await;
        // One with the same bytes, at hand.
        let mut content = vec![0; 16 << 10];
        world.source.content().read(0, &mut content);
        let mut pages = Pages::new(16 << 10, 512);
        pages.write(0, &content);
        let other = Disk::new(SimFile::new(&sim, "other", pages), sim.clock(), DiskOptions::default());
        let drained = world.edge.drain().await;
        world.edge.replace(&drained, other);
        drop(drained);
        let replaced = sim.clock().now();
        reader.await.unwrap();
        assert!(sim.clock().now() - replaced < LATEST);
        assert_eq!(world.disk.stats().held.get(), 0);
    });
}

/// The source comes and goes; guests read, write, zero and discard; a job copies; drains come by. No guest sees an error or a wrong byte.
// race-test: held-change-again
#[test]
fn outages_cost_guests_nothing_but_time() {
    let (mut was_held, mut changes) = (0, 0);
    for_seeds(400, |seed| {
        let sim = Sim::new(seed);
        let mut shape = Shape::random(&sim);
        shape.options.patience = Patience::Forever;
        let world = Rc::new(World::random(&sim, &shape));
        let rng = sim.rng().clone();
        let inner = (sim.clone(), world.clone());
        sim.run(async move {
            let (sim, world) = inner;
            let (job, work) =
                stream(world.disk.clone(), StreamOptions { patience: Patience::Forever, ..small_options() });
            let streams = rng.one_in(2);
            let work = if streams { Some(sim.spawn("job", work)) } else { None };
            let guests: Vec<_> = (0..3)
                .map(|n| {
                    let guest = world.guest.clone();
                    sim.spawn(format!("guest {n}"), async move {
                        for _ in 0..4 {
                            busy(guest.clone(), 2).await;
                            let range = guest.sim.rng().byte_range(guest.disk.size(), 3000, 1);
                            guest.read(range.clone()).await.expect("a read is held");
                            guest.write(range, 200).await.expect("a write is held");
                        }
                    })
                })
                .collect();
            for _ in 0..rng.range(1..5) {
                sim.sleep(rng.duration(Duration::ZERO, Duration::from_millis(1))).await;
                out_of_reach(&world);
                sim.sleep(rng.duration(Duration::ZERO, Duration::from_millis(500))).await;
                let asked = sim.clock().now();
                if rng.one_in(2) {
                    drop(world.edge.drain().await);
                    drop(world.disk.drain().await);
                    assert!(sim.clock().now() - asked < 3 * AT_ONCE, "{:?}", sim.clock().now() - asked);
                }
                if rng.one_in(4) {
                    sim.sleep(rng.duration(Duration::ZERO, Duration::from_secs(20))).await;
                }
                world.source.repair();
            }
            if streams && rng.one_in(4) {
                // Refused if it is over.
                let _ = job.request_cancel();
            }
            for guest in guests {
                guest.await;
            }
            if let Some(work) = work {
                assert!(!matches!(work.await, Outcome::Failed(_)));
            }
            world.check_all().await;
        });
        let stats = world.disk.stats();
        assert_eq!(stats.held.get(), 0);
        was_held += stats.held_in_all.get();
        changes += stats.writes.get();
    });
    assert!(was_held > 0 && changes > 0, "{was_held} requests were held");
}
