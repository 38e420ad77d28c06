//! Tests of the budget against a simple device, which serves one operation after the other, and a simple source that is far away; in virtual time.

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
        let chance = random(&mut self.random);
        let time = self.overhead + Duration::from_secs_f64(bytes as f64 / self.bandwidth);
        self.free_at = self.free_at.max(now) + time.mul_f64(1.0 + self.jitter * chance);
        self.free_at
    }
}

/// Random numbers from 0 to 1.
fn random(state: &mut u64) -> f64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    (*state >> 40) as f64 / f64::from(1 << 24)
}

/// Where guests' requests and copies meet.
trait Place {
    /// The source is far away.
    const FAR: bool;

    /// When a guest's request that comes at `now` is done, and of which kind it is.
    fn guest(&mut self, now: Duration) -> (Kind, Duration);

    /// When a copy that begins at `now` is done.
    fn copy(&mut self, bytes: u64, now: Duration) -> Duration;
}

impl Place for Device {
    const FAR: bool = false;

    fn guest(&mut self, now: Duration) -> (Kind, Duration) {
        (Kind::Read, self.serve(4096, now))
    }

    fn copy(&mut self, bytes: u64, now: Duration) -> Duration {
        // What is read must be written: twice the bytes.
        self.serve(2 * bytes, now)
    }
}

/// A source at the end of a line, whose answers pass one after the other, and a disk which copies don't burden but others do: what a hit takes is
/// scattered widely.
struct Far {
    latency: Duration,
    bandwidth: f64,
    line_free_at: Duration,
    /// How many of eight reads miss.
    misses: u64,
    reads: u64,
    random: u64,
}

impl Far {
    fn new(millis: u64, mib_per_second: f64, misses: u64) -> Self {
        let latency = Duration::from_millis(millis);
        let bandwidth = mib_per_second * MIB;
        Self { latency, bandwidth, line_free_at: Duration::ZERO, misses, reads: 0, random: 1 }
    }

    fn answer(&mut self, bytes: u64, now: Duration) -> Duration {
        let time = Duration::from_secs_f64(bytes as f64 / self.bandwidth);
        self.line_free_at = self.line_free_at.max(now + self.latency) + time;
        self.line_free_at
    }
}

impl Place for Far {
    const FAR: bool = true;

    fn guest(&mut self, now: Duration) -> (Kind, Duration) {
        self.reads += 1;
        if self.reads % 8 < self.misses {
            return (Kind::Miss, self.answer(64 << 10, now));
        }
        let scattered = -random(&mut self.random).max(0.001).ln();
        (Kind::Read, now + Duration::from_micros(200).mul_f64(0.3 + scattered))
    }

    fn copy(&mut self, bytes: u64, now: Duration) -> Duration {
        self.answer(bytes, now)
    }
}

/// A guest that reads with a pause in between, beside copies that follow a budget.
struct World<P = Device> {
    device: P,
    budget: Budget,
    now: Duration,
    copied: u64,
    in_flight: Vec<(Duration, Duration, u64)>,
    /// When the guest's requests came, and what they took.
    latencies: Vec<(Duration, Duration)>,
    /// Those that missed.
    misses: Vec<(Duration, Duration)>,
    target: u64,
    copies: bool,
}

impl<P: Place> World<P> {
    fn new(device: P, goal: GuestLatencyGoal) -> Self {
        Self {
            device,
            budget: Budget::new(goal, P::FAR),
            now: Duration::ZERO,
            copied: 0,
            in_flight: Vec::new(),
            latencies: Vec::new(),
            misses: Vec::new(),
            target: 16 << 20,
            copies: true,
        }
    }

    /// Lets time pass. The guest waits `think` between two requests; none is no guest.
    fn run(&mut self, time: Duration, think: Option<Duration>) {
        let until = self.now + time;
        let mut asks = think.map(|think| self.now + think);
        let mut asked: Option<(Kind, Duration, Duration)> = None;
        let mut begun = 0_u64;
        let mut quiet = None;
        while self.now < until {
            let mut seen = Seen::default();
            self.in_flight.sort_unstable();
            while let Some(&(_, _, bytes)) = self.in_flight.first().filter(|(end, ..)| *end <= self.now) {
                self.in_flight.remove(0);
                self.copied += bytes;
            }
            if let Some((kind, came, end)) = asked.filter(|(.., end)| *end <= self.now) {
                let side = if quiet == Some(begun) { &mut seen.quiet } else { &mut seen.busy };
                side[kind as usize].add(end - came);
                if kind == Kind::Miss {
                    self.misses.push((came, end - came));
                }
                seen.went = 1;
                self.latencies.push((came, end - came));
                asked = None;
                asks = think.map(|think| self.now + think);
            }
            if asks.is_some_and(|at| at <= self.now) {
                asks = None;
                let (kind, end) = self.device.guest(self.now);
                asked = Some((kind, self.now, end));
                quiet = self.in_flight.is_empty().then_some(begun);
                seen.came = 1;
            }
            self.budget.observe(&seen, self.in_flight.len(), self.now);
            let rest = if self.copies { self.fill(&mut begun) } else { None };
            let ends = self.in_flight.iter().map(|(end, ..)| *end).chain(asked.map(|(.., end)| end));
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
            let end = self.device.copy(copy, self.now);
            self.in_flight.push((end, self.now, copy));
            self.budget.begun(copy, self.now);
            *begun += 1;
        }
    }

    /// A quantile of what requests took that came since `since`.
    fn quantile(&self, part: f64, since: Duration) -> Duration {
        quantile(&self.latencies, part, since)
    }
}

fn quantile(latencies: &[(Duration, Duration)], part: f64, since: Duration) -> Duration {
    let mut times: Vec<_> =
        latencies.iter().filter(|(came, _)| *came >= since).map(|(_, took)| *took).collect();
    times.sort_unstable();
    times[((times.len() - 1) as f64 * part) as usize]
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

/// What passes the line beside a guest that boots, as a part of what it holds, and the misses' median.
fn beside_a_boot(source: Far, time: Duration) -> (f64, Duration) {
    let (bandwidth, latency) = (source.bandwidth, source.latency);
    let mut world = World::new(source, GuestLatencyGoal::Relative);
    world.target = 32 << 20;
    let held = bandwidth * latency.as_secs_f64();
    world.budget.way_holds(held as u64);
    // A firmware reads every ten milliseconds.
    world.run(time, Some(SECOND / 100));
    let guests = world.misses.len() as f64 * 65536.0;
    let used = (world.copied as f64 + guests) / (bandwidth * time.as_secs_f64());
    (used, quantile(&world.misses, 0.5, time / 4))
}

#[test]
fn a_far_sources_line_is_used_beside_a_guest_that_boots() {
    for (millis, bandwidth) in [(10, 50.0), (20, 50.0), (20, 100.0)] {
        for misses in [1, 4, 8] {
            for seconds in [2, 8] {
                let (used, median) = beside_a_boot(Far::new(millis, bandwidth, misses), SECOND * seconds);
                let case = format!("{millis} ms, {bandwidth} MiB/s, {misses} of 8 miss, {seconds} s");
                assert!(used > 0.75, "{case}: {used:.2} of the line");
                assert!(median < Duration::from_millis(millis) * 7 / 4, "{case}: misses take {median:?}");
            }
        }
    }
}

proptest! {
    #[test]
    fn copies_never_rest_for_long_and_keep_to_the_window_whatever_is_seen(
        events in prop::collection::vec((0_u64..2_000_000, 0_usize..3, 0_u64..50_000_000, any::<bool>(), 0_usize..4), 1..200),
        target in 1_u64..(64 << 20),
        copy in (64_u64 << 10)..(2 << 20),
        added in prop::option::of(1_u64..10_000_000),
        far in any::<bool>(),
    ) {
        let goal = added.map_or(GuestLatencyGoal::Relative, |nanos| GuestLatencyGoal::Added(Duration::from_nanos(nanos)));
        let mut budget = Budget::new(goal, far);
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
