//! The same random requests through headwater and through qemu-io, compared with a flat model and with each other.
//!
//! Each seed makes an image of random geometry (version, cluster size, refcount width, subclusters, data file, internal snapshot, a chain of up to
//! three images below, sizes that are no multiple of a cluster), sends it writes, zero-writes, discards, flushes, reads and changes of
//! size, and then asks: does headwater read what the model says? Does QEMU read the same from headwater's image, and headwater the same
//! from QEMU's? Does `qemu-img check` find neither error nor leak?
//!
//! `HEADWATER_SEEDS=N` tries N seeds, `HEADWATER_SEED=X` one.

mod differential {
    pub(crate) mod geometry;
    pub(crate) mod model;
    pub(crate) mod run;
    pub(crate) mod tools;
}

use differential::run;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many seeds are tried unless the environment says otherwise.
const SEEDS: u64 = 40;
/// After how many failures no more seeds are tried.
const MAX_FAILURES: usize = 5;

#[test]
fn headwater_and_qemu_agree() {
    let mut seeds = Vec::new();
    headwater_sim::for_seeds(SEEDS, |seed| seeds.push(seed));
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    let work = || {
        loop {
            let seed = seeds.get(next.fetch_add(1, Ordering::Relaxed)).copied();
            let Some(seed) = seed.filter(|_| failed.lock().unwrap().len() < MAX_FAILURES) else { return };
            if let Err(panic) = std::panic::catch_unwind(|| run::one(seed)) {
                let text =
                    panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "it panicked".to_owned());
                eprintln!("HEADWATER_SEED={seed}: {text}");
                failed.lock().unwrap().push(seed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(work);
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "replay with HEADWATER_SEED, seeds {failed:?}");
}
