//! A source that is checked against a manifest, in the simulator: nobody sees a wrong byte, who gave it is named, and the bytes come from elsewhere.

use headwater_block::filter::replicas::{Candidate, ReplicasOptions};
use headwater_block::filter::verify::Verification;
use headwater_block::filter::{ReplicasNode, VerifyNode};
use headwater_block::manifest::{Builder, promise_of};
use headwater_block::{
    BufferMut, Disk, DiskOptions, Edge, ErrorKind, ExtentKind, LocalFuture, Manifest, Node,
};
use headwater_sim::{Fault, Op, Pages, Rng, Sim, SimFile, for_seeds};
use std::rc::Rc;
use std::time::Duration;

const CHUNK: u64 = 8192;

fn content(rng: &Rng, size: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < size {
        let byte = if rng.one_in(3) { 0 } else { rng.range(1..256) as u8 };
        bytes.extend(std::iter::repeat_n(byte, rng.range(1..30_000) as usize));
    }
    bytes.truncate(size as usize);
    bytes
}

fn manifest(bytes: &[u8]) -> Manifest {
    let mut builder = Builder::new(bytes.len() as u64, CHUNK as u32).unwrap();
    for chunk in bytes.chunks(CHUNK as usize) {
        builder.push(promise_of(chunk), 1).unwrap();
    }
    builder.finish().unwrap()
}

fn file(sim: &Sim, name: &str, bytes: &[u8]) -> Rc<SimFile> {
    let file = SimFile::new(sim, name, Pages::new(bytes.len() as u64, 512));
    file.preset(0, bytes);
    file
}

fn edge(sim: &Sim, node: Rc<dyn Node>) -> Rc<Edge> {
    Edge::new(Disk::new(node, sim.clock(), DiskOptions { read_only: true, ..DiskOptions::default() }))
}

fn verified(sim: &Sim, file: &Rc<SimFile>, verification: &Rc<Verification>) -> Rc<VerifyNode> {
    VerifyNode::new(edge(sim, file.clone()), verification.clone()).unwrap()
}

#[test]
fn liars_are_blamed_and_left_and_every_byte_is_right() {
    for_seeds(25, |seed| {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let rng = inner.rng().clone();
            let size = rng.range(1..600_000);
            let bytes = Rc::new(content(&rng, size));
            let verification = Verification::new(manifest(&bytes));
            let files: Vec<_> = (0..3).map(|n| file(&inner, &format!("mirror {n}"), &bytes)).collect();
            // Two of them lie somewhere; the last is only out of reach now and then.
            for liar in &files[..2] {
                for _ in 0..rng.range(1..4) {
                    let at = rng.range(0..size);
                    liar.preset(at, &[!bytes[at as usize]]);
                }
            }
            files[2].fail(Fault::sometimes(&[Op::Read], 0.2, 5, ErrorKind::Unavailable));
            let candidates = files.iter().map(|file| {
                let edge = edge(&inner, verified(&inner, file, &verification));
                let reach = Box::new(move || -> LocalFuture<'static, _> {
                    let edge = edge.clone();
                    Box::pin(async move { Ok(edge) })
                });
                Candidate { name: file.name().to_owned(), reach }
            });
            let options = ReplicasOptions { retry: Duration::from_secs(30) };
            let node = ReplicasNode::open(candidates.collect(), inner.clock(), options).await.unwrap();
            inner.spawn("attend", ReplicasNode::attend(Rc::downgrade(&node)));
            let guests: Vec<_> = (0..3)
                .map(|n| {
                    let (sim, node, bytes) = (inner.clone(), node.clone(), bytes.clone());
                    inner.spawn(format!("guest {n}"), async move {
                        let rng = sim.rng().clone();
                        for _ in 0..30 {
                            let most = if rng.one_in(3) { 200_000 } else { 5000 };
                            let (offset, len) = (rng.range(0..size), rng.range(1..most) as usize);
                            let reading = node.read(offset, BufferMut::new(len));
                            if rng.one_in(8) {
                                let over = sim.sleep(Duration::from_micros(rng.range(0..400)));
                                futures_util::future::select(reading, Box::pin(over)).await;
                                continue;
                            }
                            let data = reading.await.unwrap();
                            let there = len.min((size - offset) as usize);
                            assert!(data[..there] == bytes[offset as usize..][..there], "{len} at {offset}");
                            assert!(data[there..].iter().all(|byte| *byte == 0));
                            let extent = node.status(offset..size).await.unwrap();
                            if extent.kind == ExtentKind::Zero {
                                let run = offset as usize..extent.end() as usize;
                                assert!(bytes[run].iter().all(|byte| *byte == 0));
                            }
                        }
                    })
                })
                .collect();
            for guest in guests {
                guest.await;
            }
            // Everything, in large pieces, as a job would.
            let whole = node.read(0, BufferMut::new(size as usize)).await.unwrap();
            assert!(whole[..] == bytes[..]);
            for name in verification.blamed() {
                assert_ne!(name, "mirror 2", "it never lied");
                let report = node.report().into_iter().find(|replica| replica.name == name).unwrap();
                assert_eq!(report.state, "distrusted");
            }
            let data = (0..verification.manifest().chunks())
                .filter(|chunk| !verification.manifest().run(*chunk).0)
                .count();
            assert_eq!(verification.chunks(), data as u64, "every chunk of data was checked");
        });
    });
}

#[test]
fn without_another_source_the_error_names_the_chunk_and_nothing_is_given_away() {
    let sim = Sim::new(1);
    let inner = sim.clone();
    sim.run(async move {
        let bytes: Vec<u8> = (0..10 * CHUNK + 100).map(|at| (at / 1000) as u8 + 1).collect();
        let verification = Verification::new(manifest(&bytes));
        let source = file(&inner, "source", &bytes);
        let node = verified(&inner, &source, &verification);
        source.preset(3 * CHUNK + 5, &[0]);
        for (offset, len) in [(3 * CHUNK, 10), (0, 10 * CHUNK), (2 * CHUNK + 1, 2 * CHUNK)] {
            let err = node.read(offset, BufferMut::new(len as usize)).await.unwrap_err();
            assert_eq!(err.kind(), ErrorKind::WrongContent);
            let text = err.to_string();
            assert!(text.contains("source: chunk 3 (8192 bytes at 24576)"), "{text}");
        }
        node.read(4 * CHUNK, BufferMut::new(6 * CHUNK as usize + 100)).await.unwrap();
        let short = file(&inner, "short", &bytes[..100]);
        let refused = VerifyNode::new(edge(&inner, short), verification.clone());
        assert_eq!(refused.map(drop).unwrap_err().kind(), ErrorKind::WrongContent);
    });
}

#[test]
fn neighbours_and_those_who_come_at_once_cost_a_chunk_once() {
    for_seeds(20, |seed| {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let bytes: Vec<u8> = (0..4 * CHUNK).map(|at| (at / 700) as u8 + 1).collect();
            let source = file(&inner, "source", &bytes);
            let node = verified(&inner, &source, &Verification::new(manifest(&bytes)));
            let guests: Vec<_> = (0..16)
                .map(|n| {
                    let node = node.clone();
                    inner.spawn("guest", async move {
                        let data = node.read(CHUNK + n * 512, BufferMut::new(512)).await.unwrap();
                        assert_eq!(data[0], ((CHUNK + n * 512) / 700) as u8 + 1);
                    })
                })
                .collect();
            for (n, guest) in guests.into_iter().enumerate() {
                // Who leaves doesn't take the others' bytes along.
                if n % 5 == 0 { guest.abort() } else { guest.await }
            }
            assert_eq!(source.most_reads(CHUNK..2 * CHUNK), 1);
            assert_eq!(source.most_reads(0..CHUNK), 0);
        });
    });
}
