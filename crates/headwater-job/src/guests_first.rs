//! Guests first: joins the [`Budget`] with the guests that it is told of and with the engine that keeps to it.

use crate::budget::{Allowance, Budget, GuestLatencyGoal, SILENCE};
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
    /// When to ask again.
    again: Option<Again>,
}

/// See [`GuestsFirst::poll`].
struct Again {
    when: LocalFuture<'static, ()>,
    /// Or earlier, when a guest's request ends: nothing may be copied now.
    rests: bool,
}

impl GuestsFirst {
    /// Watches the guests whose requests are counted there, beside copies from a source that is `far` away or not.
    pub(crate) fn new(guests: Option<&Rc<GuestLatency>>, far: bool) -> Self {
        let budget = Budget::new(GuestLatencyGoal::default(), far);
        Self { watching: guests.map(GuestLatency::watch), budget, again: None }
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
        self.again = None;
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
            Allowance::Some { target, copy } => {
                // What is in flight may be stuck, and with it the guest: its silence allows more.
                self.again = Some(Again { when: clock.sleep_until(now + SILENCE), rests: false });
                Some((target, copy))
            }
            Allowance::Rest(until) => {
                window.held_back();
                self.again = Some(Again { when: clock.sleep_until(until), rests: true });
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

    /// Ready when it is time to ask again: a rest is over, or a guest's request ended meanwhile; or guests have been silent.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let (Some(again), Some(watching)) = (&mut self.again, &self.watching) else { return Poll::Pending };
        if again.when.as_mut().poll(cx).is_ready() || again.rests && watching.meter().has_news() {
            self.again = None;
            return Poll::Ready(());
        }
        if again.rests {
            watching.meter().wake_when_one_goes(cx);
        }
        Poll::Pending
    }
}
