//! Mistakes in what jobs and guests do side by side, and the tests that should notice them.

use super::list::Test;
use super::{Edit, Mutant};

const BACKUP: Test =
    Test { binary: "backup", name: "a_backup_among_guests_is_what_the_disk_was", seeds: 100 };
const MOMENT: Test = Test {
    binary: "backup_windows",
    name: "the_moment_comes_when_changes_that_are_under_way_have_ended",
    seeds: 1,
};

const GROUP: Test = Test { binary: "group", name: "all_complete_or_none_whatever_happens", seeds: 300 };
const GROUP_COMMIT: Test = Test {
    binary: "group",
    name: "a_cancel_that_comes_after_the_commit_point_of_another_has_lost",
    seeds: 1,
};
const FLEECING: Test =
    Test { binary: "fleecing", name: "readers_see_the_moment_whatever_guests_do", seeds: 300 };
const FORGOTTEN: Test =
    Test { binary: "fleecing", name: "what_is_forgotten_is_neither_saved_nor_read_any_more", seeds: 20 };
const RECALL: Test = Test { binary: "recall", name: "a_backup_ends_and_guests_that_save_go_on", seeds: 1 };

const fn limit(name: &'static str) -> Test {
    Test { binary: "shared_limiter", name, seeds: 20 }
}

const SHARES: Test = limit("those_that_wait_share_by_weight_whatever_their_sizes");
const RESTS: Test = limit("what_one_does_not_use_the_others_have");
const LEAVES: Test = limit("one_that_leaves_while_it_waits_counts_nowhere");
const CHANGES: Test = limit("changes_of_the_limit_and_of_weights_count_at_once_for_those_that_wait");

const SHARED_LIMITER: &str = "crates/headwater-block/src/shared_limiter.rs";

/// Mistakes in backups, moments, groups of jobs, and limits that jobs share.
pub(super) const JOBS: &[Mutant] = &[
    Mutant {
        name: "a backup: changes don't have the granules for themselves that they save",
        edits: &[Edit {
            file: "crates/headwater-block/src/disk/write.rs",
            from: "        if let Some(more) = self.needs_to_save(aligned) {",
            to: "        if let Some(more) = self.needs_to_save(aligned).filter(|_| !MUTANT) {",
        }],
        tests: &[BACKUP],
    },
    Mutant {
        name: "a backup: changes don't wait until what was there is saved",
        edits: &[Edit {
            file: "crates/headwater-block/src/disk/changes.rs",
            from: "        if self.points.borrow().is_empty() {",
            to: "        if MUTANT || self.points.borrow().is_empty() {",
        }],
        tests: &[BACKUP],
    },
    Mutant {
        name: "a backup: a granule counts as saved when its copy begins",
        edits: &[Edit {
            file: "crates/headwater-block/src/copy_before_write.rs",
            from: "        let mut at = run.start;\n        while at < run.end {",
            to: "        let mut at = run.start;\n        if MUTANT { self.pending.clear(run.clone()); }\n        while at < run.end {",
        }],
        tests: &[BACKUP],
    },
    Mutant {
        name: "a backup: the job doesn't lock what it copies",
        edits: &[Edit {
            file: "crates/headwater-block/src/copy_before_write.rs",
            from: "acquire(Token::for_request(), range.clone(), Mode::Shared);",
            to: "acquire(Token::for_request(), if MUTANT { 0..0 } else { range.clone() }, Mode::Shared);",
        }],
        tests: &[BACKUP],
    },
    Mutant {
        name: "a backup: the moment comes in the middle of changes",
        edits: &[Edit {
            file: "crates/headwater-block/src/disk/changes.rs",
            from: "        let _drained = self.drain().await;\n        let point",
            to: "        let _drained = if MUTANT { None } else { Some(self.drain().await) };\n        let point",
        }],
        tests: &[MOMENT],
    },
    Mutant {
        name: "a moment is read without the lock",
        edits: &[Edit {
            file: "crates/headwater-block/src/copy_before_write/reading.rs",
            from: "range.clone(), Mode::Shared).await;\n        let top = self.source.top();",
            to: "if MUTANT { 0..0 } else { range.clone() }, Mode::Shared).await;\n        let top = self.source.top();",
        }],
        tests: &[FLEECING],
    },
    Mutant {
        name: "a moment: what somebody is reading is forgotten",
        edits: &[Edit {
            file: "crates/headwater-block/src/copy_before_write/reading.rs",
            from: "acquire(Token::for_request(), whole.clone(), Mode::Exclusive);",
            to: "acquire(Token::for_request(), if MUTANT { 0..0 } else { whole.clone() }, Mode::Exclusive);",
        }],
        tests: &[FORGOTTEN],
    },
    Mutant {
        name: "a backup: a cancel fails the guests that are saving",
        edits: &[Edit {
            file: "crates/headwater-block/src/copy_before_write.rs",
            from: "            Err(error) if !self.is_over() => error,",
            to: "            Err(error) if MUTANT || !self.is_over() => error,",
        }],
        tests: &[RECALL],
    },
    Mutant {
        name: "jobs that end together: one that fails leaves the others alone",
        edits: &[Edit {
            file: "crates/headwater-job/src/lifecycle.rs",
            from: "            control.give_up();",
            to: "            if !MUTANT { control.give_up(); }",
        }],
        tests: &[GROUP],
    },
    Mutant {
        name: "jobs that end together: one waits for nobody",
        edits: &[Edit {
            file: "crates/headwater-job/src/control.rs",
            from: "control.is_decided() || group.have_all_done()",
            to: "MUTANT || control.is_decided() || group.have_all_done()",
        }],
        tests: &[GROUP],
    },
    Mutant {
        name: "jobs that end together: a cancel counts after the commit point of another",
        edits: &[Edit {
            file: "crates/headwater-job/src/control.rs",
            from: "        self.committed.get() || !self.cancelled.get()",
            to: "        (!MUTANT && self.committed.get()) || !self.cancelled.get()",
        }],
        tests: &[GROUP_COMMIT],
    },
    Mutant {
        name: "a shared limit: weights don't count",
        edits: &[Edit {
            file: SHARED_LIMITER,
            from: "u128::from(units) * SCALE / u128::from(self.weight)",
            to: "u128::from(units) * SCALE / if MUTANT { 100 } else { u128::from(self.weight) }",
        }],
        tests: &[SHARES],
    },
    Mutant {
        name: "a shared limit: who rests saves up",
        edits: &[Edit {
            file: SHARED_LIMITER,
            from: "line.tag = line.tag.max(limiter.tag.get());\n            }",
            to: "if !MUTANT { line.tag = line.tag.max(limiter.tag.get()); }\n            }",
        }],
        tests: &[RESTS],
    },
    Mutant {
        name: "a shared limit: who leaves lets nobody go on",
        edits: &[Edit {
            file: SHARED_LIMITER,
            from: "        self.share.limiter.wake_head();\n",
            to: "        if !MUTANT { self.share.limiter.wake_head(); }\n",
        }],
        tests: &[LEAVES],
    },
    Mutant {
        name: "a shared limit: a new one isn't told to those who wait",
        edits: &[Edit {
            file: SHARED_LIMITER,
            from: "            self.limiter.set_rate(rate);\n            self.wake_head();",
            to: "            self.limiter.set_rate(rate);\n            if !MUTANT { self.wake_head(); }",
        }],
        tests: &[CHANGES],
    },
    Mutant {
        name: "a shared limit: zeroes count",
        edits: &[Edit {
            file: "crates/headwater-job/src/copy_engine.rs",
            from: "if !what.zero && !self.has_leave(&what) {",
            to: "if (MUTANT || !what.zero) && !self.has_leave(&what) {",
        }],
        tests: &[Test { binary: "shared_limit", name: "zeroes_over_a_base_do_not_count", seeds: 3 }],
    },
    Mutant {
        name: "a shared limit: a paused job keeps its turn",
        edits: &[Edit {
            file: "crates/headwater-job/src/copy_engine.rs",
            from: "        self.leaves = Leaves::default();\n        while let Some(done)",
            to: "        if !MUTANT { self.leaves = Leaves::default(); }\n        while let Some(done)",
        }],
        tests: &[Test {
            binary: "shared_limit",
            name: "jobs_share_a_limit_by_weight_and_keep_to_their_own_speeds",
            seeds: 3,
        }],
    },
    Mutant {
        name: "a shared limit: what is in memory counts",
        edits: &[Edit {
            file: "crates/headwater-job/src/copy_engine/leave.rs",
            from: "share.filter(|_| !copier.is_at_hand(&what.range))",
            to: "share.filter(|_| MUTANT || !copier.is_at_hand(&what.range))",
        }],
        tests: &[Test { binary: "shared_limit", name: "what_disks_share_of_a_source_counts_once", seeds: 3 }],
    },
];
