//! Many requests at once, on slow storage that sometimes fails, with the range lock that real disks have.

use super::*;
use headwater_block::disk::{Disk, DiskOptions};
use headwater_block::filter::CompressNode;
use headwater_block::{Buffer, Edge, ErrorKind, Limits, WriteFlags, ZeroFlags};
use headwater_sim::{Fault, Fill, Model, Op, Pages, Sim, SimFile, for_seeds};

async fn guest(sim: Sim, disk: Rc<Disk>, model: Rc<Model>, unit: u64, faulty: bool) {
    let rng = sim.rng().clone();
    for _ in 0..25 {
        let most = *rng.pick(&[512, 4 << 10, 40 << 10]);
        let range = rng.byte_range(disk.size(), most, unit);
        let len = range.end - range.start;
        let result = match rng.range(0..10) {
            0..4 => {
                let fill = Fill::Pattern(rng.range(0..100) as u8);
                let write = model.begin(range.clone(), fill);
                let data = Buffer::copy_of(&fill.bytes(range.clone()));
                let flags = WriteFlags { fua: rng.one_in(6), compressed: rng.one_in(3) };
                disk.write(range.start, data, flags).await.map(|()| write.done())
            }
            4..6 => {
                let zero = model.begin(range.clone(), Fill::Zero);
                let flags = ZeroFlags { unmap: rng.one_in(2), ..ZeroFlags::default() };
                disk.write_zeroes(range.start, len, flags).await.map(|()| zero.done())
            }
            6 => {
                let discard = model.begin_discard(range.clone());
                disk.discard(range.start, len).await.map(|()| discard.done())
            }
            7 => disk.flush().await,
            _ => {
                let reading = model.begin_read(range.clone());
                disk.read(range.start, len).await.map(|data| reading.check(&data))
            }
        };
        if let Err(err) = result {
            assert!(faulty && err.kind() == ErrorKind::Io, "{err}");
        }
    }
}

/// Copies everything up and drops the link, as the stream job does.
async fn stream(sim: Sim, disk: Rc<Disk>) {
    let mut at = 0;
    while let Some(missing) = disk.next_missing(at..disk.size(), None).await.unwrap() {
        let range = missing.range;
        let end = range.end.min(range.start + sim.rng().range(1..64) * 1024);
        disk.copy_up(range.start..end, &Default::default()).await.unwrap();
        at = range.start;
    }
    disk.change_backing(None, None).await.unwrap();
}

fn run(seed: u64, faulty: bool) {
    let sim = Sim::new(seed);
    let rng = sim.rng().clone();
    let mut kind = Kind::random(&rng);
    while kind.create.cluster_size > 64 << 10 || kind.create.size > 512 << 10 {
        kind = Kind::random(&rng);
    }
    let image = MemoryNode::new("image.qcow2", Vec::new());
    let (creating, options) = (image.clone(), kind.create.clone());
    sim.run(async move { create(&*creating, &options).await.unwrap() });
    let mut pages = Pages::new(0, 512);
    pages.write(0, &image.contents());
    let file = SimFile::new(&sim, "image.qcow2", pages);
    let alignment = *rng.pick(&[1, 512]);
    file.set_limits(Limits { write_alignment: alignment, ..file.limits() });

    let here = sim.clone();
    let streams = !faulty && kind.backing.is_some() && rng.one_in(2);
    sim.run(async move {
        let node = open(&kind, file.clone()).await;
        let disk = Disk::new(node.clone(), here.clock(), DiskOptions::default());
        let filter = CompressNode::new(Edge::new(disk.clone())).unwrap();
        let compressing = Disk::new(filter, here.clock(), DiskOptions::default());
        let model = Model::new(&kind.content());
        if faulty {
            file.fail(Fault::sometimes(&[Op::Write, Op::WriteZeroes, Op::Read], 0.02, 10, ErrorKind::Io));
        }
        let mut tasks = Vec::new();
        for n in 0..5 {
            let unit = if n == 0 { 1 } else { 512 };
            let through = if n < 3 { &disk } else { &compressing };
            let guest = guest(here.clone(), through.clone(), model.clone(), unit, faulty);
            tasks.push(here.spawn(format!("guest {n}"), guest));
        }
        if streams {
            tasks.push(here.spawn("stream", stream(here.clone(), disk.clone())));
        }
        for task in tasks {
            task.await;
        }
        file.repair();
        let size = disk.size();
        let reading = model.begin_read(0..size);
        let content = disk.read(0, size).await.unwrap();
        reading.check(&content);
        disk.close().await.unwrap();
        assert_eq!(node.header().backing_name.is_some(), kind.backing.is_some() && !streams);

        let leaks_allowed = faulty;
        check_clean(file.clone(), leaks_allowed, "after the races").await;
        let again = if streams {
            Qcow2Node::open(file, Children::default(), kind.options).await.unwrap()
        } else {
            open(&kind, file).await
        };
        assert_same(&read_all(&*again).await, &content, "after opening again");
    });
}

/// A cluster that is free gives its space back to the filesystem. Until it has, nobody may have it: what was written there meanwhile would go.
#[test]
fn what_is_freed_is_not_used_while_its_space_is_given_back() {
    let sim = Sim::new(1);
    let here = sim.clone();
    sim.run(async move {
        let file = SimFile::new(&here, "image.qcow2", Pages::new(0, 512));
        let kind =
            Kind { create: CreateOptions::new(1 << 20), backing: None, options: Qcow2Options::default() };
        create(&*file, &kind.create).await.unwrap();
        let data = |value| Buffer::copy_of(&[value; 64 << 10]);
        let node = open(&kind, file.clone()).await;
        node.write(0, data(1), WriteFlags::default()).await.unwrap();
        node.close().await.unwrap();
        // What is free in it isn't known yet.
        let node = open(&kind, file.clone()).await;
        file.stall(&[Op::Discard]);
        node.discard(0, 64 << 10).await.unwrap();
        let flushing = here.spawn("flush", {
            let node = node.clone();
            async move { node.flush().await }
        });
        file.holds(1).await;
        node.write(128 << 10, data(2), WriteFlags::default()).await.unwrap();
        file.release();
        flushing.await.unwrap();
        let found = node.read(128 << 10, BufferMut::new(64 << 10)).await.unwrap();
        assert_same(&found, &[2; 64 << 10], "what was written while space was given back");
        node.close().await.unwrap();
    });
}

// race-test: pack-open-changed
#[test]
fn requests_at_once_keep_the_image_in_order() {
    for_seeds(25, |seed| run(seed, false));
}

#[test]
fn storage_that_fails_does_no_harm() {
    for_seeds(25, |seed| run(seed, true));
}
