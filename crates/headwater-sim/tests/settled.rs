//! What a client was told outlives the process: once [`Disk::settle`] has returned, an image that is opened anew from what the file holds at that
//! moment has the bytes, with other guests and flushes at work, wherever the metadata writer is. And what it flushed outlives a power cut that comes at once,
//! although others flush and settle at the same time.

use headwater_block::{Buffer, BufferMut, Disk, DiskOptions, Node, WriteFlags, ZeroFlags};
use headwater_image::qcow2::create::{CreateOptions, create};
use headwater_image::qcow2::{Children, Qcow2Node, Qcow2Options};
use headwater_sim::{Cuts, Pages, Recorder, Sim, SimFile, for_seeds};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 1 << 20;
const GUESTS: u64 = 4;
const REQUESTS: usize = 12;

async fn open(file: Rc<SimFile>, read_only: bool) -> Rc<Qcow2Node> {
    let options = Qcow2Options { read_only, cache_size: 1 << 20, ..Qcow2Options::default() };
    Qcow2Node::open(file, Children::default(), options).await.expect("the image opens")
}

/// A guest that has a part of the disk to itself, and looks after each request what a successor would find there.
async fn guest(
    sim: Sim,
    disk: Rc<Disk>,
    file: Rc<SimFile>,
    part: std::ops::Range<u64>,
    early: Rc<Cell<u32>>,
) {
    let rng = sim.rng();
    for n in 0..REQUESTS {
        let start = rng.range(part.start..part.end - 512);
        let end = rng.range(start + 1..part.end.min(start + 20_000) + 1);
        let expected = if rng.one_in(4) {
            disk.write_zeroes(start, end - start, ZeroFlags::default()).await.unwrap();
            vec![0; (end - start) as usize]
        } else {
            let data = vec![n as u8 + 1; (end - start) as usize];
            disk.write(start, Buffer::copy_of(&data), WriteFlags::default()).await.unwrap();
            data
        };
        disk.settle(start..end).await.unwrap();
        let found = file.content();
        // The commit cycle's last barrier need not have passed.
        early.set(early.get() + u32::from(!disk.top().is_settled(0..SIZE)));
        let successor = open(SimFile::new(&sim, "successor", found), true).await;
        let bytes = successor.read(start, BufferMut::new(expected.len())).await.unwrap();
        assert!(bytes[..] == expected[..], "request {n}, {start}..{end}");
    }
}

#[test]
fn a_successor_finds_what_was_settled() {
    let early = Rc::new(Cell::new(0));
    for_seeds(60, |seed| {
        let sim = Sim::new(seed);
        let early = early.clone();
        sim.run({
            let sim = sim.clone();
            async move {
                let file = SimFile::new(&sim, "image", Pages::new(0, 512));
                let mut options = CreateOptions::new(SIZE);
                options.cluster_size = 1 << *sim.rng().pick(&[9, 10, 12, 16]);
                create(&*file, &options).await.unwrap();
                let disk = Disk::new(open(file.clone(), false).await, sim.clock(), DiskOptions::default());
                let mut guests = Vec::new();
                for n in 0..GUESTS {
                    let part = n * (SIZE / GUESTS)..(n + 1) * (SIZE / GUESTS);
                    guests.push(
                        sim.spawn(
                            "guest",
                            guest(sim.clone(), disk.clone(), file.clone(), part, early.clone()),
                        ),
                    );
                }
                while guests.iter().any(|guest| !guest.is_over()) {
                    sim.sleep(sim.rng().duration(Duration::ZERO, Duration::from_millis(5))).await;
                    disk.flush().await.unwrap();
                }
                for guest in guests {
                    guest.await;
                }
                disk.close().await.unwrap();
            }
        });
    });
    assert!(early.get() > 0, "nobody was answered while others' entries weren't written");
}

/// A guest that looks after each flush what a power cut leaves that takes whatever it may.
async fn guest_that_flushes(sim: Sim, disk: Rc<Disk>, record: Rc<Recorder>, part: std::ops::Range<u64>) {
    let rng = sim.rng();
    for n in 0..REQUESTS {
        let start = rng.range(part.start..part.end - 512);
        let end = rng.range(start + 1..part.end.min(start + 20_000) + 1);
        let expected = vec![n as u8 + 1; (end - start) as usize];
        disk.write(start, Buffer::copy_of(&expected), WriteFlags::default()).await.unwrap();
        if rng.one_in(3) {
            disk.settle(start..end).await.unwrap();
            continue;
        }
        disk.flush().await.unwrap();
        let history = record.history();
        let mut cuts = Cuts::new(&history);
        while cuts.advance() {}
        let left = cuts.files(&cuts.oldest()).remove(0);
        let mut content = Pages::new(left.len() as u64, 512);
        content.write(0, &left);
        let successor = open(SimFile::new(&sim, "successor", content), true).await;
        let bytes = successor.read(start, BufferMut::new(expected.len())).await.unwrap();
        assert!(bytes[..] == expected[..], "request {n}, {start}..{end}");
    }
}

#[test]
fn what_was_flushed_survives_although_others_flush() {
    for_seeds(60, |seed| {
        let sim = Sim::new(seed);
        sim.run({
            let sim = sim.clone();
            async move {
                let file = SimFile::new(&sim, "image", Pages::new(0, 512));
                let mut options = CreateOptions::new(SIZE);
                options.cluster_size = 1 << *sim.rng().pick(&[9, 12, 16]);
                create(&*file, &options).await.unwrap();
                let record = Recorder::start(&[&file]);
                let disk = Disk::new(open(file, false).await, sim.clock(), DiskOptions::default());
                let guests: Vec<_> = (0..GUESTS)
                    .map(|n| n * (SIZE / GUESTS)..(n + 1) * (SIZE / GUESTS))
                    .map(|part| {
                        sim.spawn(
                            "guest",
                            guest_that_flushes(sim.clone(), disk.clone(), record.clone(), part),
                        )
                    })
                    .collect();
                for guest in guests {
                    guest.await;
                }
                disk.close().await.unwrap();
            }
        });
    });
}
