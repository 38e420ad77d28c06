//! One limit for several, in virtual time: shares by weights, nothing lost, nobody starved, whatever comes, goes and changes.

use futures_util::future::{Either, select};
use headwater_block::{Clock, Share, SharedLimiter};
use headwater_sim::{Sim, for_seeds};
use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);
const MIB: u64 = 1 << 20;
const RATE: u64 = 10 * MIB;

/// What the limit may be over by: its burst.
const BURST: u64 = RATE / 10;

/// Somebody who asks for leave again and again.
struct Flow {
    share: Rc<Share>,
    /// The largest request.
    most: u64,
    passed: Rc<Cell<u64>>,
    /// Asks for nothing meanwhile.
    rests: Rc<Cell<bool>>,
}

impl Flow {
    /// Asks in `tasks` tasks at once for up to `most` units.
    fn start(sim: &Sim, limiter: &Rc<SharedLimiter>, weight: u32, tasks: usize, most: u64) -> Self {
        let share = Rc::new(limiter.join(weight));
        let flow = Self { share, most, passed: Rc::default(), rests: Rc::default() };
        for _ in 0..tasks {
            let (sim, share) = (sim.clone(), flow.share.clone());
            let (passed, rests) = (flow.passed.clone(), flow.rests.clone());
            sim.clone().spawn("flow", async move {
                loop {
                    while rests.get() {
                        sim.sleep(Duration::from_millis(1)).await;
                    }
                    let units = sim.rng().range(1..most + 1);
                    share.acquire(units).await;
                    passed.set(passed.get() + units);
                }
            });
        }
        flow
    }

    /// What passed, in units of its weight, since it was `before`.
    fn weighted(&self, before: u64) -> f64 {
        (self.passed.get() - before) as f64 / f64::from(self.share.weight())
    }
}

fn run(seed: u64, test: impl AsyncFnOnce(Sim) + 'static) {
    let sim = Sim::new(seed);
    let inner = sim.clone();
    sim.run(async move { test(inner).await });
}

/// Of flows that always wait, none is ahead of another by more than a request of each.
#[track_caller]
fn assert_fair(flows: &[&Flow], before: &[u64]) {
    for (one, one_before) in flows.iter().zip(before) {
        for (other, other_before) in flows.iter().zip(before) {
            let ahead = one.weighted(*one_before) - other.weighted(*other_before);
            let weigh = |flow: &Flow| flow.most as f64 / f64::from(flow.share.weight());
            // Twice: at the beginning and at the end of what is looked at.
            let bound = 2.0 * (weigh(one) + weigh(other));
            assert!(ahead <= bound, "{ahead} units of weight ahead, at most {bound}");
        }
    }
}

fn passed(flows: &[&Flow]) -> Vec<u64> {
    flows.iter().map(|flow| flow.passed.get()).collect()
}

#[test]
fn those_that_wait_share_by_weight_whatever_their_sizes() {
    for_seeds(30, |seed| {
        run(seed, async move |sim| {
            let limiter = SharedLimiter::new(RATE, sim.clock());
            let rng = sim.rng();
            let flows: Vec<Flow> = (0..rng.range(2..6))
                .map(|_| {
                    let weight = *rng.pick(&[1, 10, 50, 100, 100, 300, 1000]);
                    let most = *rng.pick(&[32 << 10, 64 << 10, MIB, 2 * MIB]);
                    Flow::start(&sim, &limiter, weight, rng.range(1..4) as usize, most)
                })
                .collect();
            let flows: Vec<&Flow> = flows.iter().collect();
            // Until what may pass at once has passed.
            sim.sleep(SECOND).await;
            for _ in 0..5 {
                let before = passed(&flows);
                sim.sleep(rng.duration(SECOND, SECOND * 20)).await;
                assert_fair(&flows, &before);
            }
            let all: u64 = passed(&flows).iter().sum();
            let most = flows.iter().map(|flow| flow.most).max().unwrap_or_default();
            let at_rate = (RATE as f64 * sim.clock().now().as_secs_f64()) as u64;
            assert!(all <= at_rate + BURST + most, "{all} passed, {at_rate} at the rate");
            assert!(all >= at_rate - most, "{all} passed, {at_rate} at the rate");
        });
    });
}

#[test]
fn what_one_does_not_use_the_others_have() {
    for_seeds(20, |seed| {
        run(seed, async move |sim| {
            let limiter = SharedLimiter::new(RATE, sim.clock());
            let heavy = Flow::start(&sim, &limiter, 1000, 1, MIB);
            let one = Flow::start(&sim, &limiter, 100, 2, MIB);
            let other = Flow::start(&sim, &limiter, 300, 1, 64 << 10);
            sim.sleep(SECOND).await;
            heavy.rests.set(true);
            sim.sleep(SECOND).await;
            let before = passed(&[&one, &other]);
            sim.sleep(SECOND * 20).await;
            assert_fair(&[&one, &other], &before);
            let all: u64 = passed(&[&one, &other]).iter().zip(before).map(|(now, then)| now - then).sum();
            assert!(all >= 20 * RATE - 2 * MIB, "{all} of {}", 20 * RATE);
            // Nobody has saved anything up.
            heavy.rests.set(false);
            sim.sleep(Duration::from_millis(10)).await;
            let before = passed(&[&heavy, &one, &other]);
            sim.sleep(SECOND * 20).await;
            assert_fair(&[&heavy, &one, &other], &before);
        });
    });
}

#[test]
fn one_that_is_slow_by_itself_gets_what_it_asks_for_and_the_rest_is_used() {
    for_seeds(50, |seed| {
        run(seed, async move |sim| {
            let limiter = SharedLimiter::new(RATE, sim.clock());
            let slow = Rc::new(limiter.join(100));
            let busy = Flow::start(&sim, &limiter, 100, 2, MIB / 4);
            let (inner, share) = (sim.clone(), slow.clone());
            // A quarter of the limit, in equal parts: half would be its own.
            let waited = sim.spawn("slow", async move {
                let mut longest = Duration::ZERO;
                for _ in 0..200 {
                    inner.sleep(Duration::from_millis(100)).await;
                    let since = inner.clock().now();
                    share.acquire(RATE / 40).await;
                    longest = longest.max(inner.clock().now() - since);
                }
                longest
            });
            let longest = waited.await;
            // No longer than for one request of the other and the limit to be paid for what is under way.
            assert!(longest <= Duration::from_millis(60), "{longest:?}");
            let all = busy.passed.get() + 200 * (RATE / 40);
            let at_rate = (RATE as f64 * sim.clock().now().as_secs_f64()) as u64;
            assert!(all + MIB >= at_rate, "{all} of {at_rate}");
        });
    });
}

#[test]
fn nobody_starves_among_those_that_come_and_go() {
    for_seeds(100, |seed| {
        run(seed, async move |sim| {
            let limiter = SharedLimiter::new(RATE, sim.clock());
            let light = Flow::start(&sim, &limiter, 10, 1, 64 << 10);
            let rng = sim.rng().clone();
            let began = Flow::start(&sim, &limiter, 100, 1, MIB);
            let before = (light.passed.get(), began.passed.get());
            // Newcomers all the time, ten at once, each with a fresh tag.
            for _ in 0..10 {
                let (sim, limiter, rng) = (sim.clone(), limiter.clone(), rng.clone());
                sim.clone().spawn("newcomers", async move {
                    loop {
                        let share = limiter.join(100);
                        for _ in 0..rng.range(1..3) {
                            share.acquire(rng.range(1..MIB / 2)).await;
                        }
                    }
                });
            }
            sim.sleep(SECOND * 60).await;
            // A share of 10 in 1110, and one of 100; less what one request of everybody makes.
            let [light, began] = [light.passed.get() - before.0, began.passed.get() - before.1];
            let seen = (light as f64 / 10.0, began as f64 / 100.0);
            let fair = 60.0 * RATE as f64 / 1110.0;
            assert!(seen.0 > fair * 0.7 && seen.1 > fair * 0.7, "{seen:?}, fair is {fair}");
        });
    });
}

#[test]
fn one_that_leaves_while_it_waits_counts_nowhere() {
    for_seeds(100, |seed| {
        run(seed, async move |sim| {
            let limiter = SharedLimiter::new(RATE, sim.clock());
            let flow = Flow::start(&sim, &limiter, 100, 2, 64 << 10);
            let fickle = Rc::new(limiter.join(10_000));
            let (inner, share) = (sim.clone(), fickle.clone());
            let given = sim.spawn("fickle", async move {
                let mut given = 0;
                for _ in 0..2000 {
                    let patience = inner.rng().duration(Duration::ZERO, Duration::from_millis(5));
                    let (leave, enough) = (pin!(share.acquire(RATE)), pin!(inner.sleep(patience)));
                    if matches!(select(leave, enough).await, Either::Left(_)) {
                        given += RATE;
                    }
                }
                given
            });
            let given = given.await;
            let all = given + flow.passed.get();
            let at_rate = (RATE as f64 * sim.clock().now().as_secs_f64()) as u64;
            assert!(all + BURST >= at_rate, "{all} passed, {at_rate} at the rate");
            assert!(all <= at_rate + BURST + RATE, "{all} passed, {at_rate} at the rate");
        });
    });
}

#[test]
fn changes_of_the_limit_and_of_weights_count_at_once_for_those_that_wait() {
    for_seeds(20, |seed| {
        run(seed, async move |sim| {
            let limiter = SharedLimiter::new(1, sim.clock());
            let flows = [
                Flow::start(&sim, &limiter, 100, 2, MIB),
                Flow::start(&sim, &limiter, 1, 1, MIB),
                Flow::start(&sim, &limiter, 10_000, 1, 64 << 10),
            ];
            let flows: Vec<&Flow> = flows.iter().collect();
            // All wait, the next of them for hours.
            sim.sleep(SECOND).await;
            let rng = sim.rng();
            for _ in 0..10 {
                let rate = rng.range(1..20) * MIB;
                limiter.set_rate(rate);
                for flow in &flows {
                    flow.share.set_weight(*rng.pick(&[1, 100, 1000, 10_000]));
                }
                let start = passed(&flows);
                sim.sleep(Duration::from_millis(200)).await;
                let before = passed(&flows);
                sim.sleep(SECOND * 30).await;
                assert_fair(&flows, &before);
                let all: u64 = passed(&flows).iter().zip(&start).map(|(now, then)| now - then).sum();
                let at_rate = rate * 302 / 10;
                assert!(all <= at_rate + rate / 10 + MIB, "{all}, at the rate {at_rate}");
                assert!(all + MIB >= at_rate, "{all}, at the rate {at_rate}");
            }
            // Without limit nobody waits.
            let waiting = flows[0].share.clone();
            flows.iter().for_each(|flow| flow.rests.set(true));
            limiter.set_rate(1);
            let leave = sim.spawn("waits", async move { waiting.acquire(1 << 40).await });
            sim.sleep(SECOND).await;
            limiter.set_rate(0);
            let since = sim.clock().now();
            leave.await;
            assert!(sim.clock().now() - since < Duration::from_millis(1));
        });
    });
}

#[test]
fn what_is_too_urgent_to_wait_is_paid_for_afterwards() {
    for_seeds(20, |seed| {
        run(seed, async move |sim| {
            let limiter = SharedLimiter::new(RATE, sim.clock());
            let urgent = limiter.join(100);
            let flow = Flow::start(&sim, &limiter, 100, 1, 64 << 10);
            sim.sleep(SECOND).await;
            let before = flow.passed.get();
            urgent.count(5 * RATE);
            sim.sleep(SECOND * 4).await;
            assert!(flow.passed.get() - before <= 64 << 10);
            sim.sleep(SECOND * 6).await;
            let all = 5 * RATE + flow.passed.get() - before;
            assert!(all.abs_diff(10 * RATE) <= BURST, "{all}");
        });
    });
}

#[test]
fn weights_have_bounds_and_rates_say_what_is_ones_own() {
    run(1, async |sim| {
        let limiter = SharedLimiter::new(0, sim.clock());
        let share = limiter.join(0);
        assert_eq!((share.weight(), share.rate(), share.limit()), (1, 0, 0));
        share.set_weight(u32::MAX);
        assert_eq!(share.weight(), 10_000);
        share.acquire(u64::MAX).await;
        assert_eq!(sim.clock().now(), Duration::ZERO);
        limiter.set_rate(1000);
        assert_eq!(share.rate(), 1000, "it is alone");
        let flow = Flow::start(&sim, &limiter, 10_000, 2, MIB);
        sim.sleep(SECOND).await;
        assert_eq!((share.rate(), flow.share.rate()), (500, 1000));
    });
}
