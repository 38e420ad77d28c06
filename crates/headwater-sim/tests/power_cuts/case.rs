//! A case: what is done to a world, step by step. All of it follows from a seed, and steps can be left out of it.

use crate::promise::SECTOR;
use crate::world::Workload;
use headwater_sim::Rng;
use std::fmt;
use std::ops::Range;

/// One thing that somebody does. Ranges are of sectors; parts past the disk's end are left out.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Write {
        tag: u64,
        sectors: Range<u64>,
        fua: bool,
    },
    Zero {
        sectors: Range<u64>,
        unmap: bool,
        fua: bool,
    },
    Discard {
        sectors: Range<u64>,
    },
    Flush,
    /// A new size, in sectors.
    Resize(u64),
    /// Waits for everything that was begun.
    Settle,
    /// Gives the backing file another name, of this length.
    Relink(usize),
    /// Takes an internal snapshot.
    TakeSnapshot,
    /// Deletes one of those that are there, if there are any.
    DeleteSnapshot(u64),
    StartJob,
    /// Tells the job to end with the result, if it waits for that.
    Complete,
    Cancel,
}

/// What is done to a world.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) workload: Workload,
    pub(crate) seed: u64,
    pub(crate) steps: Vec<Step>,
}

impl Case {
    /// The case of a seed, on a disk of `size` bytes with clusters of `cluster` bytes. A short one has so few steps that every state can be
    /// looked at.
    pub(crate) fn random(workload: Workload, seed: u64, short: bool, size: u64, cluster: u64) -> Self {
        let rng = Rng::new(seed ^ 0x7374_6570_7300);
        let disk = size / SECTOR;
        let growth = workload == Workload::Growth;
        let mut steps = Vec::new();
        let count = if short { rng.range(2..6) } else { rng.range(20..50) };
        let job_at = (workload.has_job()).then(|| rng.range(0..count / 2));
        let cancel_at = (workload.has_job() && rng.one_in(4)).then(|| job_at.unwrap_or(0) + rng.range(1..10));
        let per_cluster = (cluster / SECTOR).max(1);
        let mut tag = crate::world::FIRST_TAG;
        for n in 0..count {
            if job_at == Some(n) {
                steps.push(Step::StartJob);
            }
            if cancel_at == Some(n) {
                steps.push(Step::Cancel);
            }
            // The disk may have grown.
            let end = disk + disk / 4;
            let at =
                if growth && rng.one_in(2) { rng.range(disk - disk / 6..end) } else { rng.range(0..end) };
            let long = match workload {
                Workload::Growth => 300,
                Workload::Sparse => 4,
                _ => disk / 2,
            };
            let most = *rng.pick(&[1, 2, per_cluster, 3 * per_cluster, long]);
            let mut sectors = at..(at + rng.range(1..most.max(1) + 1)).min(end);
            if rng.one_in(2) {
                // Whole clusters.
                sectors = at / per_cluster * per_cluster..sectors.end.next_multiple_of(per_cluster);
            }
            let step = match rng.range(0..28) {
                n @ (5..9 | 26) if workload == Workload::Snapshots => {
                    if n == 5 {
                        Step::DeleteSnapshot(rng.range(0..100))
                    } else {
                        Step::TakeSnapshot
                    }
                }
                // Cycles run while tables are made.
                13..21 if workload == Workload::Sparse => Step::Flush,
                0..9 => {
                    tag += 1;
                    Step::Write { tag, sectors, fua: rng.one_in(5) }
                }
                9..13 => Step::Zero { sectors, unmap: rng.one_in(2), fua: rng.one_in(5) },
                13..17 => Step::Discard { sectors },
                17..21 => Step::Flush,
                21..24 => Step::Settle,
                24 | 25 if !workload.has_job() && workload != Workload::DataFile => {
                    let snapshot = matches!(workload, Workload::Snapshot | Workload::Snapshots);
                    let least = if snapshot { disk } else { 1 };
                    let change = rng.range(0..disk / 3 + 2);
                    Step::Resize(
                        if rng.one_in(2) { disk.saturating_sub(change) } else { disk + change }.max(least),
                    )
                }
                26 if workload == Workload::Backed => Step::Relink(rng.range(4..200) as usize),
                _ => Step::Flush,
            };
            steps.push(step);
        }
        if workload.has_job() {
            steps.push(Step::Complete);
        }
        Self { workload, seed, steps }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fua = |fua: &bool| if *fua { " with FUA" } else { "" };
        match self {
            Step::Write { tag, sectors, fua: is } => {
                write!(f, "write {tag} to sectors {sectors:?}{}", fua(is))
            }
            Step::Zero { sectors, unmap, fua: is } => {
                write!(f, "zero sectors {sectors:?}{}{}", if *unmap { " with unmap" } else { "" }, fua(is))
            }
            Step::Discard { sectors } => write!(f, "discard sectors {sectors:?}"),
            Step::Flush => write!(f, "flush"),
            Step::Resize(sectors) => write!(f, "resize to {sectors} sectors"),
            Step::Settle => write!(f, "wait for all of these"),
            Step::Relink(len) => write!(f, "change the backing link to a name of {len} bytes"),
            Step::TakeSnapshot => write!(f, "take an internal snapshot"),
            Step::DeleteSnapshot(which) => write!(f, "delete internal snapshot {which}, modulo"),
            Step::StartJob => write!(f, "start the job"),
            Step::Complete => write!(f, "wait for the job"),
            Step::Cancel => write!(f, "cancel the job"),
        }
    }
}
