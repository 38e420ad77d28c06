//! Tests of the budget against a simple device: it serves one operation after the other, in virtual time.

use super::*;
use proptest::prelude::*;

const MIB: f64 = 1024.0 * 1024.0;

/// A device that takes `overhead` and then a time by the bandwidth for each operation, in the order in which they come.
struct Device {
    overhead: Duration,
    bandwidth: f64,
    free_at: Duration,
    /// Each operation takes up to so many times longer, at random.
    jitter: f64,
    random: u64,
}

impl Device {
    fn new(micros: u64, mib_per_second: f64) -> Self {
        let overhead = Duration::from_micros(micros);
        Self { overhead, bandwidth: mib_per_second * MIB, free_at: Duration::ZERO, jitter: 0.3, random: 1 }
    }

    /// When an operation that comes at `now` is done.
    fn serve(&mut self, bytes: u64, now: Duration) -> Duration {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let chance = (self.random >> 40) as f64 / f64::from(1 << 24);
        let time = self.overhead + Duration::from_secs_f64(bytes as f64 / self.bandwidth);
        self.free_at = self.free_at.max(now) + time.mul_f64(1.0 + self.jitter * chance);
        self.free_at
    }
}

/// A guest that reads 4 KiB at a time with a pause in between, beside copies that follow a budget.
struct World {
    device: Device,
    budget: Budget,
    now: Duration,
    copied: u64,
    in_flight: Vec<(Duration, Duration, u64)>,
    /// What the guest's requests took, and when they came.
    latencies: Vec<(Duration, Duration)>,
    target: u64,
    copies: bool,
}

impl World {
    fn new(device: Device, goal: GuestLatencyGoal) -> Self {
        Self {
            device,
            budget: Budget::new(goal),
            now: Duration::ZERO,
            copied: 0,
            in_flight: Vec::new(),
            latencies: Vec::new(),
            target: 16 << 20,
            copies: true,
        }
    }

    /// Lets time pass. The guest waits `think` between two requests; none is no guest.
    fn run(&mut self, time: Duration, think: Option<Duration>) {
        let until = self.now + time;
        let mut asks = think.map(|think| self.now + think);
        let mut asked: Option<(Duration, Duration)> = None;
        let mut begun = 0_u64;
        let mut quiet = None;
        while self.now < until {
            let mut seen = Seen::default();
            self.in_flight.sort_unstable();
            while let Some(&(_, _, bytes)) = self.in_flight.first().filter(|(end, ..)| *end <= self.now) {
                self.in_flight.remove(0);
                self.copied += bytes;
            }
            if let Some((came, end)) = asked.filter(|(_, end)| *end <= self.now) {
                let side = if quiet == Some(begun) { &mut seen.quiet } else { &mut seen.busy };
                side[0].add(end - came);
                seen.went = 1;
                self.latencies.push((came, end - came));
                asked = None;
                asks = think.map(|think| self.now + think);
            }
            if asks.is_some_and(|at| at <= self.now) {
                asks = None;
                asked = Some((self.now, self.device.serve(4096, self.now)));
                quiet = self.in_flight.is_empty().then_some(begun);
                seen.came = 1;
            }
            self.budget.observe(&seen, self.in_flight.len(), self.now);
            let rest = if self.copies { self.fill(&mut begun) } else { None };
            let ends = self.in_flight.iter().map(|(end, ..)| *end).chain(asked.map(|(_, end)| end));
            let next = ends.chain(asks).chain(rest).chain([until]).min().unwrap_or(until);
            self.now = next.max(self.now + Duration::from_nanos(1));
        }
    }

    fn fill(&mut self, begun: &mut u64) -> Option<Duration> {
        loop {
            let (target, copy) = match self.budget.allowance(self.target, 1 << 20, self.now) {
                Allowance::All => (self.target, 1 << 20),
                Allowance::Some { target, copy } => (target, copy),
                Allowance::Rest(until) => return Some(until),
            };
            let flying: u64 = self.in_flight.iter().map(|(.., bytes)| bytes).sum();
            if flying + copy > target && flying > 0 {
                return None;
            }
            // What is read must be written: twice the bytes.
            let end = self.device.serve(2 * copy, self.now);
            self.in_flight.push((end, self.now, copy));
            self.budget.begun(copy, self.now);
            *begun += 1;
        }
    }

    /// A quantile of what requests took that came since `since`.
    fn quantile(&self, part: f64, since: Duration) -> Duration {
        let mut times: Vec<_> =
            self.latencies.iter().filter(|(came, _)| *came >= since).map(|(_, took)| *took).collect();
        times.sort_unstable();
        times[((times.len() - 1) as f64 * part) as usize]
    }
}

const SECOND: Duration = Duration::from_secs(1);
const THINK: Option<Duration> = Some(Duration::from_micros(60));

#[test]
fn without_guests_copies_take_all() {
    let mut world = World::new(Device::new(20, 1400.0), GuestLatencyGoal::Relative);
    world.run(SECOND, None);
    assert!(world.copied as f64 > 0.8 * 700.0 * MIB, "{}", world.copied as f64 / MIB);
}

/// What a guest's requests take without copies, in the median and in the 99th percentile.
fn alone(device: Device) -> [Duration; 2] {
    let mut world = World::new(device, GuestLatencyGoal::Relative);
    world.copies = false;
    world.run(SECOND / 4, THINK);
    [0.5, 0.99].map(|part| world.quantile(part, Duration::ZERO))
}

const DEVICES: [(u64, f64); 3] = [(60, 1400.0), (100, 3000.0), (150, 500.0)];

#[test]
fn a_guests_requests_stay_near_what_they_take_alone_and_copies_go_on() {
    for (micros, bandwidth) in DEVICES {
        let [idle, _] = alone(Device::new(micros, bandwidth));
        for random in 1..4 {
            let device = Device { random, ..Device::new(micros, bandwidth) };
            let mut world = World::new(device, GuestLatencyGoal::Relative);
            world.run(SECOND / 4, None);
            let before = world.copied;
            world.run(SECOND, THINK);
            let [median, tail] = [0.5, 0.99].map(|part| world.quantile(part, SECOND / 2));
            assert!(median <= idle * 3 / 2, "{median:?}, alone {idle:?}");
            assert!(tail <= idle * 5, "{tail:?}, alone {idle:?}");
            let rate = (world.copied - before) as f64 / MIB;
            assert!(rate > bandwidth / 2.0 * 0.15, "copies pass {rate} MiB/s of {}", bandwidth / 2.0);
        }
    }
}

#[test]
fn what_is_added_keeps_to_the_target_and_more_is_copied_where_more_may_be_added() {
    let mut rates = Vec::new();
    for millis in [1, 4] {
        let added = Duration::from_millis(millis);
        let [_, idle] = alone(Device::new(60, 1400.0));
        let mut world = World::new(Device::new(60, 1400.0), GuestLatencyGoal::Added(added));
        world.run(SECOND, THINK);
        let tail = world.quantile(0.99, SECOND / 4);
        assert!(tail <= idle + added * 3 / 2, "{tail:?} with {added:?} on top of {idle:?}");
        rates.push(world.copied);
    }
    assert!(rates[1] as f64 > 0.6 * 700.0 * MIB && rates[1] > rates[0], "{rates:?}");
}

#[test]
fn when_guests_are_silent_copies_take_all_again() {
    let mut world = World::new(Device::new(60, 1400.0), GuestLatencyGoal::Relative);
    world.run(SECOND / 2, THINK);
    world.run(SECOND * 2, None);
    let before = world.copied;
    world.run(SECOND, None);
    assert!((world.copied - before) as f64 > 0.8 * 700.0 * MIB, "{}", (world.copied - before) as f64 / MIB);
}

#[test]
fn it_follows_a_device_that_becomes_slow() {
    let mut world = World::new(Device::new(60, 3000.0), GuestLatencyGoal::Relative);
    world.run(SECOND / 2, THINK);
    world.device.bandwidth = 150.0 * MIB;
    let [idle, _] = alone(Device::new(60, 150.0));
    world.run(SECOND * 2, THINK);
    let median = world.quantile(0.5, SECOND * 3 / 2);
    assert!(median <= idle * 3 / 2, "{median:?}, alone {idle:?}");
}

proptest! {
    #[test]
    fn copies_never_rest_for_long_and_keep_to_the_window_whatever_is_seen(
        events in prop::collection::vec((0_u64..2_000_000, 0_usize..3, 0_u64..50_000_000, any::<bool>(), 0_usize..4), 1..200),
        target in 1_u64..(64 << 20),
        copy in (64_u64 << 10)..(2 << 20),
        added in prop::option::of(1_u64..10_000_000),
    ) {
        let goal = added.map_or(GuestLatencyGoal::Relative, |nanos| GuestLatencyGoal::Added(Duration::from_nanos(nanos)));
        let mut budget = Budget::new(goal);
        let mut now = Duration::ZERO;
        for (step, kind, took, quiet, copies) in events {
            now += Duration::from_nanos(step);
            let mut seen = Seen { came: 1, went: 1, ..Seen::default() };
            let side = if quiet { &mut seen.quiet } else { &mut seen.busy };
            side[kind].add(Duration::from_nanos(took));
            budget.observe(&seen, copies, now);
            match budget.allowance(target, copy, now) {
                Allowance::All => {}
                Allowance::Some { target: bytes, copy: size } => {
                    prop_assert!(size <= copy && size > 0);
                    prop_assert!(bytes <= target.max(copy).max(LEAST_COPY) && bytes >= size);
                    budget.begun(size, now);
                }
                // The longest burst that counts, at the least duty; a lull; a burst that ends with its copies.
                Allowance::Rest(until) => prop_assert!(until <= now + LULL_MOST.0 * 16),
            }
            let (depth, duty) = budget.knobs();
            prop_assert!(depth >= LEAST_COPY && (DUTY.0..=1.0).contains(&duty));
        }
    }
}
