//! Leave to copy: from the job's own speed limit, and from the one that it shares with other jobs ([`SharedLimiter`](headwater_block::SharedLimiter)).
//!
//! Both count bytes of data, before the copy begins; holes and zeroes pass. What a source needn't be asked for, because it is in memory, doesn't count in the
//! shared limit, which is there for the sake of the link. A job waits for its turn with nothing in hand, so a drain never waits for it; one that pauses, for
//! whatever reason, or ends, waits no more and takes no turn from others.

use super::{Engine, Run, len};
use crate::control::Control;
use headwater_block::chain::Missing;
use headwater_block::{Clock, LocalFuture, Share};
use std::ops::Range;
use std::rc::Rc;
use std::task::{Context, Poll};

/// Copies of a limited job are so small that it moves so many times a second, or the link would stand still in between.
const COPIES_PER_SECOND: u64 = 8;

/// Leave from one limit, for one copy.
#[derive(Default)]
struct Leave {
    /// Waits for leave to copy so many bytes, at the limit that it was asked at.
    pending: Option<(u64, u64, LocalFuture<'static, ()>)>,
    granted: Option<u64>,
}

impl Leave {
    /// True if there is leave; if not, it will be waited for as `ask` says.
    fn has(&mut self, bytes: u64, limit: u64, ask: impl FnOnce() -> LocalFuture<'static, ()>) -> bool {
        if self.granted.is_some() {
            return true;
        }
        // A change of the limit cancels what was reserved at the old one.
        if self.pending.as_ref().is_none_or(|(_, at_limit, _)| *at_limit != limit) {
            self.pending = Some((bytes, limit, ask()));
        }
        false
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some((bytes, _, pending)) = &mut self.pending else { return Poll::Pending };
        let bytes = *bytes;
        pending.as_mut().poll(cx).map(|()| {
            self.pending = None;
            self.granted = Some(bytes);
        })
    }
}

/// Leave from all limits of a job.
#[derive(Default)]
pub(super) struct Leaves {
    own: Leave,
    shared: Leave,
}

impl Leaves {
    /// True while leave is waited for.
    pub(super) fn is_waiting(&self) -> bool {
        self.own.pending.is_some() || self.shared.pending.is_some()
    }

    /// Ready when leave was given.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.own.poll(cx).is_ready() | self.shared.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        Poll::Pending
    }
}

/// How large a copy of `bytes` is at `rate`; 0 is without limit.
fn at_rate(bytes: u64, rate: u64) -> u64 {
    if rate == 0 { bytes } else { bytes.min((rate / COPIES_PER_SECOND).next_power_of_two()) }
}

impl Run<'_> {
    /// How many bytes of data one copy takes.
    pub(super) fn copy_size(&self) -> u64 {
        let Leaves { own, shared } = &self.leaves;
        let granted = [own.granted, shared.granted].into_iter().flatten().min();
        let now = self.engine.copier.clock().now();
        let staggered = || match self.staggers() {
            true => self.engine.window.staggered(self.copy, now),
            false => self.copy,
        };
        let size = granted.unwrap_or_else(staggered);
        if self.engine.holds() {
            return size;
        }
        let control = &self.engine.control;
        let size = at_rate(size, control.limiter().rate());
        control.share().map_or(size, |share| at_rate(size, share.rate()))
    }

    /// Whether copies are staggered. Limited ones don't fill any link; and where jobs share a source they are cut alike, so that what one has fetched another needn't be
    /// given leave for.
    pub(super) fn staggers(&self) -> bool {
        self.engine.window.staggers() && !self.engine.control.is_limited()
    }

    /// Whether there is leave to copy `what` now, which is used up then; if not, it will be waited for.
    pub(super) fn has_leave(&mut self, what: &Missing) -> bool {
        let Engine { control, copier, held, .. } = &*self.engine;
        let Leaves { own, shared } = &mut self.leaves;
        let bytes = len(&what.range);
        let limiter = control.limiter();
        let share = control.share().filter(|share| share.limit() > 0);
        if share.is_none() {
            *shared = Leave::default();
        }
        let share = share.filter(|_| !copier.is_at_hand(&what.range));
        if held.is_some() {
            // Guests wait for it.
            self.leaves = Leaves::default();
            if let Some(share) = share {
                share.count(bytes);
            }
            return true;
        }
        if limiter.rate() == 0 {
            *own = Leave::default();
        } else {
            let ask = || -> LocalFuture<'static, ()> {
                let (limiter, clock) = (limiter.clone(), copier.clock().clone());
                Box::pin(async move { limiter.acquire(bytes, &*clock).await })
            };
            if !own.has(bytes, limiter.rate(), ask) {
                return false;
            }
        }
        if let Some(share) = share {
            // A change of the shared limit is seen by those who wait there.
            if !shared.has(bytes, 0, || Box::pin(async move { share.acquire(bytes).await })) {
                return false;
            }
            shared.granted = None;
        }
        own.granted = None;
        true
    }

    /// Waits for leave to copy `range` ahead of a guest.
    pub(super) fn leave_ahead(&self, range: &Range<u64>) -> impl Future<Output = ()> + use<> {
        let Engine { control, copier, .. } = &*self.engine;
        let share = control.share().filter(|_| !copier.is_at_hand(range));
        leave(control.clone(), share, copier.clock().clone(), len(range))
    }
}

async fn leave(control: Rc<Control>, share: Option<Rc<Share>>, clock: Rc<dyn Clock>, bytes: u64) {
    if control.limiter().rate() > 0 {
        control.limiter().acquire(bytes, &*clock).await;
    }
    if let Some(share) = share {
        share.acquire(bytes).await;
    }
}
