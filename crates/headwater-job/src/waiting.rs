//! A job that pauses itself: it can't go on without something that may come by itself, waits for that, and goes on. Nobody need do anything.
//!
//! - **To those who watch it is paused**, as if a user had done it: nothing is in flight, and the state is `paused` (`standby` if it was
//!   ready). [`Wait`] and [`Event::Waits`] say what it waits for; [`Event::GoesOn`] says when that is over.
//! - **A user's commands count at once.** A cancel ends the job. A pause ends the wait, and the job stays paused until it is resumed. To resume a job
//!   that waits means to try again now.
//! - What is waited for is a future of the job's own, which looks now and then or is told. It must give up soon when its [`Abort`] is thrown, and is
//!   polled to its end: it may read.

use crate::control::{Control, Event, Wish};
use crate::state::Status;
use futures_util::future::{Either, select};
use headwater_block::{Abort, Error};
use std::fmt;
use std::pin::pin;
use std::time::Duration;

/// What a job that has paused itself waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Waiting {
    /// The source: it can't be reached.
    Source,
    /// Room: copies would leave less free than they should.
    Space,
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Waiting::Source => "source",
            Waiting::Space => "space",
        })
    }
}

/// A wait that isn't over.
#[derive(Debug, Clone)]
pub struct Wait {
    /// What for.
    pub what: Waiting,
    /// What happened.
    pub error: Error,
    /// Since when, by the clock of the job's disk.
    pub since: Duration,
}

impl Control {
    /// Pauses the job until `over` completes, which is made with the switch that tells it to give up. `None` if a user's command ended the wait;
    /// if that was a pause, this returns when the job is resumed. Nothing of the job may be in flight.
    pub(crate) async fn pause_itself<T, F: Future<Output = T>>(
        &self,
        wait: Wait,
        over: impl FnOnce(std::rc::Rc<Abort>) -> F,
    ) -> Option<T> {
        // race-mark: job-pauses-itself
        if self.wish() != Wish::Go {
            return None;
        }
        let worked = self.status();
        self.go(if worked == Status::Ready { Status::Standby } else { Status::Paused });
        let what = wait.what;
        self.set_wait(Some(wait.clone()));
        self.tell(Event::Waits(wait));
        let abort = Abort::new();
        let over = pin!(over(abort.clone()));
        let command = self.wait_until(|control| control.wish() != Wish::Go || control.wait().is_none());
        let over = match select(over, pin!(command)).await {
            Either::Left((over, _)) => Some(over),
            Either::Right(((), over)) => {
                abort.abort();
                over.await;
                None
            }
        };
        self.set_wait(None);
        self.tell(Event::GoesOn(what));
        self.wait_until(|control| control.wish() != Wish::Pause).await;
        self.go(worked);
        over
    }
}
