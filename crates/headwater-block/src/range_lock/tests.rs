//! Tests of the range lock against a naive oracle.
//!
//! The oracle is the rule itself: a request holds its range if and only if no earlier live request overlaps it in a conflicting
//! mode. It keeps a plain list, looks at every byte, and knows nothing of wakers.

use super::{Acquire, Guard, Mode, RangeLock, Token};
use futures_util::FutureExt;
use proptest::prelude::*;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

/// The size of the pretended disk in bytes: small, so that requests meet.
const SIZE: u64 = 24;

#[derive(Debug, Clone)]
enum Op {
    Acquire(Range<u64>, Mode),
    /// Polls the n-th live request, whoever it is.
    Poll(usize),
    /// Ends the n-th live request: unlocks a held range, cancels a wait.
    End(usize),
    /// Ends the n-th live request if it holds, and asks again with its token: another range, another mode.
    Again(usize, Range<u64>, Mode),
}

fn ranges() -> impl Strategy<Value = Range<u64>> {
    (0..SIZE, 1..SIZE / 2).prop_map(|(start, len)| start..start + len)
}

fn modes() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::Shared), Just(Mode::Exclusive)]
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (ranges(), modes()).prop_map(|(range, mode)| Op::Acquire(range, mode)),
        3 => any::<usize>().prop_map(Op::Poll),
        3 => any::<usize>().prop_map(Op::End),
        1 => (any::<usize>(), ranges(), modes()).prop_map(|(n, range, mode)| Op::Again(n, range, mode)),
    ]
}

#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

enum Stage {
    Asked(Acquire),
    Holds(Guard),
}

struct Live {
    range: Range<u64>,
    mode: Mode,
    stage: Stage,
    wakes: Arc<Wakes>,
    /// How often the waker had fired when a poll last answered "not yet"; none if it never did.
    pending_since: Option<usize>,
}

impl Live {
    fn poll(&mut self) {
        let Stage::Asked(acquire) = &mut self.stage else { return };
        let waker = Waker::from(self.wakes.clone());
        match Pin::new(acquire).poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(guard) => self.stage = Stage::Holds(guard),
            Poll::Pending => self.pending_since = Some(self.wakes.0.load(Ordering::Relaxed)),
        }
    }

    fn holds(&self) -> bool {
        matches!(self.stage, Stage::Holds(_))
    }
}

fn conflict(a: &Live, b: &Live) -> bool {
    let share_a_byte = a.range.clone().any(|byte| b.range.contains(&byte));
    share_a_byte && !(a.mode == Mode::Shared && b.mode == Mode::Shared)
}

/// What the oracle says: may the request at `at` hold its range?
fn may_hold(live: &[Live], at: usize) -> bool {
    !live[..at].iter().any(|earlier| conflict(earlier, &live[at]))
}

struct World {
    lock: Rc<RangeLock>,
    live: Vec<Live>,
}

impl World {
    fn ask(&mut self, token: Token, range: Range<u64>, mode: Mode) {
        let acquire = self.lock.acquire(token, range.clone(), mode);
        let stage = Stage::Asked(acquire);
        self.live.push(Live { range, mode, stage, wakes: Arc::default(), pending_since: None });
    }

    fn run(&mut self, op: Op) {
        let pick = |n: usize, of: &[Live]| n.checked_rem(of.len());
        match op {
            Op::Acquire(range, mode) => self.ask(Token::for_request(), range, mode),
            Op::Poll(n) => {
                if let Some(at) = pick(n, &self.live) {
                    self.live[at].poll();
                    assert_eq!(self.live[at].holds(), may_hold(&self.live, at));
                }
            }
            Op::End(n) => {
                if let Some(at) = pick(n, &self.live) {
                    drop(self.live.remove(at));
                }
            }
            Op::Again(n, range, mode) => {
                if let Some(at) = pick(n, &self.live)
                    && self.live[at].holds()
                {
                    let Stage::Holds(guard) = self.live.remove(at).stage else { unreachable!() };
                    self.ask(guard.release(), range, mode);
                }
            }
        }
    }

    fn check(&self) {
        assert_eq!(self.lock.len(), self.live.len());
        assert_eq!(self.lock.is_empty(), self.live.is_empty());
        for (at, one) in self.live.iter().enumerate() {
            let may = may_hold(&self.live, at);
            assert!(may || !one.holds(), "request {at} holds although an earlier one conflicts");
            if let (Stage::Asked(_), Some(before)) = (&one.stage, one.pending_since) {
                let woken = one.wakes.0.load(Ordering::Relaxed) > before;
                assert_eq!(woken, may, "request {at} is woken exactly when it may go on");
            }
        }
    }
}

proptest! {
    #[test]
    fn agrees_with_the_oracle(ops in prop::collection::vec(ops(), 1..60)) {
        let mut world = World { lock: RangeLock::new(), live: Vec::new() };
        for op in ops {
            world.run(op);
            world.check();
        }
        // From any state, polling in any order and letting holders go sets everyone free: nobody is forgotten.
        while !world.live.is_empty() {
            for at in (0..world.live.len()).rev() {
                world.live[at].poll();
            }
            world.check();
            let before = world.live.len();
            world.live.retain(|one| !one.holds());
            prop_assert!(world.live.len() < before, "the earliest request always gets its range");
        }
        prop_assert!(world.lock.is_empty());
    }
}

fn held(acquire: Acquire) -> Guard {
    acquire.now_or_never().expect("the range is free")
}

#[test]
fn a_waiting_writer_is_not_overtaken_by_readers() {
    let lock = RangeLock::new();
    let reader = held(lock.acquire(Token::for_request(), 0..10, Mode::Shared));
    let mut writer = lock.acquire(Token::for_request(), 5..6, Mode::Exclusive);
    assert!((&mut writer).now_or_never().is_none());
    let mut late = lock.acquire(Token::for_request(), 0..10, Mode::Shared);
    assert!((&mut late).now_or_never().is_none(), "it came after the writer");
    let beside = held(lock.acquire(Token::for_request(), 6..10, Mode::Shared));
    drop(reader);
    let writer = held(writer);
    assert!((&mut late).now_or_never().is_none());
    drop((writer, beside));
    drop(held(late));
    assert!(lock.is_empty());
}

#[test]
fn a_cancelled_wait_lets_those_behind_pass() {
    let lock = RangeLock::new();
    let reader = held(lock.acquire(Token::for_request(), 0..10, Mode::Shared));
    let writer = lock.acquire(Token::for_request(), 0..10, Mode::Exclusive);
    let mut late = lock.acquire(Token::for_request(), 0..10, Mode::Shared);
    assert!((&mut late).now_or_never().is_none());
    drop(writer);
    drop(held(late));
    drop(reader);
    assert!(lock.is_empty());
}

#[test]
fn a_range_granted_but_never_taken_is_unlocked_with_the_request() {
    let lock = RangeLock::new();
    let first = held(lock.acquire(Token::for_request(), 0..10, Mode::Exclusive));
    let second = lock.acquire(Token::for_request(), 0..10, Mode::Exclusive);
    let third = lock.acquire(Token::for_request(), 0..10, Mode::Exclusive);
    drop(first);
    drop(second);
    drop(held(third));
    assert!(lock.is_empty());
}
