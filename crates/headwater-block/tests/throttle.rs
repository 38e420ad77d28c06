//! Throttle groups in virtual time: rates, bursts, turns, changes and drains.

use headwater_block::filter::throttle::{Directions, Limit, ThrottleGroup, ThrottleLimits, ThrottleNode};
use headwater_block::null::{NullNode, NullOptions};
use headwater_block::{Buffer, Clock, Disk, DiskOptions, Edge, WriteFlags, ZeroFlags};
use headwater_sim::{Sim, for_seeds};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);
const BLOCK: u64 = 4096;

fn iops(rate: u64) -> ThrottleLimits {
    let iops = Directions { total: Limit::rate(rate), ..Directions::default() };
    ThrottleLimits { iops, ..ThrottleLimits::default() }
}

fn bps(rate: u64) -> ThrottleLimits {
    let bps = Directions { total: Limit::rate(rate), ..Directions::default() };
    ThrottleLimits { bps, ..ThrottleLimits::default() }
}

/// A disk on a throttle node over nothing, and the edge to what is below.
struct Member {
    disk: Rc<Disk>,
    node: Rc<ThrottleNode>,
    below: Rc<Edge>,
    done: Rc<Cell<u64>>,
}

fn group(sim: &Sim, limits: ThrottleLimits) -> Rc<ThrottleGroup> {
    ThrottleGroup::new("group", sim.clock(), limits).unwrap()
}

fn member(sim: &Sim, group: &Rc<ThrottleGroup>) -> Member {
    let null = NullNode::new("null", sim.clock(), NullOptions::default());
    let below = Edge::new(Disk::new(null, sim.clock(), DiskOptions::default()));
    let node = ThrottleNode::new(below.clone(), group.clone());
    let disk = Disk::new(node.clone(), sim.clock(), DiskOptions::default());
    Member { disk, node, below, done: Rc::default() }
}

impl Member {
    /// Starts `tasks` that read or write `len` bytes again and again.
    fn load(&self, sim: &Sim, tasks: usize, len: u64, write: bool) {
        for _ in 0..tasks {
            let (disk, done) = (self.disk.clone(), self.done.clone());
            sim.spawn("load", async move {
                loop {
                    if write {
                        disk.write(0, Buffer::zeroed(len as usize), WriteFlags::default()).await.unwrap();
                    } else {
                        disk.read(0, len).await.unwrap();
                    }
                    done.set(done.get() + 1);
                }
            });
        }
    }
}

#[track_caller]
fn assert_near(got: u64, want: u64, percent: u64) {
    let off = want * percent / 100 + 1;
    assert!(got.abs_diff(want) <= off, "{got}, not about {want}");
}

#[test]
fn requests_and_bytes_keep_their_rates() {
    for_seeds(20, |seed| {
        for (limits, len, want) in [
            (iops(100), BLOCK, 1010),
            (bps(1 << 20), BLOCK, 2586),
            // Counted as sixteen, and as one.
            (ThrottleLimits { iops_size: BLOCK, ..iops(160) }, 16 * BLOCK, 101),
            (ThrottleLimits { iops_size: BLOCK, ..iops(100) }, 512, 1010),
        ] {
            let sim = Sim::new(seed);
            let inner = sim.clone();
            sim.run(async move {
                let group = group(&inner, limits);
                let member = member(&inner, &group);
                member.load(&inner, 5, len, seed % 2 == 0);
                inner.sleep(SECOND * 10).await;
                assert_near(member.done.get(), want, 1);
            });
        }
    });
}

#[test]
fn directions_have_limits_of_their_own() {
    for_seeds(20, |seed| {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let iops = Directions { read: Limit::rate(50), write: Limit::rate(20), ..Directions::default() };
            let group = group(&inner, ThrottleLimits { iops, ..bps(1 << 30) });
            let (reader, writer) = (member(&inner, &group), member(&inner, &group));
            reader.load(&inner, 3, BLOCK, false);
            writer.load(&inner, 3, BLOCK, true);
            inner.sleep(SECOND * 10).await;
            // A queue of one kind doesn't hold up the other by what they share.
            assert_near(reader.done.get(), 505, 1);
            assert_near(writer.done.get(), 202, 1);
        });
    });
}

#[test]
fn a_burst_lasts_as_long_as_it_may_and_comes_back() {
    for_seeds(20, |seed| {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let limit = Limit { rate: 10, max: 200, max_length: Some(6) };
            let iops = Directions { total: limit, ..Directions::default() };
            let group = group(&inner, ThrottleLimits { iops, ..ThrottleLimits::default() });
            let member = member(&inner, &group);
            member.load(&inner, 4, BLOCK, false);
            let done = member.done.clone();
            // At the burst's rate, and not at once.
            inner.sleep(SECOND).await;
            assert_near(done.get(), 220, 2);
            inner.sleep(SECOND * 4).await;
            assert_near(done.get(), 1020, 2);
            // 1200, and what the rate allowed meanwhile.
            inner.sleep(SECOND * 5).await;
            assert_near(done.get(), 1300, 2);
            inner.sleep(SECOND * 10).await;
            assert_near(done.get(), 1400, 2);
        });
    });
}

#[test]
fn a_burst_of_a_second_may_come_at_once() {
    let sim = Sim::new(1);
    let inner = sim.clone();
    sim.run(async move {
        let iops =
            Directions { write: Limit { rate: 10, max: 30, max_length: None }, ..Directions::default() };
        let group = group(&inner, ThrottleLimits { iops, ..ThrottleLimits::default() });
        let member = member(&inner, &group);
        for _ in 0..31 {
            member.disk.write_zeroes(0, BLOCK, ZeroFlags::default()).await.unwrap();
        }
        assert_eq!(inner.clock().now(), Duration::ZERO);
        member.disk.discard(0, BLOCK).await.unwrap();
        assert_eq!(inner.clock().now(), SECOND / 10, "discards count as writes");
        member.disk.read(0, BLOCK).await.unwrap();
        member.disk.flush().await.unwrap();
        member.disk.block_status(0..BLOCK, 1).await.unwrap();
        assert_eq!(inner.clock().now(), SECOND / 10, "nothing else does");
    });
}

#[test]
fn members_take_turns_however_many_requests_they_have() {
    for_seeds(10, |seed| {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let group = group(&inner, iops(300));
            let members: Vec<_> = (0..3).map(|_| member(&inner, &group)).collect();
            assert_eq!(group.members(), 3);
            members[0].load(&inner, 30, BLOCK, false);
            members[1].load(&inner, 5, BLOCK, false);
            // Reads and writes share the limit, so that this one alone has half of it.
            members[2].load(&inner, 1, BLOCK, true);
            inner.sleep(SECOND * 10).await;
            assert_near(members[0].done.get(), 757, 5);
            assert_near(members[1].done.get(), 757, 5);
            assert_near(members[2].done.get(), 1515, 5);
        });
    });
}

#[test]
fn limits_that_change_hold_at_once_for_those_that_wait() {
    for_seeds(20, |seed| {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let group = group(&inner, iops(1));
            let member = member(&inner, &group);
            member.load(&inner, 50, 1 << 20, false);
            inner.sleep(SECOND).await;
            assert!(member.done.get() <= 3);
            group.set_limits(bps(100 << 20)).unwrap();
            inner.sleep(SECOND).await;
            assert_near(member.done.get(), 112, 5);
            assert!(group.set_limits(ThrottleLimits { iops_size: 1, ..bps(1) }).is_err());
            assert_eq!(group.limits(), bps(100 << 20), "what is refused changes nothing");
            let other = super_fast(&inner);
            member.node.set_group(other);
            assert_eq!(group.members(), 0);
            let before = member.done.get();
            inner.sleep(SECOND / 100).await;
            assert_near(member.done.get() - before, 100, 15);
        });
    });
}

/// A group of ten thousand requests a second, with no more than ten saved up.
fn super_fast(sim: &Sim) -> Rc<ThrottleGroup> {
    let limit = Limit { rate: 9000, max: 10_000, max_length: Some(2) };
    let iops = Directions { total: limit, ..Directions::default() };
    let group = ThrottleGroup::new("fast", sim.clock(), ThrottleLimits { iops, ..ThrottleLimits::default() })
        .unwrap();
    // The burst of a tenth of a second is used up.
    let member = member(sim, &group);
    let disk = member.disk.clone();
    let all = (0..1001).map(move |_| disk.clone());
    for disk in all {
        futures_util::FutureExt::now_or_never(disk.read(0, 512)).unwrap().unwrap();
    }
    group
}

#[test]
fn a_drain_does_not_wait_for_a_limit_and_what_passed_is_paid_for() {
    for_seeds(20, |seed| {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let group = group(&inner, iops(1));
            let (drained, other) = (member(&inner, &group), member(&inner, &group));
            let top = Edge::new(drained.disk.clone());
            for member in [&drained, &other] {
                for _ in 0..10 {
                    let (edge, done) = (Edge::new(member.disk.clone()), member.done.clone());
                    inner.spawn("one", async move {
                        edge.enter().await.read(0, BLOCK).await.unwrap();
                        done.set(done.get() + 1);
                    });
                }
            }
            inner.sleep(SECOND / 2).await;
            let start = inner.clock().now();
            // Below the filter nobody waits; above it, they are let through.
            drop(drained.below.drain().await);
            let guard = if seed % 2 == 0 { drained.disk.drain().await } else { top.drain().await };
            drop(guard);
            drop(drained.disk.drain().await);
            assert_eq!(inner.clock().now(), start);
            assert_eq!(drained.done.get(), 10);
            assert!(other.done.get() <= 2, "others wait on");
            let before = other.done.get();
            inner.sleep(SECOND * 7).await;
            assert_eq!(other.done.get(), before, "what the drain let pass is paid for by all");
            inner.sleep(SECOND * 20).await;
            assert_eq!(other.done.get(), 10);
        });
    });
}

#[test]
fn who_gives_up_waiting_holds_up_nobody() {
    for_seeds(100, |seed| {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let group = group(&inner, iops(10));
            let member = member(&inner, &group);
            let mut leavers = Vec::new();
            for n in 0..20 {
                let (disk, done) = (member.disk.clone(), member.done.clone());
                let task = inner.spawn("reader", async move {
                    disk.read(0, BLOCK).await.unwrap();
                    done.set(done.get() + 1);
                });
                if n % 2 == 0 {
                    leavers.push(task);
                }
            }
            inner.sleep(SECOND / 20).await;
            let gone = leavers.iter().filter(|task| !task.is_over()).count() as u64;
            for task in leavers {
                if inner.rng().chance(0.5) {
                    inner.yield_now().await;
                }
                task.abort();
            }
            // Those that left don't count.
            inner.sleep(SECOND * 2).await;
            assert_eq!(member.done.get(), 20 - gone);
        });
    });
}
