//! The deterministic executor: one thread, virtual time, every choice from the seed.

use crate::rng::Rng;
use headwater_block::{Clock, LocalFuture};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

/// How many steps a run may take before it counts as one that never ends.
const STEP_LIMIT: u64 = 20_000_000;

/// A handle to the executor, its clock and its chance. Clones are the same run.
#[derive(Clone)]
pub struct Sim(Rc<Shared>);

struct Shared {
    rng: Rng,
    clock: SimClock,
    tasks: RefCell<BTreeMap<u64, Entry>>,
    next_id: Cell<u64>,
    ready: Arc<Ready>,
    steps: Cell<u64>,
    step_limit: Cell<u64>,
}

struct Entry {
    name: String,
    /// Taken out while it is polled.
    future: Option<Pin<Box<dyn Future<Output = ()>>>>,
    waker: Waker,
}

/// Which tasks can go on. Wakers must be `Send`, hence the mutex; nobody ever waits for it.
#[derive(Default)]
struct Ready(Mutex<Vec<u64>>);

impl Ready {
    fn push(&self, id: u64) {
        let mut ready = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !ready.contains(&id) {
            ready.push(id);
        }
    }

    fn take(&self, rng: &Rng) -> Option<u64> {
        let mut ready = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if ready.is_empty() {
            return None;
        }
        let at = rng.index(ready.len());
        Some(ready.swap_remove(at))
    }
}

struct TaskWaker {
    id: u64,
    ready: Arc<Ready>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.ready.push(self.id);
    }
}

impl Sim {
    /// A run that `seed` decides.
    pub fn new(seed: u64) -> Self {
        Self(Rc::new(Shared {
            rng: Rng::new(seed),
            clock: SimClock::default(),
            tasks: RefCell::default(),
            next_id: Cell::new(0),
            ready: Arc::default(),
            steps: Cell::new(0),
            step_limit: Cell::new(STEP_LIMIT),
        }))
    }

    /// The run's chance.
    pub fn rng(&self) -> &Rng {
        &self.0.rng
    }

    /// The run's clock.
    pub fn clock(&self) -> Rc<SimClock> {
        Rc::new(self.0.clock.clone())
    }

    /// How many steps were made so far.
    pub fn steps(&self) -> u64 {
        self.0.steps.get()
    }

    /// Allows so many steps instead of twenty million.
    pub fn set_step_limit(&self, steps: u64) {
        self.0.step_limit.set(steps);
    }

    /// Starts a task. It runs on when the returned handle is dropped.
    pub fn spawn<T: 'static>(
        &self,
        name: impl Into<String>,
        future: impl Future<Output = T> + 'static,
    ) -> Task<T> {
        let slot = Rc::new(Slot { result: RefCell::new(None), waiter: RefCell::new(None) });
        let filled = slot.clone();
        let id = self.start(name.into(), async move {
            let result = future.await;
            filled.result.replace(Some(result));
            if let Some(waiter) = filled.waiter.take() {
                waiter.wake();
            }
        });
        Task { sim: self.clone(), id, slot }
    }

    fn start(&self, name: String, future: impl Future<Output = ()> + 'static) -> u64 {
        let id = self.0.next_id.get();
        self.0.next_id.set(id + 1);
        let waker = Waker::from(Arc::new(TaskWaker { id, ready: self.0.ready.clone() }));
        let entry = Entry { name, future: Some(Box::pin(future)), waker };
        self.0.tasks.borrow_mut().insert(id, entry);
        self.0.ready.push(id);
        id
    }

    /// Lets others go first: completes after any number of their steps.
    pub async fn yield_now(&self) {
        let mut first = true;
        poll_fn(|cx| {
            if !std::mem::take(&mut first) {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    /// Waits for a time of the virtual clock.
    pub async fn sleep(&self, time: Duration) {
        self.0.clock.sleep_until(self.0.clock.now() + time).await;
    }

    /// Runs `main` and whatever it spawns until `main` is over; tasks that are left are dropped.
    ///
    /// # Panics
    /// If nothing can go on before that (a deadlock), with the names of the tasks that wait; and when the step limit is reached.
    pub fn run<T: 'static>(&self, main: impl Future<Output = T> + 'static) -> T {
        let main = self.spawn("main", main);
        let result = loop {
            if let Some(result) = main.slot.result.take() {
                break result;
            }
            match self.0.ready.take(&self.0.rng) {
                Some(id) => self.step(id),
                None if self.0.clock.advance() => {}
                None => panic!("nothing can go on; waiting: {}", self.waiting()),
            }
        };
        while let Some((_, left)) = { self.0.tasks.borrow_mut().pop_first() } {
            drop(left);
        }
        result
    }

    fn step(&self, id: u64) {
        let steps = self.0.steps.get() + 1;
        self.0.steps.set(steps);
        assert!(steps <= self.0.step_limit.get(), "{steps} steps and no end; waiting: {}", self.waiting());
        let taken = {
            let mut tasks = self.0.tasks.borrow_mut();
            tasks.get_mut(&id).and_then(|entry| Some((entry.future.take()?, entry.waker.clone())))
        };
        let Some((mut future, waker)) = taken else { return };
        let done = future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        let entry = {
            let mut tasks = self.0.tasks.borrow_mut();
            match tasks.get_mut(&id) {
                Some(entry) if !done => {
                    entry.future = Some(future);
                    return;
                }
                _ => tasks.remove(&id),
            }
        };
        drop((entry, future));
    }

    fn waiting(&self) -> String {
        let tasks = self.0.tasks.borrow();
        tasks.iter().map(|(id, task)| format!("{id} {}", task.name)).collect::<Vec<_>>().join(", ")
    }
}

struct Slot<T> {
    result: RefCell<Option<T>>,
    waiter: RefCell<Option<Waker>>,
}

/// A handle to a task: a future of its result.
pub struct Task<T> {
    sim: Sim,
    id: u64,
    slot: Rc<Slot<T>>,
}

impl<T> Task<T> {
    /// Drops the task wherever it waits.
    pub fn abort(self) {
        let entry = self.sim.0.tasks.borrow_mut().remove(&self.id);
        drop(entry);
    }

    /// True once the task is over.
    pub fn is_over(&self) -> bool {
        !self.sim.0.tasks.borrow().contains_key(&self.id)
    }
}

impl<T> Future for Task<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        if let Some(result) = self.slot.result.take() {
            return Poll::Ready(result);
        }
        self.slot.waiter.replace(Some(cx.waker().clone()));
        Poll::Pending
    }
}

/// The virtual clock of a run: it stands still while something can go on, and then jumps to the next deadline.
#[derive(Clone, Default)]
pub struct SimClock(Rc<Time>);

#[derive(Default)]
struct Time {
    now: Cell<Duration>,
    next_id: Cell<u64>,
    /// Those who wait, by deadline. A sleep that is dropped leaves, so that it doesn't hold up the end of a run.
    sleepers: RefCell<BTreeMap<(Duration, u64), Waker>>,
}

impl SimClock {
    /// Jumps to the next deadline. False if nobody sleeps.
    fn advance(&self) -> bool {
        let Some(next) = self.0.sleepers.borrow().keys().next().map(|(at, _)| *at) else { return false };
        self.0.now.set(self.0.now.get().max(next));
        loop {
            let waker = {
                let mut sleepers = self.0.sleepers.borrow_mut();
                let due = sleepers.first_key_value().is_some_and(|((at, _), _)| *at <= self.0.now.get());
                if due { sleepers.pop_first() } else { None }
            };
            let Some((_, waker)) = waker else { return true };
            waker.wake();
        }
    }
}

impl Clock for SimClock {
    fn now(&self) -> Duration {
        self.0.now.get()
    }

    fn sleep_until(&self, deadline: Duration) -> LocalFuture<'static, ()> {
        let id = self.0.next_id.get();
        self.0.next_id.set(id + 1);
        Box::pin(Sleep { time: self.0.clone(), key: (deadline, id) })
    }
}

struct Sleep {
    time: Rc<Time>,
    key: (Duration, u64),
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.time.now.get() >= self.key.0 {
            return Poll::Ready(());
        }
        self.time.sleepers.borrow_mut().insert(self.key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.time.sleepers.borrow_mut().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(seed: u64) -> Vec<u32> {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let order = Rc::new(RefCell::new(Vec::new()));
            let tasks: Vec<_> = (0..6)
                .map(|n| {
                    let (order, sim) = (order.clone(), inner.clone());
                    inner.spawn(format!("task {n}"), async move {
                        sim.yield_now().await;
                        order.borrow_mut().push(n);
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
            order.take()
        })
    }

    #[test]
    fn the_seed_alone_decides_the_order() {
        assert_eq!(order(7), order(7));
        assert!((0..20).any(|seed| order(seed) != order(7)));
    }

    #[test]
    fn time_passes_only_when_nothing_else_can_happen() {
        let sim = Sim::new(1);
        let inner = sim.clone();
        sim.run(async move {
            let sleeper = inner.clone();
            let hour = Duration::from_secs(3600);
            let long = inner.spawn("sleeper", async move { sleeper.sleep(hour).await });
            for _ in 0..100 {
                inner.yield_now().await;
            }
            assert_eq!(inner.clock().now(), Duration::ZERO);
            assert!(!long.is_over());
            long.await;
            assert_eq!(inner.clock().now(), hour);
        });
    }

    #[test]
    #[should_panic(expected = "waiting: 0 main, 1 the one that hangs")]
    fn a_deadlock_names_those_who_wait() {
        let sim = Sim::new(1);
        let inner = sim.clone();
        sim.run(async move { inner.spawn("the one that hangs", std::future::pending::<()>()).await });
    }

    #[test]
    fn an_aborted_task_is_dropped_with_its_sleep() {
        let sim = Sim::new(1);
        let inner = sim.clone();
        sim.run(async move {
            let sleeper = inner.clone();
            let task = inner.spawn("sleeper", async move { sleeper.sleep(Duration::from_secs(9)).await });
            inner.sleep(Duration::from_secs(1)).await;
            task.abort();
            inner.yield_now().await;
            assert_eq!(inner.clock().now(), Duration::from_secs(1));
        });
    }
}
