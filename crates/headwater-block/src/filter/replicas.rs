//! Several sources of one image as one: a read goes to the replica that will be done with it first.
//!
//! - [`ReplicasNode`], here: opening, choosing, looking after those that were left. `race`: one read, on one replica after the other or on two at once.
//! - `replica`: one of them and whether it is used. `pace`: how long a read of it will take. `attempts`: requests that run at once.
//!   `report`: what is told of them.
//!
//! # Which replica is read
//! Of those that are good, the one that is expected to be done first, with all that it has been asked for before. So the fastest is used, and
//! the next one when that has its hands full.
//!
//! # When one doesn't do
//! - **It fails**: the read goes on to the next, and the replica is *left*. It is looked at after a pause that doubles each time, by a read
//!   where it failed, and used again when that goes well ([`ReplicasNode::attend`]). If no good one is there, those that were left are asked all the same, because an
//!   error is the worse answer.
//! - **It takes longer than nearly all its reads did**: a small read, as guests' misses are, is *hedged*: the next replica is asked too, and the first
//!   answer counts. Hedges are at most one in [`READS_FOR_A_HEDGE`] reads, so that a slow world isn't asked for everything twice.
//! - **It takes many times as long** ([`PATIENCE`]): it has stalled. It is left like one that fails, and what waits for it goes elsewhere.
//! - **Its bytes are wrong** ([`ErrorKind::WrongContent`], [`ErrorKind::SourceChanged`]): it is never asked again.
//!
//! Only if all have failed does a read: its error names each and why, and is of the kind that gives most hope.
//!
//! All replicas are read-only and of one size. Whether they hold the same bytes isn't known here: a `VerifyNode` below each tells.

mod attempts;
mod pace;
mod race;
mod replica;
mod report;

use self::attempts::Attempts;
use self::race::{Answer, Request};
use self::replica::{Health, Replica, add};
use super::child::Child;
use crate::buffer::BufferMut;
use crate::clock::Clock;
use crate::drain::Hurry;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind, Resolved};
use crate::identity::Identity;
use crate::node::{Limits, LocalFuture, Node};
use futures_util::future::{Either, join_all, select};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::ready;
use std::ops::Range;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::time::Duration;

pub use self::replica::{Candidate, Reach};
pub use self::report::{ReplicaEvent, ReplicaReport, ReplicasCounters};

/// For how many reads there may be one hedge, and how many may be saved up.
pub const READS_FOR_A_HEDGE: u32 = 20;
const SAVED_HEDGES: u32 = 4;

/// A read is given up on a replica when it takes so many times as long as expected, but not before [`LEAST_PATIENCE`].
pub const PATIENCE: u32 = 8;

/// See [`PATIENCE`].
pub const LEAST_PATIENCE: Duration = Duration::from_secs(2);

/// How many replicas an image may have.
pub const MOST_REPLICAS: usize = 16;

/// When one replica is open, how long the others may still take before the image is used.
const GRACE: Duration = Duration::from_secs(1);

/// A good replica that wasn't used for so long is measured again while others are used.
const MEASURE: Duration = Duration::from_secs(10);

/// How much a look at a replica reads, and how long it may take.
const LOOK: u64 = 64 << 10;
const LONGEST_LOOK: Duration = Duration::from_secs(10);

/// How many events are kept for somebody to take.
const MOST_EVENTS: usize = 256;

/// How to deal with replicas.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReplicasOptions {
    /// For how long a read that failed on all of them is tried again.
    pub retry: Duration,
}

/// Several sources of one image; see the module.
pub struct ReplicasNode {
    name: String,
    size: u64,
    replicas: Vec<Replica>,
    clock: Rc<dyn Clock>,
    options: ReplicasOptions,
    counters: ReplicasCounters,
    /// Hedges that may be made, in parts of [`READS_FOR_A_HEDGE`].
    hedges_left: Cell<u32>,
    last_read: Cell<Duration>,
    events: RefCell<VecDeque<ReplicaEvent>>,
}

impl ReplicasNode {
    /// Opens `candidates`, all at once. Those that can't be reached are no obstacle, as long as one can: [`ReplicasNode::attend`] looks at them later.
    ///
    /// # Errors
    /// `InvalidInput` if two differ in size, or there are none or too many; if none can be opened, an error that says why for each.
    pub async fn open(
        candidates: Vec<Candidate>,
        clock: Rc<dyn Clock>,
        options: ReplicasOptions,
    ) -> Result<Rc<Self>> {
        if candidates.is_empty() || candidates.len() > MOST_REPLICAS {
            let message = format!("an image has 1 to {MOST_REPLICAS} replicas, not {}", candidates.len());
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let name = candidates[0].name.clone();
        let replicas: Vec<_> = candidates.into_iter().map(Replica::new).collect();
        let size = open_all(&replicas, &*clock).await?;
        Ok(Rc::new(Self {
            name,
            size,
            replicas,
            clock,
            options,
            counters: ReplicasCounters::default(),
            hedges_left: Cell::new(SAVED_HEDGES * READS_FOR_A_HEDGE),
            last_read: Cell::default(),
            events: RefCell::default(),
        }))
    }

    /// Looks after replicas that were left, for as long as the node is there. Whoever made the node runs this beside its requests.
    pub async fn attend(node: Weak<Self>) {
        loop {
            let Some(this) = node.upgrade() else { return };
            this.look_after().await;
            let clock = this.clock.clone();
            drop(this);
            clock.sleep_until(clock.now() + Duration::from_secs(1)).await;
        }
    }

    /// Looks at those whose time has come.
    async fn look_after(&self) {
        let now = self.clock.now();
        let in_use = now.saturating_sub(self.last_read.get()) < MEASURE;
        let due = self.replicas.iter().filter(|replica| match replica.health() {
            Health::Left { look_at, .. } => look_at <= now,
            Health::Good => in_use && now.saturating_sub(replica.used_at.get()) >= MEASURE,
            Health::Distrusted { .. } => false,
        });
        join_all(due.map(|replica| self.look_at(replica))).await;
    }

    async fn look_at(&self, replica: &Replica) {
        let clock = &*self.clock;
        let look = async {
            self.opened(replica, replica.open().await)?;
            let at = replica.failed_at.get().min(self.size);
            let len = LOOK.min(self.size - at);
            let in_flight = replica.start(len, clock.now());
            let child = replica.open().await?;
            // At most `LOOK`.
            child.read(at, BufferMut::new(len as usize)).await?;
            let now = clock.now();
            replica.succeeded(&in_flight.started, len, now);
            Ok(())
        };
        let late = clock.sleep_until(clock.now() + LONGEST_LOOK);
        let seen = match select(pin!(look), late).await {
            Either::Left((seen, _)) => seen,
            Either::Right(((), _)) => {
                let message = format!("{}: nothing came for {} s", replica.name, LONGEST_LOOK.as_secs());
                Err(Error::new(ErrorKind::TimedOut, message))
            }
        };
        match seen {
            Ok(()) => self.trust(replica),
            Err(error) => self.judge(replica, error),
        }
    }

    /// Refuses a replica that isn't of the size of the others.
    fn opened(&self, replica: &Replica, child: Result<Rc<Child>>) -> Result<Rc<Child>> {
        let child = child?;
        let size = child.disk().size();
        if size != self.size {
            let message = format!(
                "{} has {size} bytes and {} has {}: they don't hold the same image",
                replica.name, self.name, self.size
            );
            return Err(Error::new(ErrorKind::WrongContent, message));
        }
        Ok(child)
    }

    /// The replica to ask for `len` bytes, which isn't among `tried`: a good one, or else, if `any`, one that was left.
    fn choose(&self, len: u64, tried: u32, any: bool) -> Option<usize> {
        let untried = || self.replicas.iter().enumerate().filter(|(at, _)| tried & (1 << at) == 0);
        let good = untried().filter(|(_, replica)| replica.is_good());
        let first = good.min_by(|(_, a), (_, b)| a.expected(len).total_cmp(&b.expected(len)));
        let next = || {
            let left = untried().filter_map(|(at, replica)| match replica.health() {
                Health::Left { look_at, .. } => Some((look_at, at)),
                _ => None,
            });
            left.min().map(|(_, at)| at)
        };
        first.map(|(at, _)| at).or_else(|| if any { next() } else { None })
    }

    /// Puts one more read to the account of hedges.
    fn earn_hedge(&self) {
        self.hedges_left.set((self.hedges_left.get() + 1).min(SAVED_HEDGES * READS_FOR_A_HEDGE));
    }

    fn take_hedge(&self) -> bool {
        let left = self.hedges_left.get();
        self.hedges_left.set(left.saturating_sub(READS_FOR_A_HEDGE));
        if left >= READS_FOR_A_HEDGE {
            return true;
        }
        self.hedges_left.set(left);
        false
    }

    fn trust(&self, replica: &Replica) {
        if replica.trust() {
            tracing::info!(replica = replica.name, "is used again");
            self.tell(ReplicaEvent::Returned { name: replica.name.clone() });
        }
    }

    /// What an error says of the replica that it comes from.
    fn judge(&self, replica: &Replica, error: Error) {
        add(&replica.counters.failures, 1);
        let name = replica.name.clone();
        if matches!(error.kind(), ErrorKind::WrongContent | ErrorKind::SourceChanged) {
            if replica.distrust(error.clone()) {
                tracing::error!(replica = name, %error, "is not used any more");
                self.tell(ReplicaEvent::Distrusted { name, error });
            }
        } else if replica.leave(error.clone(), self.clock.now()) {
            tracing::warn!(replica = name, %error, "is not used until it is well again");
            self.tell(ReplicaEvent::Left { name, error });
        }
    }

    fn tell(&self, event: ReplicaEvent) {
        let mut events = self.events.borrow_mut();
        if events.len() == MOST_EVENTS {
            events.pop_front();
        }
        events.push_back(event);
    }

    /// What has happened to replicas since the last time, the oldest first; the oldest are forgotten if nobody takes them.
    pub fn take_events(&self) -> Vec<ReplicaEvent> {
        self.events.take().into()
    }

    /// What has been counted.
    pub fn counters(&self) -> &ReplicasCounters {
        &self.counters
    }

    /// What is known of each replica, in the order in which they were named.
    pub fn report(&self) -> Vec<ReplicaReport> {
        let of = |replica: &Replica| {
            let (state, error) = match replica.health() {
                Health::Good => ("good", None),
                Health::Left { error, .. } => ("left", Some(error.to_string())),
                Health::Distrusted { error } => ("distrusted", Some(error.to_string())),
            };
            let (latency, rate) = replica.pace();
            let counters = &replica.counters;
            let (reads, bytes) = (counters.reads.get(), counters.bytes.get());
            let (failures, left) = (counters.failures.get(), counters.left.get());
            ReplicaReport {
                name: replica.name.clone(),
                state,
                error,
                reads,
                bytes,
                failures,
                left,
                latency,
                rate,
            }
        };
        self.replicas.iter().map(of).collect()
    }

    /// The nodes of those that are open, by name.
    pub fn open_nodes(&self) -> Vec<(String, Rc<dyn Node>)> {
        let open = |replica: &Replica| Some((replica.name.clone(), replica.opened()?.top()));
        self.replicas.iter().filter_map(open).collect()
    }

    fn children(&self) -> impl Iterator<Item = Rc<Child>> + '_ {
        self.replicas.iter().filter_map(Replica::opened)
    }

    async fn read_any(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        let there = self.size.saturating_sub(offset).min(buf.len() as u64);
        // At most the buffer's length.
        let len = there as usize;
        buf[len..].fill(0);
        if len == 0 {
            return Ok(buf);
        }
        let Answer::Data(data) = self.ask(&Request::Read { offset, len }).await? else {
            return Err(Error::new(ErrorKind::Corrupt, "the answer is one to another request"));
        };
        if buf.is_whole() && data.len() == buf.len() {
            return Ok(data);
        }
        buf[..len].copy_from_slice(&data);
        Ok(buf)
    }

    async fn status_of(&self, range: Range<u64>) -> Result<Extent> {
        if range.start >= self.size {
            return Ok(Extent::new(range.start, range.end - range.start, ExtentKind::Zero));
        }
        let within = range.start..range.end.min(self.size);
        match self.ask(&Request::Status(within)).await? {
            Answer::Extent(extent) => Ok(extent),
            Answer::Data(_) => Err(Error::new(ErrorKind::Corrupt, "the answer is one to another request")),
        }
    }

    fn refusal(&self) -> Error {
        let message = format!("{}: an image of several replicas can only be read", self.name);
        Error::new(ErrorKind::ReadOnly, message)
    }
}

/// Opens as many as can be within the grace, and gives their size.
async fn open_all(replicas: &[Replica], clock: &dyn Clock) -> Result<u64> {
    let mut attempts = Attempts::new();
    for (at, replica) in replicas.iter().enumerate() {
        attempts.push(at, Box::pin(replica.open()));
    }
    let mut size: Option<(u64, &str)> = None;
    let mut failed = Vec::new();
    let mut grace: Option<LocalFuture<'static, ()>> = None;
    while !attempts.is_empty() {
        let (at, opened) = match &mut grace {
            None => attempts.next().await,
            Some(over) => match select(pin!(attempts.next()), over).await {
                Either::Left((next, _)) => next,
                // Whoever asks for one that is late goes on with its opening.
                Either::Right(_) => break,
            },
        };
        let replica = &replicas[at];
        match opened {
            Ok(child) => {
                let here = child.disk().size();
                match size {
                    Some((other, name)) if other != here => {
                        let message = format!(
                            "{} has {here} bytes and {name} has {other}: they don't hold the same image",
                            replica.name
                        );
                        return Err(Error::new(ErrorKind::InvalidInput, message));
                    }
                    Some(_) => {}
                    None => {
                        size = Some((here, &replica.name));
                        grace = Some(clock.sleep_until(clock.now() + GRACE));
                    }
                }
                replica.trust();
            }
            Err(error) if error.kind() == ErrorKind::WrongContent => return Err(error),
            Err(error) => {
                tracing::warn!(replica = replica.name, %error, "can't be opened");
                replica.leave(error.clone(), clock.now());
                failed.push((at, error));
            }
        }
    }
    size.map(|(size, _)| size).ok_or_else(|| race::all_failed(&failed))
}

impl Node for ReplicasNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn driver(&self) -> &'static str {
        "replicas"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        let limits = self.children().map(|child| child.disk().limits());
        let both = |a: Limits, b: Limits| Limits {
            write_alignment: 1,
            preferred: a.preferred.max(b.preferred),
            allocation_unit: a.allocation_unit.max(b.allocation_unit),
            max_transfer: a.max_transfer.min(b.max_transfer),
            depth: a.depth.saturating_add(b.depth).min(256),
            remote: a.remote || b.remote,
        };
        limits.reduce(both).map_or_else(Limits::default, |all| Limits { write_alignment: 1, ..all })
    }

    fn resolve(&self, range: Range<u64>) -> Resolved {
        if range.start >= self.size {
            return Resolved::Zero { len: range.end - range.start, depth: 0 };
        }
        Resolved::Ask
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(self.read_any(offset, buf))
    }

    /// Which of them will be read is decided read by read.
    fn expect(&self, _range: Range<u64>) {
        let good = self.replicas.iter().filter(|replica| replica.is_good());
        good.filter_map(Replica::opened).for_each(|child| child.top().expect(0..0));
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        Box::pin(self.status_of(range))
    }

    crate::refuse_changes!();

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Ok(())))
    }

    /// Of the first, if that is open: the others have their own.
    fn identity(&self) -> Result<Identity> {
        self.replicas[0].opened().map_or_else(|| Ok(Identity::default()), |child| child.top().identity())
    }

    fn keeps_what_is_read(&self) -> bool {
        self.children().any(|child| child.disk().keeps_what_is_read())
    }

    fn hurry(&self, held: &mut Vec<Hurry>) {
        self.children().for_each(|child| child.top().hurry(held));
    }
}
