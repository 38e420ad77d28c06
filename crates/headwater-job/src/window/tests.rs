//! Tests of the window against simple paths: a latency and a bandwidth, in virtual time.

use super::*;
use proptest::prelude::*;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A path that delays each copy by `latency` and passes `bandwidth` bytes per second.
struct Path {
    latency: Duration,
    bandwidth: u64,
    busy_until: Duration,
}

struct Run {
    window: Window,
    now: Duration,
    copied: u64,
    /// Ends and starts of what is in flight, in nanoseconds, and bytes.
    flying: BinaryHeap<Reverse<(Duration, Duration, u64)>>,
    in_flight: u64,
    most_in_flight: u64,
}

impl Run {
    fn new(bounds: Bounds) -> Self {
        Self {
            window: Window::new(bounds),
            now: Duration::ZERO,
            copied: 0,
            flying: BinaryHeap::new(),
            in_flight: 0,
            most_in_flight: 0,
        }
    }

    /// Copies `bytes` and says how long it took.
    fn copy(&mut self, path: &mut Path, bytes: u64) -> Duration {
        let (begin, goal) = (self.now, self.copied + bytes);
        while self.copied < goal {
            while self.in_flight + self.window.copy() <= self.window.target() || self.flying.is_empty() {
                let size = self.window.copy();
                let start = path.busy_until.max(self.now);
                path.busy_until = start + Duration::from_nanos(size * 1_000_000_000 / path.bandwidth);
                self.flying.push(Reverse((path.busy_until + path.latency, self.now, size)));
                self.in_flight += size;
                self.most_in_flight = self.most_in_flight.max(self.in_flight);
            }
            let Some(Reverse((end, start, size))) = self.flying.pop() else { unreachable!() };
            self.now = end;
            self.in_flight -= size;
            self.copied += size;
            self.window.completed(size, end - start, end);
        }
        self.now - begin
    }
}

const MIB: u64 = 1 << 20;

fn path(millis: u64, mib_per_second: u64) -> Path {
    Path {
        latency: Duration::from_millis(millis),
        bandwidth: mib_per_second * MIB,
        busy_until: Duration::ZERO,
    }
}

#[test]
fn a_source_20_ms_away_is_not_slowed() {
    let mut run = Run::new(Bounds::REMOTE);
    let took = run.copy(&mut path(20, 1346), 512 * MIB);
    let ideal = Duration::from_millis(512 * 1000 / 1346 + 20);
    assert!(took < ideal + ideal / 5, "{took:?}, at best {ideal:?}");
    assert!(run.most_in_flight <= 64 * MIB);
}

#[test]
fn a_local_disk_gets_little_in_flight() {
    let mut run = Run::new(Bounds::LOCAL);
    let mut disk = path(0, 700);
    let took = run.copy(&mut disk, 2048 * MIB);
    assert!(took < Duration::from_millis(2048 * 1000 / 700 + 100), "{took:?}");
    assert!(run.window.target() <= 8 * MIB, "{}", run.window.target());
}

#[test]
fn a_slow_line_is_not_flooded() {
    let mut run = Run::new(Bounds::REMOTE);
    let mut line = path(30, 2);
    run.copy(&mut line, 256 * MIB);
    assert_eq!(run.window.copy(), 128 << 10);
    assert!(run.window.target() <= 4 * MIB, "a guest's read would wait: {}", run.window.target());
}

#[test]
fn it_grows_again_when_the_path_does() {
    let mut run = Run::new(Bounds::REMOTE);
    run.copy(&mut path(2, 50), 512 * MIB);
    let small = run.window.target();
    run.copy(&mut path(20, 1346), 2048 * MIB);
    assert!(small <= 12 * MIB && run.window.target() > 40 * MIB, "{small} {}", run.window.target());
}

#[test]
fn epochs_that_something_else_held_back_are_left_out() {
    let mut window = Window::new(Bounds::REMOTE);
    let before = window.target();
    for n in 0..1000 {
        window.completed(2 * MIB, Duration::from_millis(20), Duration::from_secs(n));
        window.held_back();
    }
    assert_eq!(window.target(), before);
}

proptest! {
    #[test]
    fn it_keeps_its_bounds_whatever_is_reported(
        samples in prop::collection::vec((0_u64..u64::MAX, 0_u64..u64::MAX, 0_u64..10_000_000_000), 1..200),
        most in 1_u64..(64 << 20),
    ) {
        let bounds = Bounds::REMOTE.with_at_most(most);
        let mut window = Window::new(bounds);
        let mut now = Duration::ZERO;
        for (bytes, latency, step) in samples {
            now += Duration::from_nanos(step);
            window.completed(bytes, Duration::from_nanos(latency), now);
            prop_assert!(window.target() <= bounds.most && window.target() > 0);
            prop_assert!(window.copy() <= bounds.most_copy && window.copy() >= bounds.least_copy);
        }
    }
}

/// Bytes a second of 512 MiB over connections that share a link evenly, each with one copy at a time, which waits for the latency first.
fn over_connections(bounds: Bounds, latency: f64, link: f64, connections: usize) -> f64 {
    let size = 512.0 * MIB as f64;
    let mut window = Window::new(bounds);
    let next = |window: &mut Window| {
        let bytes = window.staggered(window.copy());
        window.begins();
        bytes as f64
    };
    let (mut now, mut done) = (0.0, 0.0);
    // Of each connection: until when it waits, and what is left of its copy.
    let mut flights: Vec<(f64, f64)> = (0..connections).map(|_| (latency, next(&mut window))).collect();
    while done < size {
        let flowing: Vec<usize> = (0..connections).filter(|n| flights[*n].0 <= now).collect();
        let share = link / flowing.len().max(1) as f64;
        let wakes = flights.iter().map(|flight| flight.0).filter(|at| *at > now);
        let ends = flowing.iter().map(|n| now + flights[*n].1 / share);
        let then = wakes.chain(ends).fold(f64::INFINITY, f64::min);
        for n in flowing {
            let passed = (then - now) * share;
            done += passed;
            flights[n].1 -= passed;
            if flights[n].1 < 1.0 {
                flights[n] = (then + latency, next(&mut window));
            }
        }
        now = then;
    }
    done / now
}

#[test]
fn copies_that_share_a_link_do_not_end_together() {
    const LINK: f64 = 125e6;
    for millis in [5.0, 20.0, 80.0] {
        let staggered = over_connections(Bounds::REMOTE, millis / 1e3, LINK, 16);
        assert!(staggered > LINK * 0.95, "{millis} ms: {staggered}");
    }
    let together = over_connections(Bounds { far: false, ..Bounds::REMOTE }, 0.08, LINK, 16);
    assert!(together < LINK * 0.8, "{together}: then it needn't be");
}

#[test]
fn the_first_copies_grow_in_equal_steps() {
    let mut window = Window::new(Bounds::REMOTE);
    let mut sizes = || -> Vec<u64> {
        let mut next = || {
            let size = window.staggered(window.copy());
            window.begins();
            size
        };
        (0..18).map(|_| next() >> 10).collect()
    };
    let expected: Vec<u64> = (1..=16).map(|n| n * 128).chain([2048, 2048]).collect();
    assert_eq!(sizes(), expected);
    window.restart();
    assert_eq!(window.staggered(window.copy()), 128 << 10, "after a pause they begin together again");
    assert!(!Window::new(Bounds::LOCAL).is_staggering());
}
