//! Many readers over one source, in virtual time: right bytes, one fetch, nobody hangs.

#![expect(clippy::single_range_in_vec_init, reason = "lists of ranges are what is compared")]

use headwater_block::share::{BlockStore, SHARE_BLOCK, ShareNode, SharePool};
use headwater_block::{Abort, Buffer, BufferMut, ErrorKind, LocalFuture, Node, Result};

use headwater_sim::{Fault, Op, Pace, Pages, Sim, SimFile, for_seeds};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;
use std::sync::LazyLock;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// What the largest source holds; each byte tells where it is.
static BYTES: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..8 * MIB).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect());

fn bytes(range: Range<u64>) -> &'static [u8] {
    &BYTES[range.start as usize..range.end as usize]
}

/// A source of `size` bytes.
fn source(sim: &Sim, size: u64) -> Rc<SimFile> {
    let mut pages = Pages::new(size, 4096);
    pages.write(0, bytes(0..size));
    let file = SimFile::new(sim, "source", pages);
    file.set_read_only(true);
    file
}

fn check(range: Range<u64>, data: &[u8], size: u64) {
    let there = (range.end.min(size) - range.start) as usize;
    assert!(data[..there] == *bytes(range.start..range.start + there as u64), "{range:?}");
    assert!(data[there..].iter().all(|byte| *byte == 0), "{range:?}");
}

async fn read(node: &ShareNode, range: Range<u64>) -> Result<()> {
    let data = node.read(range.start, BufferMut::new((range.end - range.start) as usize)).await?;
    check(range, &data, node.size());
    Ok(())
}

#[test]
fn readers_at_random_get_the_sources_bytes_whoever_is_dropped_or_fails() {
    for_seeds(100, |seed| {
        let sim = Sim::new(seed);
        let size = MIB + sim.rng().range(0..SHARE_BLOCK);
        let file = source(&sim, size);
        if sim.rng().one_in(2) {
            // race-test: share-take-over
            file.fail(Fault::sometimes(&[Op::Read], 0.3, 40, ErrorKind::Unavailable));
        }
        let pool = SharePool::new(sim.rng().range(0..MIB));
        let node = || pool.join(file.clone(), Some("same".into()), None);
        let nodes: Vec<_> = (0..3).map(|_| node()).collect();
        let readers = sim.rng().range(1..6) as u32;
        nodes.iter().for_each(|node| node.set_readers(readers));
        let tasks: Vec<_> = (0..8)
            .map(|_| {
                let (sim, node) = (sim.clone(), sim.rng().pick(&nodes).clone());
                let mine = sim.clone();
                mine.spawn("reader", async move {
                    for _ in 0..30 {
                        let range = sim.rng().byte_range(size, 300 << 10, 1);
                        if range.is_empty() {
                            continue;
                        }
                        if sim.rng().one_in(3) {
                            // race-test: share-asker-dropped
                            let abort = Abort::new();
                            let thrown = abort.clone();
                            let (clock, time) =
                                (sim.clone(), sim.rng().duration(Duration::ZERO, Duration::from_micros(300)));
                            sim.spawn("abort", async move {
                                clock.sleep(time).await;
                                thrown.abort();
                            });
                            let _given_up = abort.guard(read(&node, range)).await;
                        } else if let Err(err) = read(&node, range).await {
                            assert_eq!(err.kind(), ErrorKind::Unavailable);
                        }
                    }
                })
            })
            .collect();
        let (sim_in, kept) = (sim.clone(), pool.clone());
        sim.run(async move {
            for task in tasks {
                task.await;
                sim_in.yield_now().await;
            }
            nodes.iter().for_each(|node| node.set_readers(0));
            assert_eq!(kept.used(), 0, "nothing is kept for nobody");
        });
    });
}

#[test]
fn streams_that_begin_a_little_apart_cost_one_fetch() {
    for_seeds(10, |seed| {
        let sim = Sim::new(seed);
        let size = 8 * MIB;
        let file = source(&sim, size);
        // 8 MiB take about a second.
        let pace =
            Pace { least: Duration::from_millis(5), most: Duration::from_millis(8), bandwidth: 8 * MIB };
        file.set_pace(pace);
        let pool = SharePool::new(3 * MIB);
        let node = pool.join(file.clone(), None, None);
        node.set_readers(10);
        let streams: Vec<_> = (0..10)
            .map(|_| {
                let (node, sim) = (node.clone(), sim.clone());
                let mine = sim.clone();
                mine.spawn("stream", async move {
                    sim.sleep(sim.rng().duration(Duration::ZERO, Duration::from_millis(250))).await;
                    for at in (0..size).step_by(MIB as usize / 4) {
                        let (a, b) = (at..at + MIB / 8, at + MIB / 8..at + MIB / 4);
                        let (a, b) = futures_util::future::join(read(&node, a), read(&node, b)).await;
                        a.and(b).unwrap();
                        // Writing takes its time as well.
                        sim.sleep(sim.rng().duration(Duration::ZERO, Duration::from_millis(10))).await;
                    }
                })
            })
            .collect();
        let kept = pool.clone();
        sim.run(async move {
            for stream in streams {
                stream.await;
            }
            assert!(kept.used() <= 3 * MIB);
        });
        assert_eq!(file.bytes(Op::Read), size);
        assert!(pool.used() <= 3 * MIB / 4, "all have had everything");
    });
}

#[test]
fn a_source_that_is_gone_costs_each_reader_at_most_three_tries() {
    let sim = Sim::new(1);
    let file = source(&sim, MIB);
    file.set_pace(Pace { least: Duration::from_secs(1), most: Duration::from_secs(1), bandwidth: 0 });
    file.fail(Fault::always(&[Op::Read], ErrorKind::Unavailable));
    let node = SharePool::new(MIB).join(file, None, None);
    node.set_readers(1);
    let tasks: Vec<_> = (0..20)
        .map(|_| {
            let node = node.clone();
            sim.spawn("reader", async move { read(&node, 0..10).await.unwrap_err().kind() })
        })
        .collect();
    let mine = sim.clone();
    sim.run(async move {
        for task in tasks {
            assert_eq!(task.await, ErrorKind::Unavailable);
        }
        assert!(headwater_block::Clock::now(&*mine.clock()) <= Duration::from_secs(3));
    });
}

#[test]
fn without_readers_each_read_asks_the_source() {
    let sim = Sim::new(1);
    let file = source(&sim, MIB);
    let node = SharePool::new(MIB).join(file.clone(), None, None);
    sim.run(async move {
        for _ in 0..3 {
            read(&node, 0..100).await.unwrap();
        }
        assert_eq!(file.bytes(Op::Read), 300);
        node.set_readers(1);
        for _ in 0..3 {
            read(&node, 0..100).await.unwrap();
        }
        assert_eq!(file.bytes(Op::Read), 300 + SHARE_BLOCK);
    });
}

#[test]
fn sources_with_other_keys_share_nothing() {
    let sim = Sim::new(1);
    let (one, two) = (source(&sim, MIB), source(&sim, MIB));
    let pool = SharePool::new(MIB);
    let a = pool.join(one.clone(), Some("one".into()), None);
    let b = pool.join(two.clone(), Some("two".into()), None);
    let c = pool.join(two.clone(), None, None);
    for node in [&a, &b, &c] {
        node.set_readers(1);
    }
    sim.run(async move {
        for node in [a, b, c] {
            read(&node, 0..SHARE_BLOCK).await.unwrap();
        }
        assert_eq!((one.bytes(Op::Read), two.bytes(Op::Read)), (SHARE_BLOCK, 2 * SHARE_BLOCK));
    });
}

/// A store that keeps some of what it is given.
#[derive(Default)]
struct SomeBlocks {
    sim: RefCell<Option<Sim>>,
    held: RefCell<BTreeSet<u64>>,
    fails: Cell<bool>,
}

impl BlockStore for SomeBlocks {
    fn holds(&self, offset: u64, until: u64) -> (bool, u64) {
        let held = self.held.borrow();
        let first = held.contains(&(offset / SHARE_BLOCK));
        let mut end = offset;
        while end < until && held.contains(&(end / SHARE_BLOCK)) == first {
            end = (end / SHARE_BLOCK + 1) * SHARE_BLOCK;
        }
        (first, end.min(until))
    }

    fn read(&self, range: Range<u64>) -> LocalFuture<'_, Result<Buffer>> {
        Box::pin(async move {
            if self.fails.get() {
                return Err(headwater_block::Error::new(ErrorKind::Corrupt, "the store is broken"));
            }
            let held = self.held.borrow();
            assert!(
                (range.start / SHARE_BLOCK..range.end.div_ceil(SHARE_BLOCK))
                    .all(|block| held.contains(&block))
            );
            Ok(Buffer::copy_of(bytes(range)))
        })
    }

    fn keep(&self, offset: u64, data: Buffer) {
        let sim = self.sim.borrow();
        let blocks = offset / SHARE_BLOCK..(offset + data.len() as u64).div_ceil(SHARE_BLOCK);
        self.held.borrow_mut().extend(blocks.filter(|_| sim.as_ref().is_none_or(|sim| !sim.rng().one_in(4))));
    }
}

#[test]
fn what_the_store_holds_is_not_fetched_again() {
    for_seeds(30, |seed| {
        let sim = Sim::new(seed);
        let size = MIB + 1000;
        let file = source(&sim, size);
        let store = Rc::new(SomeBlocks::default());
        let pool = SharePool::new(0);
        let node = pool.join(file.clone(), None, Some(store.clone()));
        node.set_readers(2);
        sim.run(async move {
            read(&node, 0..size).await.unwrap();
            read(&node, 100..size).await.unwrap();
            assert_eq!(file.bytes(Op::Read), size);
            assert!(node.stats().from_store >= size - SHARE_BLOCK);
            store.fails.set(true);
            read(&node, 0..size).await.unwrap();
            assert_eq!(file.bytes(Op::Read), 2 * size, "a store that is broken is no harm");
        });
        // The same with holes in what is held.
        let file = source(&sim, size);
        let store = Rc::new(SomeBlocks { sim: RefCell::new(Some(sim.clone())), ..SomeBlocks::default() });
        let node = SharePool::new(0).join(file.clone(), None, Some(store.clone()));
        node.set_readers(1);
        let chance = sim.clone();
        sim.run(async move {
            for _ in 0..20 {
                let range = chance.rng().byte_range(size, size, 1);
                if !range.is_empty() {
                    read(&node, range).await.unwrap();
                }
            }
        });
    });
}

#[test]
fn what_a_reader_expects_is_asked_for_ahead_only_if_nobody_else_has_it() {
    let sim = Sim::new(1);
    let pool = SharePool::new(MIB);
    let node = |file: &Rc<SimFile>, store| pool.join(file.clone(), Some("same".into()), store);
    let (one, other) = (source(&sim, MIB), source(&sim, MIB));
    let (first, second) = (node(&one, None), node(&other, None));
    // Nothing is shared, then with oneself only, then with others.
    first.expect(0..MIB);
    first.set_readers(2);
    first.expect(1..MIB);
    second.set_readers(1);
    first.expect(2..MIB);
    second.expect(0..MIB);
    first.expect(0..0);
    assert_eq!(one.expected(false), [0..MIB, 1..MIB, 0..0, 0..0]);
    assert_eq!(other.expected(false), [0..0]);
    // What is on its way, or in memory, needn't be asked for again.
    second.set_readers(0);
    sim.run(async move {
        let beginning = read(&first, 0..1);
        let file = one.clone();
        one.stall(&[Op::Read]);
        let expecting = async {
            file.holds(1).await;
            first.expect(10..MIB);
            first.expect(SHARE_BLOCK..MIB);
            file.release();
        };
        futures_util::future::join(beginning, expecting).await.0.unwrap();
        first.expect(0..MIB);
        assert_eq!(one.expected(true), [0..0, SHARE_BLOCK..MIB, 0..0]);
        // A store may have it for longer.
        let store = Rc::new(SomeBlocks::default());
        let kept = pool.join(file.clone(), None, Some(store));
        kept.set_readers(1);
        kept.expect(0..MIB);
        assert_eq!(file.expected(true)[3..], [0..0]);
    });
}
