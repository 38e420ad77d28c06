//! Guests first: joins the [`Budget`] with the guests that it is told of and with the engine that keeps to it.

use crate::budget::{Allowance, Budget, GuestLatencyGoal};
use crate::window::Window;
use headwater_block::guest_latency::{Copying, GuestLatency, Watching};
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
    /// Watches the guests whose requests are counted there.
    pub(crate) fn new(guests: Option<&Rc<GuestLatency>>) -> Self {
        let budget = Budget::new(GuestLatencyGoal::default());
        Self { watching: guests.map(GuestLatency::watch), budget, rest: None }
    }

    /// What copies may do now, with so many in flight.
    pub(crate) fn allowance(
        &mut self,
        goal: GuestLatencyGoal,
        window: &Window,
        copies: usize,
        clock: &dyn Clock,
    ) -> Allowance {
        self.rest = None;
        let Some(watching) = &self.watching else { return Allowance::All };
        let now = clock.now();
        self.budget.set_goal(goal);
        self.budget.observe(&watching.meter().take(), copies, now);
        let allowance = self.budget.allowance(window.target(), window.copy(), now);
        if let Allowance::Rest(until) = allowance {
            self.rest = Some(clock.sleep_until(until));
        }
        allowance
    }

    /// A copy of `bytes` begins, and is in flight until the answer is dropped.
    pub(crate) fn copying(&mut self, bytes: u64, now: Duration) -> Option<Copying> {
        self.budget.begun(bytes, now);
        self.watching.as_ref().map(|watching| watching.meter().copying())
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
