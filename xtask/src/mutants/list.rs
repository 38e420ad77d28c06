//! The tests that should notice mistakes, and the mistakes about what is durable. Those about jobs beside guests are in `jobs`.

use super::{Edit, Mutant};

/// A test, and how many seeds it gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Test {
    pub(super) binary: &'static str,
    pub(super) name: &'static str,
    pub(super) seeds: u32,
}

/// The tests' programs: package and test.
pub(super) const BINARIES: &[(&str, &str)] = &[
    ("headwater-sim", "power_cuts"),
    ("headwater-sim", "settled"),
    ("headwater-job", "windows"),
    ("headwater-job", "backup"),
    ("headwater-job", "backup_windows"),
    ("headwater-job", "group"),
    ("headwater-job", "recall"),
    ("headwater-block", "fleecing"),
    ("headwater-block", "shared_limiter"),
    ("headwater-job", "shared_limit"),
];

const fn cuts(name: &'static str, seeds: u32) -> Test {
    Test { binary: "power_cuts", name, seeds }
}

const ALONE: Test = cuts("an_image_survives_power_cuts", 12);
const BACKED: Test = cuts("an_image_whose_backing_link_changes_survives_power_cuts", 16);
const SNAPSHOT: Test = cuts("an_image_with_a_snapshot_survives_power_cuts", 6);
const SNAPSHOTS: Test = cuts("internal_snapshots_survive_power_cuts", 12);
const DATA_FILE: Test = cuts("an_external_data_file_survives_power_cuts", 6);
const GROWTH: Test = cuts("tables_that_grow_survive_power_cuts", 8);
const SPARSE: Test = cuts("tables_that_are_made_survive_power_cuts", 16);
const STREAM: Test = cuts("a_stream_survives_power_cuts_and_goes_on", 12);
const COMMIT: Test = cuts("a_commit_survives_power_cuts", 8);
const COMMIT_ACTIVE: Test = cuts("an_active_commit_survives_power_cuts", 8);
const REPAIR: Test = cuts("a_repair_survives_power_cuts", 150);
const SETTLED: Test = Test { binary: "settled", name: "a_successor_finds_what_was_settled", seeds: 20 };
const FLUSHED: Test =
    Test { binary: "settled", name: "what_was_flushed_survives_although_others_flush", seeds: 20 };
const COPY_UP: Test = Test {
    binary: "windows",
    name: "what_guests_do_while_the_source_is_read_wins_and_does_not_wait",
    seeds: 1,
};

const META_WRITER: &str = "crates/headwater-image/src/qcow2/meta_writer.rs";
const NODE: &str = "crates/headwater-image/src/qcow2/node.rs";
const BACKING_LINK: &str = "crates/headwater-image/src/qcow2/backing_link.rs";
const STREAM_JOB: &str = "crates/headwater-job/src/stream.rs";

/// Mistakes in what reaches the disk, and when.
pub(super) const IMAGES: &[Mutant] = &[
    Mutant {
        name: "no barrier before the refcount table",
        edits: &[Edit {
            file: META_WRITER,
            from: "if !snapshot.refcount_table.pieces.is_empty() {\n            barrier(&mut unflushed).await?;",
            to: "if !snapshot.refcount_table.pieces.is_empty() {\n            if !MUTANT { barrier(&mut unflushed).await?; }",
        }],
        tests: &[GROWTH, ALONE],
    },
    Mutant {
        name: "the header leads to a refcount table that isn't durable",
        edits: &[Edit {
            file: META_WRITER,
            from: "if moved {\n                barrier(&mut unflushed).await?;\n                self.events.tell(DebugEvent::RefblockAllocSwitchTable);",
            to: "if moved {\n                if !MUTANT { barrier(&mut unflushed).await?; }\n                self.events.tell(DebugEvent::RefblockAllocSwitchTable);",
        }],
        tests: &[GROWTH],
    },
    Mutant {
        name: "no barrier before L2 tables",
        edits: &[Edit {
            file: META_WRITER,
            from: "if !snapshot.l2_pieces.is_empty() {\n            barrier(&mut unflushed).await?;",
            to: "if !snapshot.l2_pieces.is_empty() {\n            if !MUTANT { barrier(&mut unflushed).await?; }",
        }],
        tests: &[ALONE],
    },
    Mutant {
        name: "no barrier before the L1 table",
        edits: &[Edit {
            file: META_WRITER,
            from: "if !snapshot.l1.pieces.is_empty() || snapshot.new_size.is_some() {\n            barrier(&mut unflushed).await?;",
            to: "if !snapshot.l1.pieces.is_empty() || snapshot.new_size.is_some() {\n            if !MUTANT { barrier(&mut unflushed).await?; }",
        }],
        tests: &[SPARSE],
    },
    Mutant {
        name: "the header leads to an L1 table that isn't durable",
        edits: &[Edit {
            file: META_WRITER,
            from: "if moved || snapshot.new_size.is_some() {\n                barrier(&mut unflushed).await?;",
            to: "if moved || snapshot.new_size.is_some() {\n                if !MUTANT { barrier(&mut unflushed).await?; }",
        }],
        tests: &[GROWTH, ALONE],
    },
    Mutant {
        name: "no barrier at the end of a cycle",
        edits: &[Edit {
            file: META_WRITER,
            from: "if durable < number {",
            to: "if durable < number && !MUTANT {",
        }],
        tests: &[FLUSHED, ALONE],
    },
    Mutant {
        name: "an answer doesn't wait for the write of its L2 entries",
        edits: &[Edit {
            file: META_WRITER,
            from: "        self.next_cycle().written.await\n    }",
            to: "        if MUTANT { Ok(()) } else { self.next_cycle().written.await }\n    }",
        }],
        tests: &[SETTLED],
    },
    Mutant {
        name: "an answer waits for the cycle that runs, not for the next",
        edits: &[Edit {
            file: META_WRITER,
            from: ".filter(|_| self.is_taken(range))",
            to: ".filter(|_| MUTANT || self.is_taken(range))",
        }],
        tests: &[SETTLED],
    },
    Mutant {
        name: "freed clusters are used again before their cycle is durable",
        edits: &[
            Edit {
                file: META_WRITER,
                from: "            writer.gone.extend(",
                to: "            if MUTANT { writer.released.extend(snapshot.dropped.clone()); }\n            if !MUTANT { writer.gone.extend(",
            },
            Edit {
                file: META_WRITER,
                from: "map(|clusters| (number, clusters)));\n",
                to: "map(|clusters| (number, clusters))); }\n",
            },
        ],
        tests: &[ALONE],
    },
    Mutant {
        name: "L2 tables are written before the barrier that covers data",
        edits: &[Edit {
            file: META_WRITER,
            from: "        // Rank 1 refers to nothing, so it may be written at any time.\n",
            to: "        if MUTANT { self.write_pieces(&snapshot.l2_pieces, DebugEvent::L2Update).await?; }\n",
        }],
        tests: &[ALONE],
    },
    Mutant {
        name: "the L1 table is written before the L2 tables",
        edits: &[Edit {
            file: META_WRITER,
            from: "        snapshot.refcount_pieces.clear();\n",
            to: "        snapshot.refcount_pieces.clear();\n        if MUTANT { self.write_pieces(&snapshot.l1.pieces, DebugEvent::L1Update).await?; }\n",
        }],
        tests: &[ALONE, GROWTH],
    },
    Mutant {
        name: "freed clusters are used again before the cycle ends",
        edits: &[Edit {
            file: META_WRITER,
            from: "        match self.write_ranks(&mut snapshot).await {",
            to: "        if MUTANT {\n            self.writer.borrow_mut().released.append(&mut snapshot.dropped);\n            self.release().await?;\n        }\n        match self.write_ranks(&mut snapshot).await {",
        }],
        tests: &[ALONE, GROWTH],
    },
    Mutant {
        name: "refcounts go down before the reference is gone",
        edits: &[Edit {
            file: META_WRITER,
            from: "        let mut snapshot = self.snapshot();\n",
            to: "        if MUTANT {\n            let mut dropped = std::mem::take(&mut self.writer.borrow_mut().dropped);\n            self.writer.borrow_mut().released.append(&mut dropped);\n            self.release().await?;\n        }\n        let mut snapshot = self.snapshot();\n",
        }],
        tests: &[ALONE],
    },
    Mutant {
        name: "what is freed joins the cycle that runs already",
        edits: &[Edit {
            file: META_WRITER,
            from: "        let mut writer = self.writer.borrow_mut();\n        match writer.dropped.last_mut() {",
            to: "        let mut writer = self.writer.borrow_mut();\n        if MUTANT { return writer.released.push(clusters); }\n        match writer.dropped.last_mut() {",
        }],
        tests: &[ALONE, GROWTH, STREAM],
    },
    Mutant {
        name: "no barrier for the external data file",
        edits: &[Edit {
            file: META_WRITER,
            from: "                Some(data_file) => data_file.flush().await,",
            to: "                Some(_) if MUTANT => Ok(()),\n                Some(data_file) => data_file.flush().await,",
        }],
        tests: &[DATA_FILE],
    },
    Mutant {
        name: "a flush doesn't wait for a cycle",
        edits: &[Edit {
            file: NODE,
            from: "if self.image.read_only { Ok(()) } else { self.image.commit().await }",
            to: "if MUTANT { self.image.file.flush().await } else { self.image.commit().await }",
        }],
        tests: &[ALONE],
    },
    Mutant {
        name: "FUA is dropped",
        edits: &[Edit {
            file: NODE,
            from: "if fua { self.image.commit().await } else { Ok(()) }",
            to: "if fua && !MUTANT { self.image.commit().await } else { Ok(()) }",
        }],
        tests: &[ALONE],
    },
    Mutant {
        name: "a discard lets the backing file show",
        edits: &[Edit {
            file: "crates/headwater-image/src/qcow2/zero_discard.rs",
            from: "            (true, _) => Become::Zero { unmap: true },",
            to: "            (true, _) if MUTANT => Become::Unallocated,\n            (true, _) => Become::Zero { unmap: true },",
        }],
        tests: &[BACKED, STREAM],
    },
    Mutant {
        name: "autoclear bits stay",
        edits: &[Edit {
            file: BACKING_LINK,
            from: "        if self.prepared.get() {\n            return Ok(());",
            to: "        if MUTANT || self.prepared.get() {\n            return Ok(());",
        }],
        tests: &[ALONE],
    },
    Mutant {
        name: "a request goes ahead while autoclear bits are being cleared",
        edits: &[Edit {
            file: BACKING_LINK,
            from: "        let kept = kept_autoclear(self.data_file.is_some());\n",
            to: "        let kept = kept_autoclear(self.data_file.is_some());\n        if MUTANT && self.header.borrow().header.autoclear & !kept == 0 { return Ok(()); }\n",
        }],
        tests: &[ALONE],
    },
    Mutant {
        name: "clusters that a snapshot shares are overwritten",
        edits: &[Edit {
            file: "crates/headwater-image/src/qcow2/entry.rs",
            from: "self.host.filter(|_| self.copied)",
            to: "self.host.filter(|_| self.copied || MUTANT)",
        }],
        tests: &[SNAPSHOT],
    },
    Mutant {
        name: "the backing link changes before what was copied is durable",
        edits: &[
            Edit {
                file: BACKING_LINK,
                from: "        self.commit().await?;\n        let image = self.clone();",
                to: "        if !MUTANT { self.commit().await?; }\n        let image = self.clone();",
            },
            Edit {
                file: STREAM_JOB,
                from: "    lifecycle::flush(&disk, control).await?;",
                to: "    if !MUTANT { lifecycle::flush(&disk, control).await?; }",
            },
        ],
        tests: &[STREAM],
    },
    Mutant {
        name: "the backing link is dropped although something is missing",
        edits: &[Edit {
            file: STREAM_JOB,
            from: "    copy_everything(&disk, &mut engine).await?;",
            to: "    if !MUTANT { copy_everything(&disk, &mut engine).await?; }",
        }],
        tests: &[STREAM],
    },
    Mutant {
        name: "the header leads to a backing file's name that isn't durable",
        edits: &[Edit {
            file: BACKING_LINK,
            from: "            self.barrier().await?;\n        }\n",
            to: "            if !MUTANT { self.barrier().await?; }\n        }\n",
        }],
        tests: &[BACKED],
    },
    Mutant {
        name: "copy-up doesn't look again under the range lock",
        edits: &[Edit {
            file: "crates/headwater-block/src/copy_up.rs",
            from: "            if now.kind != ExtentKind::Unallocated {",
            to: "            if now.kind != ExtentKind::Unallocated && !MUTANT {",
        }],
        tests: &[STREAM, COPY_UP],
    },
    Mutant {
        name: "a commit changes the graph before its base is durable",
        edits: &[Edit {
            file: "crates/headwater-job/src/commit.rs",
            from: "    lifecycle::flush(&base, control).await?;",
            to: "    if !MUTANT { lifecycle::flush(&base, control).await?; }",
        }],
        tests: &[COMMIT],
    },
    Mutant {
        name: "an active commit leads guests to a base that isn't durable",
        edits: &[Edit {
            file: "crates/headwater-job/src/mirror.rs",
            from: "if self.engine.holds() && lifecycle::try_flush(&self.target, &self.control).await? {",
            to: "if self.engine.holds() && (MUTANT || lifecycle::try_flush(&self.target, &self.control).await?) {",
        }],
        tests: &[COMMIT_ACTIVE],
    },
    Mutant {
        name: "a new snapshot: clusters are counted before their marks are gone",
        edits: &[Edit {
            file: "crates/headwater-image/src/qcow2/snapshot.rs",
            from: "            self.mark_shared().await?;\n            self.commit().await?;",
            to: "            self.mark_shared().await?;\n            if !MUTANT { self.commit().await?; }",
        }],
        tests: &[SNAPSHOTS],
    },
    Mutant {
        name: "a new snapshot: what it shares is still written in place",
        edits: &[Edit {
            file: "crates/headwater-image/src/qcow2/snapshot.rs",
            from: "self.change_marks(async |_, _| Ok(false)).await",
            to: "if MUTANT { Ok(()) } else { self.change_marks(async |_, _| Ok(false)).await }",
        }],
        tests: &[SNAPSHOTS],
    },
    Mutant {
        name: "a new snapshot: the header leads to it before its references are counted durably",
        edits: &[Edit {
            file: "crates/headwater-image/src/qcow2/snapshot.rs",
            from: "            self.commit().await?;\n            let (image, start)",
            to: "            if !MUTANT { self.commit().await?; }\n            let (image, start)",
        }],
        tests: &[SNAPSHOTS],
    },
    Mutant {
        name: "a new snapshot: the header leads to a table that isn't durable",
        edits: &[Edit {
            file: "crates/headwater-image/src/qcow2/snapshot.rs",
            from: "bytes).await?;\n                image.barrier().await?;",
            to: "bytes).await?;\n                if !MUTANT { image.barrier().await?; }",
        }],
        tests: &[SNAPSHOTS],
    },
    Mutant {
        name: "a new snapshot: what a deleted one held is given away before the header says so",
        edits: &[Edit {
            file: "crates/headwater-image/src/qcow2/snapshot.rs",
            from: "        let bytes = self.table_bytes(&table, Some(at), None).await?;",
            to: "        if MUTANT { self.drop_later((table[at].l1.0 >> self.geometry.cluster_bits)..(table[at].l1.0 >> self.geometry.cluster_bits) + 1); }\n        let bytes = self.table_bytes(&table, Some(at), None).await?;",
        }],
        tests: &[SNAPSHOTS],
    },
    Mutant {
        name: "a repair switches to refcounts that aren't durable",
        edits: &[Edit {
            file: "crates/headwater-image/src/qcow2/check/rebuild.rs",
            from: "        self.medium.flush().await?;\n\n        let mut fields",
            to: "        if !MUTANT { self.medium.flush().await?; }\n\n        let mut fields",
        }],
        tests: &[REPAIR],
    },
];
