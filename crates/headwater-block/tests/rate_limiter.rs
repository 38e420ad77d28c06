//! The rate limiter among tasks, in virtual time: the rate, the order, and what those that leave and changes do to both.

use futures_util::future::{Either, select};
use headwater_block::{Clock, RateLimiter};
use headwater_sim::{Sim, for_seeds};
use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);
const MILLI: Duration = Duration::from_millis(1);

fn run(seed: u64, test: impl AsyncFnOnce(Sim) + 'static) {
    let sim = Sim::new(seed);
    let inner = sim.clone();
    sim.run(async move { test(inner).await });
}

#[test]
fn in_no_stretch_of_time_more_passes_than_the_rate_a_burst_and_one_request() {
    for_seeds(100, |seed| {
        run(seed, async move |sim| {
            const RATE: u64 = 100_000;
            const MOST: u64 = 30_000;
            let (limiter, clock) = (RateLimiter::new(RATE), sim.clock());
            let passed: Rc<RefCell<Vec<(Duration, u64)>>> = Rc::default();
            for _ in 0..sim.rng().range(1..6) {
                let (sim, limiter, clock, passed) =
                    (sim.clone(), limiter.clone(), clock.clone(), passed.clone());
                sim.clone().spawn("flow", async move {
                    loop {
                        if sim.rng().one_in(8) {
                            sim.sleep(sim.rng().duration(Duration::ZERO, SECOND)).await;
                        }
                        let units = sim.rng().range(1..MOST);
                        limiter.acquire(units, &*clock).await;
                        passed.borrow_mut().push((clock.now(), units));
                    }
                });
            }
            sim.sleep(SECOND * 20).await;
            let passed = passed.borrow();
            for from in 0..passed.len() {
                let mut units = 0;
                for (at, more) in &passed[from..] {
                    units += more;
                    let time = (*at - passed[from].0).as_secs_f64();
                    let most = time * RATE as f64 + (RATE / 10 + MOST) as f64;
                    assert!(units as f64 <= most, "{units} in {time} s");
                }
            }
        });
    });
}

#[test]
fn those_who_wait_are_served_in_the_order_in_which_they_came() {
    for_seeds(100, |seed| {
        run(seed, async move |sim| {
            let (limiter, clock) = (RateLimiter::new(1000), sim.clock());
            limiter.acquire(5000, &*clock).await;
            let served: Rc<RefCell<Vec<u64>>> = Rc::default();
            let mut tasks = Vec::new();
            for n in 0..20 {
                let (limiter, clock, served) = (limiter.clone(), clock.clone(), served.clone());
                let units = sim.rng().range(10..500);
                tasks.push(sim.spawn("waits", async move {
                    limiter.acquire(units, &*clock).await;
                    served.borrow_mut().push(n);
                }));
                sim.sleep(MILLI).await;
            }
            for task in tasks {
                task.await;
            }
            assert_eq!(*served.borrow(), (0..20).collect::<Vec<_>>());
        });
    });
}

#[test]
fn who_leaves_makes_nobody_go_faster_than_the_rate() {
    for_seeds(100, |seed| {
        run(seed, async move |sim| {
            let (limiter, clock) = (RateLimiter::new(1000), sim.clock());
            let passed = Rc::new(Cell::new(0));
            for _ in 0..4 {
                let (sim, limiter, clock, passed) =
                    (sim.clone(), limiter.clone(), clock.clone(), passed.clone());
                sim.clone().spawn("fickle", async move {
                    loop {
                        let patience = sim.rng().duration(Duration::ZERO, SECOND * 2);
                        let (leave, enough) =
                            (pin!(limiter.acquire(300, &*clock)), pin!(sim.sleep(patience)));
                        if matches!(select(leave, enough).await, Either::Left(_)) {
                            passed.set(passed.get() + 300);
                        }
                    }
                });
            }
            sim.sleep(SECOND * 60).await;
            assert!(passed.get() <= 60_000 + 100 + 300, "{}", passed.get());
        });
    });
}

#[test]
fn a_new_rate_counts_for_those_who_wait_within_a_tenth_of_a_second() {
    for_seeds(100, |seed| {
        run(seed, async move |sim| {
            let (limiter, clock) = (RateLimiter::new(1), sim.clock());
            // Paid for in hours.
            limiter.acquire(100_000, &*clock).await;
            let (waiting, inner) = (limiter.clone(), clock.clone());
            let waits = sim.spawn("waits", async move { waiting.acquire(1000, &*inner).await });
            sim.sleep(sim.rng().duration(Duration::ZERO, SECOND)).await;
            limiter.set_rate(*sim.rng().pick(&[0, 10_000, 1_000_000]));
            let since = clock.now();
            waits.await;
            assert!(clock.now() - since <= MILLI * 101, "{:?}", clock.now() - since);
        });
    });
}
