//! A disk that fills up while it is streamed into: the job stops in time and goes on when there is room.

mod common;

use common::{SMALL, Shape, World, base, busy, commander, helper, random_trace};
use headwater_block::Clock;
use headwater_job::{Event, JobHandle, Outcome, Space, Status, StreamOptions, Waiting, stream};
use headwater_sim::{Sim, for_seeds};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

/// A file system of so many bytes for the top's data.
fn space(world: &World, size: &Rc<Cell<u64>>, low_water: u64) -> Space {
    let (data, size) = (world.top.data().clone(), size.clone());
    let free = Rc::new(move || Ok(size.get().saturating_sub(data.content().held())));
    Space { free, low_water, name: "top".to_owned() }
}

fn waits(job: &JobHandle) -> (u32, u32) {
    let (mut waits, mut goes_on) = (0, 0);
    while let Some(event) = job.try_event() {
        match event {
            Event::Waits(wait) if wait.what == Waiting::Space => waits += 1,
            Event::GoesOn(Waiting::Space) => goes_on += 1,
            _ => {}
        }
    }
    (waits, goes_on)
}

#[test]
fn it_stops_at_the_mark_and_goes_on_when_there_is_room() {
    let sim = Sim::new(1);
    let world = World::full(&sim, &Shape::plain(256 << 10));
    let size = Rc::new(Cell::new(100 << 10));
    let options = StreamOptions {
        bounds: Some(SMALL),
        space: Some(space(&world, &size, 20 << 10)),
        ..StreamOptions::default()
    };
    let (job, work) = stream(world.disk.clone(), options);
    let (watched, guest, top, mine) = (job.clone(), world.guest.clone(), world.top.clone(), sim.clone());
    let outcome = sim.run(async move {
        let watcher = mine.clone().spawn("watcher", async move {
            watched.wait_for(|status| status == Status::Paused).await;
            assert_eq!(watched.waits_for().expect("it waits").what, Waiting::Space);
            let held = top.data().content().held();
            assert!((70 << 10..=80 << 10).contains(&held), "{held}");
            let progress = watched.progress();
            assert!(progress.needs > 170 << 10 && progress.free.is_some(), "{progress:?}");
            // What guests read is not kept meanwhile.
            assert!(!guest.disk.copies_on_read());
            guest.check_all().await;
            mine.sleep(Duration::from_secs(5)).await;
            assert_eq!(watched.status(), Status::Paused);
            assert_eq!(top.data().content().held(), held);
            // Too little room makes no difference.
            size.set(size.get() + 1024);
            mine.sleep(Duration::from_secs(2)).await;
            assert_eq!(watched.status(), Status::Paused);
            // To resume it means to look at once.
            watched.resume().unwrap();
            mine.sleep(Duration::from_millis(100)).await;
            assert_eq!(watched.status(), Status::Paused);
            size.set(1 << 20);
            let before = mine.clock().now();
            watched.wait_for(|status| status == Status::Running).await;
            assert!(mine.clock().now() - before <= Duration::from_secs(2));
            assert!(guest.disk.copies_on_read());
        });
        let outcome = work.await;
        watcher.await;
        outcome
    });
    assert!(matches!(outcome, Outcome::Completed));
    assert!(!world.disk.copies_on_read());
    let (waits, goes_on) = waits(&job);
    assert!(waits >= 2 && waits == goes_on, "{waits} {goes_on}");
}

#[test]
fn a_wait_for_room_can_be_cancelled() {
    let sim = Sim::new(1);
    let world = World::full(&sim, &Shape::plain(64 << 10));
    let size = Rc::new(Cell::new(0));
    let space = Some(space(&world, &size, 1));
    let (job, work) =
        stream(world.disk.clone(), StreamOptions { bounds: Some(SMALL), space, ..StreamOptions::default() });
    let outcome = sim.run({
        let sim = sim.clone();
        async move {
            sim.spawn("canceller", async move {
                job.wait_for(|status| status == Status::Paused).await;
                job.request_cancel().unwrap();
            });
            work.await
        }
    });
    assert!(matches!(outcome, Outcome::Cancelled));
    assert_eq!(world.top.data().content().held(), 0);
}

/// Whatever guests and commands do: copies never take what is under the mark.
#[test]
fn copies_leave_what_they_should_whatever_happens() {
    for_seeds(150, |seed| {
        let sim = Sim::new(seed);
        let shape = Shape::random(&sim);
        let world = Rc::new(World::random(&sim, &shape));
        let rng = sim.rng().clone();
        let low_water = rng.range(1..8 << 10);
        let size = Rc::new(Cell::new(world.top.data().content().held() + low_water + rng.range(0..48 << 10)));
        let guests = rng.one_in(2);
        let options = StreamOptions {
            bounds: Some(SMALL),
            base: rng.one_in(4).then(|| base(rng.pick(&world.layers()))),
            detect_zeroes: rng.one_in(2),
            readahead: rng.one_in(2).then(|| rng.range(1..64 << 10)),
            boot_trace: rng.one_in(2).then(|| random_trace(&sim, world.disk.size())),
            space: Some(space(&world, &size, low_water)),
            ..StreamOptions::default()
        };
        let (job, work) = stream(world.disk.clone(), options);
        let outcome = sim.run({
            let (sim, world) = (sim.clone(), world.clone());
            async move {
                let guest = sim.spawn("guest", busy(world.guest.clone(), if guests { 30 } else { 0 }));
                if rng.one_in(2) {
                    sim.spawn("commander", commander(world.guest.clone(), job.clone()));
                }
                sim.spawn("helper", helper(sim.clone(), job.clone()));
                let (more, late, top) = (size.clone(), sim.clone(), world.top.clone());
                sim.spawn("room", async move {
                    late.sleep(Duration::from_secs(3)).await;
                    let held = top.data().content().held();
                    assert!(guests || held + low_water <= more.get(), "{held} of {more:?}");
                    more.set(more.get() + (1 << 20));
                });
                let outcome = work.await;
                guest.await;
                world.guest.check_all().await;
                outcome
            }
        });
        assert!(matches!(outcome, Outcome::Completed), "{outcome:?}");
    });
}
