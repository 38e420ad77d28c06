//! The power is cut during a repair: whatever had reached the disk by then, the guest's data are there, and the repair can be repeated.

use super::*;
use crate::qcow2::create::{CreateOptions, create};
use crate::qcow2::{Children, Qcow2Node, Qcow2Options};
use headwater_block::{Buffer, BufferMut, WriteFlags};
use headwater_sim::{Event, Op, Pages, Sim, SimFile};
use std::ops::Range;

/// The unit in which writes reach the disk.
const PIECE: usize = 512;
const CLUSTER: usize = 4096;
/// The size of the disk; some of its clusters have data.
const SIZE: usize = 64 * CLUSTER;

/// An image with data, and what the guest reads of it.
fn image(rng: &mut StdRng) -> (Vec<u8>, Vec<u8>) {
    let file = MemoryNode::new("disk.qcow2", Vec::new());
    let refcount_bits = 1 << rng.random_range(0..=6);
    let options =
        CreateOptions { cluster_size: CLUSTER as u64, refcount_bits, ..CreateOptions::new(SIZE as u64) };
    now(create(&*file, &options)).unwrap();
    let node = now(Qcow2Node::open(file.clone(), Children::default(), Qcow2Options::default())).unwrap();
    let mut model = vec![0; SIZE];
    for i in 0..SIZE / CLUSTER {
        if rng.random_bool(0.6) {
            let data = [rng.random::<u8>() | 1; CLUSTER];
            model[i * CLUSTER..][..CLUSTER].copy_from_slice(&data);
            now(node.write((i * CLUSTER) as u64, Buffer::copy_of(&data), WriteFlags::default())).unwrap();
        }
    }
    now(node.close()).unwrap();
    (file.contents(), model)
}

/// Damages what a repair can restore: reference counts, where their blocks are, and flags.
fn damage(rng: &mut StdRng, bytes: &mut [u8]) {
    let (table, block) = (CLUSTER, 2 * CLUSTER);
    for _ in 0..rng.random_range(1..6) {
        match rng.random_range(0..4) {
            0 => bytes[table..table + 8].copy_from_slice(&rng.random_range(0..1_u64 << 20).to_be_bytes()),
            1 => bytes[4 * CLUSTER + rng.random_range(0..64) * 8] &= 0x7f,
            _ => bytes[block + rng.random_range(0..200)] = rng.random(),
        }
    }
}

/// What the power cut leaves after the first `cut` events: what a completed flush covers, and of the rest any pieces.
fn after_cut(rng: &mut StdRng, before: &[u8], events: &[Event], cut: usize) -> Vec<u8> {
    let mut disk = before.to_vec();
    let mut pending: Vec<(u64, Range<u64>, Buffer, bool)> = Vec::new();
    let mut flushes: Vec<(u64, Vec<u64>)> = Vec::new();
    let put = |disk: &mut Vec<u8>, at: usize, data: &[u8]| {
        if disk.len() < at + data.len() {
            disk.resize(at + data.len(), 0);
        }
        disk[at..at + data.len()].copy_from_slice(data);
    };
    for event in &events[..cut] {
        match event {
            Event::Started { id, op: Op::Write, range, data: Some(data), .. } => {
                pending.push((*id, range.clone(), data.clone(), false));
            }
            Event::Started { id, op: Op::Flush, .. } => {
                let ended = pending.iter().filter(|write| write.3).map(|write| write.0).collect();
                flushes.push((*id, ended));
            }
            Event::Started { .. } => {}
            Event::Ended { id, ok } => {
                assert!(ok, "nothing fails here");
                if let Some(write) = pending.iter_mut().find(|write| write.0 == *id) {
                    write.3 = true;
                } else if let Some((_, covered)) = flushes.iter().find(|flush| flush.0 == *id) {
                    for (_, range, data, _) in pending.iter().filter(|write| covered.contains(&write.0)) {
                        put(&mut disk, range.start as usize, data);
                    }
                    pending.retain(|write| !covered.contains(&write.0));
                }
            }
        }
    }
    for (_, range, data, _) in &pending {
        for (i, piece) in data.chunks(PIECE).enumerate() {
            if rng.random() {
                put(&mut disk, range.start as usize + i * PIECE, piece);
            }
        }
    }
    disk
}

/// What the guest reads of an image.
fn contents(bytes: &[u8]) -> Vec<u8> {
    let file = MemoryNode::new("disk.qcow2", bytes.to_vec());
    let options = Qcow2Options { read_only: true, ..Qcow2Options::default() };
    let node = now(Qcow2Node::open(file, Children::default(), options)).unwrap();
    now(node.read(0, BufferMut::new(SIZE))).unwrap().to_vec()
}

#[test]
fn a_repair_survives_power_cuts() {
    headwater_sim::for_seeds(12, |seed| {
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut bytes, model) = image(&mut rng);
        damage(&mut rng, &mut bytes);
        let sim = Sim::new(seed);
        let mut pages = Pages::new(bytes.len() as u64, CLUSTER);
        pages.write(0, &bytes);
        let file = SimFile::new(&sim, "disk.qcow2", pages);
        file.record();
        let node = file.clone();
        let options = CheckOptions { repair: Repair::All, memory: 0 };
        let report = sim.run(async move { check(node, options).await.unwrap() });
        assert!(report.is_clean(), "{report:#?}");
        let events = file.events();
        for _ in 0..20 {
            let cut = rng.random_range(0..=events.len());
            let left = after_cut(&mut rng, &bytes, &events, cut);
            assert!(contents(&left) == model, "after {cut} of {} events: data are lost", events.len());
            let (again, repaired) = check_bytes(left, Repair::All, 0);
            let again = again.unwrap();
            assert!(again.is_clean(), "after {cut} of {} events: {again:#?}", events.len());
            assert!(
                contents(&repaired) == model,
                "after {cut} of {} events, and another repair",
                events.len()
            );
        }
    });
}
