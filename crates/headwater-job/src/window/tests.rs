//! Tests of the window against simple paths: a latency and a bandwidth, in virtual time.

use super::*;
use proptest::prelude::*;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

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

/// Bytes a second of 512 MiB over connections that share a link evenly, each with one copy at a time, which waits for the latency first. For the time of `absent`
/// nobody sees what comes, and so nothing begins.
fn over_connections(bounds: Bounds, latency: f64, connections: usize, absent: Range<f64>) -> f64 {
    let size = 512.0 * MIB as f64;
    let mut window = Window::new(bounds);
    let next = |window: &mut Window, now: f64| {
        let now = Duration::from_secs_f64(now);
        let bytes = window.staggered(window.copy(), now);
        window.begins(now);
        (latency, bytes as f64, bytes, now)
    };
    let (mut now, mut done) = (0.0, 0.0);
    // Of each connection: for how long it still waits, what is left of its copy, all of that, and when it began.
    let mut flights: Vec<_> = (0..connections).map(|_| next(&mut window, 0.0)).collect();
    while done < size {
        let flowing: Vec<usize> =
            (0..connections).filter(|n| flights[*n].0 <= 0.0 && flights[*n].1 >= 1.0).collect();
        let share = LINK / flowing.len().max(1) as f64;
        let wakes = flights.iter().map(|flight| flight.0).filter(|rest| *rest > 0.0);
        let ends = flowing.iter().map(|n| flights[*n].1 / share);
        let back = Some(absent.end - now).filter(|rest| *rest > 0.0);
        let step = wakes.chain(ends).chain(back).fold(f64::INFINITY, f64::min);
        for flight in &mut flights {
            flight.0 = if flight.0 <= step * 1.000_001 { 0.0 } else { flight.0 - step };
        }
        for n in flowing {
            done += step * share;
            flights[n].1 -= step * share;
        }
        now += step;
        if absent.contains(&now) {
            continue;
        }
        for flight in &mut flights {
            if flight.1 < 1.0 {
                let ended = Duration::from_secs_f64(now);
                window.completed(flight.2, ended - flight.3, ended);
                *flight = next(&mut window, now);
            }
        }
    }
    done / now
}

const LINK: f64 = 125e6;

#[test]
fn copies_that_share_a_link_do_not_end_together() {
    for millis in [5.0, 20.0, 80.0] {
        let staggered = over_connections(Bounds::REMOTE, millis / 1e3, 16, 0.0..0.0);
        assert!(staggered > LINK * 0.95, "{millis} ms: {staggered}");
    }
    let together = over_connections(Bounds { far: false, ..Bounds::REMOTE }, 0.08, 16, 0.0..0.0);
    assert!(together < LINK * 0.8, "{together}: then it needn't be");
}

#[test]
fn copies_that_a_disturbance_brings_together_come_apart_again() {
    for millis in [20.0, 80.0] {
        for since in [0.5, 0.77, 1.3] {
            // All that is in flight comes meanwhile, and the link stands still for the rest of the time.
            let absent = since..since + 0.5;
            let took = 512.0 * MIB as f64 / over_connections(Bounds::REMOTE, millis / 1e3, 16, absent);
            let best = 512.0 * MIB as f64 / LINK + 0.5;
            assert!(took < best * 1.06, "{millis} ms: {took}, at best {best}");
        }
    }
}

#[test]
fn copies_that_begin_together_shrink_in_equal_steps() {
    let mut window = Window::new(Bounds::REMOTE);
    let sizes = |window: &mut Window, now: Duration| -> Vec<u64> {
        let mut next = || {
            let size = window.staggered(window.copy(), now);
            window.begins(now);
            size >> 10
        };
        (0..18).map(|_| next()).collect()
    };
    let expected: Vec<u64> = (1..=16).rev().map(|n| n * 128).chain([2048, 2048]).collect();
    let second = Duration::from_secs(1);
    assert_eq!(sizes(&mut window, second), expected);
    // From what copies take follows what is together.
    window.completed(MIB, second, 2 * second);
    assert_eq!(window.staggered(window.copy(), 2 * second), 2 * MIB, "alone");
    assert_eq!(sizes(&mut window, 2 * second), expected);
    window.begins(3 * second);
    assert_eq!(window.staggered(window.copy(), 3 * second + second / 100), 1920 << 10);
    assert_eq!(window.staggered(window.copy(), 3 * second + second / 10), 2 * MIB);
    window.restart();
    assert_eq!(sizes(&mut window, 4 * second), expected, "after a pause they begin together again");
    // Of guests' small shares nothing is cut off.
    assert_eq!(window.staggered(64 << 10, 4 * second), 64 << 10);
    assert!(!Window::new(Bounds::LOCAL).staggers());
}
