//! Several sources of one image in the simulator: whatever some of them do, guests read the right bytes as long as one is well.

use headwater_block::filter::ReplicasNode;
use headwater_block::filter::replicas::{Candidate, READS_FOR_A_HEDGE, ReplicaEvent, ReplicasOptions};
use headwater_block::{BufferMut, Clock, Disk, DiskOptions, Edge, Error, ErrorKind, Node};
use headwater_sim::{Fault, Op, Pace, Pages, Sim, SimFile, for_seeds};
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 1 << 20;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// What every replica holds at `offset`.
fn byte(offset: u64) -> u8 {
    (offset / 509 % 255) as u8 + 1
}

fn file(sim: &Sim, name: &str) -> Rc<SimFile> {
    let file = SimFile::new(sim, name, Pages::new(SIZE, 512));
    let bytes: Vec<u8> = (0..SIZE).map(byte).collect();
    file.preset(0, &bytes);
    file.set_exact_status();
    file
}

fn edge(sim: &Sim, file: Rc<dyn Node>) -> Rc<Edge> {
    Edge::new(Disk::new(file, sim.clock(), DiskOptions { read_only: true, ..DiskOptions::default() }))
}

fn candidate(sim: &Sim, file: &Rc<SimFile>) -> Candidate {
    let edge = edge(sim, file.clone());
    let reach = Box::new(move || -> headwater_block::LocalFuture<'static, _> {
        let edge = edge.clone();
        Box::pin(async move { Ok(edge) })
    });
    Candidate { name: file.name().to_owned(), reach }
}

async fn open(sim: &Sim, files: &[Rc<SimFile>], retry: Duration) -> Rc<ReplicasNode> {
    let candidates = files.iter().map(|file| candidate(sim, file)).collect();
    let node = ReplicasNode::open(candidates, sim.clock(), ReplicasOptions { retry }).await.unwrap();
    sim.spawn("attend", ReplicasNode::attend(Rc::downgrade(&node)));
    node
}

async fn read(node: &ReplicasNode, offset: u64, len: usize) -> Result<(), Error> {
    let data = node.read(offset, BufferMut::new(len)).await?;
    for (at, found) in (offset..).zip(data.iter()) {
        let expected = if at < SIZE { byte(at) } else { 0 };
        assert_eq!(*found, expected, "byte {at}");
    }
    Ok(())
}

fn pace(least: u64, most: u64, bandwidth: u64) -> Pace {
    Pace { least: ms(least), most: ms(most), bandwidth }
}

#[test]
fn guests_read_the_right_bytes_as_long_as_one_replica_is_well() {
    for_seeds(25, |seed| {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let rng = inner.rng().clone();
            let count = rng.range(2..5) as usize;
            let files: Vec<_> = (0..count).map(|n| file(&inner, &format!("replica {n}"))).collect();
            for file in &files {
                file.set_pace(pace(rng.range(0..20), rng.range(20..60), rng.range(1..100) << 20));
            }
            let node = open(&inner, &files, Duration::ZERO).await;
            let well = rng.index(count);
            // One thing after the other goes wrong with all others.
            let troubled: Vec<_> = (0..count).filter(|n| *n != well).map(|n| files[n].clone()).collect();
            let chaos = inner.clone();
            let trouble = inner.spawn("trouble", async move {
                let rng = chaos.rng().clone();
                loop {
                    let file = rng.pick(&troubled);
                    let kind = *rng.pick(&[ErrorKind::Unavailable, ErrorKind::TimedOut, ErrorKind::Io]);
                    match rng.range(0..5) {
                        0 => file.fail(Fault::always(&[Op::Read, Op::Status], kind)),
                        1 => file.fail(Fault::sometimes(&[Op::Read], 0.3, 20, kind)),
                        2 => file.stall(&[Op::Read, Op::Status]),
                        3 => file.set_pace(pace(200, 900, 1 << 20)),
                        _ => {
                            file.repair();
                            file.release();
                            file.set_pace(pace(1, 20, 50 << 20));
                        }
                    }
                    chaos.sleep(ms(rng.range(50..4000))).await;
                }
            });
            let guests: Vec<_> = (0..4)
                .map(|n| {
                    let (sim, node) = (inner.clone(), node.clone());
                    inner.spawn(format!("guest {n}"), async move {
                        let rng = sim.rng().clone();
                        for _ in 0..60 {
                            let len = if rng.one_in(6) { 300 << 10 } else { rng.range(1..20_000) } as usize;
                            let offset = rng.range(0..SIZE);
                            let reading = read(&node, offset, len);
                            if rng.one_in(10) {
                                // A read may be given up at any time.
                                let over = sim.sleep(ms(rng.range(0..50)));
                                futures_util::future::select(Box::pin(reading), Box::pin(over)).await;
                            } else {
                                reading.await.unwrap();
                            }
                            let extent = node.status(offset..offset + 1).await.unwrap();
                            assert_eq!((extent.offset, extent.len), (offset, 1));
                            sim.sleep(ms(rng.range(0..300))).await;
                        }
                    })
                })
                .collect();
            for guest in guests {
                guest.await;
            }
            trouble.abort();
            let counters = node.counters();
            let (reads, hedges) = (counters.reads.get(), counters.hedges.get());
            assert!(hedges <= reads / u64::from(READS_FOR_A_HEDGE) + 4, "{hedges} hedges for {reads} reads");
            // When all are well again, all are used again.
            for file in &files {
                file.repair();
                file.release();
                file.set_pace(pace(1, 5, 0));
            }
            inner.sleep(Duration::from_secs(200)).await;
            assert!(node.report().iter().all(|replica| replica.state == "good"), "{:?}", node.report());
        });
    });
}

#[test]
fn the_fastest_is_used_and_when_it_fails_it_is_left_and_returned_to() {
    let sim = Sim::new(7);
    let inner = sim.clone();
    sim.run(async move {
        let files = [file(&inner, "far"), file(&inner, "near")];
        files[0].set_pace(pace(50, 51, 0));
        files[1].set_pace(pace(5, 6, 0));
        let node = open(&inner, &files, Duration::ZERO).await;
        let ask = async |n: u64| {
            for at in 0..n {
                read(&node, at * 4096 % SIZE, 4096).await.unwrap();
            }
        };
        ask(100).await;
        assert!(files[1].started(Op::Read) > 95, "{:?}", node.report());
        node.take_events();
        files[1].fail(Fault::always(&[Op::Read], ErrorKind::Unavailable));
        ask(40).await;
        assert!(matches!(&node.take_events()[..], [ReplicaEvent::Left { name, .. }] if name == "near"));
        // It isn't asked by each read, but looked at with pauses that grow.
        assert!(files[1].failures() < 5, "{}", files[1].failures());
        files[1].repair();
        inner.sleep(Duration::from_secs(10)).await;
        assert!(matches!(&node.take_events()[..], [ReplicaEvent::Returned { name }] if name == "near"));
        let before = files[1].started(Op::Read);
        ask(50).await;
        assert!(files[1].started(Op::Read) - before > 45, "{:?}", node.report());
    });
}

#[test]
fn reads_that_are_slow_are_hedged_and_no_more_than_there_is_room_for() {
    for_seeds(6, |seed| {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let files = [file(&inner, "first"), file(&inner, "second")];
            files[0].set_pace(pace(5, 6, 0));
            files[1].set_pace(pace(8, 9, 0));
            let node = open(&inner, &files, Duration::ZERO).await;
            for at in 0..60 {
                read(&node, at * 4096, 4096).await.unwrap();
            }
            let before = node.counters().hedges_won.get();
            files[0].delay_nth(0, Duration::from_secs(1));
            let begun = inner.clock().now();
            read(&node, 0, 4096).await.unwrap();
            let took = inner.clock().now() - begun;
            assert!(took < ms(100), "it waited {took:?} for the slow one");
            assert_eq!(node.counters().hedges_won.get(), before + 1);
            // When everything is slow, everything isn't asked twice.
            for file in &files {
                file.set_pace(pace(100, 1500, 0));
            }
            let (asked, reads) = (files[0].started(Op::Read) + files[1].started(Op::Read), 300);
            for at in 0..reads {
                read(&node, at * 512, 512).await.unwrap();
            }
            let asked = files[0].started(Op::Read) + files[1].started(Op::Read) - asked;
            assert!(asked <= reads + reads / 20 + 20, "{asked} requests for {reads} reads");
        });
    });
}

#[test]
fn a_stalled_replica_is_left_by_reads_of_any_size() {
    let sim = Sim::new(3);
    let inner = sim.clone();
    sim.run(async move {
        let files = [file(&inner, "stalls"), file(&inner, "second")];
        files[0].set_pace(pace(1, 2, 0));
        files[1].set_pace(pace(20, 30, 0));
        let node = open(&inner, &files, Duration::ZERO).await;
        for at in 0..20 {
            read(&node, at * 4096, 4096).await.unwrap();
        }
        files[0].stall(&[Op::Read]);
        let begun = inner.clock().now();
        read(&node, 0, 900 << 10).await.unwrap();
        assert!(inner.clock().now() - begun < Duration::from_secs(3));
        assert_eq!(node.report()[0].state, "left");
    });
}

#[test]
fn when_all_fail_the_error_names_each_and_the_read_is_tried_again_for_a_time() {
    let sim = Sim::new(5);
    let inner = sim.clone();
    sim.run(async move {
        let files = [file(&inner, "one"), file(&inner, "two")];
        let node = open(&inner, &files, Duration::from_secs(5)).await;
        files[0].fail(Fault::always(&[Op::Read], ErrorKind::Io));
        files[1].fail(Fault::always(&[Op::Read], ErrorKind::Unavailable));
        let begun = inner.clock().now();
        let error = read(&node, 0, 10).await.unwrap_err();
        assert!(inner.clock().now() - begun > Duration::from_secs(3));
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        let text = error.to_string();
        assert!(text.contains("one: ") && text.contains("two: "), "{text}");
        let healer = (inner.clone(), files[1].clone());
        inner.spawn("healer", async move {
            healer.0.sleep(Duration::from_secs(2)).await;
            healer.1.repair();
        });
        read(&node, 0, 10).await.unwrap();
    });
}

#[test]
fn sizes_must_agree_and_who_is_late_is_used_later() {
    let sim = Sim::new(9);
    let inner = sim.clone();
    sim.run(async move {
        let one = file(&inner, "one");
        let short = SimFile::new(&inner, "short", Pages::new(SIZE / 2, 512));
        let both = vec![candidate(&inner, &one), candidate(&inner, &short)];
        let refused = ReplicasNode::open(both, inner.clock(), ReplicasOptions::default()).await;
        assert_eq!(refused.map(drop).unwrap_err().kind(), ErrorKind::InvalidInput);
        // One that is out of reach at first, and one that turns out to be another image.
        let late = |file: &Rc<SimFile>| {
            let (sim, edge) = (inner.clone(), edge(&inner, file.clone()));
            let reach = Box::new(move || -> headwater_block::LocalFuture<'static, _> {
                let (sim, edge) = (sim.clone(), edge.clone());
                Box::pin(async move {
                    if sim.clock().now() < Duration::from_secs(3) {
                        return Err(Error::new(ErrorKind::Unavailable, "nobody is there"));
                    }
                    Ok(edge)
                })
            });
            Candidate { name: file.name().to_owned(), reach }
        };
        let all = vec![late(&file(&inner, "late")), candidate(&inner, &one), late(&short)];
        let node = ReplicasNode::open(all, inner.clock(), ReplicasOptions::default()).await.unwrap();
        inner.spawn("attend", ReplicasNode::attend(Rc::downgrade(&node)));
        read(&node, 5, 5000).await.unwrap();
        inner.sleep(Duration::from_secs(20)).await;
        let states: Vec<_> = node.report().iter().map(|replica| replica.state).collect();
        assert_eq!(states, ["good", "good", "distrusted"]);
    });
}
