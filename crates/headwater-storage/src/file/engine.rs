//! The file engine: one per disk thread, shared by all files on it.
//!
//! An operation enters the slab and a queue; the first one of a turn of the event loop wakes the **driver**, a task of the same
//! runtime, which runs after the tasks that are ready now. So all that they ask for goes to the kernel in one call. The driver also
//! runs when the eventfd says that something was completed: it reaps all of it and wakes the tasks that wait.
//!
//! **Cancellation**: a future that is dropped leaves its operation in the slab, with the buffer that the kernel may still write, until
//! the completion is there. **The end**: dropping the engine waits for the operations that the kernel has.

use super::cached;
use super::op::{Completion, Op, OpenFile, Request, Slab, Work};
use super::ring::Ring;
use super::threads::Pool;
use headwater_block::{Buffer, BufferMut, Error, ErrorKind, Result};
use rustix::event::{EventfdFlags, eventfd};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::coop::consume_budget;

/// Workers where there is no ring, and beside one.
const WORKERS: usize = 16;
const WORKERS_BESIDE_RING: usize = 2;

/// Which engine is wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum IoMode {
    /// The ring if the system allows it, else threads.
    #[default]
    Auto,
    /// The ring, or an error.
    Ring,
    /// Threads, even if the ring would work.
    Threads,
}

/// Which engine is at work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring.
    Ring,
    /// A pool of worker threads.
    Threads,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EngineKind::Ring => "io_uring",
            EngineKind::Threads => "threads",
        })
    }
}

thread_local! {
    /// The engines of this thread, for their drivers. A driver is spawned as a task that could move to another thread, so it holds a
    /// number, not the engine; on a runtime of one thread it finds it here.
    static ENGINES: RefCell<Vec<(u64, Weak<Engine>)>> = const { RefCell::new(Vec::new()) };
    static NEXT_ID: Cell<u64> = const { Cell::new(0) };
}

/// The file engine of one thread, shared by all its files: submits their requests in batches, owns the buffers that the kernel uses, and
/// waits for the kernel when it is dropped. Files keep it alive.
pub struct Engine {
    id: u64,
    kind: EngineKind,
    why_threads: Option<String>,
    state: RefCell<State>,
    /// The eventfd that ring and workers write. It is never read: tokio's epoll is edge-triggered, and each write is an edge.
    ready: AsyncFd<OwnedFd>,
}

struct State {
    ring: Option<Ring>,
    pool: Pool,
    ops: Slab,
    /// Operations that have yet to be handed to the ring or the pool.
    queue: VecDeque<u32>,
    driver: Option<Waker>,
    /// The driver was woken and will run.
    woken: bool,
    /// Kept between turns for their memory; empty.
    completions: Vec<Completion>,
    tasks: Vec<Waker>,
    /// The ring failed for good, with this errno.
    broken: Option<i32>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Engine({})", self.kind)
    }
}

impl Engine {
    /// An engine for the calling thread. Must be called within the tokio runtime (of one thread, with I/O enabled) that will run
    /// its files' requests. Errors: `Unsupported` if the ring is demanded and the system has none or forbids it.
    pub fn new(mode: IoMode) -> Result<Rc<Self>> {
        let runtime = tokio::runtime::Handle::try_current().map_err(|_| {
            Error::new(ErrorKind::InvalidInput, "the file engine must be made within a tokio runtime")
        })?;
        if runtime.runtime_flavor() != tokio::runtime::RuntimeFlavor::CurrentThread {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "the file engine needs a tokio runtime of one thread, because a disk belongs to one thread",
            ));
        }
        let failed = |err: io::Error| Error::from_io(err, "make the file engine's eventfd");
        let event =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|err| failed(err.into()))?;
        let for_workers = event.try_clone().map_err(failed)?;
        let (ring, why_threads) = match mode {
            IoMode::Threads => (None, None),
            IoMode::Ring | IoMode::Auto => match Ring::new(event.as_fd()) {
                Ok(ring) => (Some(ring), None),
                Err(err) if mode == IoMode::Auto => (None, Some(err.to_string())),
                Err(err) => {
                    let message = format!(
                        "cannot use io_uring: {err}; allow it (sysctl kernel.io_uring_disabled, the container's seccomp profile), \
                         or use threads for file I/O"
                    );
                    return Err(Error::new(ErrorKind::Unsupported, message));
                }
            },
        };
        let (kind, workers) = match ring {
            Some(_) => (EngineKind::Ring, WORKERS_BESIDE_RING),
            None => (EngineKind::Threads, WORKERS),
        };
        let state = State {
            ring,
            pool: Pool::new(for_workers, workers),
            ops: Slab::default(),
            queue: VecDeque::new(),
            driver: None,
            woken: true,
            completions: Vec::new(),
            tasks: Vec::new(),
            broken: None,
        };
        // SAFETY: the descriptor belongs to the `AsyncFd`, which takes it out of the event loop before closing it; nobody else closes it.
        let ready = unsafe { AsyncFd::register_with_interest(event, Interest::READABLE) };
        let ready = ready.map_err(|err| failed(err.into()))?;
        let id = NEXT_ID.replace(NEXT_ID.get() + 1);
        let engine = Rc::new(Self { id, kind, why_threads, state: RefCell::new(state), ready });
        ENGINES.with_borrow_mut(|engines| engines.push((id, Rc::downgrade(&engine))));
        runtime.spawn(poll_fn(move |cx| match find(id) {
            Some(engine) => engine.drive(cx),
            None => Poll::Ready(()),
        }));
        Ok(engine)
    }

    /// What does the work.
    pub fn kind(&self) -> EngineKind {
        self.kind
    }

    /// Why there is no ring although [`IoMode::Auto`] would have liked one.
    pub fn why_threads(&self) -> Option<&str> {
        self.why_threads.as_deref()
    }

    /// Reads from `offset` until at least `want` bytes of `buf` are filled or the file ends. Gives back the buffer and how many are.
    pub(super) async fn read(
        &self,
        file: &Rc<OpenFile>,
        offset: u64,
        mut buf: BufferMut,
        want: usize,
    ) -> io::Result<(BufferMut, usize)> {
        let done = if file.alignment.get() > 1 { 0 } else { cached::read(file, offset, &mut buf) };
        if done >= want {
            // Nobody waited, so nobody else had a turn. Whoever reads on and on must not keep the thread to himself.
            consume_budget().await;
            return Ok((buf, done));
        }
        match self.start(file, Work::Read { buf, offset, want }, done).await? {
            (Work::Read { buf, .. }, count) => Ok((buf, count as usize)),
            _ => unreachable!("the work of a read is a read"),
        }
    }

    /// Writes all of `data` at `offset`; if `durable`, it is on the medium afterwards.
    pub(super) async fn write(
        &self,
        file: &Rc<OpenFile>,
        offset: u64,
        data: Buffer,
        durable: bool,
    ) -> io::Result<()> {
        self.start(file, Work::Write { data, offset, durable }, 0).await.map(drop)
    }

    /// Does a request that carries no memory (neither `Read` nor `Write`).
    pub(super) async fn plain(&self, file: &Rc<OpenFile>, request: Request) -> io::Result<u64> {
        self.start(file, Work::Plain(request), 0).await.map(|(_, result)| result)
    }

    fn start(&self, file: &Rc<OpenFile>, work: Work, done: usize) -> Running<'_> {
        let mut state = self.state.borrow_mut();
        let slot = state.ops.insert(Op::new(file.clone(), work, done));
        state.queue.push_back(slot);
        if !state.woken {
            state.woken = true;
            if let Some(driver) = &state.driver {
                driver.wake_by_ref();
            }
        }
        Running { engine: self, slot: Some(slot) }
    }

    /// One turn of the driver.
    fn drive(&self, cx: &mut Context<'_>) -> Poll<()> {
        // Asked before reaping, so that what comes afterwards wakes the driver again.
        loop {
            match self.ready.poll_read_ready(cx) {
                Poll::Ready(Ok(mut guard)) => guard.clear_ready(),
                // The runtime is shutting down: no task will ask for anything more.
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => break,
            }
        }
        let mut state = self.state.borrow_mut();
        if !state.driver.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            state.driver = Some(cx.waker().clone());
        }
        state.woken = false;
        let mut tasks = std::mem::take(&mut state.tasks);
        let again = state.turn(&mut tasks);
        state.woken |= again;
        // A waker may drop a task and with it a future of ours, so that nothing may be borrowed here.
        drop(state);
        if again {
            cx.waker().wake_by_ref();
        }
        tasks.drain(..).for_each(Waker::wake);
        self.state.borrow_mut().tasks = tasks;
        Poll::Pending
    }
}

fn find(id: u64) -> Option<Rc<Engine>> {
    ENGINES.with_borrow(|engines| engines.iter().find(|(other, _)| *other == id)?.1.upgrade())
}

impl State {
    /// Submits and reaps until there is nothing more to do at once. Collects the tasks to wake. True if the driver must come back
    /// although nothing may wake it, because the kernel was short of something.
    fn turn(&mut self, tasks: &mut Vec<Waker>) -> bool {
        if let Some(ring) = &mut self.ring {
            ring.silence();
        }
        loop {
            let progress = self.submit(tasks) | self.reap(tasks);
            if progress && !self.queue.is_empty() {
                continue;
            }
            let Some(ring) = &mut self.ring else { return false };
            if !ring.listen() {
                return ring.has_unsubmitted();
            }
            // Looked at with the eventfd on, because it may only seem so: the kernel sets its "work is pending" flag after it has put up
            // the work, which may be done by then. Such a flag stays until there is work again; going round for it would never end.
            if !(self.submit(tasks) | self.reap(tasks)) {
                return self.ring.as_mut().is_some_and(Ring::has_unsubmitted);
            }
            if let Some(ring) = &mut self.ring {
                ring.silence();
            }
        }
    }

    /// Moves operations from the queue to the kernel. True if at least one was moved.
    fn submit(&mut self, tasks: &mut Vec<Waker>) -> bool {
        let mut progress = false;
        while let Some(&slot) = self.queue.front() {
            let op = self.ops.get(slot);
            if op.abandoned && op.is_harmless_to_drop() {
                self.queue.pop_front();
                self.ops.remove(slot);
                continue;
            }
            let call = op.call();
            let in_ring = self.ring.is_some() && Ring::takes(&call);
            let result = match (&mut self.ring, self.broken) {
                (_, Some(errno)) => Err(io::Error::from_raw_os_error(errno)),
                (Some(ring), _) if in_ring => {
                    // SAFETY: the operation owns the buffer and the file that the call names, and stays in the slab until the
                    // completion has been reaped: see `finish`, `break_down` and `Engine::drop`.
                    if !unsafe { ring.push(slot, call) } {
                        break;
                    }
                    Ok(())
                }
                // SAFETY: as above.
                _ => unsafe { self.pool.push(slot, call) },
            };
            self.queue.pop_front();
            progress = true;
            match result {
                Ok(()) => self.ops.get(slot).run(in_ring),
                Err(err) => self.finish(slot, -i64::from(err.raw_os_error().unwrap_or(libc::EIO)), tasks),
            }
        }
        let entered = self.ring.as_mut().map_or(Ok(()), Ring::submit);
        if let Err(err) = entered {
            self.break_down(err.raw_os_error().unwrap_or(libc::EIO), tasks);
        }
        progress
    }

    /// Takes results. True if there were any.
    fn reap(&mut self, tasks: &mut Vec<Waker>) -> bool {
        let mut completions = std::mem::take(&mut self.completions);
        if let Some(ring) = &mut self.ring {
            ring.reap(&mut completions);
        }
        self.pool.reap(&mut completions);
        let progress = !completions.is_empty();
        for completion in completions.drain(..) {
            self.finish(completion.slot, completion.result, tasks);
        }
        self.completions = completions;
        progress
    }

    /// The kernel is done with one call of an operation.
    fn finish(&mut self, slot: u32, result: i64, tasks: &mut Vec<Waker>) {
        let op = self.ops.get(slot);
        op.running = false;
        if op.abandoned {
            self.ops.remove(slot);
        } else if op.advance(result) {
            tasks.extend(op.waker.take());
        } else {
            self.queue.push_back(slot);
        }
    }

    /// The ring refuses to be entered. Nobody knows what it still does, so what runs there keeps its slot and its memory for ever.
    fn break_down(&mut self, errno: i32, tasks: &mut Vec<Waker>) {
        tracing::error!(errno, "io_uring failed; all requests to files fail from now on");
        self.broken = Some(errno);
        for op in self.ops.iter_mut() {
            if op.running && op.in_ring {
                op.lose(errno);
                tasks.extend(op.waker.take());
            }
        }
        // Completions that may still come name slots of lost operations; nobody reaps them.
        std::mem::forget(self.ring.take());
    }
}

impl Drop for Engine {
    /// Waits for what the kernel still does: it writes into buffers that the slab frees next. Files must not be in use any more;
    /// their futures borrow the engine, so they are not.
    fn drop(&mut self) {
        // At the end of a thread the list may be gone; then so are the drivers.
        let _ = ENGINES.try_with(|engines| engines.borrow_mut().retain(|(id, _)| *id != self.id));
        let state = self.state.get_mut();
        let mut tasks = Vec::new();
        state.turn(&mut tasks);
        while let Some(ring) = &mut state.ring
            && ring.running() > 0
        {
            if let Err(err) = ring.wait() {
                state.break_down(err.raw_os_error().unwrap_or(libc::EIO), &mut tasks);
            }
            state.turn(&mut tasks);
        }
        if state.broken.is_some() {
            std::mem::forget(std::mem::take(&mut state.ops));
        }
        // Now the driver finds no engine and ends. The pool's own drop, which comes before the slab's (fields drop in the order in
        // which they are declared), waits for the workers.
        if let Some(driver) = state.driver.take() {
            driver.wake();
        }
    }
}

/// A running operation. Dropping it lets the operation run on alone.
struct Running<'a> {
    engine: &'a Engine,
    /// Present until the result was taken.
    slot: Option<u32>,
}

impl Future for Running<'_> {
    type Output = io::Result<(Work, u64)>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let slot = self.slot.expect("not polled after its end");
        let mut state = self.engine.state.borrow_mut();
        let op = state.ops.get(slot);
        if let Some(result) = op.result.take() {
            let work = state.ops.reclaim(slot);
            drop(state);
            self.slot = None;
            return Poll::Ready(result.and_then(|count| Ok((work?, count))));
        }
        let known = op.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
        let old = if known { None } else { op.waker.replace(cx.waker().clone()) };
        // The last waker of a task may take the task with it, and that its other operations: nothing may be borrowed then.
        drop(state);
        drop(old);
        Poll::Pending
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let Some(slot) = self.slot else { return };
        let mut state = self.engine.state.borrow_mut();
        let op = state.ops.get(slot);
        let waker = op.waker.take();
        if op.result.is_some() {
            let _ = state.ops.reclaim(slot);
        } else {
            op.abandoned = true;
        }
        drop(state);
        // As above.
        drop(waker);
    }
}

#[cfg(test)]
mod tests;
