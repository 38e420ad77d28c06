//! The ring against the threads, futures that are dropped, and the end of an engine.

use super::*;
use crate::file::testing::{on_runtime, scratch_file};
use futures_util::stream::{FuturesUnordered, StreamExt};
use proptest::prelude::*;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

/// How many futures the cancellation test drops in each engine.
const DROPS: usize = 2000;

fn opened(file: &File) -> Rc<OpenFile> {
    let fd = OwnedFd::from(file.try_clone().unwrap());
    // Passes for a direct file, because only those are read and written in the ring.
    Rc::new(OpenFile::new(fd, 512, 1))
}

fn engines() -> [Rc<Engine>; 2] {
    [Engine::new(IoMode::Auto).unwrap(), Engine::new(IoMode::Threads).unwrap()]
}

/// Lets other tasks, and so the driver, have a turn.
async fn one_turn() {
    tokio::task::yield_now().await;
}

#[derive(Debug, Clone)]
enum Step {
    Read { offset: u64, len: usize },
    Write { offset: u64, len: usize, durable: bool },
    Punch { offset: u64, len: u64 },
    Seek { offset: u64, hole: bool },
    Sync,
    SetSize { size: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let offset = 0..200_000_u64;
    prop_oneof![
        3 => (offset.clone(), 0..70_000_usize).prop_map(|(offset, len)| Step::Read { offset, len }),
        3 => (offset.clone(), 1..70_000_usize, any::<bool>())
            .prop_map(|(offset, len, durable)| Step::Write { offset, len, durable }),
        1 => (offset.clone(), 1..70_000_u64).prop_map(|(offset, len)| Step::Punch { offset, len }),
        1 => (offset.clone(), any::<bool>()).prop_map(|(offset, hole)| Step::Seek { offset, hole }),
        1 => Just(Step::Sync),
        1 => offset.prop_map(|size| Step::SetSize { size }),
    ]
}

/// What a step gives: a number or an errno, and the bytes that were read.
async fn run(
    engine: &Engine,
    file: &Rc<OpenFile>,
    step: &Step,
    seed: u8,
) -> (Result<u64, Option<i32>>, Vec<u8>) {
    let plain = match step {
        Step::Read { offset, len } => {
            return match engine.read(file, *offset, BufferMut::zeroed(*len), *len).await {
                Ok((buf, count)) => (Ok(count as u64), buf.to_vec()),
                Err(err) => (Err(err.raw_os_error()), Vec::new()),
            };
        }
        Step::Write { offset, len, durable } => {
            let data: Vec<u8> = (0..*len).map(|i| (i % 251) as u8 ^ seed).collect();
            let written = engine.write(file, *offset, Buffer::copy_of(&data), *durable).await;
            return (written.map(|()| 0).map_err(|err| err.raw_os_error()), Vec::new());
        }
        Step::Punch { offset, len } => Request::Allocate {
            mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            offset: *offset,
            len: *len,
        },
        Step::Seek { offset, hole: true } => Request::SeekHole { offset: *offset },
        Step::Seek { offset, hole: false } => Request::SeekData { offset: *offset },
        Step::Sync => Request::Sync,
        Step::SetSize { size } => Request::SetSize { size: *size },
    };
    (engine.plain(file, plain).await.map_err(|err| err.raw_os_error()), Vec::new())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn ring_and_threads_do_the_same(steps in prop::collection::vec(step(), 1..30)) {
        on_runtime(async {
            let [ring, threads] = engines();
            let (a, b) = (scratch_file(), scratch_file());
            let (file_a, file_b) = (opened(a.as_file()), opened(b.as_file()));
            for (i, step) in steps.iter().enumerate() {
                let by_ring = run(&ring, &file_a, step, i as u8).await;
                let by_threads = run(&threads, &file_b, step, i as u8).await;
                assert_eq!(by_ring, by_threads, "{step:?}");
            }
            assert!(std::fs::read(a.path()).unwrap() == std::fs::read(b.path()).unwrap());
        });
    }
}

#[test]
fn auto_says_what_it_chose_and_why() {
    on_runtime(async {
        let [auto, threads] = engines();
        assert_eq!(auto.kind() == EngineKind::Threads, auto.why_threads().is_some());
        assert_eq!((threads.kind(), threads.why_threads()), (EngineKind::Threads, None));
    });
}

#[test]
fn an_engine_needs_a_runtime_of_one_thread() {
    assert_eq!(Engine::new(IoMode::Auto).unwrap_err().kind(), ErrorKind::InvalidInput);
}

/// The pool hands memory out again as soon as it is free: were it freed while a read runs, the read would destroy the next user's bytes.
#[test]
fn a_dropped_read_keeps_its_memory_until_the_kernel_is_done() {
    on_runtime(async {
        let scratch = scratch_file();
        std::fs::write(scratch.path(), vec![0xee; 1 << 20]).unwrap();
        for engine in engines() {
            // Around the page cache if possible: then reads take a while.
            let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(scratch.path());
            let file = opened(direct.as_ref().unwrap_or(scratch.as_file()));
            for i in 0..DROPS {
                let mut reads: FuturesUnordered<_> = (0..4)
                    .map(|k| {
                        let offset = ((i * 4 + k) * 4096 % (1 << 20)) as u64;
                        Box::pin(engine.read(&file, offset, BufferMut::new(8192), 8192))
                    })
                    .collect();
                // Dropped before it is submitted, while it runs, and after its end.
                assert!(futures_util::poll!(reads.next()).is_pending());
                for _ in 0..i % 4 {
                    one_turn().await;
                }
                drop(reads);
                let mine = BufferMut::copy_of(&[0x11; 8192]);
                for _ in 0..2 {
                    one_turn().await;
                }
                assert!(mine.iter().all(|byte| *byte == 0x11), "round {i} on {engine:?}");
            }
        }
    });
}

#[test]
fn more_operations_than_the_ring_has_entries() {
    on_runtime(async {
        let scratch = scratch_file();
        std::fs::write(scratch.path(), (0..=255).cycle().take(1 << 20).collect::<Vec<u8>>()).unwrap();
        for engine in engines() {
            let file = opened(scratch.as_file());
            let mut reads: FuturesUnordered<_> = (0..3000_u64)
                .map(|i| {
                    let (engine, file) = (&engine, &file);
                    async move {
                        let (buf, count) = engine.read(file, i * 7, BufferMut::new(16), 16).await.unwrap();
                        assert_eq!((count, buf[0]), (16, (i * 7 % 256) as u8));
                    }
                })
                .collect();
            let mut ended = 0;
            while reads.next().await.is_some() {
                ended += 1;
            }
            assert_eq!(ended, 3000);
        }
    });
}

#[test]
fn errors_come_back_as_the_system_calls_them() {
    on_runtime(async {
        let full = File::options().write(true).open("/dev/full").unwrap();
        for engine in engines() {
            let file = opened(&full);
            let err = engine.write(&file, 0, Buffer::zeroed(4096), false).await.unwrap_err();
            assert_eq!(err.raw_os_error(), Some(libc::ENOSPC));
            let err = engine.read(&file, 0, BufferMut::new(4096), 4096).await.unwrap_err();
            assert_eq!(err.raw_os_error(), Some(libc::EBADF));
        }
    });
}

/// The engine is dropped while the kernel has work, and the file was closed by everybody else.
#[test]
fn the_end_waits_for_what_runs() {
    on_runtime(async {
        let scratch = scratch_file();
        for engine in engines() {
            std::fs::write(scratch.path(), b"").unwrap();
            let file = opened(scratch.as_file());
            {
                let mut write = Box::pin(engine.write(&file, 0, Buffer::copy_of(&[7; 65536]), true));
                assert!(futures_util::poll!(&mut write).is_pending());
            }
            drop(file);
            drop(engine);
            assert!(std::fs::read(scratch.path()).unwrap() == vec![7; 65536]);
        }
    });
}

#[test]
fn a_broken_ring_fails_requests_and_frees_nothing_that_runs() {
    on_runtime(async {
        let Ok(engine) = Engine::new(IoMode::Ring) else { return };
        // A read that never ends, of what passes for a direct file, because only those are read in the ring.
        let (reader, _writer) = std::io::pipe().unwrap();
        let pipe = Rc::new(OpenFile::new(reader.into(), 512, 1));
        let mut read = Box::pin(engine.read(&pipe, u64::MAX, BufferMut::new(4096), 1));
        assert!(futures_util::poll!(&mut read).is_pending());
        one_turn().await;
        let mut tasks = Vec::new();
        engine.state.borrow_mut().break_down(libc::EBADF, &mut tasks);
        assert_eq!(tasks.len(), 1);
        assert_eq!(read.await.unwrap_err().raw_os_error(), Some(libc::EBADF));
        let scratch = scratch_file();
        let err = engine.write(&opened(scratch.as_file()), 0, Buffer::zeroed(1), false).await.unwrap_err();
        assert_eq!(err.raw_os_error(), Some(libc::EBADF));
    });
}

#[test]
fn a_read_of_which_the_page_cache_has_a_part_is_whole() {
    use rustix::fs::{Advice, fadvise};
    on_runtime(async {
        let scratch = scratch_file();
        let bytes: Vec<u8> = (0..200_000_u32).map(|i| (i / 7) as u8).collect();
        scratch.as_file().write_all_at(&bytes, 0).unwrap();
        scratch.as_file().sync_all().unwrap();
        let file = Rc::new(OpenFile::new(scratch.as_file().try_clone().unwrap().into(), 1, 1));
        for engine in engines() {
            for dropped in [0..0, 0..200_000, 100_000..200_000, 0..100_000_u64] {
                // The kernel may keep what it likes; then the test is easier.
                let len = std::num::NonZeroU64::new(dropped.end - dropped.start);
                if let Some(len) = len {
                    fadvise(&file.fd, dropped.start, Some(len), Advice::DontNeed).unwrap();
                }
                let (buf, count) = engine.read(&file, 10, BufferMut::zeroed(250_000), 199_990).await.unwrap();
                assert_eq!((count, &buf[..count]), (199_990, &bytes[10..]), "without {dropped:?}");
            }
        }
    });
}

#[test]
fn whoever_reads_what_is_cached_leaves_others_a_turn() {
    on_runtime(async {
        let scratch = scratch_file();
        scratch.as_file().write_all_at(&[1; 4096], 0).unwrap();
        let file = Rc::new(OpenFile::new(scratch.as_file().try_clone().unwrap().into(), 1, 1));
        let engine = Engine::new(IoMode::Auto).unwrap();
        let stop = Cell::new(false);
        let reads = async {
            // More than anybody reads in a turn.
            for _ in 0..1_000_000 {
                if stop.get() {
                    return;
                }
                engine.read(&file, 0, BufferMut::new(4096), 4096).await.unwrap();
            }
            panic!("nobody else had a turn");
        };
        let other = async {
            one_turn().await;
            stop.set(true);
        };
        futures_util::future::join(reads, other).await;
    });
}
