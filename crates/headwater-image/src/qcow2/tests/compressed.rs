//! Compressed clusters: where they go, what becomes of them, and what QEMU says of that.

use super::super::snapshots::NewSnapshot;
use super::*;
use headwater_block::disk::{Disk, DiskOptions};
use headwater_block::filter::CompressNode;
use headwater_block::{Buffer, DebugEvent, Edge, ErrorKind, Limits, WriteFlags, ZeroFlags};
use headwater_sim::{Fault, Op, Pages, Sim, SimFile};
use std::future::Future;

const COMPRESSED: WriteFlags = WriteFlags { fua: false, compressed: true };

/// A cluster of bytes that get about a third as large.
fn text(seed: u64, len: usize) -> Vec<u8> {
    let rng = Rng::new(seed);
    let words: Vec<Vec<u8>> = (0..64).map(|_| (0..9).map(|_| rng.range(0..256) as u8).collect()).collect();
    let mut out = Vec::new();
    while out.len() < len {
        out.extend_from_slice(rng.pick(&words[..]).as_slice());
    }
    out.truncate(len);
    out
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let rng = Rng::new(seed);
    (0..len).map(|_| rng.range(0..256) as u8).collect()
}

fn kind(create: CreateOptions) -> Kind {
    Kind { create, backing: None, options: Qcow2Options::default() }
}

async fn new_image(kind: &Kind) -> (Rc<MemoryNode>, Rc<Qcow2Node>) {
    let file = MemoryNode::new("image.qcow2", Vec::new());
    create(&*file, &kind.create).await.unwrap();
    let node = open(kind, file.clone()).await;
    (file, node)
}

async fn compress(node: &Qcow2Node, model: &mut [u8], offset: u64, data: &[u8]) {
    node.write(offset, Buffer::copy_of(data), COMPRESSED).await.unwrap();
    model[offset as usize..offset as usize + data.len()].copy_from_slice(data);
}

async fn compressed_clusters(file: &Rc<MemoryNode>) -> u64 {
    check(file.clone(), CheckOptions::default()).await.unwrap().compressed_clusters
}

fn block_on(work: impl Future<Output = ()> + 'static) {
    Sim::new(1).run(work);
}

#[test]
fn clusters_are_packed_whatever_the_image_is_like() {
    for (version, compression, extended_l2, refcount_bits, cluster_size) in [
        (2, Compression::Zlib, false, 16, 65536),
        (3, Compression::Zstd, true, 64, 65536),
        (3, Compression::Zlib, true, 8, 16384),
        // As many references as one cluster has, or fewer.
        (3, Compression::Zlib, false, 1, 65536),
        (3, Compression::Zstd, false, 2, 4096),
        (3, Compression::Zlib, false, 16, 512),
        (3, Compression::Zstd, false, 16, 2 << 20),
    ] {
        block_on(async move {
            // The last cluster is cut off.
            let clusters = if cluster_size > 65536 { 5 } else { 21 };
            let mut create = CreateOptions::new(clusters * cluster_size - ((cluster_size / 2) & !511));
            create.version = version;
            create.compression = compression;
            create.extended_l2 = extended_l2;
            create.refcount_bits = refcount_bits;
            create.cluster_size = cluster_size;
            let kind = kind(create);
            let what = format!("{:?}", kind.create);
            let (file, node) = new_image(&kind).await;
            let mut model = kind.content();
            let before = file.size();
            let all = text(cluster_size, model.len());
            compress(&node, &mut model, 0, &all).await;
            assert_same(&read_all(&*node).await, &model, &what);
            node.close().await.unwrap();
            if refcount_bits >= 8 && cluster_size >= 4096 {
                let grown = file.size() - before;
                assert!(grown < all.len() as u64 / 2 + 2 * cluster_size, "{what}: {grown} bytes");
            }
            assert_eq!(compressed_clusters(&file).await, clusters, "{what}");
            check_clean(file.clone(), false, &what).await;
            check_with_qemu(&kind, &file.contents(), &model, &what);
        });
    }
}

#[test]
fn what_gets_no_smaller_is_written_as_it_is() {
    block_on(async {
        let kind = kind(CreateOptions::new(4 << 16));
        let (file, node) = new_image(&kind).await;
        let mut model = kind.content();
        let (compressible, random) = (text(1, 1 << 16), noise(2, 1 << 16));
        let mixed = [compressible.clone(), random.clone(), compressible, random.clone()].concat();
        compress(&node, &mut model, 0, &mixed).await;
        assert_same(&read_all(&*node).await, &model, "mixed");
        let status = node.status(0..4 << 16).await.unwrap();
        assert!(status.compressed && status.len == 1 << 16);
        assert!(!node.status(1 << 16..2 << 16).await.unwrap().compressed);
        // Over what was compressed, too.
        compress(&node, &mut model, 0, &random).await;
        node.close().await.unwrap();
        assert_eq!(compressed_clusters(&file).await, 1);
        check_clean(file.clone(), false, "mixed").await;
        check_with_qemu(&kind, &file.contents(), &model, "mixed");
    });
}

#[test]
fn parts_of_clusters_are_compressed_with_what_is_there() {
    block_on(async {
        let create =
            CreateOptions { backing: Some(("base.raw".into(), Format::Raw)), ..CreateOptions::new(300_032) };
        let kind = Kind { create, backing: Some(text(3, 250_000)), options: Qcow2Options::default() };
        let (file, node) = new_image(&kind).await;
        let mut model = kind.content();
        // Over the backing, over itself, over plain data, and at the cut-off end.
        for (offset, len) in [(70_000, 100), (60_000, 20_000), (70_050, 10), (299_000, 1032), (0, 300_032)] {
            let data = text(offset + len, len as usize);
            compress(&node, &mut model, offset, &data).await;
            assert_same(&read_all(&*node).await, &model, "parts");
        }
        node.write(131_072, Buffer::copy_of(&[7; 65536]), WriteFlags::default()).await.unwrap();
        model[131_072..196_608].fill(7);
        compress(&node, &mut model, 140_000, &[8; 1000]).await;
        assert!(node.status(131_072..196_608).await.unwrap().compressed);
        node.write(0, Buffer::copy_of(&[9; 512]), WriteFlags::default()).await.unwrap();
        model[..512].fill(9);
        assert!(!node.status(0..65536).await.unwrap().compressed, "writes in between unpack");
        node.close().await.unwrap();
        assert_eq!(compressed_clusters(&file).await, 4);
        check_clean(file.clone(), false, "parts").await;
        check_with_qemu(&kind, &file.contents(), &model, "parts");
    });
}

#[test]
fn a_shared_cluster_is_free_when_the_last_has_left_it() {
    block_on(async {
        let kind = kind(CreateOptions::new(64 << 16));
        let (file, node) = new_image(&kind).await;
        let mut model = kind.content();
        let data = text(4, 64 << 16);
        compress(&node, &mut model, 0, &data).await;
        node.flush().await.unwrap();
        let packed = file.size();
        // Every other one goes, then the others: by a write, zeroes, a discard.
        for (round, first) in [0, 1].into_iter().enumerate() {
            for cluster in (first..64).step_by(2) {
                let at = cluster << 16;
                match cluster % 3 {
                    0 => node.write(at, Buffer::copy_of(&[1; 65536]), WriteFlags::default()).await.unwrap(),
                    1 => node
                        .write_zeroes(at, 1 << 16, ZeroFlags { unmap: true, ..ZeroFlags::default() })
                        .await
                        .unwrap(),
                    _ => node.discard(at, 1 << 16).await.unwrap(),
                }
                model[at as usize..(at + (1 << 16)) as usize].fill(u8::from(cluster % 3 == 0));
            }
            node.flush().await.unwrap();
            node.flush().await.unwrap();
            check_clean(file.clone(), true, &format!("round {round}")).await;
        }
        assert_same(&read_all(&*node).await, &model, "all gone");
        // What is free is used again, also the cluster that was open.
        let before = file.size();
        compress(&node, &mut model, 0, &data[..16 << 16]).await;
        assert_eq!(file.size(), before);
        assert_same(&read_all(&*node).await, &model, "used again");
        node.close().await.unwrap();
        assert!(packed < 64 << 15);
        check_clean(file.clone(), false, "used again").await;
        check_with_qemu(&kind, &file.contents(), &model, "used again");
    });
}

#[test]
fn what_was_inflated_is_forgotten_when_the_place_gets_another_cluster() {
    block_on(async {
        // One cluster of data, and the same place for it again and again: the one that is free.
        let create = CreateOptions { cluster_size: 4096, ..CreateOptions::new(4096) };
        let kind = kind(create);
        let (file, node) = new_image(&kind).await;
        let before = file.size();
        for round in 0..40 {
            let data = text(round, 4096);
            node.write(0, Buffer::copy_of(&data), COMPRESSED).await.unwrap();
            assert_same(&read_all(&*node).await, &data, "just written");
            // Twice: what the first frees, the second gives back.
            node.flush().await.unwrap();
            node.flush().await.unwrap();
        }
        assert!(file.size() <= before + 8 * 4096, "places are used again");
    });
}

#[test]
fn a_snapshot_keeps_what_was_compressed() {
    block_on(async {
        let kind = kind(CreateOptions::new(16 << 16));
        let (file, node) = new_image(&kind).await;
        let mut model = kind.content();
        compress(&node, &mut model, 0, &text(5, 16 << 16)).await;
        let old = model.clone();
        let none = std::time::Duration::ZERO;
        let new = NewSnapshot { name: "one".into(), date: none, vm_clock: none };
        let taken = node.take_snapshot(&new).await.unwrap();
        compress(&node, &mut model, 3 << 16, &text(6, 5 << 16)).await;
        node.discard(9 << 16, 2 << 16).await.unwrap();
        model[9 << 16..11 << 16].fill(0);
        node.flush().await.unwrap();
        check_clean(file.clone(), true, "with a snapshot").await;
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("image.qcow2"), file.contents()).unwrap();
        std::fs::write(dir.path().join("old.raw"), &old).unwrap();
        let (ok, said) =
            qemu_img(dir.path(), &["convert", "-l", "snapshot.name=one", "image.qcow2", "then.raw"]);
        assert!(ok, "{said}");
        let (ok, said) = qemu_img(dir.path(), &["compare", "-f", "raw", "-F", "raw", "then.raw", "old.raw"]);
        assert!(ok, "{said}");
        node.delete_snapshot(&taken.id).await.unwrap();
        assert_same(&read_all(&*node).await, &model, "after the snapshot");
        node.close().await.unwrap();
        check_clean(file.clone(), false, "after the snapshot").await;
        check_with_qemu(&kind, &file.contents(), &model, "after the snapshot");
    });
}

#[test]
fn an_external_data_file_takes_no_compressed_clusters() {
    block_on(async {
        let create = CreateOptions { data_file: Some("data.raw".into()), ..CreateOptions::new(1 << 20) };
        let file = MemoryNode::new("image.qcow2", Vec::new());
        super::create(&*file, &create).await.unwrap();
        let children =
            Children { data_file: Some(MemoryNode::new("data.raw", vec![0; 1 << 20])), backing: None };
        let node = Qcow2Node::open(file.clone(), children, Qcow2Options::default()).await.unwrap();
        assert_eq!(node.compressed_unit(), None);
        // The wish is one about space only.
        node.write(0, Buffer::copy_of(&[3; 65536]), COMPRESSED).await.unwrap();
        assert!(read_all(&*node).await[..65536].iter().all(|byte| *byte == 3));
        node.close().await.unwrap();
        assert_eq!(compressed_clusters(&file).await, 0);
    });
}

#[test]
fn writes_begin_and_end_at_sectors_of_their_own() {
    for alignment in [1, 512, 4096] {
        let sim = Sim::new(u64::from(alignment));
        let here = sim.clone();
        sim.run(async move {
            let kind = kind(CreateOptions::new(32 << 16));
            let (image, _) = new_image(&kind).await;
            let mut pages = Pages::new(0, 512);
            pages.write(0, &image.contents());
            let file = SimFile::new(&here, "image.qcow2", pages);
            file.set_limits(Limits { write_alignment: alignment, ..file.limits() });
            file.record();
            let node = open(&kind, file.clone()).await;
            // Two at once, and one by one.
            let (a, b) = (text(7, 4 << 16), text(8, 4 << 16));
            let one = node.write(0, Buffer::copy_of(&a), COMPRESSED);
            let two = node.write(4 << 16, Buffer::copy_of(&b), COMPRESSED);
            let (one, two) = futures_util::future::join(one, two).await;
            one.and(two).unwrap();
            for n in 8..16 {
                node.write(n << 16, Buffer::copy_of(&text(n, 1 << 16)), COMPRESSED).await.unwrap();
            }
            let mut written = std::collections::BTreeSet::new();
            let unit = u64::from(alignment.max(512));
            for event in file.events() {
                let headwater_sim::Event::Started { op: Op::Write, range, .. } = event else { continue };
                let (offset, len) = (range.start, range.end - range.start);
                assert!(offset % unit == 0 && len % unit == 0, "{offset} {len}");
                for sector in offset / 512..(offset + len) / 512 {
                    assert!(written.insert(sector), "sector {sector} is written twice");
                }
            }
            node.close().await.unwrap();
            check_clean(file.clone(), false, "alignment").await;
        });
    }
}

#[test]
fn a_write_that_fails_gives_its_places_back() {
    let sim = Sim::new(1);
    let here = sim.clone();
    sim.run(async move {
        let kind = kind(CreateOptions::new(32 << 16));
        let (image, _) = new_image(&kind).await;
        let mut pages = Pages::new(0, 512);
        pages.write(0, &image.contents());
        let file = SimFile::new(&here, "image.qcow2", pages);
        let node = open(&kind, file.clone()).await;
        let data = text(9, 8 << 16);
        node.write(0, Buffer::copy_of(&data), COMPRESSED).await.unwrap();
        file.fail(Fault::always(&[Op::Write], ErrorKind::NoSpace));
        let failed = node.write(2 << 16, Buffer::copy_of(&data), COMPRESSED).await;
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::NoSpace);
        file.repair();
        assert_same(&read_all(&*node).await[..8 << 16], &data, "as before");
        node.close().await.unwrap();
        check_clean(file.clone(), false, "after a failure").await;
    });
}

#[test]
fn the_filter_compresses_parts_and_zeroes_of_parts() {
    let sim = Sim::new(1);
    let here = sim.clone();
    sim.run(async move {
        // The last cluster is cut off.
        let kind = kind(CreateOptions::new((8 << 16) - 512));
        let (file, node) = new_image(&kind).await;
        let mut model = kind.content();
        let below = Disk::new(node, here.clock(), DiskOptions::default());
        let filter = CompressNode::new(Edge::new(below.clone())).unwrap();
        assert_eq!(filter.compressed_unit(), Some(1 << 16));
        let disk = Disk::new(filter, here.clock(), DiskOptions::default());
        let data = text(10, model.len());
        disk.write(0, Buffer::copy_of(&data), WriteFlags::default()).await.unwrap();
        model.copy_from_slice(&data);
        let all = model.len() as u64;
        for (offset, end) in [(100, 200), (70_000, 300_000), (500_000, all), (393_216, 458_752)] {
            let fast = ZeroFlags { fast_only: true, ..ZeroFlags::default() };
            let whole = offset % 65536 == 0 && (end == all || end % 65536 == 0);
            assert_eq!(disk.write_zeroes(offset, end - offset, fast).await.is_ok(), whole);
            disk.write_zeroes(offset, end - offset, ZeroFlags::default()).await.unwrap();
            model[offset as usize..end as usize].fill(0);
        }
        disk.discard(0, 1 << 16).await.unwrap();
        model[..1 << 16].fill(0);
        assert_same(&disk.read(0, all).await.unwrap(), &model, "through the filter");
        disk.close().await.unwrap();
        below.close().await.unwrap();
        // One is discarded, two are zero, and one is zero as a whole.
        assert_eq!(compressed_clusters(&file).await, 4);
        check_clean(file.clone(), false, "through the filter").await;
        check_with_qemu(&kind, &file.contents(), &model, "through the filter");
    });
    let raw = Disk::new(MemoryNode::new("raw", vec![0; 512]), sim.clock(), DiskOptions::default());
    let refused = CompressNode::new(Edge::new(raw)).err().expect("memory compresses nothing");
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
}

#[test]
fn rules_for_faults_hit_compressed_writes() {
    let names = ["write_compressed", "cluster_alloc_bytes", "l2_update_compressed"];
    for name in names {
        assert!(name.parse::<DebugEvent>().is_ok());
    }
}
