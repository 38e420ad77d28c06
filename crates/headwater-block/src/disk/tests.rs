//! Tests of the disk on a node in memory: bounds, alignment, status. Races and copy-on-read are tested by the job crate's simulations.

use super::*;
use crate::buffer::Buffer;
use crate::memory::MemoryNode;
use crate::node::{LocalFuture, WriteFlags};
use futures_util::FutureExt;
use proptest::prelude::*;
use std::time::Duration;

/// A clock that stands still: nothing here waits for time.
struct StoppedClock;

impl Clock for StoppedClock {
    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn sleep_until(&self, _deadline: Duration) -> LocalFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
}

fn disk(size: usize, write_alignment: u32) -> Rc<Disk> {
    let node = MemoryNode::new("test.raw", vec![0xee; size]);
    node.set_limits(Limits { write_alignment, ..Limits::default() });
    Disk::new(node, Rc::new(StoppedClock), DiskOptions::default())
}

/// Runs a future that a node in memory never makes wait.
fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("a node in memory completes at once")
}

#[derive(Debug, Clone)]
enum Op {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Read(u64, u64),
}

fn op(size: u64) -> impl Strategy<Value = Op> {
    let range = move || (0..size).prop_flat_map(move |at| (Just(at), 0..=(size - at).min(5000)));
    prop_oneof![
        (range(), any::<u8>()).prop_map(|((at, len), byte)| Op::Write(at, len, byte)),
        range().prop_map(|(at, len)| Op::Zero(at, len)),
        range().prop_map(|(at, len)| Op::Read(at, len)),
    ]
}

proptest! {
    /// Any offset and length works, whatever alignment the node needs; neighbouring bytes are kept.
    #[test]
    fn requests_of_any_alignment_equal_a_flat_model(ops in prop::collection::vec(op(20_000), 1..40), power in 0u32..13) {
        let size = 20_480;
        let disk = disk(size, 1_u32 << power);
        let mut model = vec![0xee_u8; size];
        for op in ops {
            match op {
                Op::Write(at, len, byte) => {
                    let range = at as usize..(at + len) as usize;
                    model[range.clone()].fill(byte);
                    now(disk.write(at, Buffer::copy_of(&model[range]), WriteFlags::default())).unwrap();
                }
                Op::Zero(at, len) => {
                    model[at as usize..(at + len) as usize].fill(0);
                    now(disk.write_zeroes(at, len, ZeroFlags::default())).unwrap();
                }
                Op::Read(at, len) => {
                    let data = now(disk.read(at, len)).unwrap();
                    prop_assert_eq!(&data[..], &model[at as usize..(at + len) as usize]);
                }
            }
        }
        prop_assert_eq!(&now(disk.read(0, size as u64)).unwrap()[..], &model[..]);
        prop_assert!(disk.lock.is_empty() && disk.gate.inside() == 0);
    }
}

#[test]
fn requests_past_the_end_are_refused_and_change_nothing() {
    let disk = disk(4096, 512);
    for (offset, len) in [(4096, 1), (0, 4097), (u64::MAX, 1), (1, u64::MAX)] {
        assert_eq!(now(disk.read(offset, len)).unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(now(disk.discard(offset, len)).unwrap_err().kind(), ErrorKind::OutOfRange);
        let zero = disk.write_zeroes(offset, len, ZeroFlags::default());
        assert_eq!(now(zero).unwrap_err().kind(), ErrorKind::OutOfRange);
    }
    assert!(now(disk.read(4096, 0)).is_ok(), "the end itself is within bounds");
}

#[test]
fn a_change_dropped_half_way_poisons_the_disk_and_says_so() {
    let disk = disk(4096, 512);
    drop(disk.must_finish().unwrap());
    let err = now(disk.read(0, 1)).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Closed);
    assert!(err.to_string().contains("test.raw"), "{err}");
}

#[test]
fn a_read_only_disk_takes_no_change() {
    let node = MemoryNode::new("test.raw", vec![0; 4096]);
    node.set_read_only(true);
    let disk = Disk::new(node, Rc::new(StoppedClock), DiskOptions::default());
    let write = disk.write(0, Buffer::zeroed(1), WriteFlags::default());
    assert_eq!(now(write).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert!(now(disk.flush()).is_ok(), "there is nothing to flush");
}

#[test]
fn status_is_coalesced_and_bounded() {
    let mut bytes = vec![0; 64 << 10];
    bytes[8192..16384].fill(1);
    let disk = Disk::new(MemoryNode::new("m", bytes), Rc::new(StoppedClock), DiskOptions::default());
    let extents = now(disk.block_status(0..64 << 10, 10)).unwrap();
    let kinds: Vec<_> = extents.iter().map(|e| (e.offset, e.len, e.kind)).collect();
    assert_eq!(
        kinds,
        [
            (0, 8192, ExtentKind::Zero),
            (8192, 8192, ExtentKind::Data),
            (16384, (64 << 10) - 16384, ExtentKind::Zero)
        ]
    );
    assert_eq!(now(disk.block_status(0..64 << 10, 2)).unwrap().len(), 2);
}

/// Requests that come while a disk is opened anew are judged by what it is afterwards: what it is in between, or was meant to be, is not their affair.
#[test]
fn changes_that_come_during_a_drain_are_judged_when_it_is_over() {
    let disk = disk(8192, 512);
    let read_only = |read_only| disk.set_options(DiskOptions { read_only, ..disk.options() });
    for refused in [false, true] {
        let drained = now(disk.drain());
        read_only(!refused);
        let mut write = Box::pin(disk.write(0, Buffer::zeroed(512), WriteFlags::default()));
        let mut zeroes = Box::pin(disk.write_zeroes(512, 512, ZeroFlags::default()));
        let mut discard = Box::pin(disk.discard(1024, 512));
        assert!((&mut write).now_or_never().is_none(), "a write doesn't wait for the end of the drain");
        assert!((&mut zeroes).now_or_never().is_none(), "zeroes don't wait for the end of the drain");
        assert!((&mut discard).now_or_never().is_none(), "a discard doesn't wait for the end of the drain");
        read_only(refused);
        drop(drained);
        for (what, done) in [("write", now(write)), ("zeroes", now(zeroes)), ("discard", now(discard))] {
            let kind = done.err().map(|err| err.kind());
            assert_eq!(kind, refused.then_some(ErrorKind::ReadOnly), "{what}");
        }
    }
}
