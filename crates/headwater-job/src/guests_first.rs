//! Guests first: joins the [`Budget`] with the guests that it is told of and with the engine that keeps to it.

use crate::budget::{Allowance, Budget, GuestLatencyGoal};
use crate::window::Window;
use headwater_block::guest_latency::{GuestLatency, Watching};
use headwater_block::{Clock, LocalFuture};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

/// See the module. Without guests it allows everything.
pub(crate) struct GuestsFirst {
    watching: Option<Watching>,
    budget: Budget,
    /// Copies rest until then.
    rest: Option<LocalFuture<'static, ()>>,
}

impl GuestsFirst {
    /// Watches the guests whose requests are counted there, beside copies from a source that is `far` away or not.
    pub(crate) fn new(guests: Option<&Rc<GuestLatency>>, far: bool) -> Self {
        let budget = Budget::new(GuestLatencyGoal::default(), far);
        Self { watching: guests.map(GuestLatency::watch), budget, rest: None }
    }

    /// How many bytes guests leave to copies, of which `copies` are in flight, and how large a copy may be; none while they must have the disk for
    /// themselves. Without a goal, no guest is there.
    pub(crate) fn leave(
        &mut self,
        goal: Option<GuestLatencyGoal>,
        window: &mut Window,
        copies: usize,
        clock: &dyn Clock,
    ) -> Option<(u64, u64)> {
        self.rest = None;
        let all = Some((window.target(), window.copy()));
        let (Some(watching), Some(goal)) = (&self.watching, goal) else { return all };
        let now = clock.now();
        self.budget.set_goal(goal);
        self.budget.way_holds(window.held());
        let seen = watching.meter().take();
        self.budget.observe(&seen, copies, now);
        if seen.came + seen.went > 0 {
            let (depth, duty) = self.budget.knobs();
            tracing::trace!(depth, duty, window = window.target(), came = seen.came, "beside guests");
        }
        match self.budget.allowance(window.target(), window.copy(), now) {
            Allowance::All => all,
            Allowance::Some { target, copy } => Some((target, copy)),
            Allowance::Rest(until) => {
                window.held_back();
                self.rest = Some(clock.sleep_until(until));
                None
            }
        }
    }

    /// `copy`, of so many bytes, which begins now: until it ends, guests' requests aren't quiet.
    pub(crate) fn beside<T: 'static>(
        &mut self,
        bytes: u64,
        now: Duration,
        copy: LocalFuture<'static, T>,
    ) -> LocalFuture<'static, T> {
        self.budget.begun(bytes, now);
        let Some(watching) = &self.watching else { return copy };
        let copying = watching.meter().copying();
        Box::pin(async move {
            let _copying = copying;
            copy.await
        })
    }

    /// Ready when a rest is over, or when a guest's request ended meanwhile: then it is time to ask again.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let (Some(rest), Some(watching)) = (&mut self.rest, &self.watching) else { return Poll::Pending };
        if rest.as_mut().poll(cx).is_ready() || watching.meter().has_news() {
            return Poll::Ready(());
        }
        watching.meter().wake_when_one_goes(cx);
        Poll::Pending
    }
}
