//! Tests of the raw format over a node in memory.

use super::*;
use futures_util::FutureExt;
use headwater_block::memory::MemoryNode;

/// The result of a future that never has to wait, as those over memory.
fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("memory never waits")
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8 + 1).collect()
}

#[test]
fn a_window_reads_and_writes_its_part_of_the_file_only() {
    let bytes = pattern(10_000);
    let file = MemoryNode::new("disk.img", bytes.clone());
    let raw =
        RawNode::new(file.clone(), RawOptions { offset: 1000, size: Some(5000), read_only: false }).unwrap();
    assert_eq!((raw.size(), raw.driver(), raw.name()), (5000, "raw", "disk.img"));
    let read = now(raw.read(4900, BufferMut::new(200))).unwrap();
    assert_eq!(&read[..100], &bytes[5900..6000]);
    assert_eq!(&read[100..], &[0; 100]);
    assert_eq!(&now(raw.read(6000, BufferMut::new(7))).unwrap()[..], &[0; 7]);

    now(raw.write(0, Buffer::copy_of(b"hello"), WriteFlags::default())).unwrap();
    now(raw.write_zeroes(4999, 1, ZeroFlags::default())).unwrap();
    let mut expected = bytes;
    expected[1000..1005].copy_from_slice(b"hello");
    expected[5999] = 0;
    assert_eq!(file.contents(), expected);
    for past in [4998, 5000, u64::MAX] {
        let err = now(raw.write(past, Buffer::copy_of(b"abc"), WriteFlags::default())).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::NoSpace);
        assert_eq!(now(raw.discard(past, 3)).unwrap_err().kind(), ErrorKind::OutOfRange);
    }
    assert_eq!(now(raw.resize(10)).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn an_image_on_it_may_grow_unless_the_size_is_fixed() {
    let file = MemoryNode::new("disk.img", pattern(1000));
    let raw = RawNode::new(file.clone(), RawOptions { offset: 100, size: None, read_only: false }).unwrap();
    now(raw.write(2000, Buffer::copy_of(b"abc"), WriteFlags::default())).unwrap();
    assert_eq!((raw.size(), file.contents().len()), (2003, 2103));
    now(raw.write_zeroes(3000, 5, ZeroFlags::default())).unwrap();
    assert_eq!(raw.size(), 3005);
    for past in [u64::MAX - 100, u64::MAX - 50, u64::MAX] {
        let err = now(raw.write(past, Buffer::copy_of(b"abc"), WriteFlags::default())).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::OutOfRange);
    }
}

#[test]
fn resolve_leads_to_the_file_and_ends_with_the_disk() {
    let file = MemoryNode::new("disk.img", pattern(8192));
    let raw = RawNode::new(file, RawOptions { offset: 512, size: None, read_only: true }).unwrap();
    let Resolved::At { node, offset, len, depth } = raw.resolve(100..10_000) else { panic!("data") };
    assert_eq!((node.driver(), offset, len, depth), ("memory", 612, 8192 - 612, 0));
    assert!(matches!(raw.resolve(7680..7690), Resolved::Zero { len: 10, depth: 0 }));
    let extent = now(raw.status(0..20_000)).unwrap();
    assert_eq!((extent.offset, extent.len, extent.kind), (0, 7680, ExtentKind::Data));
    assert_eq!(extent.host_offset, Some(512));
    assert_eq!(now(raw.status(7680..7681)).unwrap().kind, ExtentKind::Zero);
}

#[test]
fn a_read_only_image_refuses_changes() {
    let raw = RawNode::new(
        MemoryNode::new("d", pattern(100)),
        RawOptions { read_only: true, ..Default::default() },
    )
    .unwrap();
    assert!(raw.is_read_only());
    let err = now(raw.write(0, Buffer::copy_of(b"abc"), WriteFlags::default())).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::ReadOnly);
    assert_eq!(now(raw.resize(7)).unwrap_err().kind(), ErrorKind::ReadOnly);
}

#[test]
fn windows_that_do_not_fit_are_refused() {
    let file = MemoryNode::new("disk.img", pattern(1000));
    for (offset, size) in [(1001, None), (0, Some(1001)), (500, Some(501)), (1, Some(u64::MAX))] {
        let err =
            RawNode::new(file.clone(), RawOptions { offset, size, read_only: true }).err().expect("refused");
        assert_eq!(err.kind(), ErrorKind::InvalidInput);
    }
    file.set_limits(Limits { write_alignment: 512, ..Limits::default() });
    let err = RawNode::new(file.clone(), RawOptions::default()).err().expect("1000 is no multiple of 512");
    assert!(err.to_string().contains("units of 512"), "{err}");
    assert!(RawNode::new(file, RawOptions { read_only: true, ..Default::default() }).is_ok());
}

#[test]
fn a_whole_file_grows_and_shrinks() {
    let file = MemoryNode::new("disk.img", pattern(1000));
    let raw = RawNode::new(file, RawOptions::default()).unwrap();
    now(raw.resize(2000)).unwrap();
    assert_eq!(raw.size(), 2000);
    assert_eq!(now(raw.read(1500, BufferMut::new(1))).unwrap()[0], 0);
}
