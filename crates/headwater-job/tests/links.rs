//! Streams over links: how much of a link they use, how they follow one that changes, and what guests pay whose misses take the same link.

use headwater_block::{Buffer, Clock, Disk, DiskOptions, Limits, WriteFlags};
use headwater_job::{GuestLatencyGoal, Outcome, StreamOptions, stream};
use headwater_sim::{Device, Op, Pace, Pages, Sim, SimFile, SimOverlay, for_seeds};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const UNIT: u32 = 64 << 10;
const MILLI: Duration = Duration::from_millis(1);

/// 1 Gbit/s, in bytes a second.
const GIGABIT: u64 = 125_000_000;

/// A disk that lacks all of a source at the end of a link.
struct Far {
    sim: Sim,
    source: Rc<SimFile>,
    top: Rc<SimOverlay>,
    disk: Rc<Disk>,
    /// The stream is over: what guests do from now on isn't what is tested.
    over: Rc<Cell<bool>>,
}

fn link(millis: u64, jitter: u64, bandwidth: u64) -> Pace {
    Pace { least: MILLI * millis as u32, most: MILLI * (millis + jitter) as u32, bandwidth }
}

impl Far {
    fn new(seed: u64, size: u64, pace: Pace) -> Self {
        let sim = Sim::new(seed);
        let mut pages = Pages::new(size, UNIT as usize);
        for at in (0..size).step_by(MIB as usize) {
            pages.write(at, &[1; MIB as usize]);
        }
        let source = SimFile::new(&sim, "source", pages);
        source.set_limits(Limits { remote: true, ..Limits::default() });
        source.set_pace(pace);
        source.set_exact_status();
        let top = SimOverlay::new(&sim, "top", size, UNIT, 512, Some(source.clone()));
        for local in [top.data() as &Device, &top] {
            local.set_pace(Pace { least: Duration::ZERO, most: Duration::ZERO, bandwidth: 0 });
        }
        let disk = Disk::new(top.clone(), sim.clock(), DiskOptions::default());
        Self { sim, source, top, disk, over: Rc::default() }
    }

    /// Streams it, with `beside` at work, and says how long that took.
    fn stream(&self, options: StreamOptions, beside: impl Future<Output = ()> + 'static) -> Duration {
        let (_job, work) = stream(self.disk.clone(), options);
        let clock = self.sim.clock();
        let since = clock.now();
        let (sim, over) = (self.sim.clone(), self.over.clone());
        self.sim.run(async move {
            let beside = sim.spawn("beside", beside);
            let outcome = work.await;
            assert!(matches!(outcome, Outcome::Completed), "{outcome:?}");
            let took = clock.now() - since;
            over.set(true);
            beside.await;
            took
        })
    }
}

#[test]
fn a_gigabit_is_used_to_nine_tenths_at_any_distance() {
    const SIZE: u64 = 64 * MIB;
    for (millis, jitter) in [(1, 0), (5, 2), (20, 5), (80, 0), (80, 20)] {
        let far = Far::new(5, SIZE, link(millis, jitter, GIGABIT));
        let took = far.stream(StreamOptions::default(), async {});
        // The data, and a round trip each for the look at the source, the copy's own look, the copy and the proof.
        let best =
            Duration::from_secs_f64(SIZE as f64 / GIGABIT as f64) + MILLI * (millis + jitter) as u32 * 4;
        assert!(took < best * 10 / 9, "{millis} ms: {took:?}, at best {best:?}");
        let most = far.source.peak_bytes(Op::Read);
        assert!(most <= 64 * MIB, "{most} bytes were in flight");
    }
}

#[test]
fn a_link_that_changes_in_the_middle_is_used_before_and_after() {
    const SIZE: u64 = 64 * MIB;
    let far = Far::new(6, SIZE, link(2, 0, GIGABIT));
    let (clock, source) = (far.sim.clock(), far.source.clone());
    let change = async move {
        clock.sleep_until(MILLI * 250).await;
        source.set_pace(link(40, 0, GIGABIT / 2));
    };
    let took = far.stream(StreamOptions::default(), change);
    let rest = SIZE as f64 - 0.25 * GIGABIT as f64;
    let best = MILLI * 250 + Duration::from_secs_f64(rest / (GIGABIT / 2) as f64) + MILLI * 40 * 4;
    assert!(took < best * 10 / 9, "{took:?}, at best {best:?}");
}

/// Reads of 4 KiB that miss, one at a time, until told to end: what each took.
async fn guest(sim: Sim, disk: Rc<Disk>, ends: Rc<Cell<bool>>, took: Rc<RefCell<Vec<Duration>>>) {
    let clock = sim.clock();
    let units = disk.size() / u64::from(UNIT);
    // From the end downwards: there the stream comes last.
    for n in (units / 2..units).rev() {
        if ends.get() {
            return;
        }
        let since = clock.now();
        disk.read(n * u64::from(UNIT), 4096).await.unwrap();
        took.borrow_mut().push(clock.now() - since);
        clock.sleep_until(clock.now() + MILLI).await;
    }
}

fn median(took: &RefCell<Vec<Duration>>) -> Duration {
    let mut took = took.borrow().clone();
    took.sort_unstable();
    took[took.len() / 2]
}

#[test]
fn a_guests_misses_do_not_queue_behind_copies_on_the_link() {
    const SIZE: u64 = 48 * MIB;
    for seed in 1..3 {
        let alone = {
            let far = Far::new(seed, SIZE, link(2, 1, GIGABIT));
            let took = Rc::new(RefCell::default());
            far.sim.run({
                let (sim, disk, took) = (far.sim.clone(), far.disk.clone(), Rc::clone(&took));
                let keeps = far.disk.enable_copy_on_read(None);
                async move {
                    let _keeps = keeps;
                    guest(sim, disk, Rc::default(), took).await;
                }
            });
            median(&took)
        };
        let far = Far::new(seed, SIZE, link(2, 1, GIGABIT));
        let took = Rc::new(RefCell::default());
        let beside = guest(far.sim.clone(), far.disk.clone(), far.over.clone(), Rc::clone(&took));
        let streamed = far.stream(StreamOptions::default(), beside);
        let median = median(&took);
        assert!(median <= alone * 2, "seed {seed}: {median:?}, alone {alone:?}");
        let best = Duration::from_secs_f64(SIZE as f64 / GIGABIT as f64);
        assert!(streamed < best * 8, "seed {seed}: {streamed:?}, at best {best:?}");
    }
}

#[test]
fn a_guest_whose_disk_is_busy_with_copies_is_held_to_the_target_that_it_was_given() {
    for seed in 1..3 {
        let far = Far::new(seed, 64 * MIB, link(1, 0, 0));
        // The local disk is what both queue for.
        far.top.data().set_pace(Pace { least: MILLI / 20, most: MILLI / 10, bandwidth: 400_000_000 });
        let took = Rc::new(RefCell::<Vec<Duration>>::default());
        let beside = {
            let (clock, disk, over) = (far.sim.clock(), far.disk.clone(), far.over.clone());
            let took = Rc::clone(&took);
            async move {
                for n in 0..10_000_u64 {
                    if over.get() {
                        return;
                    }
                    let since = clock.now();
                    let data = Buffer::zeroed(4096);
                    disk.write(63 * MIB + n % 16 * 4096, data, WriteFlags::default()).await.unwrap();
                    took.borrow_mut().push(clock.now() - since);
                    clock.sleep_until(clock.now() + MILLI / 10).await;
                }
            }
        };
        let goal = GuestLatencyGoal::Added(MILLI * 2);
        far.stream(StreamOptions { guest_latency: goal, ..StreamOptions::default() }, beside);
        // The first ones meet what had begun before.
        let mut took = took.borrow()[50..].to_vec();
        took.sort_unstable();
        let tail = took[took.len() * 99 / 100];
        assert!(tail < MILLI * 3, "seed {seed}: {tail:?}");
    }
}

/// Writes of 4 KiB one after the other, without a pause, until told to end.
async fn hammer(disk: Rc<Disk>, ends: Rc<Cell<bool>>, at: u64) {
    let mut n = 0;
    while !ends.get() {
        let data = Buffer::zeroed(4096);
        disk.write(at + n % 16 * 4096, data, WriteFlags::default()).await.unwrap();
        n += 1;
    }
}

#[test]
fn guests_that_never_pause_do_not_starve_the_copies() {
    const SIZE: u64 = 8 * MIB;
    for_seeds(2, |seed| {
        let far = |guests: u64, goal| {
            let far = Far::new(seed, SIZE, link(1, 1, 0));
            // The local disk is what all queue for, one after the other.
            far.top.data().set_pace(Pace { least: MILLI / 20, most: MILLI / 10, bandwidth: 400_000_000 });
            let hammers = (0..guests).map(|n| hammer(far.disk.clone(), far.over.clone(), n * MIB));
            let beside = futures_util::future::join_all(hammers);
            let options = StreamOptions { guest_latency: goal, ..StreamOptions::default() };
            far.stream(options, async move { drop(beside.await) })
        };
        let alone = far(0, GuestLatencyGoal::Relative);
        for goal in [GuestLatencyGoal::Relative, GuestLatencyGoal::Added(MILLI / 1000)] {
            for guests in [1, 4] {
                let took = far(guests, goal);
                // A sixteenth of the time is the copies', whatever the guests do, and half of that for lulls and for what copies queue behind.
                assert!(
                    took <= alone * 32 + MILLI * 200,
                    "{guests} guests, {goal:?}: {took:?}, alone {alone:?}"
                );
            }
        }
    });
}
