//! Threads for work that needs the processor for so long that a disk's thread shouldn't do it: compressing.
//!
//! One pool for the process. Threads start when there is work that nobody idle can take, up to one for each processor, and stay. Work is done in
//! the order in which it was asked for, whoever asked.

use headwater_block::workers::{Work, Workers};
use headwater_block::{Error, ErrorKind, LocalFuture, Result};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// The most threads, however many processors there are: one disk's thread gives them no more than they can do.
const MOST: usize = 8;

/// The threads of this process.
pub static THREADS: &(dyn Workers + Sync) = &POOL;

static POOL: Pool = Pool { queue: Mutex::new(Queue::new()), work: Condvar::new() };

#[derive(Debug)]
struct Pool {
    queue: Mutex<Queue>,
    /// Signalled for each job.
    work: Condvar,
}

struct Queue {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

struct Job {
    work: Work,
    result: oneshot::Sender<Vec<u8>>,
}

impl Queue {
    const fn new() -> Self {
        Self { jobs: VecDeque::new(), threads: 0, idle: 0 }
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { jobs, threads, idle } = self;
        write!(f, "{} jobs for {threads} threads, {idle} of them idle", jobs.len())
    }
}

impl Pool {
    /// No code panics while it holds the lock, and what it guards is consistent at every step.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a job into the queue, and sees to it that somebody comes to it. Gives it back if there is nobody.
    fn push(&'static self, job: Job) -> Option<Job> {
        let mut queue = self.lock();
        let most = std::thread::available_parallelism().map_or(1, |most| most.get().min(MOST));
        if queue.idle <= queue.jobs.len() && queue.threads < most {
            let thread =
                std::thread::Builder::new().name("headwater-cpu".into()).spawn(move || POOL.work_for_ever());
            match thread {
                Ok(_) => queue.threads += 1,
                // Those that there are will come to it.
                Err(_) if queue.threads > 0 => {}
                Err(_) => return Some(job),
            }
        }
        queue.jobs.push_back(job);
        drop(queue);
        self.work.notify_one();
        None
    }

    fn next(&self) -> Job {
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return job;
            }
            queue.idle += 1;
            queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }

    fn work_for_ever(&self) {
        loop {
            let Job { work, result } = self.next();
            // Nobody needs it any more.
            if result.is_closed() {
                continue;
            }
            if let Ok(done) = catch_unwind(AssertUnwindSafe(work)) {
                let _nobody_waits = result.send(done);
            }
        }
    }
}

impl Workers for Pool {
    fn run(&self, work: Work) -> LocalFuture<'static, Result<Vec<u8>>> {
        let (result, done) = oneshot::channel();
        let alone = POOL.push(Job { work, result });
        Box::pin(async move {
            if let Some(job) = alone {
                return Ok((job.work)());
            }
            done.await.map_err(|_| Error::new(ErrorKind::Io, "a worker thread gave up what it was to do"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::future::join_all;

    #[test]
    fn all_work_is_done_by_a_few_threads() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            for round in 0..20_u8 {
                let all = (0..100_u8).map(|n| THREADS.run(Box::new(move || vec![round, n])));
                for (n, done) in (0..).zip(join_all(all).await) {
                    assert_eq!(done.unwrap(), [round, n]);
                }
            }
            let threads = POOL.lock().threads;
            assert!((1..=MOST).contains(&threads), "{threads} threads");
        });
    }

    #[test]
    fn a_panic_is_an_error_and_the_thread_goes_on() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            for _ in 0..2 * MOST {
                let error = THREADS.run(Box::new(|| panic!("this is a test"))).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Io);
            }
            assert_eq!(THREADS.run(Box::new(|| vec![1])).await.unwrap(), [1]);
        });
    }

    #[test]
    fn what_nobody_waits_for_keeps_nobody_waiting() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            for _ in 0..100 {
                drop(THREADS.run(Box::new(Vec::new)));
            }
            assert_eq!(THREADS.run(Box::new(|| vec![2])).await.unwrap(), [2]);
        });
    }
}
