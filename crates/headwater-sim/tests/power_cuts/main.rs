//! The power is cut everywhere, in everything that is done to qcow2 images: by guests, by jobs, by repairs. See the modules:
//!
//! - `case` and `world`: what is done to which images, all from a seed; `run` does it in the simulator.
//! - `promise`: what a guest may expect afterwards. `verify` holds what is left of the files against that, and against the rules of the format.
//! - `explore` cuts the power at every moment of a run. `repair` does so while an image is repaired. `shrink` makes a case that fails small.
//!
//! Each workload has short runs, of which nearly every state is looked at, and long ones, of which states are sampled. A failure prints the
//! seed; `HEADWATER_SEED=n` replays it, exactly. scripts/soak-power-cuts looks for more of them, and `cargo xtask mutants` makes sure that
//! mistakes in the product are found.

mod case;
mod explore;
mod promise;
mod repair;
mod run;
mod shrink;
mod snapshots;
mod soak;
mod verify;
mod world;

use case::Case;
use explore::{Effort, Tally};
use headwater_sim::for_seeds;
use run::Lies;
use shrink::{Shrunk, shrink};
use world::{Workload, World};

/// How many seeds a test tries, and how many different states it must have looked at then.
struct Plan {
    short: u64,
    long: u64,
    states: u64,
}

const ALONE: Plan = Plan { short: 32, long: 32, states: 9300 };
const BACKED: Plan = Plan { short: 28, long: 28, states: 9600 };
const SNAPSHOT: Plan = Plan { short: 16, long: 16, states: 5700 };
const SNAPSHOTS: Plan = Plan { short: 16, long: 16, states: 4700 };
const COMPRESSED: Plan = Plan { short: 24, long: 24, states: 8800 };
const DATA_FILE: Plan = Plan { short: 20, long: 20, states: 8400 };
const GROWTH: Plan = Plan { short: 12, long: 12, states: 3400 };
const SPARSE: Plan = Plan { short: 30, long: 30, states: 6700 };
const STREAM: Plan = Plan { short: 20, long: 20, states: 14200 };
const STREAM_ABOVE: Plan = Plan { short: 23, long: 23, states: 12500 };
const COMMIT: Plan = Plan { short: 22, long: 18, states: 19000 };
const COMMIT_ACTIVE: Plan = Plan { short: 22, long: 22, states: 15500 };
const REPAIR: Plan = Plan { short: 0, long: 320, states: 1000 };

/// Looks for a failure.
fn look(workload: Workload, seed: u64, short: bool, lies: Lies, tally: &mut Tally) -> Result<(), Shrunk> {
    let effort = match (short, workload) {
        (true, _) => Effort::EXHAUSTIVE,
        // Its images are large.
        (false, Workload::Growth) => Effort { samples: 8, ..Effort::RANDOM },
        (false, _) => Effort::RANDOM,
    };
    let world = World::new(workload, seed, short);
    let case = Case::random(workload, seed, short, world.create.size, world.create.cluster_size);
    explore::explore(&case, &world, effort, lies, tally)
        .map_err(|failure| shrink(&case, &world, effort, lies, failure))
}

/// Looks at many states of a workload.
fn survives(workload: Workload, plan: &Plan) {
    let mut tally = Tally::default();
    for (short, seeds) in [(true, plan.short), (false, plan.long)] {
        for_seeds(seeds, |seed| {
            if let Err(failure) = look(workload, seed, short, Lies::default(), &mut tally) {
                panic!("{workload:?}, {} run: {failure}", if short { "short" } else { "long" });
            }
        });
    }
    report(&format!("{workload:?}"), &tally, plan);
}

/// Says how much was looked at, and makes sure that it was enough.
fn report(what: &str, tally: &Tally, plan: &Plan) {
    println!("{what}: {tally}");
    let chosen = ["HEADWATER_SEED", "HEADWATER_SEEDS"].iter().any(|name| std::env::var_os(name).is_some());
    assert!(chosen || tally.states() >= plan.states, "{} different states are wanted", plan.states);
}

#[test]
fn an_image_survives_power_cuts() {
    survives(Workload::Alone, &ALONE);
}

#[test]
fn an_image_whose_backing_link_changes_survives_power_cuts() {
    survives(Workload::Backed, &BACKED);
}

#[test]
fn an_image_with_a_snapshot_survives_power_cuts() {
    survives(Workload::Snapshot, &SNAPSHOT);
}

#[test]
fn internal_snapshots_survive_power_cuts() {
    survives(Workload::Snapshots, &SNAPSHOTS);
}

#[test]
fn compressed_clusters_survive_power_cuts() {
    survives(Workload::Compressed, &COMPRESSED);
}

#[test]
fn an_external_data_file_survives_power_cuts() {
    survives(Workload::DataFile, &DATA_FILE);
}

#[test]
fn tables_that_grow_survive_power_cuts() {
    survives(Workload::Growth, &GROWTH);
}

#[test]
fn tables_that_are_made_survive_power_cuts() {
    survives(Workload::Sparse, &SPARSE);
}

#[test]
fn a_stream_survives_power_cuts_and_goes_on() {
    survives(Workload::Stream, &STREAM);
}

#[test]
fn a_stream_of_what_lies_above_a_base_survives_power_cuts_and_goes_on() {
    survives(Workload::StreamAbove, &STREAM_ABOVE);
}

#[test]
fn a_commit_survives_power_cuts() {
    survives(Workload::Commit, &COMMIT);
}

#[test]
fn an_active_commit_survives_power_cuts() {
    survives(Workload::CommitActive, &COMMIT_ACTIVE);
}

#[test]
fn a_repair_survives_power_cuts() {
    let mut tally = Tally::default();
    for_seeds(REPAIR.long, |seed| {
        repair::explore(seed, 16, &mut tally).unwrap_or_else(|error| panic!("{error}"));
    });
    report("Repair", &tally, &REPAIR);
}

/// All of these together are what a run of the tests looks at.
#[test]
fn there_are_enough_states() {
    let plans = [
        ALONE,
        BACKED,
        SNAPSHOT,
        SNAPSHOTS,
        COMPRESSED,
        DATA_FILE,
        GROWTH,
        SPARSE,
        STREAM,
        STREAM_ABOVE,
        COMMIT,
        COMMIT_ACTIVE,
        REPAIR,
    ];
    assert!(plans.iter().map(|plan| plan.states).sum::<u64>() >= 100_000);
}

/// Storage that forgets flushes is noticed, and the case that shows it becomes small.
#[test]
fn storage_that_lies_is_noticed_and_the_case_shrinks() {
    let lies = Lies { no_flush: true };
    let found: Vec<Shrunk> = (0..8)
        .filter_map(|seed| look(Workload::Alone, seed, false, lies, &mut Tally::default()).err())
        .collect();
    assert!(found.len() >= 7, "{} of 8 seeds notice it", found.len());
    let smallest = found.iter().min_by_key(|shrunk| shrunk.steps).expect("there are some");
    println!("{smallest}");
    assert!(
        smallest.steps <= 2 && smallest.of >= 20,
        "shrunk to {} of {} steps",
        smallest.steps,
        smallest.of
    );
    assert!(smallest.text.contains("lost: ") && smallest.text.contains("the power is cut after event"));
}
