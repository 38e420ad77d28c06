//! The one serialisation primitive of the data path: a lock on ranges of a disk's bytes.
//!
//! # Rules
//! - **Modes.** Shared holders of overlapping ranges coexist; an exclusive holder is alone in its range.
//! - **FIFO.** A request waits for every earlier request whose range overlaps and whose mode conflicts, whether that one holds
//!   or waits. So no one starves, and requests that overlap get through in the order in which they asked.
//! - **Cancellation.** Dropping a waiting [`Acquire`] leaves the queue and lets those behind pass. Dropping a [`Guard`] unlocks, so a
//!   guard lives as long as the kernel or a peer may still touch the range.
//! - **No nesting, no upgrades.** A request that holds a range never asks for another, which is why there is no deadlock. Acquiring takes the
//!   request's only [`Token`]; [`Guard::release`] gives it back. To get a stronger mode: release, acquire, and look again.
//!
//! ```compile_fail,E0382
//! # async fn nested(lock: std::rc::Rc<headwater_block::range_lock::RangeLock>) {
//! use headwater_block::range_lock::{Mode, Token};
//! let token = Token::for_request();
//! let outer = lock.acquire(token, 0..10, Mode::Shared).await;
//! let inner = lock.acquire(token, 0..10, Mode::Exclusive).await; // the token was moved into `outer`
//! # }
//! ```
//!
//! # Cost
//! Entries are kept in the order of arrival and scanned. With the few dozen requests that a disk has in flight this beats a tree, and the
//! common case (nothing overlaps) allocates nothing once the list has grown.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

#[cfg(test)]
mod tests;

/// Whether a range is shared with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Plain I/O that changes no mapping.
    Shared,
    /// Copy-ups, read-modify-write, changes of mappings.
    Exclusive,
}

/// The right of one request to hold one range at a time.
#[derive(Debug)]
pub struct Token(());

impl Token {
    /// The token of a new request. A request makes exactly one, where it enters the disk.
    pub fn for_request() -> Self {
        Self(())
    }
}

/// A lock on ranges of bytes. See the module for its rules.
#[derive(Default)]
pub struct RangeLock {
    queue: RefCell<Queue>,
}

#[derive(Default)]
struct Queue {
    /// In order of arrival, and so sorted by ticket.
    entries: VecDeque<Entry>,
    next_ticket: u64,
    /// How many entries wait. While none does, unlocking needs no scan for whom to wake.
    waiting: usize,
}

struct Entry {
    ticket: u64,
    range: Range<u64>,
    mode: Mode,
    state: State,
}

enum State {
    Held,
    /// The waker of who waits, once it has been polled.
    Waiting(Option<Waker>),
}

impl Entry {
    fn conflicts(&self, range: &Range<u64>, mode: Mode) -> bool {
        self.range.start < range.end
            && range.start < self.range.end
            && (self.mode == Mode::Exclusive || mode == Mode::Exclusive)
    }
}

impl Queue {
    fn push(&mut self, range: Range<u64>, mode: Mode) -> (u64, bool) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let free = !self.entries.iter().any(|e| e.conflicts(&range, mode));
        let state = if free { State::Held } else { State::Waiting(None) };
        self.waiting += usize::from(!free);
        self.entries.push_back(Entry { ticket, range, mode, state });
        (ticket, free)
    }

    fn position(&self, ticket: u64) -> usize {
        self.entries
            .binary_search_by_key(&ticket, |e| e.ticket)
            .expect("an entry lives as long as its handle")
    }

    /// Takes an entry out and grants what was only waiting for it.
    fn remove(&mut self, ticket: u64) {
        let at = self.position(ticket);
        let gone = self.entries.remove(at).expect("found just now");
        self.waiting -= usize::from(matches!(gone.state, State::Waiting(_)));
        if self.waiting == 0 {
            return;
        }
        // Only entries behind the one that left can have waited for it.
        for i in at..self.entries.len() {
            let entry = &self.entries[i];
            if !entry.conflicts(&gone.range, gone.mode) || matches!(entry.state, State::Held) {
                continue;
            }
            let blocked = self.entries.range(..i).any(|e| e.conflicts(&entry.range, entry.mode));
            if !blocked {
                let state = std::mem::replace(&mut self.entries[i].state, State::Held);
                self.waiting -= 1;
                if let State::Waiting(Some(waker)) = state {
                    waker.wake();
                }
            }
        }
    }
}

impl RangeLock {
    /// A lock whose ranges are all free.
    pub fn new() -> Rc<Self> {
        Rc::new(Self::default())
    }

    /// Asks for `range` in `mode`, in the order of the calls (not of the first polls).
    pub fn acquire(self: &Rc<Self>, token: Token, range: Range<u64>, mode: Mode) -> Acquire {
        let (ticket, held) = self.queue.borrow_mut().push(range, mode);
        Acquire { handle: Some(Handle { lock: self.clone(), ticket }), token: Some(token), held }
    }

    /// How many requests hold or wait for a range.
    pub fn len(&self) -> usize {
        self.queue.borrow().entries.len()
    }

    /// True if no request holds or waits for a range.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An entry of the queue that leaves it when dropped.
struct Handle {
    lock: Rc<RangeLock>,
    ticket: u64,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.lock.queue.borrow_mut().remove(self.ticket);
    }
}

/// Waits for a range.
#[must_use = "the range is only held once this has completed"]
pub struct Acquire {
    handle: Option<Handle>,
    token: Option<Token>,
    held: bool,
}

impl Future for Acquire {
    type Output = Guard;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Guard> {
        let this = &mut *self;
        if !this.held {
            let handle = this.handle.as_ref().expect("polled after completion");
            let mut queue = handle.lock.queue.borrow_mut();
            let at = queue.position(handle.ticket);
            match &mut queue.entries[at].state {
                State::Held => {}
                State::Waiting(waker) => {
                    *waker = Some(cx.waker().clone());
                    return Poll::Pending;
                }
            }
        }
        let handle = this.handle.take().expect("polled after completion");
        let token = this.token.take().expect("polled after completion");
        Poll::Ready(Guard { handle, token })
    }
}

/// A held range. Dropping it unlocks.
#[must_use = "dropping a guard unlocks its range"]
pub struct Guard {
    handle: Handle,
    token: Token,
}

impl Guard {
    /// Unlocks, and gives the request's token back for another range or mode.
    pub fn release(self) -> Token {
        drop(self.handle);
        self.token
    }
}
