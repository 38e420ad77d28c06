//! Makes a failing case small, and tells it in words.

use crate::case::Case;
use crate::explore::{Effort, Failure, Tally, depth_of, explore, try_run};
use crate::run::Lies;
use crate::verify::verify;
use crate::world::World;
use headwater_sim::Cuts;
use std::fmt::{self, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How many smaller cases are tried.
const MOST_TRIES: usize = 120;

/// A failing case with as few steps as were found to fail, and in words.
pub(crate) struct Shrunk {
    pub(crate) steps: usize,
    /// How many there were.
    pub(crate) of: usize,
    pub(crate) text: String,
}

impl fmt::Display for Shrunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shrunk to {} of {} steps:\n{}", self.steps, self.of, self.text)
    }
}

/// Takes steps away from a failing case for as long as it fails, then makes what survives simple.
pub(crate) fn shrink(case: &Case, world: &World, effort: Effort, lies: Lies, failure: Failure) -> Shrunk {
    let (mut case, of) = (case.clone(), case.steps.len());
    let mut failure = failure;
    // Who only wants to know that it fails need not wait.
    let mut tries = if std::env::var_os("HEADWATER_NO_SHRINKING").is_some() { MOST_TRIES } else { 0 };
    let mut part = case.steps.len() / 2;
    while part > 0 && tries < MOST_TRIES {
        let mut at = 0;
        while at < case.steps.len() && tries < MOST_TRIES {
            let mut smaller = case.clone();
            smaller.steps.drain(at..(at + part).min(smaller.steps.len()));
            tries += 1;
            match explore(&smaller, world, effort, lies, &mut Tally::default()) {
                Err(again) => (case, failure) = (smaller, again),
                Ok(()) => at += part,
            }
        }
        part /= 2;
    }
    Shrunk { steps: case.steps.len(), of, text: describe(&case, world, effort, lies, &failure) }
}

/// A failure in words, with what survives made as simple as possible.
fn describe(case: &Case, world: &World, effort: Effort, lies: Lies, failure: &Failure) -> String {
    let mut text = format!(
        "{:?} with {:?}, cache of {} bytes, alignment {}\n",
        case.workload, world.create, world.cache_size, world.alignment
    );
    for (number, step) in case.steps.iter().enumerate() {
        let _ = writeln!(text, "  {}. {step}", number + 1);
    }
    let Some((moment, choice)) = &failure.cut else {
        let _ = writeln!(text, "goes wrong without a power cut: {}", failure.error);
        return text;
    };
    let Ok(run) = try_run(case, world, lies) else { return text };
    let mut cuts = Cuts::new(&run.history);
    while cuts.moment() < *moment && cuts.advance() {}
    let allowed = run.promises.allowed(*moment);
    let depth = depth_of(cuts.hash(choice), effort);
    let look = |choice: &_| {
        let files = cuts.files(choice);
        let looked = || verify(world, &run, *moment, &allowed, &files, depth, cuts.hash(choice));
        catch_unwind(AssertUnwindSafe(looked)).unwrap_or_else(|_| Err(failure.error.clone()))
    };
    let simple = cuts.simplify(choice, |choice| look(choice).is_err());
    let error = look(&simple).err().unwrap_or_else(|| failure.error.clone());
    let _ = writeln!(text, "the power is cut after event {moment} of {}:", run.history.events.len());
    text + &cuts.describe(&simple) + "and then: " + &error + "\n"
}
