//! The search without an end: scripts/soak-power-cuts.

use crate::explore::Tally;
use crate::run::Lies;
use crate::world::Workload;
use crate::{look, repair};
use std::time::{Duration, Instant};

/// Every workload, with the test that replays a seed of it.
const TESTS: [(Workload, &str); 12] = [
    (Workload::Alone, "an_image_survives_power_cuts"),
    (Workload::Backed, "an_image_whose_backing_link_changes_survives_power_cuts"),
    (Workload::Snapshot, "an_image_with_a_snapshot_survives_power_cuts"),
    (Workload::Snapshots, "internal_snapshots_survive_power_cuts"),
    (Workload::Compressed, "compressed_clusters_survive_power_cuts"),
    (Workload::DataFile, "an_external_data_file_survives_power_cuts"),
    (Workload::Growth, "tables_that_grow_survive_power_cuts"),
    (Workload::Sparse, "tables_that_are_made_survive_power_cuts"),
    (Workload::Stream, "a_stream_survives_power_cuts_and_goes_on"),
    (Workload::StreamAbove, "a_stream_of_what_lies_above_a_base_survives_power_cuts_and_goes_on"),
    (Workload::Commit, "a_commit_survives_power_cuts"),
    (Workload::CommitActive, "an_active_commit_survives_power_cuts"),
];

/// How often it says how far it is.
const REPORT: Duration = Duration::from_secs(30);

#[test]
#[ignore = "runs until it is stopped: scripts/soak-power-cuts"]
#[allow(clippy::disallowed_methods, reason = "how long it runs is a matter of the real clock")]
fn soak() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("it is a number"));
    let end = number("HEADWATER_SOAK_SECONDS").map(Duration::from_secs);
    let first = number("HEADWATER_SOAK_FROM").unwrap_or(1_000_000);
    let (start, mut reported) = (Instant::now(), Duration::ZERO);
    let mut total = 0;
    for seed in first.. {
        // States of different seeds differ, so those of a seed can be forgotten.
        let fail = |test: &str, error: &dyn std::fmt::Display| {
            println!("{error}\nseed {seed} fails; replay with");
            println!(
                "  HEADWATER_SEED={seed} cargo nextest run -p headwater-sim --test power_cuts --no-capture {test}"
            );
            panic!("seed {seed} of {test} fails");
        };
        for (workload, test) in TESTS {
            for short in [true, false] {
                let mut tally = Tally::default();
                if let Err(failure) = look(workload, seed, short, Lies::default(), &mut tally) {
                    fail(test, &failure);
                }
                total += tally.states();
            }
        }
        let mut tally = Tally::default();
        if let Err(error) = repair::explore(seed, 16, &mut tally) {
            fail("a_repair_survives_power_cuts", &error);
        }
        total += tally.states();
        let passed = start.elapsed();
        let over = end.is_some_and(|end| passed >= end);
        if over || passed - reported >= REPORT {
            reported = passed;
            let rate = total as f64 / passed.as_secs_f64();
            println!(
                "seeds {first}..={seed}: {total} different states in {} s, {rate:.0} a second",
                passed.as_secs()
            );
        }
        if over {
            return;
        }
    }
}
