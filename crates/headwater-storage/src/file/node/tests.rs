//! The file node against a vector of bytes, on both engines, around and through the page cache; ends of files, full disks, holes.

use super::*;
use crate::file::testing::{on_runtime, scratch_file};
use crate::file::{Cache, EngineKind, IoMode, Locking};
use futures_util::stream::{FuturesUnordered, StreamExt};
use headwater_block::WriteFlags;
use proptest::prelude::*;
use std::path::PathBuf;
use std::process::Command;

/// The part of a file that the model test plays with, in bytes.
const SPAN: u64 = 256 << 10;

fn options(cache: Cache) -> FileOptions {
    FileOptions { cache, ..FileOptions::default() }
}

/// Runs a test on both engines, around and through the page cache.
fn everywhere<F: AsyncFn(&Rc<Engine>, Cache)>(test: F) {
    for mode in [IoMode::Auto, IoMode::Threads] {
        for cache in [Cache::Auto, Cache::Buffered] {
            on_runtime(async {
                let engine = Engine::new(mode).unwrap();
                test(&engine, cache).await;
            });
        }
    }
}

async fn read(node: &FileNode, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = BufferMut::new(len);
    buf.fill(0xa5);
    node.read(offset, buf).await.unwrap().to_vec()
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| ((i * 7 + i / 251) % 256) as u8 ^ seed).collect()
}

#[derive(Debug, Clone)]
enum Step {
    Read { offset: u64, len: usize, skew: usize },
    Write { offset: u64, len: u64, skew: usize, fua: bool },
    Zero { offset: u64, len: u64, unmap: bool },
    Discard { offset: u64, len: u64 },
    Status { offset: u64, len: u64 },
    Resize { size: u64 },
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    let at = 0..SPAN;
    let len = prop_oneof![1..5000_u64, 1..70_000_u64];
    let skew = prop_oneof![Just(0_usize), 1..600_usize];
    prop_oneof![
        4 => (0..SPAN * 5 / 4, 0..70_000_usize, skew.clone())
            .prop_map(|(offset, len, skew)| Step::Read { offset, len, skew }),
        4 => (at.clone(), len.clone(), skew, any::<bool>())
            .prop_map(|(offset, len, skew, fua)| Step::Write { offset, len, skew, fua }),
        2 => (at.clone(), len.clone(), any::<bool>())
            .prop_map(|(offset, len, unmap)| Step::Zero { offset, len, unmap }),
        1 => (at.clone(), len.clone()).prop_map(|(offset, len)| Step::Discard { offset, len }),
        3 => (at.clone(), len).prop_map(|(offset, len)| Step::Status { offset, len }),
        1 => at.prop_map(|size| Step::Resize { size }),
        1 => Just(Step::Flush),
    ]
}

/// The bytes that a node should hold.
struct Model(Vec<u8>);

impl Model {
    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        (offset..offset + len as u64).map(|at| self.0.get(at as usize).copied().unwrap_or(0)).collect()
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let range = offset as usize..offset as usize + data.len();
        self.0.resize(self.0.len().max(range.end), 0);
        self.0[range].copy_from_slice(data);
    }
}

async fn play(node: &FileNode, model: &mut Model, step: &Step, seed: u8) {
    let align = u64::from(node.limits().write_alignment);
    let down = |value: u64| value - value % align;
    match *step {
        Step::Read { offset, len, skew } => {
            let mut whole = BufferMut::zeroed(skew + len);
            let part = whole.split_off(skew);
            let part = node.read(offset, part).await.unwrap();
            assert!(part[..] == model.read(offset, len)[..]);
        }
        Step::Write { offset, len, skew, fua } => {
            let (offset, len) = (down(offset), len.next_multiple_of(align) as usize);
            let data = Buffer::copy_of(&pattern(skew + len, seed)).slice(skew..skew + len);
            node.write(offset, data.clone(), WriteFlags { fua, ..WriteFlags::default() }).await.unwrap();
            model.write(offset, &data);
        }
        Step::Zero { offset, len, unmap } => {
            let (offset, len) = (down(offset), len.next_multiple_of(align));
            node.write_zeroes(offset, len, ZeroFlags { unmap, ..ZeroFlags::default() }).await.unwrap();
            model.write(offset, &vec![0; len as usize]);
        }
        Step::Discard { offset, len } => {
            node.discard(offset, len).await.unwrap();
            // Every byte is as before or zero.
            let now = read(node, offset, len as usize).await;
            let before = model.read(offset, len as usize);
            assert!(now.iter().zip(&before).all(|(now, before)| now == before || *now == 0));
            let there = (model.0.len() as u64).saturating_sub(offset).min(len);
            model.write(offset.min(model.0.len() as u64), &now[..there as usize]);
        }
        Step::Status { offset, len } => {
            let extent = node.status(offset..offset + len).await.unwrap();
            assert!(extent.offset == offset && extent.len > 0 && extent.len <= len, "{extent:?}");
            if extent.kind == ExtentKind::Zero {
                assert!(model.read(offset, extent.len as usize).iter().all(|byte| *byte == 0), "{extent:?}");
            } else {
                assert_eq!((extent.kind, extent.host_offset), (ExtentKind::Data, Some(offset)));
                assert!(extent.end() <= node.size());
            }
        }
        Step::Resize { size } => {
            node.resize(size).await.unwrap();
            model.0.resize(size as usize, 0);
        }
        Step::Flush => node.flush().await.unwrap(),
    }
    assert_eq!(node.size(), model.0.len() as u64);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_node_is_a_vector_of_bytes(steps in prop::collection::vec(step(), 1..40), size in 0..SPAN) {
        everywhere(async |engine, cache| {
            let scratch = scratch_file();
            let bytes = pattern(size as usize, 0x5a);
            std::fs::write(scratch.path(), &bytes).unwrap();
            let node = FileNode::open(engine, scratch.path(), options(cache)).unwrap();
            let mut model = Model(bytes);
            for (i, step) in steps.iter().enumerate() {
                play(&node, &mut model, step, i as u8).await;
            }
            node.close().await.unwrap();
            assert!(std::fs::read(scratch.path()).unwrap() == model.0);
        });
    }
}

#[test]
fn the_end_of_a_file() {
    everywhere(async |engine, cache| {
        let scratch = scratch_file();
        std::fs::write(scratch.path(), pattern(10_000, 0)).unwrap();
        let node = FileNode::open(engine, scratch.path(), FileOptions { read_only: true, ..options(cache) })
            .unwrap();
        let mut expected = pattern(10_000, 0);
        expected.resize(20_000, 0);
        for (offset, len) in [
            (0, 16384),
            (8192, 4096),
            (8192, 8192),
            (9999, 1),
            (9999, 2),
            (10_000, 5),
            (12_288, 4096),
            (5, 9995),
        ] {
            assert!(
                read(&node, offset, len).await == expected[offset as usize..offset as usize + len],
                "{len} at {offset}"
            );
        }
        assert!(read(&node, u64::MAX - 10, 4096).await.iter().all(|byte| *byte == 0));
        assert!(matches!(node.resolve(20_000..30_000), Resolved::Zero { len: 10_000, depth: 0 }));
        assert!(matches!(node.resolve(9000..30_000), Resolved::At { offset: 9000, len: 1000, .. }));
        let err = node.write(0, Buffer::zeroed(4096), WriteFlags::default()).await.unwrap_err();
        assert_eq!(err.kind(), ErrorKind::ReadOnly);
    });
}

#[test]
fn writes_must_be_aligned_until_the_page_cache_is_asked_for() {
    on_runtime(async {
        let engine = Engine::new(IoMode::Auto).unwrap();
        let scratch = scratch_file();
        let node = FileNode::open(&engine, scratch.path(), FileOptions::default()).unwrap();
        if node.is_direct() {
            let err = node.write(3, Buffer::zeroed(512), WriteFlags::default()).await.unwrap_err();
            assert_eq!(err.kind(), ErrorKind::InvalidInput);
            let name = scratch.path().to_str().unwrap();
            assert!(err.to_string().contains(name) && err.to_string().contains("at 3"), "{err}");
            let end = u64::MAX - u64::MAX % 4096 - 4096;
            let err = node.write(end, Buffer::zeroed(4096), WriteFlags::default()).await.unwrap_err();
            assert_eq!(err.kind(), ErrorKind::OutOfRange);
        }
        node.write(0, Buffer::copy_of(&pattern(8192, 1)), WriteFlags::default()).await.unwrap();
        node.use_buffered().unwrap();
        assert_eq!((node.is_direct(), node.limits().write_alignment), (false, 1));
        node.write(4095, Buffer::copy_of(b"abc"), WriteFlags { fua: true, ..WriteFlags::default() })
            .await
            .unwrap();
        let mut expected = pattern(8192, 1);
        expected[4095..4098].copy_from_slice(b"abc");
        assert!(read(&node, 0, 8192).await == expected);
    });
}

#[test]
fn a_created_file_is_new_and_ours() {
    on_runtime(async {
        let engine = Engine::new(IoMode::Auto).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let node =
            FileNode::create(&engine, &path, FileOptions { read_only: true, ..FileOptions::default() })
                .unwrap();
        assert_eq!((node.size(), node.is_read_only()), (0, false));
        let err = FileNode::create(&engine, &path, FileOptions::default()).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::AlreadyExists);
        assert_eq!(
            FileNode::open(&engine, &path, FileOptions::default()).unwrap_err().kind(),
            ErrorKind::InUse
        );
        node.close().await.unwrap();
        let err = node.read(0, BufferMut::new(1)).await.unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Closed);
        // The lock went with the close, although the node still lives.
        let again = FileNode::open(&engine, &path, FileOptions::default()).unwrap();
        assert!(again.is_locked());
        let err = FileNode::open(&engine, dir.path().join("no"), FileOptions::default()).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::NotFound);
        drop(again);
        let off = FileOptions { locking: Locking::Off, ..FileOptions::default() };
        assert!(!FileNode::open(&engine, &path, off).unwrap().is_locked());
    });
}

#[test]
fn holes_are_told_from_data_and_what_was_written_is_no_hole() {
    everywhere(async |engine, cache| {
        let scratch = scratch_file();
        scratch.as_file().set_len(16 << 20).unwrap();
        let node = FileNode::open(engine, scratch.path(), options(cache)).unwrap();
        let status = async |range: Range<u64>| {
            let extent = node.status(range).await.unwrap();
            (extent.kind, extent.len)
        };
        if node.no_holes.get() {
            return;
        }
        assert_eq!(status(0..32 << 20).await, (ExtentKind::Zero, 32 << 20));
        node.write(4 << 20, Buffer::zeroed(1 << 20), WriteFlags::default()).await.unwrap();
        assert_eq!(status(4 << 20..6 << 20).await, (ExtentKind::Data, 1 << 20));
        assert_eq!(status(0..6 << 20).await, (ExtentKind::Zero, 4 << 20));
        assert_eq!(status(5 << 20..6 << 20).await, (ExtentKind::Zero, 1 << 20));
        node.discard(4 << 20, 1 << 20).await.unwrap();
        assert_eq!(status(0..6 << 20).await.0, ExtentKind::Zero);
        // A status that runs while a write does may say either, but its answer isn't remembered as a hole.
        let write = node.write(8 << 20, Buffer::copy_of(&[1; 4096]), WriteFlags::default());
        let (written, _) = futures_util::future::join(write, status(8 << 20..9 << 20)).await;
        written.unwrap();
        assert_eq!(status(8 << 20..9 << 20).await.0, ExtentKind::Data);
    });
}

#[test]
fn zeroes_take_no_space_or_all_of_it() {
    use std::os::unix::fs::MetadataExt;
    everywhere(async |engine, cache| {
        let scratch = scratch_file();
        let node = FileNode::open(engine, scratch.path(), options(cache)).unwrap();
        node.write(0, Buffer::copy_of(&[1; 1 << 20]), WriteFlags { fua: true, ..WriteFlags::default() })
            .await
            .unwrap();
        let flags = |unmap, fua| ZeroFlags { unmap, fua, fast_only: false };
        node.write_zeroes(0, 1 << 20, flags(true, true)).await.unwrap();
        let blocks = || scratch.as_file().metadata().unwrap().blocks() * 512;
        if !node.abilities.knows_punch() {
            return;
        }
        assert_eq!(blocks(), 0);
        node.write_zeroes(0, 2 << 20, flags(false, true)).await.unwrap();
        assert!(blocks() >= 2 << 20);
        // Far past the end: longer, but not fuller.
        node.write_zeroes(1 << 40, 1 << 30, flags(true, true)).await.unwrap();
        assert_eq!(node.size(), (1 << 40) + (1 << 30));
        assert_eq!(scratch.as_file().metadata().unwrap().len(), node.size());
        assert!(blocks() < 3 << 20);
    });
}

#[test]
fn zeroes_are_written_where_nothing_faster_is_known() {
    everywhere(async |engine, cache| {
        let scratch = scratch_file();
        let node = FileNode::open(engine, scratch.path(), options(cache)).unwrap();
        node.abilities.forget_all();
        node.write(0, Buffer::copy_of(&pattern(4 << 20, 3)), WriteFlags::default()).await.unwrap();
        let fast = ZeroFlags { fast_only: true, ..ZeroFlags::default() };
        let err = node.write_zeroes(0, 4096, fast).await.unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Unsupported);
        for unmap in [false, true] {
            let flags = ZeroFlags { unmap, ..ZeroFlags::default() };
            node.write_zeroes(4096, 5 << 20, flags).await.unwrap();
        }
        assert_eq!(node.size(), 4096 + (5 << 20));
        let mut expected = pattern(4 << 20, 3);
        expected[4096..].fill(0);
        expected.resize(4096 + (5 << 20), 0);
        assert!(read(&node, 0, expected.len()).await == expected);
        node.discard(0, 1 << 20).await.unwrap();
        assert!(read(&node, 0, expected.len()).await == expected);
    });
}

#[test]
fn flushes_at_once_share_and_all_succeed() {
    everywhere(async |engine, cache| {
        let scratch = scratch_file();
        let node = FileNode::open(engine, scratch.path(), options(cache)).unwrap();
        let mut work: FuturesUnordered<LocalFuture<'_, Result<()>>> = FuturesUnordered::new();
        for i in 0..40_u64 {
            work.push(node.write(i * 4096, Buffer::copy_of(&[i as u8; 4096]), WriteFlags::default()));
            work.push(node.flush());
        }
        while let Some(done) = work.next().await {
            done.unwrap();
        }
        node.flush().await.unwrap();
    });
}

const CHILD: &str = "HEADWATER_TEST_FULL_DISK";

/// A limit on the size of files stands for the full disk; it needs a process of its own.
#[test]
fn a_full_disk_is_told_as_such() {
    if std::env::var_os(CHILD).is_none() {
        let status = Command::new("sh")
            .args(["-c", "trap '' XFSZ; ulimit -f 1024; exec \"$0\" \"$@\""])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "file::node::tests::a_full_disk_is_told_as_such"])
            .env(CHILD, "1")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    everywhere(async |engine, cache| {
        let scratch = scratch_file();
        let node = FileNode::open(engine, scratch.path(), options(cache)).unwrap();
        let mut failed = None;
        for i in 0..8 {
            let data = Buffer::copy_of(&[i as u8 + 1; 256 << 10]);
            if let Err(err) = node.write(i * (256 << 10), data, WriteFlags::default()).await {
                failed = Some(err);
                break;
            }
        }
        let err = failed.unwrap();
        assert_eq!(err.kind(), ErrorKind::NoSpace, "{err}");
        assert!(err.to_string().contains(scratch.path().to_str().unwrap()), "{err}");
        // What was there is still there, and the node goes on.
        assert!(read(&node, 0, 4096).await == [1; 4096]);
        node.write(0, Buffer::copy_of(&[9; 4096]), WriteFlags::default()).await.unwrap();
        node.flush().await.unwrap();
    });
}

/// As root on a file system without room: the real thing.
#[test]
fn a_really_full_file_system() {
    let dir = tempfile::tempdir().unwrap();
    let mount =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(dir.path()).output();
    if !mount.is_ok_and(|output| output.status.success()) {
        return;
    }
    let _unmount = Afterwards("umount", &["--lazy"], dir.path().to_owned());
    everywhere(async |engine, cache| {
        let path = dir.path().join("disk");
        let node = FileNode::create(engine, &path, options(cache)).unwrap();
        let err = node.write(0, Buffer::copy_of(&[1; 2 << 20]), WriteFlags::default()).await.unwrap_err();
        assert_eq!(err.kind(), ErrorKind::NoSpace, "{err}");
        let keep = ZeroFlags::default();
        let err = node.write_zeroes(0, 4 << 20, keep).await.unwrap_err();
        assert_eq!(err.kind(), ErrorKind::NoSpace, "{err}");
        node.close().await.unwrap();
        std::fs::remove_file(&path).unwrap();
    });
}

/// A command that undoes something at the end of a test, however it ends.
struct Afterwards(&'static str, &'static [&'static str], PathBuf);

impl Drop for Afterwards {
    fn drop(&mut self) {
        let _ = Command::new(self.0).args(self.1).arg(&self.2).status();
    }
}

/// As root, with a loop device.
#[test]
fn a_block_device() {
    let scratch = scratch_file();
    scratch.as_file().set_len(1 << 20).unwrap();
    let setup = Command::new("losetup").args(["--find", "--show"]).arg(scratch.path()).output();
    let Ok(output) = setup else { return };
    let Some(device) = String::from_utf8(output.stdout).ok().filter(|_| output.status.success()) else {
        return;
    };
    let device = PathBuf::from(device.trim());
    let _detach = Afterwards("losetup", &["--detach"], device.clone());
    everywhere(async |engine, cache| {
        let node = FileNode::open(engine, &device, options(cache)).unwrap();
        assert_eq!((node.size(), node.is_direct()), (1 << 20, cache == Cache::Auto));
        let mut model = Model(pattern(1 << 20, 1));
        node.write(0, Buffer::copy_of(&model.0), WriteFlags { fua: true, ..WriteFlags::default() })
            .await
            .unwrap();
        let steps = [
            Step::Read { offset: 1001, len: 70_000, skew: 3 },
            Step::Zero { offset: 0, len: 65_536, unmap: true },
            Step::Zero { offset: 65_536, len: 65_536, unmap: false },
            Step::Discard { offset: 1 << 18, len: 1 << 18 },
            Step::Write { offset: 3 << 18, len: 1 << 18, skew: 0, fua: true },
            Step::Status { offset: 0, len: 1 << 20 },
            Step::Read { offset: 0, len: 5 << 18, skew: 0 },
            Step::Flush,
        ];
        for step in steps {
            play(&node, &mut model, &step, 7).await;
        }
        let past = node.write(1 << 20, Buffer::zeroed(4096), WriteFlags::default()).await.unwrap_err();
        assert_eq!(past.kind(), ErrorKind::OutOfRange);
        assert_eq!(node.resize(2 << 20).await.unwrap_err().kind(), ErrorKind::Unsupported);
        let again = FileNode::open(engine, &device, options(cache)).unwrap_err();
        assert_eq!(again.kind(), ErrorKind::InUse);
        node.close().await.unwrap();
    });
}

#[test]
fn a_read_may_be_dropped_at_any_time() {
    on_runtime(async {
        let engine = Engine::new(IoMode::Auto).unwrap();
        assert_eq!(engine.kind() == EngineKind::Ring, engine.why_threads().is_none());
        let scratch = scratch_file();
        let expected = pattern(1 << 20, 0);
        std::fs::write(scratch.path(), &expected).unwrap();
        let node = FileNode::open(&engine, scratch.path(), FileOptions::default()).unwrap();
        for i in 0..500_u64 {
            let mut dropped = node.read(i * 2001, BufferMut::new(4096));
            assert!(futures_util::poll!(&mut dropped).is_pending());
            let kept = read(&node, i * 2001, 4096);
            drop(dropped);
            assert!(kept.await == expected[i as usize * 2001..i as usize * 2001 + 4096]);
        }
    });
}

#[test]
fn a_source_that_was_made_shorter_is_no_source_of_zeroes() {
    everywhere(async |engine, cache| {
        let file = scratch_file();
        std::fs::write(file.path(), pattern(64 << 10, 1)).unwrap();
        let options = FileOptions { read_only: true, ..options(cache) };
        let node = FileNode::open(engine, file.path(), options).unwrap();
        file.as_file().set_len(16 << 10).unwrap();
        assert_eq!(read(&node, 0, 8192).await, pattern(8192, 1));
        for offset in [12 << 10, 32 << 10, 4097] {
            let err = node.read(offset, BufferMut::new(32 << 10)).await.unwrap_err();
            assert_eq!(err.kind(), ErrorKind::SourceChanged, "{err}");
        }
        assert_eq!(node.status(32 << 10..64 << 10).await.unwrap_err().kind(), ErrorKind::SourceChanged);
    });
}
