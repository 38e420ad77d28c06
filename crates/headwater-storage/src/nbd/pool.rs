//! The connections of one node: opened when load asks for them, replaced when they break.
//!
//! The first connection is made when the node is opened, and its failure is the user's to see. Further ones are made in the background
//! once requests pile up, all at once if the server is far away; a server that takes fewer (qemu-nbd without `--shared` leaves the second waiting for ever) costs nothing
//! but an attempt now and then. Connecting is done by tasks of its own, so that a request that is dropped while it
//! waits takes nothing with it.

use super::NbdOptions;
use super::connection::Connection;
use super::remote::Remote;
use super::socket::Socket;
use headwater_block::{Error, ErrorKind, Result};
use headwater_nbd::negotiate::BASE_ALLOCATION;
use headwater_nbd::{ServerOffer, TransmissionFlags};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// With so many requests in flight on the least busy connection, another one is opened. Each TCP connection has a congestion window of
/// its own. On a Unix socket a second one brings something only when the server has as many requests of the first as it works on at a
/// time, and costs it threads with buffers: to send 512 MiB took nbdkit 0.45 s of CPU over four connections, and 0.31 s over two.
const BUSY_TCP: usize = 2;
const BUSY_UNIX: usize = super::DEPTH as usize;

/// A server that takes longer than this to be connected to is far away.
const FAR: Duration = Duration::from_millis(3);

/// The first and the longest pause before the next attempt to reconnect.
const BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(2);

/// The pause after a failed attempt to get one more connection while others work.
const EXTRA_PAUSE: Duration = Duration::from_secs(30);

/// How long a slot has been without a connection, and when to try again.
struct Vacancy {
    not_before: Instant,
    failures: u32,
}

enum Slot {
    Vacant(Vacancy),
    Connecting,
    Open(Rc<Connection>),
}

/// See the [module](self).
pub(super) struct Pool {
    name: Rc<str>,
    remote: Remote,
    options: NbdOptions,
    offer: ServerOffer,
    read_only: bool,
    max_data: u32,
    capacity: u32,
    slots: RefCell<Vec<Slot>>,
    /// Requests that wait for a connection attempt to end.
    waiting: RefCell<Vec<oneshot::Sender<()>>>,
    last_error: RefCell<Option<Error>>,
    /// The export is another one now: nothing may be read from it any more.
    changed: RefCell<Option<Error>>,
    closed: Cell<bool>,
    /// Nobody waits for a connection any more.
    impatient: Cell<bool>,
    /// How many connections have broken so far.
    losses: Cell<u64>,
    /// The server is so far away that connections are opened all at once.
    far: bool,
    outage: Cell<Option<Outage>>,
}

/// A time without any connection.
#[derive(Clone, Copy)]
struct Outage {
    since: Instant,
    /// Attempts to reconnect that have failed meanwhile.
    attempts: u32,
}

/// The longest read or write that is sent, in bytes.
fn max_data(offer: &ServerOffer) -> u32 {
    let limit = offer.block_sizes.maximum.min(32 << 20);
    let minimum = offer.block_sizes.minimum;
    // A valid maximum is at least the preferred size, hence at least the minimum.
    (limit - limit % minimum).max(minimum)
}

/// Connects for the first time, again and again while the options allow it and it may help.
async fn first_connection(remote: &Remote, options: &NbdOptions) -> Result<(Socket, ServerOffer)> {
    let deadline = Instant::now() + options.open_timeout;
    let mut pause = BACKOFF;
    loop {
        let failed = match remote.open(options.connect_timeout).await {
            Ok(opened) => return Ok(opened),
            Err(error) => error,
        };
        use ErrorKind::{InvalidInput, PermissionDenied, Unsupported};
        let hopeless = matches!(failed.kind(), InvalidInput | PermissionDenied | Unsupported);
        if hopeless || !remote.can_connect_again() || Instant::now() + pause > deadline {
            return Err(failed);
        }
        tracing::debug!(node = remote.name(), error = %failed, "no connection yet");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_BACKOFF);
    }
}

impl Pool {
    /// Makes the first connection.
    pub(super) async fn connect(name: Rc<str>, remote: Remote, options: NbdOptions) -> Result<Rc<Self>> {
        let begun = Instant::now();
        let (socket, offer) = first_connection(&remote, &options).await?;
        let far = remote.is_tcp() && begun.elapsed() >= FAR;
        if offer.size > i64::MAX as u64 {
            let message = format!("{name}: the server claims an export of {} bytes", offer.size);
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        let multi = offer.flags.contains(TransmissionFlags::CAN_MULTI_CONN);
        let read_only = options.read_only || offer.flags.contains(TransmissionFlags::READ_ONLY);
        let count = match options.connections {
            _ if !remote.can_connect_again() => 1,
            // A flush on one connection need not cover what was written on another.
            Some(_) if !multi && !read_only => 1,
            Some(count) => count.clamp(1, 64),
            None if multi => super::DEFAULT_CONNECTIONS,
            None => 1,
        };
        let max_data = max_data(&offer);
        let first = Connection::start(socket, name.clone(), &offer, max_data, options.request_timeout);
        let mut slots = vec![Slot::Open(first)];
        let not_before = Instant::now();
        slots.resize_with(count as usize, || Slot::Vacant(Vacancy { not_before, failures: 0 }));
        Ok(Rc::new(Self {
            name,
            remote,
            options,
            offer,
            read_only,
            max_data,
            capacity: count,
            slots: RefCell::new(slots),
            waiting: RefCell::default(),
            last_error: RefCell::default(),
            changed: RefCell::default(),
            closed: Cell::new(false),
            impatient: Cell::new(false),
            losses: Cell::new(0),
            far,
            outage: Cell::new(None),
        }))
    }

    /// What was agreed on the first connection; all others agree to the same.
    pub(super) fn offer(&self) -> &ServerOffer {
        &self.offer
    }

    /// Whether changes are refused, here or by the server.
    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The longest read or write that is sent, in bytes: a multiple of the server's minimum.
    pub(super) fn max_data(&self) -> u32 {
        self.max_data
    }

    /// The most connections that are opened.
    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// How many connections have broken since the node was opened.
    pub(super) fn losses(&self) -> u64 {
        self.bury_dead();
        self.losses.get()
    }

    /// The least busy connection; if all are broken, waits for one as long as the outage may last. Attempts to reconnect go on for ever,
    /// as long as someone asks.
    pub(super) async fn acquire(self: &Rc<Self>) -> Result<Rc<Connection>> {
        loop {
            if let Some(error) = &*self.changed.borrow() {
                return Err(error.clone());
            }
            if self.closed.get() {
                return Err(Error::new(ErrorKind::Closed, format!("{} was closed", self.name)));
            }
            self.bury_dead();
            let (best, vacant, connecting) = self.survey();
            if let Some(best) = best {
                self.outage.set(None);
                let wanted = best.in_flight() >= self.busy() && !connecting;
                if let Some((slot, not_before)) = vacant
                    && wanted
                    && not_before <= Instant::now()
                {
                    self.start_connecting(slot);
                    if self.far {
                        self.connect_ahead();
                    }
                }
                return Ok(best);
            }
            if self.impatient.get() {
                return Err(self.give_up());
            }
            if let (Some((slot, _)), false) = (vacant, connecting) {
                self.start_connecting(slot);
            }
            let now = Instant::now();
            let outage = self.outage.get().unwrap_or(Outage { since: now, attempts: 0 });
            self.outage.set(Some(outage));
            let end = outage.since + self.options.retry;
            if outage.attempts > 0 && now >= end {
                return Err(self.give_up());
            }
            let (sender, receiver) = oneshot::channel();
            self.waiting.borrow_mut().push(sender);
            // A sender that is gone means that the pool is closed, or that nobody waits any more; the next round says so.
            if outage.attempts > 0 {
                let _ = tokio::time::timeout_at(end, receiver).await;
            } else {
                let _ = receiver.await;
            }
        }
    }

    /// Requests that wait for a connection fail, and later ones don't wait. What is connected is used as ever.
    pub(super) fn stop_waiting(&self) {
        self.impatient.set(true);
        self.waiting.take();
    }

    /// True once nobody waits any more.
    pub(super) fn is_impatient(&self) -> bool {
        self.impatient.get()
    }

    /// Opens all further connections in the background, if the server is far away: one after the other would take its round trips as often.
    pub(super) fn connect_ahead(self: &Rc<Self>) {
        if !self.far || self.closed.get() {
            return;
        }
        let now = Instant::now();
        let ready = |slot: &Slot| matches!(slot, Slot::Vacant(vacancy) if vacancy.not_before <= now);
        let vacant: Vec<usize> = {
            let slots = self.slots.borrow();
            (0..slots.len()).filter(|at| ready(&slots[*at])).collect()
        };
        vacant.into_iter().for_each(|slot| self.start_connecting(slot));
    }

    /// With so many requests in flight on the least busy connection, another one is opened.
    fn busy(&self) -> usize {
        if self.remote.is_tcp() { BUSY_TCP } else { BUSY_UNIX }
    }

    /// The least busy open slot, the vacant one that may be tried first, and whether one is being connected.
    fn survey(&self) -> (Option<Rc<Connection>>, Option<(usize, Instant)>, bool) {
        let slots = self.slots.borrow();
        let open = slots.iter().filter_map(|slot| if let Slot::Open(c) = slot { Some(c) } else { None });
        let best = open.min_by_key(|connection| connection.in_flight()).cloned();
        let vacant = slots.iter().enumerate().filter_map(|(index, slot)| match slot {
            Slot::Vacant(vacancy) => Some((index, vacancy.not_before)),
            _ => None,
        });
        let vacant = vacant.min_by_key(|(_, not_before)| *not_before);
        (best, vacant, slots.iter().any(|slot| matches!(slot, Slot::Connecting)))
    }

    fn give_up(&self) -> Error {
        let why = self.last_error.borrow().as_ref().map_or("no attempt ended".to_owned(), Error::to_string);
        let in_vain = match self.impatient.get() {
            true => "isn't waited for any more".to_owned(),
            false => format!("could not be made again within {} s", self.options.retry.as_secs_f32()),
        };
        let message = format!("{}: the connection was lost and {in_vain}: {why}", self.name);
        Error::new(ErrorKind::Unavailable, message)
    }

    fn bury_dead(&self) {
        let mut slots = self.slots.borrow_mut();
        if slots.iter().any(|slot| matches!(slot, Slot::Open(connection) if connection.is_retired())) {
            // The server waits until we have left all connections, those without requests as well.
            for slot in &*slots {
                if let Slot::Open(connection) = slot {
                    connection.retire();
                }
            }
        }
        for slot in &mut *slots {
            if let Slot::Open(connection) = slot
                && let Some(error) = connection.dead()
            {
                tracing::warn!(node = &*self.name, %error, "connection lost");
                self.losses.set(self.losses.get() + 1);
                *self.last_error.borrow_mut() = Some(error);
                *slot = Slot::Vacant(Vacancy { not_before: Instant::now(), failures: 0 });
            }
        }
    }

    fn start_connecting(self: &Rc<Self>, index: usize) {
        let slot = std::mem::replace(&mut self.slots.borrow_mut()[index], Slot::Connecting);
        let Slot::Vacant(vacancy) = slot else { return };
        let pool = self.clone();
        tokio::task::spawn_local(async move {
            tokio::time::sleep_until(vacancy.not_before).await;
            let opened = pool.remote.open(pool.options.connect_timeout).await;
            pool.connected(index, vacancy.failures, opened);
            for waiter in pool.waiting.take() {
                let _ = waiter.send(());
            }
        });
    }

    fn connected(&self, index: usize, failures: u32, opened: Result<(Socket, ServerOffer)>) {
        if self.closed.get() {
            return;
        }
        let same = opened.and_then(|(socket, offer)| match self.difference(&offer) {
            None => Ok((socket, offer)),
            Some(difference) => {
                let message = format!("{}: {difference}; it is not the same disk any more", self.name);
                let error = Error::new(ErrorKind::SourceChanged, message);
                *self.changed.borrow_mut() = Some(error.clone());
                Err(error)
            }
        });
        let slot = match same {
            Ok((socket, offer)) => {
                let timeout = self.options.request_timeout;
                let connection = Connection::start(socket, self.name.clone(), &offer, self.max_data, timeout);
                self.outage.set(None);
                Slot::Open(connection)
            }
            Err(error) => {
                tracing::debug!(node = &*self.name, %error, "no connection");
                *self.last_error.borrow_mut() = Some(error);
                let others_work = self.survey().0.is_some();
                let outage = self.outage.get();
                self.outage.set(outage.map(|outage| Outage { attempts: outage.attempts + 1, ..outage }));
                let backoff = BACKOFF.saturating_mul(1 << failures.min(10)).min(LONGEST_BACKOFF);
                let pause = if others_work { EXTRA_PAUSE } else { backoff };
                Slot::Vacant(Vacancy { not_before: Instant::now() + pause, failures: failures + 1 })
            }
        };
        self.slots.borrow_mut()[index] = slot;
    }

    /// In what way the export is another one than when it was opened.
    fn difference(&self, now: &ServerOffer) -> Option<String> {
        let then = &self.offer;
        if now.size != then.size {
            return Some(format!("the export had {} bytes and now has {}", then.size, now.size));
        }
        // Requests are made to the first offer's measure.
        let tells_holes = |offer: &ServerOffer| offer.context(BASE_ALLOCATION).is_some();
        let differs = (now.block_sizes, now.headers.are_structured(), tells_holes(now))
            != (then.block_sizes, then.headers.are_structured(), tells_holes(then));
        // What it takes of changes matters only to those who make some.
        if differs || !self.read_only && now.flags != then.flags {
            return Some("the export's block sizes or abilities are others than before".to_owned());
        }
        None
    }

    /// Says good-bye on all connections, waits for the server a moment, and refuses what comes.
    pub(super) async fn close(&self) {
        self.closed.set(true);
        let slots = std::mem::take(&mut *self.slots.borrow_mut());
        self.waiting.take();
        for slot in slots {
            if let Slot::Open(connection) = slot {
                connection.disconnect();
                // It is only a courtesy: a server that doesn't close must not hold us up.
                let _ = tokio::time::timeout(Duration::from_secs(1), connection.closed()).await;
            }
        }
    }

    /// Gives everything up at once.
    pub(super) fn abandon(&self) {
        self.closed.set(true);
        self.slots.take();
        self.waiting.take();
    }
}
