//! What a disk held at one moment can be read while guests change it, in every order that a seed can bring; and what becomes of it when it can't be saved.

use headwater_block::copy_before_write::{OnUnsaved, Policy};
use headwater_block::filter::{CopyBeforeWriteNode, SnapshotAccessNode};
use headwater_block::{
    Abort, Buffer, Clock, Disk, DiskOptions, Edge, ErrorKind, ExtentKind, PointInTime, WriteFlags, ZeroFlags,
};
use headwater_sim::{Fault, Fill, Op, Pages, Rng, Sim, SimFile, SimOverlay, for_seeds};
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 32 << 10;

struct World {
    sim: Sim,
    disk: Rc<Disk>,
    target: Rc<Disk>,
    file: Rc<SimFile>,
    point: Rc<PointInTime>,
    /// Guests come through it.
    filter: Rc<Disk>,
    shown: Rc<Disk>,
    /// What it held.
    then: Buffer,
}

/// An overlay on a base, both with data, and a moment of it.
async fn world(sim: &Sim) -> World {
    let base = SimFile::new(sim, "base", Pages::new(SIZE, 512));
    base.preset(0, &Fill::Pattern(1).bytes(0..SIZE));
    let overlay = SimOverlay::new(sim, "top", SIZE, 1024, 512, Some(base));
    let disk = Disk::new(overlay, sim.clock(), DiskOptions::default());
    disk.write(3000, Buffer::copy_of(&vec![2; 5000]), WriteFlags::default()).await.unwrap();
    disk.write_zeroes(16384, 2048, ZeroFlags::default()).await.unwrap();
    let then = disk.read(0, SIZE).await.unwrap();
    let file = SimFile::new(sim, "saved", Pages::new(SIZE, 512));
    file.preset(0, &Fill::Pattern(9).bytes(0..SIZE));
    let target = Disk::new(file.clone(), sim.clock(), DiskOptions::default());
    let point = disk.begin_point_in_time(&target, 2048, None).await;
    let filter = CopyBeforeWriteNode::new(Edge::new(disk.clone()), point.clone());
    let filter = Disk::new(filter, sim.clock(), DiskOptions::default());
    let shown = SnapshotAccessNode::new(point.clone());
    let shown = Disk::new(shown, sim.clock(), DiskOptions::default());
    World { sim: sim.clone(), disk, target, file, point, filter, shown, then }
}

/// Changes something through the filter, or past it.
async fn change(world: &World, rng: &Rng) -> headwater_block::Result<()> {
    let disk = if rng.one_in(4) { &world.disk } else { &world.filter };
    let range = rng.byte_range(SIZE, 6000, 512);
    let len = range.end - range.start;
    match rng.range(0..4) {
        0 => {
            disk.write_zeroes(range.start, len, ZeroFlags { unmap: rng.one_in(2), ..ZeroFlags::default() })
                .await
        }
        1 => disk.discard(range.start, len).await,
        _ => {
            let data = Buffer::copy_of(&vec![rng.range(10..250) as u8; len as usize]);
            disk.write(range.start, data, WriteFlags::default()).await
        }
    }
}

async fn reads_as_then(world: &World, range: std::ops::Range<u64>) {
    let read = world.shown.read(range.start, range.end - range.start).await.expect("it can be read");
    let expected = &world.then[range.start as usize..range.end as usize];
    let differs = read.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{range:?} differs from that moment at that offset");
}

// race-test: point-in-time-read
#[test]
fn readers_see_the_moment_whatever_guests_do() {
    for_seeds(300, |seed| {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let world = Rc::new(world(&inner).await);
            let guests: Vec<_> = (0..3)
                .map(|_| {
                    let world = world.clone();
                    inner.spawn("guest", async move {
                        for _ in 0..12 {
                            change(&world, world.sim.rng()).await.unwrap();
                        }
                    })
                })
                .collect();
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    let world = world.clone();
                    inner.spawn("reader", async move {
                        for _ in 0..12 {
                            let range = world.sim.rng().byte_range(SIZE, 9000, 1);
                            reads_as_then(&world, range.clone()).await;
                            // What is said to be zero is so.
                            for extent in world.shown.block_status(range, 8).await.unwrap() {
                                let bytes = &world.then[extent.offset as usize..extent.end() as usize];
                                let zero = bytes.iter().all(|byte| *byte == 0);
                                assert!(extent.kind == ExtentKind::Data || zero, "{extent:?}");
                            }
                        }
                    })
                })
                .collect();
            for task in guests.into_iter().chain(readers) {
                task.await;
            }
            reads_as_then(&world, 0..SIZE).await;
            world.filter.close().await.unwrap();
            let before = world.file.started(Op::Write);
            change(&world, world.sim.rng()).await.unwrap();
            assert_eq!(world.file.started(Op::Write), before, "nothing touches the target any more");
            assert_eq!(world.shown.read(0, 512).await.unwrap_err().kind(), ErrorKind::Closed);
        });
    });
}

async fn write(world: &World, at: u64) -> headwater_block::Result<()> {
    world.filter.write(at, Buffer::copy_of(&vec![77; 512]), WriteFlags::default()).await
}

fn in_world<F: Future<Output = ()> + 'static>(test: impl Fn(World) -> F + Clone + 'static) {
    for seed in 0..25 {
        let sim = Sim::new(seed);
        let (inner, test) = (sim.clone(), test.clone());
        sim.run(async move { test(world(&inner).await).await });
    }
}

#[test]
fn a_change_that_cannot_be_saved_is_refused_or_breaks_the_copy() {
    in_world(|world| async move {
        world.file.fail(Fault::nth(&[Op::Write], 0, ErrorKind::NoSpace));
        assert_eq!(write(&world, 0).await.unwrap_err().kind(), ErrorKind::NoSpace);
        reads_as_then(&world, 0..SIZE).await;
        write(&world, 0).await.unwrap();
        reads_as_then(&world, 0..SIZE).await;

        world.point.set_policy(Policy { on_unsaved: OnUnsaved::BreakCopy, ..Policy::default() });
        world.file.fail(Fault::nth(&[Op::Write], 0, ErrorKind::NoSpace));
        write(&world, 8192).await.unwrap();
        assert!(world.point.broken().is_some());
        let lost = world.shown.read(0, 512).await.unwrap_err().to_string();
        assert!(lost.contains("is lost"), "{lost}");
        let before = world.file.started(Op::Write);
        write(&world, 20480).await.unwrap();
        assert_eq!(world.file.started(Op::Write), before, "nothing is saved any more");
    });
}

#[test]
fn a_change_waits_for_a_slow_target_as_long_as_it_is_told_and_loses_nothing() {
    in_world(|world| async move {
        let timeout = Some(Duration::from_secs(2));
        world.point.set_policy(Policy { on_unsaved: OnUnsaved::RefuseChange, timeout, ..Policy::default() });
        world.file.stall(&[Op::Write]);
        let began = world.sim.clock().now();
        assert_eq!(write(&world, 0).await.unwrap_err().kind(), ErrorKind::TimedOut);
        assert_eq!(
            write(&world, 100).await.unwrap_err().kind(),
            ErrorKind::TimedOut,
            "the same bytes once more"
        );
        assert!(world.sim.clock().now() - began >= Duration::from_secs(4));
        // A reader isn't held up, and the target isn't harmed.
        reads_as_then(&world, 0..SIZE).await;
        world.file.release();
        write(&world, 0).await.unwrap();
        write(&world, 8192).await.unwrap();
        reads_as_then(&world, 0..SIZE).await;
        let copy = world.target.read(0, 2048).await.unwrap();
        assert_eq!(copy[..], world.then[..2048]);
        world.filter.close().await.unwrap();
        world.target.close().await.unwrap();
    });
}

#[test]
fn the_end_waits_for_a_write_that_was_waited_for_no_longer() {
    in_world(|world| async move {
        let timeout = Some(Duration::from_secs(1));
        world.point.set_policy(Policy { on_unsaved: OnUnsaved::BreakCopy, timeout, ..Policy::default() });
        world.file.stall(&[Op::Write]);
        write(&world, 0).await.unwrap();
        assert!(world.point.broken().is_some());
        let point = world.point.clone();
        let end = world.sim.spawn("end", async move { point.end().await });
        world.sim.sleep(Duration::from_secs(1)).await;
        assert!(!end.is_over());
        world.file.release();
        end.await;
        world
            .target
            .write(0, Buffer::copy_of(&vec![1; 512]), WriteFlags::default())
            .await
            .expect("it is as good as before");
    });
}

// race-test: point-in-time-forgets
#[test]
fn what_is_forgotten_is_neither_saved_nor_read_any_more() {
    for_seeds(50, |seed| {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let world = Rc::new(world(&inner).await);
            // The first granule is in the target, the second isn't.
            world.filter.write(0, Buffer::copy_of(&[77; 512]), WriteFlags::default()).await.unwrap();
            world.file.stall(&[Op::Read]);
            let reader = world.clone();
            let reads = inner.spawn("reader", async move { reads_as_then(&reader, 0..2048).await });
            world.file.holds(1).await;
            let point = world.point.clone();
            let forget =
                inner.spawn("forget", async move { point.forget(0..4096 + 100, &Abort::new()).await });
            inner.sleep(Duration::from_millis(500)).await;
            assert!(!forget.is_over(), "somebody is reading it");
            world.file.release();
            reads.await;
            forget.await.unwrap();
            assert_eq!(world.point.pending(), SIZE - 4096);

            let saved = world.file.started(Op::Write);
            world.filter.write(2048, Buffer::copy_of(&[78; 2048]), WriteFlags::default()).await.unwrap();
            assert_eq!(world.file.started(Op::Write), saved, "nobody needs what was there");
            for at in [0, 2048, 4095] {
                assert_eq!(world.shown.read(at, 1).await.unwrap_err().kind(), ErrorKind::NotAllowed);
            }
            assert!(world.shown.read(0, SIZE).await.is_err());
            world.filter.discard(0, SIZE).await.unwrap();
            reads_as_then(&world, 4096..SIZE).await;
            // Less than a granule is kept, and the rest of the disk is whole granules.
            world.point.forget(5000..6000, &Abort::new()).await.unwrap();
            reads_as_then(&world, 4096..SIZE).await;
            world.point.forget(SIZE - 2048..SIZE, &Abort::new()).await.unwrap();
            reads_as_then(&world, 4096..SIZE - 2048).await;
            assert!(world.shown.read(SIZE - 1, 1).await.is_err());
        });
    });
}
