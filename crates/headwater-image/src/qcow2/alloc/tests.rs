//! The memory of free clusters against a plain set.

use super::*;
use headwater_sim::{Rng, for_seeds};
use std::collections::BTreeSet;

#[test]
fn space_hands_out_each_free_cluster_once() {
    for_seeds(50, |seed| {
        let rng = Rng::new(seed);
        let mut space = Space::new(0);
        let mut free = BTreeSet::new();
        let mut used = BTreeSet::new();
        for _ in 0..500 {
            if rng.one_in(2) {
                let want = rng.range(1..9);
                match space.take_run(want, 16, true) {
                    Some((start, count)) => {
                        assert!(count >= 1 && count <= want && start / 16 == (start + count - 1) / 16);
                        for cluster in start..start + count {
                            assert!(free.remove(&cluster) && used.insert(cluster));
                        }
                    }
                    None => {
                        assert!(free.is_empty());
                        let start = space.take_end(want);
                        used.extend(start..start + want);
                    }
                }
            } else if let Some(&start) = used.iter().nth(rng.index(used.len().max(1))) {
                let count = (start..start + rng.range(1..6))
                    .take_while(|cluster| used.contains(cluster))
                    .count() as u64;
                space.give(start, count);
                for cluster in start..start + count {
                    assert!(used.remove(&cluster) && free.insert(cluster));
                }
            }
        }
    });
}

#[test]
fn what_the_scan_has_before_it_is_left_to_the_scan() {
    let mut space = Space::new(100);
    space.scan_at = 40;
    space.give(30, 80);
    assert_eq!(space.runs, BTreeMap::from([(30, 10), (100, 10)]));
    space.scan_at = 100;
    space.give(50, 5);
    assert_eq!(space.runs, BTreeMap::from([(30, 10), (50, 5), (100, 10)]));
}

#[test]
fn the_scan_passes_over_what_is_held() {
    let mut space = Space::new(100);
    space.hold(&[10..20, 30..40]);
    space.scan_at = 64;
    space.found(5..35);
    space.found(38..50);
    assert_eq!(space.runs, BTreeMap::from([(5, 5), (20, 10), (40, 10)]));
    space.let_go(10..20);
    space.let_go(30..40);
    assert_eq!(space.runs, BTreeMap::from([(5, 45)]));
    // What the scan hasn't come to is left to it.
    space.hold(&[70..80, 95..96]);
    space.let_go(70..80);
    space.scan_at = 100;
    space.found(64..90);
    assert_eq!(space.runs, BTreeMap::from([(5, 45), (64, 26)]));
}
