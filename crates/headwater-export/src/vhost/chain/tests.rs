//! Chains of nonsense, and of all shapes.

use super::*;
use proptest::prelude::*;
use vm_memory::Bytes;

const MEMORY: u64 = 0x10000;
const TABLE: u64 = 0x1000;
const INDIRECT: u64 = 0x2000;
const COUNT: u16 = 16;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap()
}

fn put(memory: &GuestMemoryMmap, table: u64, index: u16, descriptor: (u64, u32, u16, u16)) {
    let (at, len, flags, next) = descriptor;
    let descriptor = Descriptor::new(at, len, flags, next);
    memory.write_obj(descriptor, GuestAddress(table + 16 * u64::from(index))).unwrap();
}

fn walk(memory: &GuestMemoryMmap, head: u16) -> Result<(Parts, Parts), Broken> {
    Descriptors { start: GuestAddress(TABLE), count: COUNT.into() }.walk(memory, head)
}

#[test]
fn a_chain_may_be_as_long_as_its_table_and_no_longer() {
    let memory = memory();
    for index in 0..COUNT {
        let more = u16::from(index + 1 < COUNT);
        put(&memory, TABLE, index, (0x4000 + u64::from(index), 1, more, index + 1));
    }
    let (readable, writable) = walk(&memory, 0).unwrap();
    assert_eq!((readable.len(), writable.len()), (16, 0));
    put(&memory, TABLE, COUNT - 1, (0x4000, 1, 1, 0));
    assert!(walk(&memory, 0).unwrap_err().0.contains("loop"));
    // In a table of its own, it may be as long as the longest queue, and have descriptors in front.
    put(&memory, TABLE, 0, (0x4000, 1, 1, 1));
    put(&memory, TABLE, 1, (INDIRECT, 16 * 20, 4, 0));
    for index in 0..20 {
        put(&memory, INDIRECT, index, (0x4000, 2, 2 | u16::from(index < 19), index + 1));
    }
    let (readable, writable) = walk(&memory, 0).unwrap();
    assert_eq!((readable.len(), writable.len()), (1, 40));
    put(&memory, TABLE, 1, (INDIRECT, 16 * 20, 5, 2));
    assert!(walk(&memory, 0).is_err(), "a table is the end");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever the tables hold, walking ends, and what comes of it lies in memory.
    #[test]
    fn any_table_is_walked_to_an_end(
        descriptors in proptest::collection::vec(
            (0..MEMORY + 64, 0..80_u32, 0..8_u16, 0..COUNT + 1), usize::from(COUNT) * 2..=usize::from(COUNT) * 2),
        tables in proptest::collection::vec((0..u16::MAX, 0..24_u32), 4),
        head in 0..COUNT + 2,
    ) {
        let memory = memory();
        for (index, descriptor) in descriptors.into_iter().enumerate() {
            let (table, index) = if index < COUNT.into() { (TABLE, index) } else { (INDIRECT, index - usize::from(COUNT)) };
            put(&memory, table, index as u16, descriptor);
        }
        for (index, count) in tables {
            put(&memory, TABLE, index % COUNT, (INDIRECT, 16 * count, 4, 0));
        }
        let descriptors = Descriptors { start: GuestAddress(TABLE), count: COUNT.into() };
        let _ = descriptors.request(&memory, head);
        if let Ok((readable, writable)) = walk(&memory, head) {
            let mut bytes = vec![0; readable.len() as usize];
            prop_assert!(readable.read(&memory, 0, &mut bytes).is_ok());
            prop_assert!(writable.write(&memory, 0, &vec![1; writable.len() as usize]).is_ok());
        }
    }
}
