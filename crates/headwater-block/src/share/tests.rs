//! What stays in memory and what goes.

use super::memory::Memory;
use crate::buffer::Buffer;

const MIB: u64 = 1 << 20;

fn piece() -> Buffer {
    Buffer::zeroed(MIB as usize)
}

fn has(memory: &Memory, at: u64) -> bool {
    memory.next_after(1, at * MIB) == Some(at * MIB)
}

#[test]
fn what_all_readers_have_had_goes_first_and_then_the_oldest() {
    let mut memory = Memory::new(8 * MIB);
    for at in 0..8 {
        memory.insert(1, at * MIB, &piece(), 2);
    }
    assert_eq!(memory.used(), 8 * MIB);
    // The second reader has had this one: two pieces may stay that all have had, and this one is the first to go.
    assert!(memory.get(1, &(5 * MIB..6 * MIB), 2).is_some());
    memory.insert(1, 8 * MIB, &piece(), 2);
    assert!(!has(&memory, 5) && has(&memory, 0));
    memory.insert(1, 9 * MIB, &piece(), 2);
    assert!(!has(&memory, 0) && has(&memory, 1));
    assert_eq!(memory.used(), 8 * MIB);
}

#[test]
fn of_what_all_have_had_a_quarter_is_kept() {
    let mut memory = Memory::new(8 * MIB);
    for at in 0..100 {
        memory.insert(1, at * MIB, &piece(), 1);
    }
    assert_eq!(memory.used(), 2 * MIB);
    assert!(has(&memory, 99) && has(&memory, 98));
}

#[test]
fn a_part_that_was_read_is_not_the_whole() {
    let mut memory = Memory::new(4 * MIB);
    memory.insert(1, 0, &piece(), 2);
    assert!(memory.get(1, &(0..MIB / 2), 2).is_some());
    for at in 1..4 {
        memory.insert(1, at * MIB, &piece(), 2);
    }
    assert!(has(&memory, 0));
    assert!(memory.get(1, &(MIB / 2..2 * MIB), 2).is_some());
    memory.insert(1, 4 * MIB, &piece(), 2);
    assert!(!has(&memory, 0));
}

#[test]
fn what_is_larger_than_the_bound_is_not_kept_and_sources_are_apart() {
    let mut memory = Memory::new(2 * MIB);
    memory.insert(1, 0, &Buffer::zeroed(3 * MIB as usize), 9);
    assert_eq!(memory.used(), 0);
    memory.insert(1, 0, &piece(), 9);
    memory.insert(2, 0, &piece(), 9);
    memory.forget(1);
    assert!(memory.get(1, &(0..MIB), 9).is_none());
    assert!(memory.get(2, &(0..MIB), 9).is_some());
    assert_eq!(memory.used(), MIB);
}
