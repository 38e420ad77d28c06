//! Worker threads that do requests with plain system calls.
//!
//! They carry everything where io_uring is forbidden, and beside the ring what it has no operation for (lseek, ftruncate). Workers
//! start when there is work that nobody idle can take, up to a limit, and stay. A worker that finishes puts its result on a list
//! and, if the list was empty, writes the eventfd that the engine's driver waits for.

use super::op::{Call, Completion};
use super::syscalls;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// A worker runs system calls and nothing deep.
const STACK_BYTES: usize = 128 << 10;

struct Job {
    slot: u32,
    call: Call,
}

// SAFETY: a job holds an address, but who pushed it vouched that the memory is valid for the request until the completion is
// reaped, and that nobody else touches it meanwhile, on whatever thread. The buffer's handle, which is not `Send`, stays behind.
unsafe impl Send for Job {}

struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    /// Signalled for each job, and when the queue closes.
    work: Condvar,
    done: Mutex<Vec<Completion>>,
    ready: OwnedFd,
}

/// A pool of workers.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    limit: usize,
}

/// No code panics while it holds these locks, and what they guard is consistent at every step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool of up to `limit` threads (at least 1) that writes the eventfd `ready` when completions can be reaped.
    pub(super) fn new(ready: OwnedFd, limit: usize) -> Self {
        let queue = Queue { jobs: VecDeque::new(), idle: 0, closed: false };
        let shared =
            Shared { queue: Mutex::new(queue), work: Condvar::new(), done: Mutex::new(Vec::new()), ready };
        Self { shared: Arc::new(shared), workers: Vec::new(), limit }
    }

    /// Hands a call to a worker. Fails, without having taken it, only if not one worker can be started.
    ///
    /// # Safety
    /// The descriptor stays open, and the memory that the call names valid and untouched by others, until the completion for
    /// `slot` has been reaped or the pool has been dropped.
    pub(super) unsafe fn push(&mut self, slot: u32, call: Call) -> io::Result<()> {
        let mut queue = lock(&self.shared.queue);
        if queue.idle <= queue.jobs.len() && self.workers.len() < self.limit {
            let shared = self.shared.clone();
            let worker = std::thread::Builder::new()
                .name("headwater-io".into())
                .stack_size(STACK_BYTES)
                .spawn(move || shared.run());
            match worker {
                Ok(worker) => self.workers.push(worker),
                // Those that there are will come to it.
                Err(_) if !self.workers.is_empty() => {}
                Err(err) => return Err(err),
            }
        }
        queue.jobs.push_back(Job { slot, call });
        drop(queue);
        self.shared.work.notify_one();
        Ok(())
    }

    /// Appends what was completed since the last call.
    pub(super) fn reap(&mut self, into: &mut Vec<Completion>) {
        if !self.workers.is_empty() {
            into.append(&mut lock(&self.shared.done));
        }
    }
}

impl Drop for Pool {
    /// Waits until the workers have done all that was pushed, so that they touch no memory afterwards.
    fn drop(&mut self) {
        lock(&self.shared.queue).closed = true;
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            // A worker doesn't panic; if one did, it is gone all the same.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn next(&self) -> Option<Job> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue.idle += 1;
            queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }

    fn run(&self) {
        while let Some(job) = self.next() {
            // SAFETY: who pushed the job vouched for it until its completion is reaped, which is put up only below.
            let result = unsafe { syscalls::perform(job.call) };
            let mut done = lock(&self.done);
            let first = done.is_empty();
            done.push(Completion { slot: job.slot, result });
            drop(done);
            if first {
                // Adding 1 fails only when 2^64 - 2 wake-ups are unread.
                let _ = rustix::io::write(&self.ready, &ready_count());
            }
        }
    }
}

/// What is added to an eventfd, in the byte order of the machine, which is what eventfd takes.
fn ready_count() -> [u8; 8] {
    if cfg!(target_endian = "big") { 1_u64.to_be_bytes() } else { 1_u64.to_le_bytes() }
}
