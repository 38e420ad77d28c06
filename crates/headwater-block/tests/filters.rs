//! Filters in the simulator: whatever is stacked on a disk, its contents are what a flat model says; and what each filter adds.

use headwater_block::copy_up::CopyUpOptions;
use headwater_block::filter::blkdebug::{BlkdebugOptions, InjectError, SetState};
use headwater_block::filter::throttle::ThrottleLimits;
use headwater_block::filter::{BlkdebugNode, BlkverifyNode, CopyOnReadNode, ThrottleGroup, ThrottleNode};
use headwater_block::memory::MemoryNode;
use headwater_block::{
    Buffer, DebugEvent, Disk, DiskOptions, Edge, ErrorKind, ExtentKind, Limits, Node, WriteFlags, ZeroFlags,
};
use headwater_sim::{Fault, Op, Pages, Rng, Sim, SimFile, SimOverlay, for_seeds};
use std::rc::Rc;

fn disk(sim: &Sim, node: Rc<dyn Node>) -> Rc<Disk> {
    Disk::new(node, sim.clock(), DiskOptions::default())
}

/// A source of `bytes`.
fn source(sim: &Sim, bytes: &[u8]) -> Rc<SimFile> {
    let file = SimFile::new(sim, "source", Pages::new(bytes.len() as u64, 512));
    file.preset(0, bytes);
    file
}

fn random_bytes(rng: &Rng, len: u64) -> Vec<u8> {
    // Runs, some of zeroes, so that a status has something to say.
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < len {
        let run = rng.range(1..3000) as usize;
        let byte = if rng.one_in(3) { 0 } else { rng.range(1..256) as u8 };
        bytes.extend(std::iter::repeat_n(byte, run));
    }
    bytes.truncate(len as usize);
    bytes
}

/// A random filter over `below`, which holds `bytes`.
fn random_filter(sim: &Sim, below: Rc<Disk>, bytes: &[u8]) -> Rc<dyn Node> {
    let rng = sim.rng();
    let edge = Edge::new(below);
    match rng.range(0..4) {
        0 => {
            let mut limits = ThrottleLimits::default();
            limits.iops.total.rate = 100_000;
            ThrottleNode::new(edge, ThrottleGroup::new("group", sim.clock(), limits).unwrap())
        }
        1 => CopyOnReadNode::new(edge, None).unwrap(),
        2 => {
            let align = *rng.pick(&[0, 512, 4096]);
            let some = |of: u64| if rng.one_in(2) { of.max(512) * rng.range(1..4) } else { 0 };
            let options = BlkdebugOptions {
                align,
                max_transfer: some(align),
                opt_write_zero: some(align),
                opt_discard: some(align),
                ..BlkdebugOptions::default()
            };
            BlkdebugNode::new(edge, options).unwrap()
        }
        _ => {
            let raw = Edge::new(disk(sim, MemoryNode::new("raw", bytes.to_vec())));
            BlkverifyNode::new(edge, raw).unwrap()
        }
    }
}

#[test]
fn contents_are_what_they_would_be_without_filters() {
    for_seeds(300, |seed| {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let rng = inner.rng().clone();
            let size = if rng.one_in(2) { 32 << 10 } else { rng.range(1..40 << 10) };
            let source_size = if rng.one_in(2) { size } else { rng.range(1..50 << 10) };
            let mut bytes = random_bytes(&rng, source_size);
            let source = source(&inner, &bytes);
            bytes.resize(size as usize, 0);
            let unit = *rng.pick(&[512, 1024, 4096]);
            let alignment = *rng.pick(&[1, 512, unit]);
            let overlay = SimOverlay::new(&inner, "overlay", size, unit, alignment, Some(source));
            let mut top = disk(&inner, overlay);
            for _ in 0..rng.range(1..4) {
                top = disk(&inner, random_filter(&inner, top, &bytes));
            }
            assert_eq!(top.size(), size);
            for _ in 0..60 {
                let range = rng.byte_range(size, 9000, 512);
                let (at, len) = (range.start, range.end - range.start);
                let within = range.start as usize..range.end as usize;
                match rng.range(0..6) {
                    0 | 1 => {
                        let byte = rng.range(0..256) as u8;
                        bytes[within.clone()].fill(byte);
                        let fua = rng.one_in(8);
                        top.write(
                            at,
                            Buffer::copy_of(&bytes[within]),
                            WriteFlags { fua, ..WriteFlags::default() },
                        )
                        .await
                        .unwrap();
                    }
                    2 => {
                        let flags = ZeroFlags { fua: false, unmap: rng.one_in(2), fast_only: false };
                        top.write_zeroes(at, len, flags).await.unwrap();
                        bytes[within].fill(0);
                    }
                    3 => {
                        for extent in top.block_status(range, 100).await.unwrap() {
                            let part = &bytes[extent.offset as usize..extent.end() as usize];
                            assert!(extent.kind != ExtentKind::Zero || part.iter().all(|byte| *byte == 0));
                        }
                    }
                    4 if rng.one_in(3) => top.flush().await.unwrap(),
                    _ => assert_eq!(&top.read(at, len).await.unwrap()[..], &bytes[within]),
                }
            }
            assert_eq!(&top.read(0, size).await.unwrap()[..], &bytes[..]);
            let past = top.top().read(size - 1, headwater_block::BufferMut::new(5000)).await.unwrap();
            assert!(past[0] == bytes[size as usize - 1] && past[1..].iter().all(|byte| *byte == 0));
            let beyond = top.top().read(size + 700, headwater_block::BufferMut::new(100)).await.unwrap();
            assert!(beyond.iter().all(|byte| *byte == 0));
        });
    });
}

/// The simulated overlay panics when two changes of it overlap that must not.
#[test]
fn users_above_and_beside_a_filter_share_the_locks_of_the_disk_below() {
    for_seeds(100, |seed| {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let size = 64 << 10;
            let bytes = random_bytes(inner.rng(), size);
            let source = source(&inner, &bytes);
            let overlay = SimOverlay::new(&inner, "overlay", size, 4096, 512, Some(source));
            let below = disk(&inner, overlay.clone());
            let node = CopyOnReadNode::new(Edge::new(below.clone()), None).unwrap();
            let top = disk(&inner, node);
            let mut tasks = Vec::new();
            for n in 0..8 {
                let (sim, below, top) = (inner.clone(), below.clone(), top.clone());
                tasks.push(inner.spawn(format!("user {n}"), async move {
                    let user = if n % 2 == 0 { &below } else { &top };
                    for _ in 0..20 {
                        let range = sim.rng().byte_range(size, 6000, 512);
                        let (at, len) = (range.start, range.end - range.start);
                        match sim.rng().range(0..4) {
                            0 => user
                                .write(at, Buffer::zeroed(len as usize), WriteFlags::default())
                                .await
                                .unwrap(),
                            1 => user.discard(at, len).await.unwrap(),
                            2 if n % 2 == 0 => {
                                below.copy_up(range, &CopyUpOptions::default()).await.map(drop).unwrap();
                            }
                            _ => drop(user.read(at, len).await.unwrap()),
                        }
                    }
                }));
            }
            for task in tasks {
                task.await;
            }
            top.read(0, size).await.unwrap();
            assert_eq!(overlay.unallocated(), 0);
        });
    });
}

#[test]
fn copy_on_read_keeps_what_lies_above_the_bottoms_backing() {
    for_seeds(30, |seed| {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let size = 16 * 1024;
            let source = source(&inner, &vec![1; size as usize]);
            let layer =
                |name: &str, below: Rc<dyn Node>| SimOverlay::new(&inner, name, size, 1024, 512, Some(below));
            let middle = layer("middle", source.clone());
            middle.preset(0..4096, Some(&[2; 4096]));
            let top = layer("top", middle.clone());
            let below = disk(&inner, top.clone());
            let edge = Edge::new(below.clone());

            let foreign = layer("foreign", source.clone());
            let err = CopyOnReadNode::new(edge.clone(), Some(foreign.clone())).err().unwrap();
            assert!(err.kind() == ErrorKind::InvalidInput && err.to_string().contains("foreign"), "{err}");
            assert!(!below.copies_on_read());

            let node = CopyOnReadNode::new(edge.clone(), Some(middle.clone())).unwrap();
            let filter: Rc<dyn Node> = node.clone();
            let err = CopyOnReadNode::new(Edge::new(disk(&inner, filter)), Some(node.clone())).err().unwrap();
            assert!(err.to_string().contains("filter"), "{err}");
            let reader = disk(&inner, node);
            assert!(reader.keeps_what_is_read() && !reader.copies_on_read());
            reader.read(0, size).await.unwrap();
            assert_eq!(top.unallocated(), 12, "only what the bottom holds was kept");

            // The disk is exchanged: copy-on-read goes with the edge.
            let other = disk(&inner, layer("other", source.clone()));
            let drained = edge.drain().await;
            edge.replace(&drained, other.clone());
            drop(drained);
            assert!(other.copies_on_read() && !below.copies_on_read());
            drop(reader);
            assert!(!other.copies_on_read());

            // Without a bottom all is kept.
            let node = CopyOnReadNode::new(Edge::new(below.clone()), None).unwrap();
            disk(&inner, node).read(0, size).await.unwrap();
            assert_eq!(top.unallocated(), 0);
        });
    });
}

#[test]
fn images_that_hold_the_same_are_never_found_to_differ() {
    for_seeds(100, |seed| {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let size = 16 * 1024;
            let child = || Edge::new(disk(&inner, source(&inner, &vec![0; size as usize])));
            let verify = disk(&inner, BlkverifyNode::new(child(), child()).unwrap());
            let users: Vec<_> = (0..6)
                .map(|n| {
                    let (sim, verify) = (inner.clone(), verify.clone());
                    inner.spawn(format!("user {n}"), async move {
                        for _ in 0..15 {
                            let range = sim.rng().byte_range(size, 4000, 512);
                            let (at, len) = (range.start, range.end - range.start);
                            match sim.rng().range(0..4) {
                                0 => drop(verify.read(at, len).await.unwrap()),
                                1 => verify.discard(at, len).await.unwrap(),
                                2 => verify.write_zeroes(at, len, ZeroFlags::default()).await.unwrap(),
                                _ => {
                                    let data = Buffer::copy_of(&vec![n + 1; len as usize]);
                                    verify.write(at, data, WriteFlags::default()).await.unwrap();
                                }
                            }
                        }
                    })
                })
                .collect();
            for user in users {
                user.await;
            }
        });
    });
}

#[test]
fn a_difference_names_its_byte_and_is_final() {
    let sim = Sim::new(1);
    let inner = sim.clone();
    sim.run(async move {
        let size = 16 * 1024;
        let memory = |bytes: Vec<u8>| Edge::new(disk(&inner, MemoryNode::new("memory", bytes)));
        let err = BlkverifyNode::new(memory(vec![0; 10]), memory(vec![0; 11])).err().unwrap();
        assert!(err.to_string().contains("same size"), "{err}");

        let mut bytes = vec![7; size];
        bytes[5000] = 8;
        let verify = disk(&inner, BlkverifyNode::new(memory(vec![7; size]), memory(bytes)).unwrap());
        verify.read(0, 5000).await.unwrap();
        let err = verify.read(4096, 4096).await.unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Corrupt);
        assert!(err.to_string().contains("byte 5000 is 0x07 in the first and 0x08 in the second"), "{err}");
        for later in [
            verify.read(0, 1).await.map(drop),
            verify.write(0, Buffer::zeroed(1), WriteFlags::default()).await,
            verify.discard(0, 4096).await,
            verify.flush().await,
        ] {
            assert_eq!(later.unwrap_err().to_string(), err.to_string());
        }

        // One fails where the other doesn't; and both fail.
        let files = [source(&inner, &vec![0; size]), source(&inner, &vec![0; size])];
        let [test, raw] = files.clone().map(|file| Edge::new(disk(&inner, file)));
        let verify = disk(&inner, BlkverifyNode::new(test, raw).unwrap());
        files.iter().for_each(|file| file.fail(Fault::nth(&[Op::Write], 0, ErrorKind::NoSpace)));
        let write = || verify.write(0, Buffer::zeroed(512), WriteFlags::default());
        assert_eq!(write().await.unwrap_err().kind(), ErrorKind::NoSpace);
        verify.flush().await.unwrap();
        files[1].fail(Fault::nth(&[Op::Write], 0, ErrorKind::NoSpace));
        let err = write().await.unwrap_err();
        assert!(
            err.kind() == ErrorKind::Corrupt && err.to_string().contains("the second failed to write"),
            "{err}"
        );
        assert!(verify.read(0, 1).await.is_err());
    });
}

#[test]
fn injected_errors_have_the_number_asked_for_and_reach_nothing() {
    let sim = Sim::new(1);
    let inner = sim.clone();
    sim.run(async move {
        let memory = MemoryNode::new("memory", vec![7; 8192]);
        let edge = Edge::new(disk(&inner, memory.clone()));
        let options = BlkdebugOptions {
            inject_error: vec![
                InjectError {
                    errno: 28,
                    state: Some(2),
                    once: true,
                    ..InjectError::new(DebugEvent::Pwritev)
                },
                InjectError { state: Some(3), ..InjectError::new(DebugEvent::FlushToDisk) },
            ],
            set_state: vec![
                SetState { event: DebugEvent::Pwritev, state: Some(1), new_state: 2 },
                SetState { event: DebugEvent::WriteAio, state: None, new_state: 3 },
            ],
            ..BlkdebugOptions::default()
        };
        let node = BlkdebugNode::new(edge.clone(), options).unwrap();
        assert!(node.hears_debug_events());
        let top = disk(&inner, node.clone());
        let write = |byte| top.write(0, Buffer::copy_of(&[byte; 512]), WriteFlags::default());
        write(1).await.unwrap();
        let err = write(2).await.unwrap_err();
        assert_eq!((err.kind(), err.os_code()), (ErrorKind::NoSpace, Some(28)));
        assert!(err.to_string().contains("blkdebug"), "{err}");
        assert_eq!(memory.contents()[0], 1);
        write(3).await.unwrap();
        node.debug_event(DebugEvent::WriteAio);
        node.debug_event(DebugEvent::FlushToDisk);
        assert_eq!(top.flush().await.unwrap_err().os_code(), Some(5));

        for (options, name) in [
            (BlkdebugOptions { align: 3, ..BlkdebugOptions::default() }, "align 3"),
            (BlkdebugOptions { align: 1 << 17, ..BlkdebugOptions::default() }, "align 131072"),
            (
                BlkdebugOptions { align: 4096, max_transfer: 512, ..BlkdebugOptions::default() },
                "max-transfer 512",
            ),
            (
                BlkdebugOptions { opt_write_zero: 4096, max_write_zero: 5120, ..BlkdebugOptions::default() },
                "max-write-zero 5120",
            ),
            (
                BlkdebugOptions { align: 512, opt_discard: 768, ..BlkdebugOptions::default() },
                "opt-discard 768",
            ),
        ] {
            let err = BlkdebugNode::new(edge.clone(), options).err().unwrap();
            assert!(err.to_string().contains(name), "{err}");
        }
    });
}

/// What an unaligned write leaves of a block is nobody else's loss: others write to the same block below the filter.
#[test]
fn a_filter_does_not_write_back_what_others_have_changed() {
    const SLOT: u64 = 100;
    for_seeds(20, |seed| {
        let sim = Sim::new(seed);
        let here = sim.clone();
        sim.run(async move {
            let file = SimFile::new(&here, "file", Pages::new(4096, 512));
            file.set_limits(Limits { write_alignment: 512, ..file.limits() });
            let below = disk(&here, file);
            let filter: Rc<dyn Node> = match seed % 2 {
                0 => {
                    let group = ThrottleGroup::new("group", here.clock(), ThrottleLimits::default());
                    ThrottleNode::new(Edge::new(below.clone()), group.unwrap())
                }
                _ => CopyOnReadNode::new(Edge::new(below.clone()), None).unwrap(),
            };
            let writers = [disk(&here, filter), below.clone()].into_iter().zip(0..).map(|(disk, first)| {
                here.spawn("writer", async move {
                    for round in 1..=20_u8 {
                        for slot in (first..40).step_by(2) {
                            let data = Buffer::copy_of(&[round; SLOT as usize]);
                            disk.write(slot * SLOT, data, WriteFlags::default()).await.unwrap();
                        }
                    }
                })
            });
            for writer in writers.collect::<Vec<_>>() {
                writer.await;
            }
            let all = below.read(0, 40 * SLOT).await.unwrap();
            assert!(all.iter().all(|byte| *byte == 20), "a write is lost");
        });
    });
}
