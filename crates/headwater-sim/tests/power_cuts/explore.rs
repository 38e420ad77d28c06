//! Cuts the power everywhere in a run, and looks at what is left.

use crate::case::Case;
use crate::run::{Lies, Run, run};
use crate::verify::{Depth, verify};
use crate::world::World;
use headwater_sim::power_cut::Choice;
use headwater_sim::{Cuts, Rng};
use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How many states are looked at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effort {
    /// Moments with at most so many choices have all of them tried.
    pub(crate) all_up_to: u64,
    /// How many are tried at others.
    pub(crate) samples: u64,
    /// One state in so many is used.
    pub(crate) used: u64,
    /// One in so many is shown to QEMU.
    pub(crate) shown: u64,
}

impl Effort {
    pub(crate) const RANDOM: Effort = Effort { all_up_to: 16, samples: 16, used: 40, shown: 2000 };
    pub(crate) const EXHAUSTIVE: Effort = Effort { all_up_to: 1 << 12, samples: 200, used: 100, shown: 8000 };
}

/// What was looked at, over many runs.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// States by hash, with the epoch of the promises they were held against.
    seen: HashMap<u64, usize>,
    pub(crate) runs: u64,
    pub(crate) moments: u64,
    /// Moments of which every state was looked at.
    pub(crate) exhausted: u64,
    pub(crate) used: u64,
    pub(crate) shown: u64,
}

impl Tally {
    /// How many different states were looked at.
    pub(crate) fn states(&self) -> u64 {
        self.seen.len() as u64
    }

    /// Notes a state; false if it was held against the same promises already.
    pub(crate) fn is_new(&mut self, hash: u64, epoch: usize) -> bool {
        self.seen.insert(hash, epoch) != Some(epoch)
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally { runs, moments, exhausted, used, shown, .. } = self;
        write!(
            f,
            "{} different states, at {moments} moments ({exhausted} with every state) of {runs} runs; ",
            self.states()
        )?;
        write!(f, "{used} were used on, {shown} shown to QEMU")
    }
}

/// Something that must not be.
pub(crate) struct Failure {
    pub(crate) error: String,
    /// Where the power was cut, and what survived; none if the run itself went wrong.
    pub(crate) cut: Option<(usize, Choice)>,
}

/// Carries out `case`, unless it panics.
pub(crate) fn try_run(case: &Case, world: &World, lies: Lies) -> Result<Run, String> {
    guarded(|| run(case, world, lies))
}

/// Carries out `work`; a panic is an error.
pub(crate) fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_string()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    })
}

/// Cuts the power at every moment of a case's run.
pub(crate) fn explore(
    case: &Case,
    world: &World,
    effort: Effort,
    lies: Lies,
    tally: &mut Tally,
) -> Result<(), Failure> {
    let run = try_run(case, world, lies).map_err(|error| Failure { error, cut: None })?;
    let rng = Rng::new(case.seed ^ 0x6375_7473);
    let mut cuts = Cuts::new(&run.history);
    let mut allowed = run.promises.allowed(0);
    let mut stage = usize::MAX;
    tally.runs += 1;
    loop {
        let moment = cuts.moment();
        // Something may be allowed or forbidden from here on.
        if std::mem::replace(&mut stage, run.promises.stage(moment)) != run.promises.stage(moment) {
            allowed = run.promises.allowed(moment);
        }
        tally.moments += 1;
        let exhaust = cuts.combinations() <= effort.all_up_to;
        tally.exhausted += u64::from(exhaust);
        let mut look = |choice: Choice| {
            let hash = cuts.hash(&choice);
            if !tally.is_new(hash, allowed.epoch + (run.snapshots.stage(moment) << 32)) {
                return Ok(());
            }
            // By the state itself, so that a shrunk choice is looked at in the same way.
            let depth = depth_of(hash, effort);
            tally.used += u64::from(depth != Depth::Plain);
            tally.shown += u64::from(depth == Depth::Reference);
            let files = cuts.files(&choice);
            guarded(|| verify(world, &run, moment, &allowed, &files, depth, hash))
                .map_err(|error| Failure { error, cut: Some((moment, choice)) })
        };
        if exhaust {
            cuts.all().try_for_each(&mut look)?;
        } else {
            [cuts.newest(), cuts.oldest()].into_iter().try_for_each(&mut look)?;
            (0..effort.samples).try_for_each(|_| look(cuts.sample(&rng)))?;
        }
        if !cuts.advance() {
            return Ok(());
        }
    }
}

/// How closely the state with this hash is looked at.
pub(crate) fn depth_of(hash: u64, effort: Effort) -> Depth {
    let at = |every: u64| every > 0 && (hash >> 8).is_multiple_of(every);
    match (at(effort.shown), at(effort.used)) {
        (true, _) => Depth::Reference,
        (false, true) => Depth::Use,
        (false, false) => Depth::Plain,
    }
}
