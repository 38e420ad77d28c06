//! What a boot trace is for: the guest that comes second waits for the source far less often.

mod common;

use common::{Guest, Shape, World};
use headwater_block::disk::ReadWatch;
use headwater_job::window::Bounds;
use headwater_job::{BootRecorder, BootTrace, Outcome, StreamOptions, stream};
use headwater_sim::{Op, Pace, Sim};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 4 << 20;

/// A boot: reads here and there, always the same, and some work after each.
async fn boot(guest: Guest) {
    for range in reads() {
        guest.read(range).await.unwrap();
        guest.sim.sleep(Duration::from_millis(6)).await;
    }
}

fn reads() -> Vec<Range<u64>> {
    (0..60u64).map(|n| (n * 1_234_577) % (SIZE - 16384) / 4096 * 4096).map(|at| at..at + 8192).collect()
}

/// Boots on a fresh disk while it streams; gives the trace, how many reads waited for the source, and how many bytes that was asked for.
fn first_boot(seed: u64, trace: Option<BootTrace>) -> (BootTrace, u64, u64) {
    let sim = Sim::new(seed);
    let world = World::full(&sim, &Shape { unit: 4096, alignment: 4096, ..Shape::plain(SIZE) });
    let pace = Pace { least: Duration::from_millis(10), most: Duration::from_millis(12), bandwidth: 4 << 20 };
    world.source.set_pace(pace);
    world.source.set_exact_status();
    let recorder = BootRecorder::new(sim.clock());
    let watch: Rc<dyn ReadWatch> = recorder.clone();
    world.disk.watch_reads(&watch);
    let bounds = Bounds {
        least_copy: 16 << 10,
        most_copy: 64 << 10,
        least_copies: 4,
        far: false,
        start: 256 << 10,
        most: 256 << 10,
    };
    let options = StreamOptions { bounds: Some(bounds), boot_trace: trace, ..StreamOptions::default() };
    let (job, work) = stream(world.disk.clone(), options);
    let guest = world.guest.clone();
    let ended = sim.run({
        let sim = sim.clone();
        async move {
            let booted = sim.spawn("guest", boot(guest.clone()));
            let outcome = work.await;
            booted.await;
            guest.check_all().await;
            outcome
        }
    });
    assert!(matches!(ended, Outcome::Completed));
    let progress = job.progress();
    assert!(progress.total_is_exact && progress.total == progress.done, "{progress:?}");
    let waited = world.disk.stats().backing_reads.get();
    (recorder.take_changed().expect("something was read"), waited, world.source.bytes(Op::Read))
}

#[test]
fn the_second_guest_waits_far_less_often() {
    let (trace, without, _) = first_boot(1, None);
    assert_eq!(trace.ranges(SIZE, 4096).len(), trace.len());
    let (again, with, read) = first_boot(2, Some(trace.clone()));
    assert_eq!(again.ranges(SIZE, 4096)[..10], trace.ranges(SIZE, 4096)[..10]);
    assert!(without >= 10 && with * 5 <= without, "{without} reads waited without a trace, {with} with it");
    assert_eq!(read, SIZE, "nothing is asked for twice");
}

#[test]
fn a_trace_of_another_disk_does_no_harm() {
    let text = "headwater boot trace 1\n0 0 99999999999\n1 5 1\n2 88888888 12\n";
    let (_, _, read) = first_boot(3, Some(BootTrace::parse(text).unwrap()));
    assert_eq!(read, SIZE);
}

/// Waits of a guest that reads on and on in the second half of a disk whose first half is streamed at the time.
fn waits_in_a_run(readahead: u64, step: u64) -> u64 {
    let sim = Sim::new(7);
    let world = World::full(&sim, &Shape { unit: 4096, alignment: 4096, ..Shape::plain(SIZE) });
    let pace = Pace { least: Duration::from_millis(10), most: Duration::from_millis(12), bandwidth: 0 };
    world.source.set_pace(pace);
    world.source.set_exact_status();
    let options = StreamOptions { readahead: Some(readahead), speed: 256 << 10, ..StreamOptions::default() };
    let (job, work) = stream(world.disk.clone(), options);
    let guest = world.guest.clone();
    sim.run({
        let sim = sim.clone();
        async move {
            let read = sim.spawn("guest", {
                let sim = sim.clone();
                async move {
                    for n in 0..100u64 {
                        let at = SIZE / 2 + n * step % (SIZE / 2);
                        guest.read(at..at + 4096).await.unwrap();
                        sim.sleep(Duration::from_millis(25)).await;
                    }
                }
            });
            sim.spawn("fast at last", async move {
                read.await;
                job.set_speed(0).unwrap();
            });
            work.await
        }
    });
    world.disk.stats().backing_reads.get()
}

#[test]
fn a_guest_that_reads_on_and_on_waits_a_few_times() {
    let (without, with) = (waits_in_a_run(0, 4096), waits_in_a_run(1 << 20, 4096));
    assert!(without >= 90 && with <= 10, "{without} reads waited without reading ahead, {with} with it");
    // Random reads cost the source nothing beside what they ask for.
    let (without, with) =
        (waits_in_a_run(0, 1_234_567 / 4096 * 4096), waits_in_a_run(1 << 20, 1_234_567 / 4096 * 4096));
    assert_eq!(without, with);
}
