//! One request: on one replica after the other, on two at once when the first is slow, until one has answered.
//!
//! Whatever reads nothing but a replica may be dropped at any time, and so those that are overtaken are.

use super::attempts::Attempts;
use super::pace::{Pace, Started};
use super::replica::add;
use super::{LEAST_PATIENCE, PATIENCE, ReplicasNode};
use crate::buffer::BufferMut;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::node::LocalFuture;
use futures_util::future::{Either, select};
use std::ops::Range;
use std::pin::pin;
use std::time::Duration;

/// Reads of at most so many bytes are hedged: guests' misses, not a job's copies, which nobody waits for.
const HEDGED: u64 = 512 << 10;

/// The first and the longest pause before all replicas are asked again.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How long a read waits for a stalled replica before it looks again whether there is another.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What is asked.
pub(super) enum Request {
    Read { offset: u64, len: usize },
    Status(Range<u64>),
}

/// What is answered.
pub(super) enum Answer {
    Data(BufferMut),
    Extent(Extent),
}

impl Request {
    /// How many bytes come.
    fn len(&self) -> u64 {
        match self {
            Self::Read { len, .. } => *len as u64,
            Self::Status(_) => 0,
        }
    }

    fn offset(&self) -> u64 {
        match self {
            Self::Read { offset, .. } => *offset,
            Self::Status(range) => range.start,
        }
    }
}

/// What is known of an attempt, by the number of its replica.
struct Running {
    replica: usize,
    started: Started,
    hedge: bool,
    /// The replica was left when it was asked.
    last_resort: bool,
    /// When the replica counts as stalled; none once it does.
    stalls_at: Option<Duration>,
}

impl ReplicasNode {
    /// Asks until one has answered, or all have failed for as long as requests are tried again.
    pub(super) async fn ask(&self, request: &Request) -> Result<Answer> {
        add(&self.counters.reads, 1);
        self.earn_hedge();
        let begun = self.clock.now();
        self.last_read.set(begun);
        let mut pause = PAUSE;
        loop {
            let error = match self.race(request).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let again = self.clock.now() + pause;
            let passing = matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::TimedOut);
            if !passing || again > begun + self.options.retry {
                return Err(error);
            }
            self.clock.sleep_until(again).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn race(&self, request: &Request) -> Result<Answer> {
        let len = request.len();
        let mut tried = 0;
        let mut failed = Vec::new();
        let mut attempts = Attempts::new();
        let mut running: Vec<Running> = Vec::new();
        let mut hedge_at = None;
        loop {
            if attempts.is_empty() {
                let Some(next) = self.choose(len, tried, true) else { return Err(self.none_left(&failed)) };
                if !failed.is_empty() {
                    add(&self.counters.failovers, 1);
                }
                let run = self.start(request, next, &mut tried, &mut attempts, false);
                if failed.is_empty() && len <= HEDGED && len > 0 {
                    let slow = self.replicas[next].slow_after(&run.started);
                    hedge_at = slow.map(|slow| run.started.at() + slow);
                }
                running.push(run);
            }
            let alarm = running.iter().filter_map(|run| run.stalls_at).chain(hedge_at).min();
            let ended = match alarm {
                None => Some(attempts.next().await),
                Some(at) => match select(pin!(attempts.next()), self.clock.sleep_until(at)).await {
                    Either::Left((ended, _)) => Some(ended),
                    Either::Right(((), _)) => None,
                },
            };
            let now = self.clock.now();
            let Some((at, result)) = ended else {
                if hedge_at.is_some_and(|hedge_at| hedge_at <= now) {
                    hedge_at = None;
                    if let Some(next) = self.choose(len, tried, false)
                        && self.take_hedge()
                    {
                        add(&self.counters.hedges, 1);
                        running.push(self.start(request, next, &mut tried, &mut attempts, true));
                    }
                }
                self.find_stalled(&mut running, request, now);
                // Who waits only for stalled ones goes elsewhere, as long as there is a good one.
                let stalled = running.iter().all(|run| run.stalls_at.is_none());
                if stalled && let Some(next) = self.choose(len, tried, false) {
                    add(&self.counters.failovers, 1);
                    running.push(self.start(request, next, &mut tried, &mut attempts, false));
                }
                continue;
            };
            let Some(which) = running.iter().position(|run| run.replica == at) else { continue };
            let run = running.swap_remove(which);
            let replica = &self.replicas[at];
            match result {
                Ok(answer) => {
                    replica.succeeded(&run.started, len, now);
                    for other in attempts.replicas() {
                        if let Some(run) = running.iter().find(|run| run.replica == other) {
                            self.replicas[other].overtaken(&run.started, now);
                        }
                    }
                    if run.hedge {
                        add(&self.counters.hedges_won, 1);
                    }
                    if run.last_resort {
                        self.trust(replica);
                    }
                    return Ok(answer);
                }
                Err(error) => {
                    replica.failed_at.set(request.offset());
                    self.judge(replica, error.clone());
                    failed.push((at, error));
                }
            }
        }
    }

    /// Leaves replicas that have kept this request waiting too long.
    fn find_stalled(&self, running: &mut [Running], request: &Request, now: Duration) {
        for run in running {
            if run.stalls_at.is_none_or(|at| at > now) {
                continue;
            }
            let replica = &self.replicas[run.replica];
            let others = self.replicas.iter().enumerate().any(|(at, r)| at != run.replica && r.is_good());
            // Without another to go to it is better than none; one may come back.
            run.stalls_at = (!others).then_some(now + LOOK_AGAIN);
            if others {
                let waited = now.saturating_sub(run.started.at()).as_secs_f64();
                let message = format!(
                    "{}: {} bytes at {} have not come for {waited:.1} s, {:.3} s were expected",
                    replica.name,
                    request.len(),
                    request.offset(),
                    Pace::expected_of(&run.started).as_secs_f64()
                );
                replica.failed_at.set(request.offset());
                self.judge(replica, Error::new(ErrorKind::TimedOut, message));
            }
        }
    }

    fn start<'a>(
        &'a self,
        request: &Request,
        at: usize,
        tried: &mut u32,
        attempts: &mut Attempts<'a, Result<Answer>>,
        hedge: bool,
    ) -> Running {
        *tried |= 1 << at;
        let replica = &self.replicas[at];
        let in_flight = replica.start(request.len(), self.clock.now());
        let started = in_flight.started;
        let last_resort = !replica.is_good();
        let attempt: LocalFuture<'a, Result<Answer>> = match request {
            Request::Read { offset, len } => {
                let (offset, len) = (*offset, *len);
                Box::pin(async move {
                    let _in_flight = in_flight;
                    let child = self.opened(replica, replica.open().await)?;
                    Ok(Answer::Data(child.read(offset, BufferMut::new(len)).await?))
                })
            }
            Request::Status(range) => {
                let range = range.clone();
                Box::pin(async move {
                    let _in_flight = in_flight;
                    let child = self.opened(replica, replica.open().await)?;
                    Ok(Answer::Extent(child.status(range).await?))
                })
            }
        };
        attempts.push(at, attempt);
        let patience = (Pace::expected_of(&started) * PATIENCE).max(LEAST_PATIENCE);
        Running { replica: at, started, hedge, last_resort, stalls_at: Some(started.at() + patience) }
    }

    /// Why nobody answered: this time, or, of those that aren't trusted, before.
    fn none_left(&self, failed: &[(usize, Error)]) -> Error {
        let mut all = failed.to_vec();
        for (at, replica) in self.replicas.iter().enumerate() {
            if let super::Health::Distrusted { error } = replica.health()
                && !all.iter().any(|(other, _)| *other == at)
            {
                all.push((at, error));
            }
        }
        all_failed(&all)
    }
}

/// The error of a request that failed on all replicas.
pub(super) fn all_failed(failed: &[(usize, Error)]) -> Error {
    if let [(_, error)] = failed {
        return error.clone();
    }
    let hope = |error: &Error| match error.kind() {
        ErrorKind::Unavailable => 0,
        ErrorKind::TimedOut => 1,
        ErrorKind::WrongContent | ErrorKind::SourceChanged => 3,
        _ => 2,
    };
    let kind = failed.iter().map(|(_, error)| error).min_by_key(|error| hope(error)).map(Error::kind);
    let each: Vec<_> = failed.iter().map(|(_, error)| error.to_string()).collect();
    let message = format!("all {} replicas failed: {}", failed.len(), each.join("; "));
    Error::new(kind.unwrap_or(ErrorKind::Unavailable), message)
}
