//! The power is cut everywhere: the image is always in order, and what was flushed is there.
//!
//! A guest writes, zeroes, discards, flushes and resizes on an image in a simulated file that records what it was asked. Afterwards, for
//! many points of the record, the file is put together as a power cut there may leave it: what a completed flush covers is there;
//! of everything else that was started, each 512 bytes may be old or new.

use super::super::header::Header;
use super::*;
use headwater_block::{Buffer, WriteFlags, ZeroFlags};
use headwater_sim::{Event, Op, Pages, Sim, SimFile, for_seeds};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

const PIECE: u64 = 512;

/// A disk of this size, with the smallest clusters and the widest refcounts, needs a larger refcount table than it begins with.
const LARGE: u64 = 3 << 20;

/// What the guest did, with how many events the record had when it began.
struct Change {
    begun: usize,
    range: Range<usize>,
    /// The new bytes; none for a discard, which gives zeroes or nothing.
    data: Option<Vec<u8>>,
}

/// A flush that completed: the record's length then, how many changes had completed when it began, and what the disk held.
struct Mark {
    done: usize,
    changes: usize,
    model: Vec<u8>,
}

#[derive(Default)]
struct History {
    changes: Vec<Change>,
    marks: Vec<Mark>,
    model: Vec<u8>,
    /// All sizes that the disk ever had.
    sizes: Vec<u64>,
}

/// Copies everything into the image, and drops the backing file.
async fn unlink(file: &SimFile, node: &Qcow2Node, history: &RefCell<History>) {
    let model = history.borrow().model.clone();
    for (at, data) in model.chunks(64 << 10).enumerate() {
        let offset = at * (64 << 10);
        let (begun, range) = (file.events().len(), offset..offset + data.len());
        history.borrow_mut().changes.push(Change { begun, range, data: Some(data.to_vec()) });
        node.write(offset as u64, Buffer::copy_of(data), WriteFlags::default()).await.unwrap();
    }
    node.change_backing(None, None).await.unwrap();
}

async fn guest(sim: Sim, kind: Kind, file: Rc<SimFile>, node: Rc<Qcow2Node>, history: Rc<RefCell<History>>) {
    let rng = sim.rng().clone();
    let mut flushes = Vec::new();
    // A large disk is there to fill the refcount table.
    let large = kind.create.size >= LARGE;
    let unlink_at = if large { 5 } else { rng.range(10..200) };
    for step in 0..60 {
        let size = history.borrow().model.len() as u64;
        let cluster = kind.create.cluster_size;
        let most = *rng.pick(&[512, 3 * cluster, 20 * cluster, (400 * cluster).min(size)]);
        if step == unlink_at {
            unlink(&file, &node, &history).await;
        }
        let range = rng.byte_range(size, most, 512);
        let len = range.end - range.start;
        let part = range.start as usize..range.end as usize;
        let begun = file.events().len();
        let change = |data: Option<Vec<u8>>| {
            history.borrow_mut().changes.push(Change { begun, range: part.clone(), data });
        };
        match rng.range(0..13) {
            0..6 => {
                let data = vec![rng.range(1..256) as u8; len as usize];
                change(Some(data.clone()));
                node.write(range.start, Buffer::copy_of(&data), WriteFlags::default()).await.unwrap();
                history.borrow_mut().model[part].copy_from_slice(&data);
            }
            6..8 => {
                change(Some(vec![0; len as usize]));
                let flags = ZeroFlags { unmap: rng.one_in(2), ..ZeroFlags::default() };
                node.write_zeroes(range.start, len, flags).await.unwrap();
                history.borrow_mut().model[part].fill(0);
            }
            8..10 => {
                change(None);
                node.discard(range.start, len).await.unwrap();
                let now = node.read(range.start, BufferMut::new(len as usize)).await.unwrap();
                history.borrow_mut().model[part].copy_from_slice(&now);
            }
            10 if !large => {
                let new = if rng.one_in(2) { range.start.max(512) } else { size + rng.range(0..200) * 512 };
                let part = (new.min(size) as usize)..(new.max(size) as usize);
                let data = vec![0; part.len()];
                history.borrow_mut().changes.push(Change { begun, range: part, data: Some(data) });
                node.resize(new).await.unwrap();
                history.borrow_mut().model.resize(new as usize, 0);
                history.borrow_mut().sizes.push(new);
            }
            // Others go on while this flush runs.
            _ => {
                let (node, file, history) = (node.clone(), file.clone(), history.clone());
                let (changes, model) = (history.borrow().changes.len(), history.borrow().model.clone());
                flushes.push(sim.spawn("flush", async move {
                    node.flush().await.unwrap();
                    let done = file.events().len();
                    history.borrow_mut().marks.push(Mark { done, changes, model });
                }));
            }
        }
    }
    for flush in flushes {
        flush.await;
    }
    node.close().await.unwrap();
}

/// The file as a power cut after `cut` events may leave it.
fn after_cut(rng: &Rng, start: &[u8], events: &[Event], cut: usize) -> Vec<u8> {
    let events = &events[..cut];
    let ends: HashMap<u64, usize> = events
        .iter()
        .enumerate()
        .filter_map(|(at, event)| match event {
            Event::Ended { id, .. } => Some((*id, at)),
            Event::Started { .. } => None,
        })
        .collect();
    let ended = |id: u64| ends.get(&id).copied();
    let covered = events
        .iter()
        .enumerate()
        .filter_map(|(at, event)| match event {
            Event::Started { id, op: Op::Flush, .. } => ended(*id).map(|_| at),
            _ => None,
        })
        .max()
        .unwrap_or(0);
    let mut bytes = start.to_vec();
    // Some disks lose most of what wasn't flushed, others little.
    let kept = *rng.pick(&[0.0, 0.1, 0.5, 0.9, 1.0]);
    for event in events {
        let Event::Started { id, op, range, data, .. } = event else { continue };
        if *op == Op::Flush {
            continue;
        }
        let durable = ended(*id).is_some_and(|at| at < covered);
        let mut at = range.start;
        while at < range.end {
            let end = ((at / PIECE + 1) * PIECE).min(range.end);
            let applied = match op {
                Op::Discard => rng.one_in(2),
                _ => durable || rng.chance(kept),
            };
            if applied {
                let part = at as usize..end as usize;
                if bytes.len() < part.end {
                    bytes.resize(part.end, 0);
                }
                match data {
                    Some(data) => {
                        let from = (at - range.start) as usize;
                        bytes[part.clone()].copy_from_slice(&data[from..from + part.len()]);
                    }
                    None => bytes[part].fill(0),
                }
            }
            at = end;
        }
    }
    bytes
}

/// Each byte is what the last completed flush covers, or what a later change wrote.
fn check_content(got: &[u8], start: &[u8], history: &History, cut: usize) {
    let mark = history.marks.iter().filter(|mark| mark.done <= cut).max_by_key(|mark| mark.changes);
    let (flushed, changes) = mark.map_or((start, 0), |mark| (&mark.model[..], mark.changes));
    let later = history.changes[changes..].iter().filter(|change| change.begun <= cut);
    assert!(history.sizes.contains(&(got.len() as u64)), "the size is {}", got.len());
    let later: Vec<&Change> = later.collect();
    for (at, byte) in got.iter().enumerate() {
        let flushed = flushed.get(at).copied().unwrap_or(0);
        let written = |change: &&Change| {
            let data = change.data.as_ref();
            change.range.contains(&at) && *byte == data.map_or(0, |data| data[at - change.range.start])
        };
        assert!(
            *byte == flushed || later.iter().any(written),
            "byte {at} is {byte} after a cut at {cut}; flushed {flushed}"
        );
    }
}

#[test]
fn an_image_survives_power_cuts_everywhere() {
    for_seeds(12, |seed| {
        let sim = Sim::new(seed);
        let rng = sim.rng().clone();
        let mut kind = Kind::random(&rng);
        while kind.create.cluster_size > 16 << 10 || kind.create.size > 400 << 10 {
            kind = Kind::random(&rng);
        }
        if seed % 16 == 1 {
            // So many refcounts of so many bytes that their table must grow.
            kind.create = CreateOptions { cluster_size: 512, refcount_bits: 64, ..CreateOptions::new(LARGE) };
            kind.backing = None;
        }
        let image = MemoryNode::new("image.qcow2", Vec::new());
        let (creating, create_options) = (image.clone(), kind.create.clone());
        sim.run(async move { create(&*creating, &create_options).await.unwrap() });
        let start = image.contents();

        let mut pages = Pages::new(0, 512);
        pages.write(0, &start);
        let file = SimFile::new(&sim, "image.qcow2", pages);
        file.record();
        let history = Rc::new(RefCell::new(History {
            model: kind.content(),
            sizes: vec![kind.create.size],
            ..History::default()
        }));
        {
            let (sim_here, kind, file, history) = (sim.clone(), kind.clone(), file.clone(), history.clone());
            sim.run(async move {
                let node = open(&kind, file.clone()).await;
                guest(sim_here, kind, file, node, history).await;
            });
        }

        let events = file.events();
        let last = events.len();
        for n in 0..20 {
            let cut = if n == 0 { last } else { rng.index(events.len() + 1) };
            let bytes = after_cut(&rng, &start, &events, cut);
            let (kind, history, rng) = (kind.clone(), history.clone(), rng.clone());
            sim.run(async move {
                let file = MemoryNode::new("image.qcow2", bytes);
                check_clean(file.clone(), true, &format!("after a cut at {cut}")).await;
                let header = Header::read(&*file).await.unwrap();
                let children =
                    if header.backing_name.is_some() { kind.children() } else { Children::default() };
                let node = Qcow2Node::open(file.clone(), children, kind.options).await.unwrap();
                if cut == last && kind.create.refcount_bits == 64 && kind.create.cluster_size == 512 {
                    assert!(
                        header.refcount_table_clusters > 1 || kind.create.size < 3 << 20,
                        "the table grew"
                    );
                }
                let got = read_all(&*node).await;
                check_content(&got, &kind.content(), &history.borrow(), cut);
                // And it can be used: what leaked is in nobody's way.
                let size = node.size();
                for _ in 0..10 {
                    let range = rng.byte_range(size, 20 << 10, 512);
                    let data = Buffer::zeroed((range.end - range.start) as usize);
                    node.write(range.start, data, WriteFlags::default()).await.unwrap();
                }
                node.close().await.unwrap();
                check_clean(file, true, &format!("after using what a cut at {cut} left")).await;
            });
        }
    });
}
