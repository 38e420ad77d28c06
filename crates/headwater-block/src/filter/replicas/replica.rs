//! One replica: how it is reached, how fast it is, whether it is trusted.

use super::pace::{Pace, Started};
use crate::edge::Edge;
use crate::error::{Error, ErrorKind, Result};
use crate::filter::child::Child;
use crate::node::LocalFuture;
use futures_util::FutureExt;
use futures_util::future::Shared;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// Reaches a replica, again each time that it is called.
pub type Reach = Box<dyn Fn() -> LocalFuture<'static, Result<Rc<Edge>>>>;

/// A source that may be used, before anybody has looked whether it can be.
pub struct Candidate {
    /// What messages call it.
    pub name: String,
    /// Opens it. What is said here of a source that isn't what it should be ([`ErrorKind::WrongContent`]) excludes it for good.
    pub reach: Reach,
}

/// The first and the longest pause before a replica that was left is looked at again.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Whether a replica is used.
#[derive(Debug, Clone)]
pub(super) enum Health {
    /// It is.
    Good,
    /// Not until a look at it goes well.
    Left { error: Error, pause: Duration, look_at: Duration },
    /// Never again: its bytes are wrong.
    Distrusted { error: Error },
}

/// Counters of a replica.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: Cell<u64>,
    pub(super) bytes: Cell<u64>,
    pub(super) failures: Cell<u64>,
    pub(super) left: Cell<u64>,
}

pub(super) fn add(counter: &Cell<u64>, n: u64) {
    counter.set(counter.get() + n);
}

type Opening = Shared<LocalFuture<'static, Result<Rc<Edge>>>>;

/// See the module.
pub(super) struct Replica {
    pub(super) name: String,
    reach: Reach,
    child: RefCell<Option<Rc<Child>>>,
    opening: RefCell<Option<Opening>>,
    health: RefCell<Health>,
    pace: RefCell<Pace>,
    pub(super) counters: Counters,
    /// When it was last asked for something.
    pub(super) used_at: Cell<Duration>,
    /// Where the read began that made us leave it.
    pub(super) failed_at: Cell<u64>,
}

impl Replica {
    /// One that nobody has reached yet.
    pub(super) fn new(candidate: Candidate) -> Self {
        let error = Error::new(ErrorKind::Unavailable, format!("{} isn't open yet", candidate.name));
        Self {
            name: candidate.name,
            reach: candidate.reach,
            child: RefCell::default(),
            opening: RefCell::default(),
            health: RefCell::new(Health::Left { error, pause: PAUSE, look_at: Duration::ZERO }),
            pace: RefCell::default(),
            counters: Counters::default(),
            used_at: Cell::default(),
            failed_at: Cell::default(),
        }
    }

    /// The child, if it is open.
    pub(super) fn opened(&self) -> Option<Rc<Child>> {
        self.child.borrow().clone()
    }

    /// The child, which is opened if it isn't. Those who want it at once wait for one opening; if all of them leave, whoever comes next goes on with it.
    pub(super) async fn open(&self) -> Result<Rc<Child>> {
        if let Some(child) = self.opened() {
            return Ok(child);
        }
        let opening = self.opening.borrow_mut().get_or_insert_with(|| (self.reach)().shared()).clone();
        let opened = opening.clone().await;
        if self.opening.borrow().as_ref().is_some_and(|other| other.ptr_eq(&opening)) {
            self.opening.take();
        }
        let edge = opened?;
        Ok(self.child.borrow_mut().get_or_insert_with(|| Rc::new(Child::new(edge))).clone())
    }

    pub(super) fn health(&self) -> Health {
        self.health.borrow().clone()
    }

    pub(super) fn is_good(&self) -> bool {
        matches!(*self.health.borrow(), Health::Good)
    }

    /// It is used from now on. True if it wasn't.
    pub(super) fn trust(&self) -> bool {
        !matches!(self.health.replace(Health::Good), Health::Good)
    }

    /// It isn't used until a look at it goes well. True if it was used.
    pub(super) fn leave(&self, error: Error, now: Duration) -> bool {
        let mut health = self.health.borrow_mut();
        let (was_good, pause) = match &*health {
            Health::Good => (true, PAUSE),
            // Those who were under way already say nothing new.
            Health::Left { look_at, pause, .. } if *look_at > now => (false, *pause),
            Health::Left { pause, .. } => (false, (*pause * 2).min(LONGEST_PAUSE)),
            Health::Distrusted { .. } => return false,
        };
        if was_good {
            add(&self.counters.left, 1);
        }
        *health = Health::Left { error, pause, look_at: now + pause };
        was_good
    }

    /// It is never used again. True if that is new.
    pub(super) fn distrust(&self, error: Error) -> bool {
        !matches!(self.health.replace(Health::Distrusted { error }), Health::Distrusted { .. })
    }

    pub(super) fn expected(&self, len: u64) -> f64 {
        self.pace.borrow().expected(len)
    }

    /// A read of `len` bytes starts, and is in flight until the guard goes.
    pub(super) fn start(&self, len: u64, now: Duration) -> InFlight<'_> {
        self.used_at.set(now);
        add(&self.counters.reads, 1);
        let started = self.pace.borrow_mut().start(len, now);
        InFlight { replica: self, started }
    }

    pub(super) fn succeeded(&self, read: &Started, len: u64, now: Duration) {
        add(&self.counters.bytes, len);
        self.pace.borrow_mut().succeeded(read, now);
    }

    pub(super) fn overtaken(&self, read: &Started, now: Duration) {
        self.pace.borrow_mut().overtaken(read, now);
    }

    pub(super) fn slow_after(&self, read: &Started) -> Option<Duration> {
        self.pace.borrow().slow_after(read)
    }

    /// Latency in seconds, and bytes a second.
    pub(super) fn pace(&self) -> (f64, f64) {
        let pace = self.pace.borrow();
        (pace.latency(), pace.rate())
    }
}

/// A read in flight.
pub(super) struct InFlight<'a> {
    replica: &'a Replica,
    pub(super) started: Started,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.replica.pace.borrow_mut().ended(&self.started);
    }
}
