//! Mistakes in writing compressed clusters, and the test that should notice them.

use super::list::Test;
use super::{Edit, Mutant};

const CUTS: Test = Test { binary: "power_cuts", name: "compressed_clusters_survive_power_cuts", seeds: 16 };

const PACK: &str = "crates/headwater-image/src/qcow2/pack.rs";
const COMPRESS: &str = "crates/headwater-image/src/qcow2/compress.rs";

/// Mistakes in where compressed clusters go, and when something refers to them.
pub(super) const COMPRESSED: &[Mutant] = &[
    Mutant {
        name: "compressed: another reference to a shared cluster isn't counted",
        edits: &[Edit { file: PACK, from: "count + 1);", to: "if MUTANT { count } else { count + 1 });" }],
        tests: &[CUTS],
    },
    Mutant {
        name: "compressed: a cluster that has become free stays open",
        edits: &[Edit {
            file: PACK,
            from: "self.0.filter(|open| !gone(open))",
            to: "self.0.filter(|open| MUTANT || !gone(open))",
        }],
        tests: &[CUTS],
    },
    Mutant {
        name: "compressed: an entry names its place before the bytes are there",
        edits: &[
            Edit {
                file: COMPRESS,
                from: "        if let Err(err) = self.write_packed(",
                to: "        if MUTANT { for ((cluster, (slice, index)), place) in packed.iter().zip(&entries).zip(places.as_slice()) { let old = self.l2_entry(slice, *index, cluster.guest)?; self.set_compressed_entry(slice, *index, old, place.clone()); } }\n        if let Err(err) = self.write_packed(",
            },
            Edit {
                file: COMPRESS,
                from: "            let old = self.l2_entry(slice, *index, cluster.guest)?;\n            self.set",
                to: "            if MUTANT { continue; }\n            let old = self.l2_entry(slice, *index, cluster.guest)?;\n            self.set",
            },
        ],
        tests: &[CUTS],
    },
    Mutant {
        name: "compressed: a write begins in the sector where another one ends",
        edits: &[Edit {
            file: PACK,
            from: "if Some(open.at) == before {",
            to: "if MUTANT || Some(open.at) == before {",
        }],
        tests: &[CUTS],
    },
];
