//! Worker threads that do requests with plain system calls.
//!
//! They carry everything where io_uring is forbidden, and beside the ring what it has no operation for (lseek, ftruncate). Workers
//! start when there is work that nobody idle can take, up to a limit, and stay. A worker that finishes puts its result on a list
//! and, if the list was empty, writes the eventfd that the engine's driver waits for.
//!
//! **One worker at a time writes to a file** through the page cache: most file systems let only one do so anyway, and the others would burn their time
//! waiting for its lock. Writes that must be durable are apart from that: those wait for the device, side by side.

use super::op::{Call, Completion, Request};
use super::syscalls;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
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

impl Job {
    /// The file that it needs for itself.
    fn needs(&self) -> Option<RawFd> {
        let alone = matches!(self.call.request, Request::Write { durable: false, .. }) && !self.call.direct;
        alone.then_some(self.call.fd)
    }
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
    /// Files that a worker has for itself.
    taken: Vec<RawFd>,
}

impl Queue {
    /// Takes the first job that can be done now.
    fn take(&mut self) -> Option<Job> {
        let at = self.jobs.iter().position(|job| !self.must_wait(job))?;
        let job = self.jobs.remove(at)?;
        self.taken.extend(job.needs());
        Some(job)
    }

    fn must_wait(&self, job: &Job) -> bool {
        job.needs().is_some_and(|file| self.taken.contains(&file))
    }

    /// True if whoever has the job's file, or is on the way to a job of that file, comes to this one afterwards.
    fn is_behind_another(&self, job: &Job) -> bool {
        let file = job.needs();
        file.is_some() && (self.must_wait(job) || self.jobs.iter().any(|other| other.needs() == file))
    }
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
        let queue = Queue::default();
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
        let job = Job { slot, call };
        if queue.is_behind_another(&job) {
            queue.jobs.push_back(job);
            return Ok(());
        }
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
        queue.jobs.push_back(job);
        let wake = queue.idle > 0;
        drop(queue);
        if wake {
            self.shared.work.notify_one();
        }
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
    /// The next job, after one that had `file` for itself.
    fn next(&self, file: Option<RawFd>) -> Option<Job> {
        let mut queue = lock(&self.queue);
        queue.taken.retain(|taken| Some(*taken) != file);
        loop {
            if let Some(job) = queue.take() {
                // Nobody was woken for what waited for the file.
                if queue.idle > 0 && file.is_some() && queue.jobs.iter().any(|job| !queue.must_wait(job)) {
                    self.work.notify_one();
                }
                return Some(job);
            }
            // Those that wait for a file are for whoever has it.
            if queue.closed {
                return None;
            }
            queue.idle += 1;
            queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }

    fn run(&self) {
        let mut file = None;
        while let Some(job) = self.next(file) {
            file = job.needs();
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

#[cfg(test)]
mod tests {
    use super::super::testing::scratch_file;
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::os::fd::AsRawFd;
    use std::time::{Duration, Instant};

    const JOBS: u32 = 2000;

    /// Pushes reads and writes, durable or not, of three files, in bursts, and waits until as many have come back.
    #[expect(clippy::disallowed_methods, reason = "workers take real time")]
    fn all_come_back(limit: usize) {
        let files = [scratch_file(), scratch_file(), scratch_file()];
        let ready = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let mut pool = Pool::new(ready, limit);
        let mut memory = vec![[0_u8; 512]; JOBS as usize];
        let mut completions = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(20);
        for (slot, bytes) in (0..JOBS).zip(&mut memory) {
            let (ptr, len, offset) = (bytes.as_mut_ptr(), 512, u64::from(slot) * 512);
            let request = match slot % 7 {
                0 => Request::Read { ptr, len, offset },
                1 => Request::Write { ptr, len, offset, durable: slot % 49 == 1 },
                _ => Request::Write { ptr, len, offset, durable: false },
            };
            let fd = files[(slot / 5 % 3) as usize].as_file().as_raw_fd();
            // SAFETY: files and memory outlive the pool, and nobody else uses the memory.
            unsafe { pool.push(slot, Call { fd, request, may_block: false, direct: false }) }.unwrap();
            // A pause now and then, in which the workers fall asleep.
            while slot % 40 == 39 && completions.len() <= slot as usize && Instant::now() < deadline {
                pool.reap(&mut completions);
                std::thread::yield_now();
            }
        }
        while completions.len() < JOBS as usize && Instant::now() < deadline {
            pool.reap(&mut completions);
            std::thread::yield_now();
        }
        assert!(lock(&pool.shared.queue).taken.len() <= limit);
        drop(pool);
        let mut slots: Vec<u32> = completions.iter().map(|completion| completion.slot).collect();
        slots.sort_unstable();
        assert!(slots.into_iter().eq(0..JOBS), "each once, none forgotten");
    }

    #[test]
    fn no_job_is_forgotten_behind_another_of_its_file() {
        all_come_back(1);
        all_come_back(2);
        all_come_back(8);
    }

    #[test]
    fn one_worker_has_a_file_while_others_do_the_rest() {
        let write = |slot, fd, durable| {
            let request = Request::Write { ptr: std::ptr::null(), len: 0, offset: 0, durable };
            Job { slot, call: Call { fd, request, may_block: false, direct: false } }
        };
        let mut queue = Queue::default();
        let first = write(0, 7, false);
        assert!(!queue.is_behind_another(&first), "it needs a worker");
        queue.jobs.push_back(first);
        assert!(queue.is_behind_another(&write(1, 7, false)));
        assert!(!queue.is_behind_another(&write(1, 8, false)));
        assert!(!queue.is_behind_another(&write(1, 7, true)), "durable ones wait side by side");
        queue.jobs.extend([write(1, 7, false), write(2, 8, false), write(3, 7, true)]);
        let taken: Vec<u32> = std::iter::from_fn(|| queue.take()).map(|job| job.slot).collect();
        assert_eq!(taken, [0, 2, 3]);
        queue.taken.clear();
        assert_eq!(queue.take().map(|job| job.slot), Some(1));
    }
}
