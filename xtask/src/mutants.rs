//! `cargo xtask mutants`: mistakes are made in a copy of the product on purpose, one at a time, and a test must notice each.
//!
//! A test of power cuts that never fails proves little. Each **mutant** (`list`) is a change of some text of the product: a barrier left out, a
//! cluster used again too early. The copy (`scratch`), below `target`, holds all of them, each behind a switch that
//! is set when a test starts, so that it is built once. The tree itself knows nothing of this.
//!
//! First the tests must pass without any mistake. Then each mutant is run with the tests that should notice it, and at least one of them
//! must fail. A mutant that survives, or whose text isn't in the tree any more, is a problem.

mod compressed;
mod jobs;
mod list;
mod scratch;

use std::collections::BTreeSet;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use compressed::COMPRESSED;
use jobs::JOBS;
use list::{IMAGES, Test};
use scratch::Scratch;

/// A deliberate mistake.
pub(crate) struct Mutant {
    /// What is wrong.
    name: &'static str,
    edits: &'static [Edit],
    /// The tests that should notice it, the likeliest first.
    tests: &'static [Test],
}

/// A change of the text of a file. `MUTANT` in the new text stands for "this mutant is the one that runs".
pub(crate) struct Edit {
    file: &'static str,
    /// It is there once.
    from: &'static str,
    to: &'static str,
}

/// How long one test may take. One that hangs has noticed something, too.
const MOST_TIME: Duration = Duration::from_secs(100);

/// All of them.
fn all() -> impl Iterator<Item = &'static Mutant> {
    IMAGES.iter().chain(COMPRESSED).chain(JOBS)
}

/// Runs every mutant, or those whose names contain `only`. Returns what is wrong, a line each.
pub(crate) fn run(only: Option<&str>) -> Result<Vec<String>> {
    let chosen: Vec<&Mutant> =
        all().filter(|mutant| only.is_none_or(|only| mutant.name.contains(only))).collect();
    if chosen.is_empty() {
        bail!("no mutant has such a name");
    }
    let scratch = Scratch::prepare(all())?;
    let mut problems = Vec::new();
    let tests: BTreeSet<Test> = chosen.iter().flat_map(|mutant| mutant.tests).copied().collect();
    for test in &tests {
        if let Some(how) = fails(&scratch, *test, "")? {
            problems.push(format!("{}: {how} without any mistake", test.name));
        }
    }
    if !problems.is_empty() {
        return Ok(problems);
    }
    for mutant in &chosen {
        let start = now();
        let mut noticed = None;
        for test in mutant.tests {
            if let Some(how) = fails(&scratch, *test, mutant.name)? {
                noticed = Some(format!("{} {how}", test.name));
                break;
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        match noticed {
            Some(noticed) => println!("{}: {noticed} ({seconds:.1} s)", mutant.name),
            None => problems.push(format!(
                "the mutant `{}` survives: no test notices it; make one that does ({seconds:.1} s)",
                mutant.name
            )),
        }
    }
    println!("{} of {} mutants were noticed", chosen.len() - problems.len(), chosen.len());
    Ok(problems)
}

/// How a test fails with a mutant, if it does.
fn fails(scratch: &Scratch, test: Test, mutant: &str) -> Result<Option<&'static str>> {
    let mut child = Command::new(scratch.binary(test.binary)?)
        .args([test.name, "--exact", "--test-threads=1"])
        .current_dir(scratch.directory_of(test.binary)?)
        .env("HEADWATER_MUTANT", mutant)
        .env("HEADWATER_SEEDS", test.seeds.to_string())
        .env("HEADWATER_NO_SHRINKING", "1")
        .env_remove("HEADWATER_SEED")
        .env("RUST_BACKTRACE", "0")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run the test {}", test.name))?;
    wait(&mut child)
}

#[allow(clippy::disallowed_methods, reason = "children of this program run in real time")]
fn now() -> Instant {
    Instant::now()
}

fn wait(child: &mut Child) -> Result<Option<&'static str>> {
    let start = now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok((!status.success()).then_some("fails"));
        }
        if start.elapsed() > MOST_TIME {
            child.kill()?;
            child.wait()?;
            return Ok(Some("doesn't end"));
        }
        thread::sleep(Duration::from_millis(20));
    }
}
