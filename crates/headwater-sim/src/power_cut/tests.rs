//! Short histories, of which every state is known.

use super::*;
use crate::faults::Op;
use headwater_block::Buffer;
use std::collections::BTreeSet;
use std::ops::Range;

/// A history of one file of two sectors of `.`, in words: `w1a0` starts write 1 of `a` to sector 0, `w1a0f` with FUA, `z` zeroes, `d` discards,
/// `t21` makes the file one sector long, `f` flushes, and `1.` ends operation 1.
fn history(words: &str) -> History {
    let mut events = Vec::new();
    for word in words.split(' ') {
        let c: Vec<char> = word.chars().collect();
        let id = |at: usize| u64::from(c[at].to_digit(10).unwrap());
        let sector = |at: usize| id(at) * SECTOR as u64..(id(at) + 1) * SECTOR as u64;
        let start = |id, op, range: Range<u64>, data, fua| Event::Started { id, op, range, data, fua };
        let event = match c[0] {
            'w' => {
                let data = Buffer::copy_of(&[c[2] as u8; SECTOR]);
                start(id(1), Op::Write, sector(3), Some(data), word.ends_with('f'))
            }
            'z' => start(id(1), Op::WriteZeroes, sector(2), None, false),
            'd' => start(id(1), Op::Discard, sector(2), None, false),
            't' => start(id(1), Op::Header, sector(2).start..sector(2).start, None, false),
            'f' => start(id(1), Op::Flush, 0..2 * SECTOR as u64, None, false),
            _ => Event::Ended { id: id(0), ok: !word.ends_with('!') },
        };
        events.push((0, event));
    }
    History { files: vec![("file".to_string(), vec![b'.'; 2 * SECTOR])], events }
}

/// The states after the last event, a letter for each sector.
fn states(words: &str) -> String {
    let history = history(words);
    let mut cuts = Cuts::new(&history);
    while cuts.advance() {}
    let (mut texts, mut hashes) = (BTreeSet::new(), BTreeSet::new());
    for choice in cuts.all() {
        let bytes = cuts.files(&choice).remove(0);
        let letter = |sector: &[u8]| {
            assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector isn't torn");
            if sector[0] == 0 { '0' } else { sector[0] as char }
        };
        texts.insert(bytes.chunks(SECTOR).map(letter).collect::<String>());
        hashes.insert(cuts.hash(&choice));
    }
    assert_eq!(texts.len(), hashes.len(), "the hash tells states apart");
    texts.into_iter().collect::<Vec<_>>().join(" ")
}

#[test]
fn what_is_not_flushed_may_survive_or_not() {
    assert_eq!(states("w1a0"), ".. a.");
    assert_eq!(states("w1a0 1. w2b1 2."), ".. .b a. ab");
    assert_eq!(states("w1a0 1. w2b0 2."), ".. a. b.");
    assert_eq!(states("w1a0 1. z20 2."), ".. 0. a.");
}

#[test]
fn a_flush_covers_what_ended_before_it_started_once_it_has_ended() {
    assert_eq!(states("w1a0 1. f2"), ".. a.");
    assert_eq!(states("w1a0 1. f2 2."), "a.");
    assert_eq!(states("w1a0 f2 1. 2."), ".. a.");
    assert_eq!(states("w1a0 1. f2 w3b0 2."), "a. b.");
    assert_eq!(states("w1a0 1. f2 2.!"), ".. a.");
}

#[test]
fn writes_at_the_same_time_take_effect_in_either_order() {
    assert_eq!(states("w1a0 w2b0 1. 2. f3 3."), "a. b.");
    assert_eq!(states("w1a0 w2b0f 2."), "a. b.");
    assert_eq!(states("w1a0 1. w2b0f 2."), "b.");
    assert_eq!(states("w1a0 w2b0 2. f3 3."), "a. b.");
}

#[test]
fn a_failed_write_may_have_done_something_or_not() {
    assert_eq!(states("w1a0 1.! f2 2."), ".. a.");
}

#[test]
fn a_discard_never_becomes_certain() {
    assert_eq!(states("w1a0 1. f2 2. d30 3. f4 4."), "0. a.");
    assert_eq!(states("d10 1. f2 2. w3a0 3. f4 4."), "a.");
}

#[test]
fn the_size_has_versions() {
    assert_eq!(states("w1a3"), ".. ..00 ..0a");
    assert_eq!(states("w1a3 1. f2 2."), "..0a");
    assert_eq!(states("t11"), ". .. .0");
    assert_eq!(states("t11 1. f2 2."), ".");
    assert_eq!(states("t10 1. w2a1 2. f3 3."), "0a");
    assert_eq!(states("t14 1. f2 2."), "..00");
    // The one that is durable needs it longer than the one that isn't.
    assert_eq!(states("w1a2 w2b3 2. f3 3."), "..0b ..ab");
    assert_eq!(states("w1c3 w2b2 2. f3 3."), "..b ..b0 ..bc");
}

#[test]
fn a_part_of_a_sector_keeps_the_rest() {
    let mut history = history("w1a0 1. f2 2.");
    let data = Some(Buffer::copy_of(b"xy"));
    history.events.push((0, Event::Started { id: 3, op: Op::Write, range: 510..512, data, fua: false }));
    let mut cuts = Cuts::new(&history);
    while cuts.advance() {}
    let newest = cuts.files(&cuts.newest()).remove(0);
    assert_eq!((&newest[..510], &newest[510..514]), (&[b'a'; 510][..], &b"xy.."[..]));
}

#[test]
fn a_choice_is_simplified_to_what_matters() {
    let history = history("w1a0 1. w2b1 2. w3c0 3.");
    let mut cuts = Cuts::new(&history);
    while cuts.advance() {}
    assert_eq!(cuts.combinations(), 6);
    // It fails where the second write survives without the third.
    let fails = |choice: &Choice| {
        let bytes = &cuts.files(choice)[0];
        bytes[0] != b'c' && bytes[SECTOR] == b'b'
    };
    let found = cuts.all().find(|choice| fails(choice)).unwrap();
    let simple = cuts.simplify(&found, fails);
    assert!(fails(&simple));
    let text = cuts.describe(&simple);
    assert!(
        text.contains("Write of 0x200..0x400 (ended, started as event 2)\n    survived: 0x200"),
        "{text}"
    );
}

#[test]
fn samples_reach_every_state() {
    let history = history("w1a0 1. w2b1 2. w3c0");
    let mut cuts = Cuts::new(&history);
    while cuts.advance() {}
    let rng = Rng::new(1);
    let seen: BTreeSet<u64> = (0..200).map(|_| cuts.hash(&cuts.sample(&rng))).collect();
    assert_eq!(seen.len(), 6);
}
