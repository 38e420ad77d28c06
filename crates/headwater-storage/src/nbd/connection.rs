//! One connection: a table of the requests in flight, a task that writes them and a task that reads the replies.
//!
//! A request's buffer belongs to the table until its reply is complete, not to the future that waits: when that future is
//! dropped, the reply is read all the same, and thrown away. Whatever ends a connection (the peer, garbage, the watchdog)
//! is noted once in `dead` and the socket is shut down; the reader, which that wakes, then fails all that is in flight.
//! Only the reader takes entries out of the table.

use super::reader;
use super::socket::Socket;
use headwater_block::{Buffer, BufferMut, Error, ErrorKind};
use headwater_nbd::reply::StatusExtent;
use headwater_nbd::{Command, CommandFlags, Encoded, Headers, ReadCoverage, Request, ServerOffer};
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::io::IoSlice;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// How many requests are written with one system call. Each takes up to two vectors; the kernel's limit is 1024.
const BATCH: usize = 64;

/// A connection on which requests wait may be silent for the request timeout. A single request may stay without an answer for so many
/// times longer, while others are answered: on a slow line, the last of many large reads does wait.
const PATIENCE: u32 = 8;

/// The longest range that one request is for where headers are compact, in bytes: 32 bits less the largest alignment.
pub(super) const LONGEST_COMPACT: u64 = (1 << 32) - (64 << 10);

/// What a successful reply brings.
#[derive(Debug)]
pub(super) enum Answer {
    /// Nothing but success.
    Done,
    /// The buffer of a read, filled.
    Data(BufferMut),
    /// The extents of a block status request; not empty.
    Extents(Vec<StatusExtent>),
}

/// Why a request failed.
pub(super) struct Failure {
    pub(super) error: Error,
    /// The connection is gone, rather than this request refused.
    pub(super) lost: bool,
    /// The buffer of a read, its contents arbitrary.
    pub(super) buf: Option<BufferMut>,
}

pub(super) type Reply = Result<Answer, Failure>;

/// What a request waits for, and what its reply has brought so far.
pub(super) enum Expect {
    Data { buf: Option<BufferMut>, coverage: ReadCoverage, chunks: u32 },
    Extents(Vec<StatusExtent>),
    Nothing,
}

pub(super) struct InFlight {
    pub(super) expect: Expect,
    /// Where the request begins, which extended headers repeat.
    pub(super) offset: u64,
    /// The first error chunk.
    pub(super) error: Option<Error>,
    since: Instant,
    waiter: oneshot::Sender<Reply>,
}

impl InFlight {
    /// Tells the waiter, if it still waits.
    pub(super) fn finish(self, reply: Result<(), Error>) {
        let answer = match (reply, self.expect) {
            (Ok(()), Expect::Data { buf: Some(buf), .. }) => Ok(Answer::Data(buf)),
            (Ok(()), Expect::Extents(extents)) => Ok(Answer::Extents(extents)),
            (Ok(()), Expect::Nothing) => Ok(Answer::Done),
            (Ok(()), Expect::Data { buf: None, .. }) => {
                let error = Error::new(ErrorKind::Closed, "the read was given up");
                Err(Failure { error, lost: false, buf: None })
            }
            (Err(error), expect) => {
                let buf = if let Expect::Data { buf, .. } = expect { buf } else { None };
                let lost = error.kind() == ErrorKind::Unavailable;
                Err(Failure { error, lost, buf })
            }
        };
        let _ = self.waiter.send(answer);
    }

    fn lose(self, error: Error) {
        let buf = if let Expect::Data { buf, .. } = self.expect { buf } else { None };
        let _ = self.waiter.send(Err(Failure { error, lost: true, buf }));
    }
}

struct Outgoing {
    header: Encoded,
    payload: Option<Buffer>,
}

/// What the tasks of a connection share.
pub(super) struct Shared {
    pub(super) socket: Socket,
    /// The node, for messages.
    pub(super) name: Rc<str>,
    pub(super) headers: Headers,
    /// The context id of `base:allocation`.
    pub(super) allocation: Option<u32>,
    /// The longest read that is sent.
    pub(super) max_data: u32,
    pub(super) table: RefCell<HashMap<u64, InFlight>>,
    pub(super) last_received: Cell<Instant>,
    queue: RefCell<VecDeque<Outgoing>>,
    writer: RefCell<Option<Waker>>,
    next_cookie: Cell<u64>,
    dead: RefCell<Option<Error>>,
    /// The server answers no more requests, though it waits for us to go: no new ones, but those in flight get their replies.
    retired: RefCell<Option<Error>>,
    request_timeout: Duration,
}

/// A connection to an export, ready for requests. Dropping it closes the socket at once.
pub(super) struct Connection {
    shared: Rc<Shared>,
    tasks: [AbortHandle; 3],
}

impl Drop for Connection {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Connection {
    /// Starts the tasks of a connection on which `offer` was agreed. Must be called within a `LocalSet`.
    pub(super) fn start(
        socket: Socket,
        name: Rc<str>,
        offer: &ServerOffer,
        max_data: u32,
        request_timeout: Duration,
    ) -> Rc<Self> {
        let shared = Rc::new(Shared {
            socket,
            name,
            headers: offer.headers,
            allocation: offer.context(headwater_nbd::negotiate::BASE_ALLOCATION),
            max_data,
            table: RefCell::default(),
            last_received: Cell::new(Instant::now()),
            queue: RefCell::default(),
            writer: RefCell::default(),
            next_cookie: Cell::new(1),
            dead: RefCell::default(),
            retired: RefCell::default(),
            request_timeout,
        });
        let tasks = [
            tokio::task::spawn_local(read_replies(shared.clone())).abort_handle(),
            tokio::task::spawn_local(write_requests(shared.clone())).abort_handle(),
            tokio::task::spawn_local(watch(shared.clone())).abort_handle(),
        ];
        Rc::new(Self { shared, tasks })
    }

    /// Why the connection takes no more requests, if so.
    pub(super) fn dead(&self) -> Option<Error> {
        let dead = self.shared.dead.borrow().clone();
        dead.or_else(|| self.shared.retired.borrow().clone())
    }

    /// The server said that it is shutting down.
    pub(super) fn is_retired(&self) -> bool {
        self.shared.retired.borrow().is_some()
    }

    /// Takes no more requests; see [`Shared::retire`].
    pub(super) fn retire(&self) {
        self.shared.retire();
    }

    /// How many requests wait for their reply.
    pub(super) fn in_flight(&self) -> usize {
        self.shared.table.borrow().len()
    }

    /// Sends a read of `buf.len()` bytes.
    pub(super) fn read(&self, offset: u64, buf: BufferMut) -> oneshot::Receiver<Reply> {
        // Callers split at `max_data`.
        let length = buf.len() as u32;
        let expect = Expect::Data { buf: Some(buf), coverage: ReadCoverage::new(offset, length), chunks: 0 };
        self.submit(Command::Read, CommandFlags::NONE, offset, length.into(), None, expect)
    }

    /// Asks for the status of a range, or of its beginning where one request can't be for all of it.
    pub(super) fn block_status(&self, offset: u64, length: u64) -> oneshot::Receiver<Reply> {
        let extended = self.shared.headers.are_extended();
        let length = if extended { length } else { length.min(LONGEST_COMPACT) };
        let expect = Expect::Extents(Vec::new());
        self.submit(Command::BlockStatus, CommandFlags::NONE, offset, length, None, expect)
    }

    /// Sends data.
    pub(super) fn write(&self, offset: u64, data: Buffer, flags: CommandFlags) -> oneshot::Receiver<Reply> {
        // Callers split at the server's maximum.
        let length = data.len() as u64;
        self.submit(Command::Write, flags, offset, length, Some(data), Expect::Nothing)
    }

    /// Sends a request without data either way, for at most [`LONGEST_COMPACT`].
    pub(super) fn plain(
        &self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u64,
    ) -> oneshot::Receiver<Reply> {
        self.submit(command, flags, offset, length, None, Expect::Nothing)
    }

    fn submit(
        &self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u64,
        payload: Option<Buffer>,
        expect: Expect,
    ) -> oneshot::Receiver<Reply> {
        let (waiter, reply) = oneshot::channel();
        let shared = &*self.shared;
        let now = Instant::now();
        let entry = InFlight { expect, offset, error: None, since: now, waiter };
        if let Some(error) = self.dead() {
            entry.lose(error);
            return reply;
        }
        let cookie = shared.next_cookie.get();
        shared.next_cookie.set(cookie + 1);
        let mut table = shared.table.borrow_mut();
        if table.is_empty() {
            // Silence counts from here.
            shared.last_received.set(now);
        }
        table.insert(cookie, entry);
        shared.send(Request::new(command, cookie, offset, length).with_flags(flags), payload);
        reply
    }

    /// Says good-bye; the server then closes. Nothing may be in flight.
    pub(super) fn disconnect(&self) {
        self.shared.send(Request::disconnect(), None);
    }

    /// Completes when the server has closed, or the connection broke.
    pub(super) async fn closed(&self) {
        while self.dead().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Shared {
    fn send(&self, request: Request, payload: Option<Buffer>) {
        self.queue.borrow_mut().push_back(Outgoing { header: request.encode(self.headers), payload });
        if let Some(writer) = self.writer.borrow_mut().take() {
            writer.wake();
        }
    }

    /// Notes that the server is shutting down. The connection closes when the last request in flight has let go of it.
    pub(super) fn retire(&self) {
        let message = format!("{}: the server is shutting down", self.name);
        self.retired.borrow_mut().get_or_insert(Error::new(ErrorKind::Unavailable, message));
    }

    /// Notes why the connection ends (the first reason counts) and wakes the reader.
    fn kill(&self, error: Error) {
        self.dead.borrow_mut().get_or_insert(error);
        self.socket.shut_down();
    }
}

async fn read_replies(shared: Rc<Shared>) {
    let Err(error) = reader::run(&shared).await;
    shared.kill(error);
    // Nothing is added to the table once `dead` is set.
    let error = shared.dead.borrow().clone();
    let lost = std::mem::take(&mut *shared.table.borrow_mut());
    for (_, entry) in lost {
        if let Some(error) = error.clone() {
            entry.lose(error);
        }
    }
    shared.queue.borrow_mut().clear();
}

/// Writes what is queued. Requests that are made before the task runs again go out together.
async fn write_requests(shared: Rc<Shared>) {
    loop {
        let mut batch = poll_fn(|cx| {
            let mut queue = shared.queue.borrow_mut();
            if queue.is_empty() {
                *shared.writer.borrow_mut() = Some(cx.waker().clone());
                return Poll::Pending;
            }
            let count = queue.len().min(BATCH);
            Poll::Ready(queue.drain(..count).collect::<Vec<_>>())
        })
        .await;
        if let Err(e) = write_batch(&shared.socket, &mut batch).await {
            let what = format!("send a request to {}", shared.name);
            return shared.kill(Error::from_io(e, what));
        }
    }
}

async fn write_batch(socket: &Socket, batch: &mut [Outgoing]) -> std::io::Result<()> {
    let mut vectors = Vec::with_capacity(2 * batch.len());
    for out in &*batch {
        vectors.push(IoSlice::new(&out.header));
        vectors.extend(out.payload.as_ref().map(|data| IoSlice::new(data)));
    }
    let mut rest = &mut vectors[..];
    while !rest.is_empty() {
        let n = socket.writev(rest).await?;
        IoSlice::advance_slices(&mut rest, n);
    }
    socket.flush().await
}

/// Ends the connection when the server no longer answers.
async fn watch(shared: Rc<Shared>) {
    let limit = shared.request_timeout;
    loop {
        tokio::time::sleep(limit / 4).await;
        let now = Instant::now();
        let Some(oldest) = shared.table.borrow().values().map(|entry| entry.since).min() else { continue };
        let silent = now - shared.last_received.get();
        if silent >= limit || now - oldest >= limit * PATIENCE {
            let waited = (now - oldest).as_secs_f32();
            let message = format!("{}: no answer from the server for {waited:.1} s", shared.name);
            return shared.kill(Error::new(ErrorKind::TimedOut, message));
        }
    }
}
