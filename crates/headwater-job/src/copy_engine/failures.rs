//! What the engine does with work that failed: it waits for the source, tries again at the end, or gives up.

use super::{Engine, Run, len};
use crate::control::Action;
use crate::outage::{self, Ended};
use headwater_block::Error;
use headwater_block::chain::Missing;
use headwater_block::copy_up::Failed;
use std::ops::Range;

/// A piece of work.
#[derive(Debug, Clone)]
pub(crate) enum At {
    /// A copy.
    Copy(Missing),
    /// A look for what is to be copied.
    Look(Range<u64>),
}

/// Work that failed because the source can't be reached.
pub(crate) struct Trouble {
    pub(crate) failed: Failed,
    pub(crate) at: At,
}

impl Trouble {
    /// How many bytes of it are known to be data, and how many were not looked at yet.
    pub(super) fn bytes(&self) -> (u64, u64) {
        match &self.at {
            At::Copy(run) if run.zero => (0, 0),
            At::Copy(run) => (len(&run.range), 0),
            At::Look(range) => (0, len(range)),
        }
    }
}

/// Work that failed and is tried again.
#[derive(Default)]
pub(super) struct Failures {
    pub(super) copies: Vec<Missing>,
    pub(super) looks: Vec<Range<u64>>,
    pub(super) first: Option<Error>,
}

impl Failures {
    pub(super) fn bytes(&self) -> u64 {
        let ranges = self.copies.iter().map(|missing| &missing.range).chain(&self.looks);
        ranges.map(|range| range.end - range.start).sum()
    }
}

impl Run<'_> {
    /// Takes note of an error. One that ends the job is returned.
    pub(super) fn failed(&mut self, failed: Failed, at: At) -> Option<Error> {
        // While everything is being given up, an error changes nothing: that part is tried again, or the job ends anyway. Nor does one more
        // while the source is out of reach.
        let recalled = self.engine.control.is_recalled(&failed.error);
        if self.abort.is_aborted() || recalled || self.trouble.is_some() && failed.error.kind().may_pass() {
            self.keep(at, false);
            return None;
        }
        if outage::is_outage(&failed, &self.engine.control) {
            self.trouble = Some(Trouble { failed, at });
            return None;
        }
        self.decide(failed, at)
    }

    /// Puts work where it is found again: when it is its turn, or at the end.
    fn keep(&mut self, at: At, until_the_end: bool) {
        match (at, until_the_end) {
            (At::Copy(what), false) => self.put(what),
            (At::Copy(what), true) => self.failures.copies.push(what),
            (At::Look(range), false) => self.scanner.again(range),
            (At::Look(range), true) => self.failures.looks.push(range),
        }
    }

    /// Decides what is done about an error.
    fn decide(&mut self, failed: Failed, at: At) -> Option<Error> {
        let action = self.engine.control.action(failed.operation, failed.error.kind());
        self.keep(at, action == Action::Ignore);
        self.engine.control.report(&failed, action);
        match action {
            Action::Report => return Some(failed.error),
            Action::Ignore => {
                self.failures.first.get_or_insert(failed.error);
            }
            Action::Stop => {}
        }
        None
    }

    /// Waits, paused, until the source can be reached. An error that ends the job is returned.
    pub(super) async fn wait_out(&mut self) -> Option<Error> {
        self.withdraw().await;
        self.engine.let_go();
        let trouble = self.trouble.as_ref()?;
        let Engine { copier, control, .. } = &*self.engine;
        let ended = outage::wait_out(copier, control, trouble).await;
        let Trouble { at, .. } = self.trouble.take()?;
        self.engine.window.restart();
        self.engine.meter.restart(self.engine.copier.clock().now());
        match ended {
            Ended::Again => {
                self.keep(at, false);
                None
            }
            Ended::Failed(failed) => self.decide(failed, at),
        }
    }

    /// Tries once more what has failed.
    pub(super) fn try_again(&mut self) {
        self.tried_again = true;
        let failures = std::mem::take(&mut self.failures);
        failures.copies.into_iter().for_each(|missing| self.put(missing));
        failures.looks.into_iter().for_each(|range| self.scanner.again(range));
    }
}
