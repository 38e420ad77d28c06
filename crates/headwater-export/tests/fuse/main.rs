//! A disk as a file, used through the kernel. Needs /dev/fuse and the right to mount.
//!
//! Each test is done twice: over io_uring, and through /dev/fuse. The kernel offers the first where it is new enough and a parameter of its module says
//! so, which root may set; where it can't be had that is said, and only the second is tested.
//!
//! The disk's thread never touches the file itself: it would wait for its own answer.

mod ends;
mod ring;

use headwater_block::memory::MemoryNode;
use headwater_block::null::{NullNode, NullOptions};
use headwater_block::{BufferMut, Disk, DiskOptions, Edge, ErrorKind, Node, TokioClock};
use headwater_export::Removal;
use headwater_export::fuse::{FuseExport, FuseOptions, MountOptions, mount, unmount};
use ring::{Way, with_ring};
use rustix::fs::{FallocateFlags, OFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use std::cell::{Cell, RefCell};
use std::fs::{File, OpenOptions};
use std::io::ErrorKind as IoKind;
use std::mem::ManuallyDrop;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// A disk in memory, mounted.
struct Mount {
    _directory: tempfile::TempDir,
    path: PathBuf,
    disk: Rc<Disk>,
    export: FuseExport,
    /// The sizes that others were told of.
    told: Rc<RefCell<Vec<u64>>>,
}

impl Mount {
    async fn new(content: Vec<u8>, writable: bool, growable: bool) -> Self {
        Self::of(MemoryNode::new("memory", content), writable, growable).await
    }

    async fn of(node: Rc<dyn Node>, writable: bool, growable: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, "what lies below").unwrap();
        let disk = Disk::new(node, Rc::new(TokioClock::new()), DiskOptions::default());
        let told = Rc::<RefCell<Vec<u64>>>::default();
        let export = serve(&path, &disk, writable, growable, told.clone()).await;
        Self { _directory: directory, path, disk, export, told }
    }

    /// Lets a client work on the file.
    async fn client<T: Send + 'static>(&self, work: impl FnOnce(&Path) -> T + Send + 'static) -> T {
        let path = self.path.clone();
        tokio::task::spawn_blocking(move || work(&path)).await.unwrap()
    }

    async fn end(self) {
        let (over_ring, through_file) = self.export.requests();
        match WAY.get() {
            // What needs no answer comes through the file, too, but isn't counted.
            Way::Ring => assert!(over_ring > 0 && through_file == 0, "{over_ring}, {through_file}"),
            Way::File => assert!(over_ring == 0 && through_file > 0, "{over_ring}, {through_file}"),
        }
        self.export.remove(Removal::Safe).await.unwrap().await;
        assert_eq!(std::fs::read(&self.path).unwrap(), b"what lies below");
    }
}

/// A test that fails must not leave a mount behind, nor wait for an answer of its own.
impl Drop for Mount {
    fn drop(&mut self) {
        let _ = unmount(&self.path, Removal::Hard);
    }
}

thread_local! {
    /// The way that the test is done now.
    static WAY: Cell<Way> = const { Cell::new(Way::File) };
}

async fn serve(
    path: &Path,
    disk: &Rc<Disk>,
    writable: bool,
    growable: bool,
    told: Rc<RefCell<Vec<u64>>>,
) -> FuseExport {
    let over_ring = WAY.get() == Way::Ring;
    with_ring(over_ring, start(path, FuseOptions { writable, growable, over_ring, ..options(disk, told) }))
        .await
}

/// For a disk that can be read only, and tells of its sizes.
fn options(disk: &Rc<Disk>, told: Rc<RefCell<Vec<u64>>>) -> FuseOptions {
    let edge = Edge::new(disk.clone());
    let disk = disk.clone();
    let resized = Box::new(move || told.borrow_mut().push(disk.size()));
    FuseOptions { edge, writable: false, writethrough: false, growable: false, over_ring: true, resized }
}

async fn start(path: &Path, options: FuseOptions) -> FuseExport {
    let mounted = mount(path, MountOptions { writable: options.writable, allow_other: false }).await.unwrap();
    FuseExport::start(mounted, options).unwrap()
}

/// Does a test both ways.
fn run(test: impl AsyncFn()) {
    for way in Way::all() {
        WAY.set(way);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, test());
    }
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

fn pattern(len: u64) -> Vec<u8> {
    (0..len).map(|at| (at / 512 + at % 251 + 1) as u8).collect()
}

#[test]
fn many_requests_at_once_are_answered_when_the_disk_has_done_them() {
    run(async || {
        let latency = Duration::from_micros(300);
        let options = NullOptions { size: 64 * MIB, latency, read_zeroes: true, ..NullOptions::default() };
        let node = NullNode::new("null", Rc::new(TokioClock::new()), options);
        let mount = Mount::of(node, false, false).await;
        let work = mount.client(|path| {
            std::thread::scope(|scope| {
                for reader in 0..32 {
                    scope.spawn(move || {
                        let flags = OFlags::DIRECT.bits() as i32;
                        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).unwrap();
                        // Aligned, as the kernel wants it.
                        let mut buffer = BufferMut::new(4096);
                        for i in 0..200 {
                            buffer.fill(1);
                            file.read_exact_at(&mut buffer, (i * 37 + reader * 500) * 4096 % (64 * MIB))
                                .unwrap();
                            assert!(buffer.iter().all(|byte| *byte == 0));
                        }
                    });
                }
            });
        });
        tokio::time::timeout(Duration::from_secs(40), work).await.expect("all are answered");
        mount.end().await;
    });
}

#[test]
fn the_file_is_the_disk() {
    run(async || {
        let mount = Mount::new(pattern(3 * MIB + 512), true, false).await;
        mount
            .client(|path| {
                let file = open(path);
                assert_eq!(
                    (file.metadata().unwrap().len(), file.metadata().unwrap().mode()),
                    (3 * MIB + 512, 0o100_600)
                );
                assert_eq!(std::fs::read(path).unwrap(), pattern(3 * MIB + 512));
                // Longer than a request.
                file.write_all_at(&pattern(3 * MIB), 0).unwrap();
                file.write_all_at(&[7; 100_000], 1_000_001).unwrap();
                file.sync_data().unwrap();
            })
            .await;
        assert_eq!(*mount.disk.read(1_000_000, 100_002).await.unwrap(), {
            let mut bytes = pattern(3 * MIB)[1_000_000..1_100_002].to_vec();
            bytes[1..100_001].fill(7);
            bytes
        });
        assert!(mount.disk.stats().flushes.get() > 0, "fsync is a flush");
        // What somebody else writes is seen at once.
        mount.disk.write(0, headwater_block::Buffer::copy_of(b"new"), Default::default()).await.unwrap();
        mount
            .client(|path| {
                let mut start = [0; 3];
                File::open(path).unwrap().read_exact_at(&mut start, 0).unwrap();
                assert_eq!(&start, b"new");
            })
            .await;
        mount.end().await;
    });
}

/// Clients at once, each in a part of its own, against what each knows.
#[test]
fn clients_at_once_read_what_they_wrote() {
    run(async || {
        let mount = Mount::new(vec![0; 4 << 20], true, false).await;
        let client = |part: u64| {
            mount.client(move |path| {
                let (file, base) = (open(path), part * MIB);
                let mut known = vec![0; MIB as usize];
                let mut random = part + 1;
                for step in 0..150u64 {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    let start = (random >> 33) % MIB;
                    let end = (start + 1 + (random >> 13) % 70_000).min(MIB);
                    let range = start as usize..end as usize;
                    match random >> 61 {
                        0..4 => {
                            let data = vec![step as u8 + 1; range.len()];
                            file.write_all_at(&data, base + start).unwrap();
                            known[range].copy_from_slice(&data);
                        }
                        4 => {
                            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                            fallocate(&file, mode, base + start, end - start).unwrap();
                            known[range].fill(0);
                        }
                        5 => {
                            fallocate(&file, FallocateFlags::ZERO_RANGE, base + start, end - start).unwrap();
                            known[range].fill(0);
                        }
                        _ => {
                            let mut data = vec![0; range.len()];
                            file.read_exact_at(&mut data, base + start).unwrap();
                            assert!(data == known[range], "part {part}, step {step}");
                        }
                    }
                }
            })
        };
        futures_util::future::join_all((0..4).map(client)).await;
        mount.end().await;
    });
}

#[test]
fn a_disk_keeps_its_size() {
    run(async || {
        let mount = Mount::new(pattern(8192), true, false).await;
        mount
            .client(|path| {
                let file = open(path);
                assert_eq!(
                    file.write_at(&[1; 4096], 8192 - 512).unwrap(),
                    512,
                    "as much as there is room for"
                );
                let past = file.write_at(&[1], 8192).unwrap_err();
                assert_eq!(past.kind(), IoKind::StorageFull, "{past}");
                for size in [0, 4096, 16384] {
                    assert_eq!(file.set_len(size).unwrap_err().kind(), IoKind::PermissionDenied);
                }
                // Nobody empties a disk by opening it.
                let emptied = OpenOptions::new().write(true).truncate(true).open(path).unwrap_err();
                assert_eq!(emptied.kind(), IoKind::PermissionDenied);
                assert_eq!(fallocate(&file, FallocateFlags::empty(), 0, 4096), Err(Errno::OPNOTSUPP));
                for start in [4608, 8192] {
                    assert_eq!(fallocate(&file, FallocateFlags::ZERO_RANGE, start, 4096), Err(Errno::NOSPC));
                }
                assert_eq!(
                    std::fs::read(path).unwrap()[4608..7680],
                    pattern(8192)[4608..7680],
                    "nothing was done"
                );
                assert_eq!(file.read_at(&mut [0; 10], 8192).unwrap(), 0);
                assert_eq!(file.read_at(&mut [0; 4096], 8000).unwrap(), 192);
            })
            .await;
        mount.end().await;
    });
}

#[test]
fn a_growable_disk_grows_with_what_is_written_and_never_shrinks_by_it() {
    run(async || {
        let mount = Mount::new(pattern(4096), true, true).await;
        let grow = |step: u64| {
            mount.client(move |path| {
                let file = open(path);
                for at in (0..40).rev() {
                    file.write_all_at(&[step as u8; 512], 4096 + at * 2048 + step * 512).unwrap();
                }
            })
        };
        futures_util::future::join_all((0..4).map(grow)).await;
        assert_eq!(mount.disk.size(), 4096 + 40 * 2048);
        assert_eq!(mount.told.borrow().last(), Some(&mount.disk.size()));
        let written = mount.disk.read(4096, 40 * 2048).await.unwrap();
        assert!(written.chunks(512).enumerate().all(|(at, part)| part == [(at % 4) as u8; 512]));
        mount
            .client(|path| {
                let file = open(path);
                file.set_len(1024).unwrap();
                assert_eq!(file.metadata().unwrap().len(), 1024);
                file.set_len(1 << 20).unwrap();
                let mut byte = [1];
                file.read_exact_at(&mut byte, 1 << 19).unwrap();
                assert_eq!(byte, [0], "what is new is zeroes");
            })
            .await;
        assert_eq!(mount.disk.size(), 1 << 20);
        assert!(mount.told.borrow().ends_with(&[1024, 1 << 20]), "{:?}", mount.told);
        mount.end().await;
    });
}

#[test]
fn holes_are_found() {
    run(async || {
        let mount = Mount::new(vec![0; 2 << 20], true, false).await;
        mount
            .client(|path| {
                let file = open(path);
                file.write_all_at(&[1; 4096], MIB).unwrap();
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&file, mode, 0, MIB).unwrap();
                let data = seek(&file, SeekFrom::Data(0)).unwrap();
                assert!(data <= MIB, "nothing is passed over: {data}");
                assert!(seek(&file, SeekFrom::Hole(MIB)).unwrap() >= MIB + 4096);
                assert_eq!(seek(&file, SeekFrom::Data(2 * MIB)), Err(Errno::NXIO));
                assert_eq!(seek(&file, SeekFrom::End(0)).unwrap(), 2 * MIB);
            })
            .await;
        mount.end().await;
    });
}

#[test]
fn a_read_only_file_stays_so() {
    run(async || {
        let mount = Mount::new(pattern(4096), false, false).await;
        mount
            .client(|path| {
                assert_eq!(path.metadata().unwrap().mode(), 0o100_400);
                let refused = OpenOptions::new().write(true).open(path).unwrap_err();
                assert_eq!(refused.kind(), IoKind::ReadOnlyFilesystem);
                let writable = std::fs::Permissions::from_mode(0o600);
                assert!(std::fs::set_permissions(path, writable).is_err());
                assert_eq!(std::fs::read(path).unwrap(), pattern(4096));
            })
            .await;
        mount.end().await;
    });
}

#[test]
fn a_file_in_use_stays_until_it_must_go() {
    run(async || {
        let mount = Mount::new(pattern(8192), true, false).await;
        // Closing it here, on the disk's thread, would wait for the disk's thread.
        let file = ManuallyDrop::new(mount.client(open).await);
        assert_eq!(mount.export.remove(Removal::Safe).await.err().unwrap().kind(), ErrorKind::InUse);
        let file = tokio::task::spawn_blocking(move || {
            file.read_exact_at(&mut [0; 512], 0).unwrap();
            file
        });
        let file = file.await.unwrap();
        mount.export.remove(Removal::Hard).await.unwrap().await;
        let cut_off = tokio::task::spawn_blocking(move || {
            ManuallyDrop::into_inner(file).read_exact_at(&mut [0; 512], 0)
        });
        assert!(cut_off.await.unwrap().is_err());
        assert_eq!(std::fs::read(&mount.path).unwrap(), b"what lies below");
    });
}

#[test]
fn an_export_that_is_unmounted_from_outside_is_gone() {
    run(async || {
        let mount = Mount::new(pattern(8192), true, false).await;
        mount
            .client(|path| rustix::mount::unmount(path, rustix::mount::UnmountFlags::empty()).unwrap())
            .await;
        mount.export.gone().await;
        // Once more is not an error.
        mount.export.remove(Removal::Safe).await.unwrap();
    });
}

#[test]
fn the_dead_mount_of_a_server_that_was_killed_is_replaced() {
    run(async || {
        let mut mount = Mount::new(pattern(8192), true, false).await;
        let over =
            headwater_export::fuse::mount(&mount.path, MountOptions { writable: true, allow_other: false });
        // Its server never begins: to its clients it is as if it had been killed.
        drop(over.await.unwrap().device);
        assert_eq!(
            mount.client(|path| path.metadata().unwrap_err().raw_os_error()).await,
            Some(Errno::NOTCONN.raw_os_error())
        );
        let over = serve(&mount.path, &mount.disk, true, false, Rc::default()).await;
        let below = std::mem::replace(&mut mount.export, over);
        assert_eq!(mount.client(|path| std::fs::read(path).unwrap()).await, pattern(8192));
        mount.export.remove(Removal::Safe).await.unwrap().await;
        mount.export = below;
        mount.end().await;
    });
}

#[test]
fn only_a_regular_file_is_mounted_over() {
    run(async || {
        let directory = tempfile::tempdir().unwrap();
        let options = MountOptions { writable: true, allow_other: false };
        let refused = mount(directory.path(), options).await.err().unwrap();
        assert!(refused.to_string().contains("a directory"), "{refused}");
        let refused = mount(&directory.path().join("nothing"), options).await.err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::NotFound, "{refused}");
    });
}
