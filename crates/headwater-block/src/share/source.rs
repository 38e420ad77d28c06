//! One source: which blocks are in flight, and who fetches them.

use super::memory::Memory;
use super::{BlockStore, SHARE_BLOCK, ShareStats};
use crate::buffer::{Buffer, BufferMut};
use crate::error::{Error, Result};
use crate::node::{LocalFuture, Node};
use futures_util::future::try_join_all;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// So many failures of others for the same block are a reader's own.
const MOST_FAILURES: u32 = 2;

/// Some of a source's bytes.
#[derive(Clone)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) data: Buffer,
}

/// How a flight ended.
#[derive(Clone)]
enum Landed {
    Data(Buffer),
    /// Who flew it was dropped, or failed with this.
    Gone(Option<Error>),
}

/// A range that somebody is fetching, in whole blocks.
struct Flight {
    range: Range<u64>,
    landed: RefCell<Option<Landed>>,
    waiting: RefCell<Vec<Waker>>,
}

impl Flight {
    async fn wait(&self) -> Landed {
        poll_fn(|cx| {
            if let Some(landed) = &*self.landed.borrow() {
                return Poll::Ready(landed.clone());
            }
            let mut waiting = self.waiting.borrow_mut();
            if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                waiting.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await
    }
}

/// The right and the duty to fetch a range. Dropped, it leaves them to those who wait.
struct Claim {
    source: Rc<Source>,
    flight: Rc<Flight>,
}

impl Claim {
    /// Tells all who wait. What they do next they do when they are polled.
    fn land(&self, landed: Landed) {
        if self.flight.landed.borrow().is_some() {
            return;
        }
        self.source.flights.borrow_mut().remove(&self.flight.range.start);
        self.flight.landed.replace(Some(landed));
        for waker in self.flight.waiting.take() {
            waker.wake();
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // race-mark: share-asker-dropped
        self.land(Landed::Gone(None));
    }
}

/// How a part of what is wanted is had.
enum Way {
    Memory(Piece),
    Join(Rc<Flight>),
    Fetch { stored: bool },
}

/// A source and what is known of it; see the parent module.
pub(super) struct Source {
    id: u64,
    key: Option<String>,
    size: u64,
    readers: Cell<u32>,
    memory: Rc<RefCell<Memory>>,
    store: Option<Rc<dyn BlockStore>>,
    /// By their starts. No two overlap, nor does one with what is in memory.
    flights: RefCell<BTreeMap<u64, Rc<Flight>>>,
    stats: Cell<ShareStats>,
}

impl Source {
    pub(super) fn new(
        id: u64,
        key: Option<String>,
        size: u64,
        memory: Rc<RefCell<Memory>>,
        store: Option<Rc<dyn BlockStore>>,
    ) -> Self {
        let (flights, stats) = (RefCell::default(), Cell::default());
        Self { id, key, size, readers: Cell::new(0), memory, store, flights, stats }
    }

    pub(super) fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn stats(&self) -> ShareStats {
        self.stats.get()
    }

    /// How many readers all nodes have together.
    pub(super) fn readers(&self) -> u32 {
        self.readers.get()
    }

    /// More is kept of it than what memory has.
    pub(super) fn has_store(&self) -> bool {
        self.store.is_some()
    }

    /// One of the nodes has `now` readers instead of `before`.
    pub(super) fn change_readers(&self, before: u32, now: u32) {
        self.readers.set(self.readers.get() - before + now);
        if self.readers.get() == 0 {
            self.memory.borrow_mut().forget(self.id);
        }
    }

    /// The bytes of `range` (not empty, within the source), in pieces that may reach further; through `node` what must be fetched. May be dropped.
    pub(super) fn obtain<'a>(
        self: &'a Rc<Self>,
        node: &'a Rc<dyn Node>,
        range: Range<u64>,
    ) -> LocalFuture<'a, Result<Vec<Piece>>> {
        self.obtain_after(node, range, 0)
    }

    /// As [`Source::obtain`], when others have failed so often.
    fn obtain_after<'a>(
        self: &'a Rc<Self>,
        node: &'a Rc<dyn Node>,
        range: Range<u64>,
        failures: u32,
    ) -> LocalFuture<'a, Result<Vec<Piece>>> {
        let end = range.end.next_multiple_of(SHARE_BLOCK).min(self.size);
        let mut at = range.start - range.start % SHARE_BLOCK;
        let mut parts: Vec<LocalFuture<'a, Result<Vec<Piece>>>> = Vec::new();
        let mut pieces = Vec::new();
        // In one step, without an await: what nobody fetches is claimed before anybody else can look.
        while at < end {
            let (part, way) = self.way(at..end);
            at = part.end;
            let bytes = part.end.min(range.end) - part.start.max(range.start);
            match way {
                Way::Memory(piece) => {
                    self.count(|stats| stats.from_memory += bytes);
                    pieces.push(piece);
                }
                Way::Join(flight) => parts.push(Box::pin(self.join(node, flight, part, failures))),
                Way::Fetch { stored } => {
                    let claim = self.claim(part);
                    parts.push(Box::pin(self.fetch(node, claim, stored)));
                }
            }
        }
        Box::pin(async move {
            pieces.extend(try_join_all(parts).await?.into_iter().flatten());
            Ok(pieces)
        })
    }

    fn count(&self, change: impl FnOnce(&mut ShareStats)) {
        let mut stats = self.stats.get();
        change(&mut stats);
        self.stats.set(stats);
    }

    /// How the start of `range`, whole blocks, is had, and how much of it is had so.
    fn way(&self, range: Range<u64>) -> (Range<u64>, Way) {
        let mut memory = self.memory.borrow_mut();
        if let Some(piece) = memory.get(self.id, &range, self.readers.get()) {
            let end = range.end.min(piece.offset + piece.data.len() as u64);
            return (range.start..end, Way::Memory(piece));
        }
        let flights = self.flights.borrow();
        if let Some((_, flight)) = flights.range(..=range.start).next_back()
            && flight.range.end > range.start
        {
            return (range.start..range.end.min(flight.range.end), Way::Join(flight.clone()));
        }
        let until = flights.range(range.start..range.end).next().map_or(range.end, |(start, _)| *start);
        let until = memory.next_after(self.id, range.start).map_or(until, |start| start.min(until));
        let (stored, until) =
            self.store.as_ref().map_or((false, until), |store| store.holds(range.start, until));
        (range.start..until, Way::Fetch { stored })
    }

    /// Whether a read of `range` would ask nothing of the source now.
    pub(super) fn is_at_hand(&self, range: Range<u64>) -> bool {
        let (memory, flights) = (self.memory.borrow(), self.flights.borrow());
        let end = range.end.min(self.size);
        let mut at = range.start;
        while at < end {
            let in_flight = || {
                let (_, flight) = flights.range(..=at).next_back()?;
                (flight.range.end > at).then_some(flight.range.end)
            };
            let stored = || {
                let block = at - at % SHARE_BLOCK;
                let (stored, until) =
                    self.store.as_ref()?.holds(block, end.next_multiple_of(SHARE_BLOCK).min(self.size));
                stored.then_some(until)
            };
            match memory.kept_until(self.id, at).or_else(in_flight).or_else(stored) {
                Some(until) => at = until,
                None => return false,
            }
        }
        true
    }

    fn claim(self: &Rc<Self>, range: Range<u64>) -> Claim {
        let flight = Rc::new(Flight { range, landed: RefCell::default(), waiting: RefCell::default() });
        self.flights.borrow_mut().insert(flight.range.start, flight.clone());
        Claim { source: self.clone(), flight }
    }

    /// Waits for what somebody else fetches, of which `part` is wanted.
    async fn join(
        self: &Rc<Self>,
        node: &Rc<dyn Node>,
        flight: Rc<Flight>,
        part: Range<u64>,
        failures: u32,
    ) -> Result<Vec<Piece>> {
        let failures = match flight.wait().await {
            Landed::Data(data) => {
                let bytes = part.end - part.start;
                self.count(|stats| stats.joined += bytes);
                self.memory.borrow_mut().served(self.id, &part, self.readers.get());
                return Ok(vec![Piece { offset: flight.range.start, data }]);
            }
            Landed::Gone(Some(error)) if failures + 1 >= MOST_FAILURES => return Err(error),
            Landed::Gone(Some(_)) => failures + 1,
            Landed::Gone(None) => failures,
        };
        // race-mark: share-take-over
        self.obtain_after(node, part, failures).await
    }

    /// Fetches what was claimed.
    async fn fetch(self: &Rc<Self>, node: &Rc<dyn Node>, claim: Claim, stored: bool) -> Result<Vec<Piece>> {
        let range = claim.flight.range.clone();
        let len = range.end - range.start;
        if let (Some(store), true) = (&self.store, stored) {
            match store.read(range.clone()).await {
                Ok(data) => {
                    self.count(|stats| stats.from_store += len);
                    claim.land(Landed::Data(data.clone()));
                    return Ok(vec![Piece { offset: range.start, data }]);
                }
                Err(err) => tracing::warn!("{err}; {} is asked instead", node.name()),
            }
        }
        self.count(|stats| stats.fetched += len);
        match node.read(range.start, BufferMut::new(len as usize)).await {
            Ok(buf) => {
                let data = buf.freeze();
                if self.readers.get() > 0 {
                    self.memory.borrow_mut().insert(self.id, range.start, &data, self.readers.get());
                }
                claim.land(Landed::Data(data.clone()));
                if let Some(store) = &self.store {
                    store.keep(range.start, data.clone());
                }
                Ok(vec![Piece { offset: range.start, data }])
            }
            Err(err) => {
                claim.land(Landed::Gone(Some(err.clone())));
                Err(err)
            }
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.memory.borrow_mut().forget(self.id);
    }
}
