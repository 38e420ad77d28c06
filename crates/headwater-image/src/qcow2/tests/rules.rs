//! Images that other programs made, features that must be respected, and damage that must be refused.

use super::super::header::{AUTOCLEAR_BITMAPS, Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY};
use super::*;
use headwater_block::node::BackingLink;
use headwater_block::{Buffer, ErrorKind, Limits, WriteFlags, ZeroFlags};
use headwater_sim::{Fault, Op, Pages, Sim, SimFile, for_seeds};
use std::future::Future;

fn block_on<T: 'static>(future: impl Future<Output = T> + 'static) -> T {
    Sim::new(0).run(future)
}

/// A directory with `data.raw`, half of it data, and qemu-img to make images in it.
struct Workshop {
    dir: tempfile::TempDir,
    data: Vec<u8>,
}

const SIZE: usize = 1 << 20;

impl Workshop {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data: Vec<u8> = (0..SIZE).map(|i| if i >> 15 & 1 == 0 { (i / 100) as u8 } else { 0 }).collect();
        std::fs::write(dir.path().join("data.raw"), &data).unwrap();
        Self { dir, data }
    }

    #[track_caller]
    fn qemu(&self, args: &str) -> String {
        let args: Vec<&str> = args.split_whitespace().collect();
        let (ok, text) = qemu_img(self.dir.path(), &args);
        assert!(ok, "qemu-img {args:?}: {text}");
        text
    }

    fn load(&self, name: &str) -> Rc<MemoryNode> {
        MemoryNode::new(name, std::fs::read(self.dir.path().join(name)).unwrap())
    }

    fn store(&self, name: &str, node: &MemoryNode) {
        std::fs::write(self.dir.path().join(name), node.contents()).unwrap();
    }
}

async fn open_plain(file: Rc<MemoryNode>) -> headwater_block::Result<Rc<Qcow2Node>> {
    Qcow2Node::open(file, Children::default(), Qcow2Options::default()).await
}

async fn write(node: &Qcow2Node, model: &mut [u8], offset: usize, len: usize, byte: u8) {
    node.write(offset as u64, Buffer::copy_of(&vec![byte; len]), WriteFlags::default()).await.unwrap();
    model[offset..offset + len].fill(byte);
}

#[test]
fn images_that_qemu_made_are_read_and_written() {
    for (convert, options) in [
        ("-c", ""),
        ("-c", "-o compression_type=zstd"),
        ("-c", "-o cluster_size=512"),
        ("-c", "-o cluster_size=2M"),
        ("-c", "-o extended_l2=on,cluster_size=128k"),
        ("", "-o extended_l2=on"),
        ("", "-o compat=0.10"),
        ("", "-o preallocation=metadata"),
        ("", "-o preallocation=full,refcount_bits=1,cluster_size=4k"),
        ("", "-o lazy_refcounts=on"),
    ] {
        let shop = Workshop::new();
        shop.qemu(&format!("convert -O qcow2 {convert} {options} data.raw image.qcow2"));
        let file = shop.load("image.qcow2");
        let mut model = shop.data.clone();
        let copy = file.clone();
        let model = block_on(async move {
            let node = open_plain(copy).await.unwrap();
            assert_same(&read_all(&*node).await, &model, "as qemu-img wrote it");
            for (offset, len) in [(0, 512), (70_000, 5000), (200_000, 200_000), (SIZE - 512, 512)] {
                write(&node, &mut model, offset, len, 0x5a).await;
            }
            node.write_zeroes(300_000, 150_000, ZeroFlags { unmap: true, ..ZeroFlags::default() })
                .await
                .unwrap();
            model[300_000..450_000].fill(0);
            node.flush().await.unwrap();
            write(&node, &mut model, 310_000, 100_000, 0x66).await;
            assert_same(&read_all(&*node).await, &model, "as changed");
            node.close().await.unwrap();
            model
        });
        shop.store("image.qcow2", &file);
        std::fs::write(shop.dir.path().join("model.raw"), &model).unwrap();
        shop.qemu("check -f qcow2 image.qcow2");
        shop.qemu("compare -f qcow2 -F raw image.qcow2 model.raw");
    }
}

#[test]
fn internal_snapshots_keep_their_data() {
    for options in [
        "cluster_size=4k",
        "extended_l2=on,cluster_size=16k",
        "compat=0.10",
        "cluster_size=512,refcount_bits=2",
    ] {
        let shop = Workshop::new();
        shop.qemu(&format!("convert -O qcow2 -o {options} data.raw image.qcow2"));
        shop.qemu("snapshot -c before image.qcow2");
        let file = shop.load("image.qcow2");
        let (copy, mut model) = (file.clone(), shop.data.clone());
        let model = block_on(async move {
            let node = open_plain(copy).await.unwrap();
            for (offset, len) in [(512, 1024), (70_000, 5000), (200_000, 200_000), (SIZE - 512, 512)] {
                write(&node, &mut model, offset, len, 0x5a).await;
            }
            node.write_zeroes(300_000, 150_000, ZeroFlags { unmap: true, ..ZeroFlags::default() })
                .await
                .unwrap();
            model[300_000..450_000].fill(0);
            node.discard(0, 100_000).await.unwrap();
            let now = read_all(&*node).await;
            model[..100_000].copy_from_slice(&now[..100_000]);
            assert_same(&now, &model, "as changed");
            assert_eq!(node.resize(4096).await.unwrap_err().kind(), ErrorKind::Unsupported);
            node.close().await.unwrap();
            model
        });
        shop.store("image.qcow2", &file);
        std::fs::write(shop.dir.path().join("model.raw"), &model).unwrap();
        shop.qemu("check -f qcow2 image.qcow2");
        shop.qemu("compare -f qcow2 -F raw image.qcow2 model.raw");
        shop.qemu("convert -l snapshot.name=before -O raw image.qcow2 before.raw");
        shop.qemu("compare -f raw -F raw before.raw data.raw");
        shop.qemu("snapshot -d before image.qcow2");
        shop.qemu("check -f qcow2 image.qcow2");
    }
}

#[test]
fn data_may_be_in_an_external_file() {
    for raw in ["on", "off"] {
        let shop = Workshop::new();
        shop.qemu(&format!("create -f qcow2 -o data_file=ext.raw,data_file_raw={raw} image.qcow2 1M"));
        let (file, ext) = (shop.load("image.qcow2"), shop.load("ext.raw"));
        let (copy, ext_copy, is_raw) = (file.clone(), ext.clone(), raw == "on");
        let model = block_on(async move {
            assert!(open_plain(copy.clone()).await.is_err(), "the data file must be given");
            let children = Children { data_file: Some(ext_copy.clone()), backing: None };
            let node = Qcow2Node::open(copy, children, Qcow2Options::default()).await.unwrap();
            let mut model = vec![0; SIZE];
            for (offset, len) in [(0, 512), (70_000, 5000), (200_000, 200_000), (SIZE - 512, 512)] {
                write(&node, &mut model, offset, len, 0x5a).await;
            }
            node.write_zeroes(250_000, 150_000, ZeroFlags { unmap: true, ..ZeroFlags::default() })
                .await
                .unwrap();
            model[250_000..400_000].fill(0);
            node.discard(65536, 65536).await.unwrap();
            model[65536..131_072].fill(0);
            write(&node, &mut model, 80_000, 100, 0x77).await;
            assert_same(&read_all(&*node).await, &model, "as changed");
            if is_raw {
                assert_same(&ext_copy.contents(), &model, "the data file as a raw image");
            }
            node.close().await.unwrap();
            model
        });
        shop.store("image.qcow2", &file);
        shop.store("ext.raw", &ext);
        std::fs::write(shop.dir.path().join("model.raw"), &model).unwrap();
        shop.qemu("check -f qcow2 image.qcow2");
        shop.qemu("compare -f qcow2 -F raw image.qcow2 model.raw");
    }
}

#[test]
fn bitmaps_are_no_longer_believed_after_a_write() {
    let shop = Workshop::new();
    shop.qemu("create -f qcow2 image.qcow2 1M");
    shop.qemu("bitmap --add image.qcow2 dirty");
    let file = shop.load("image.qcow2");
    block_on(async move {
        let before = Header::read(&*file).await.unwrap();
        assert_eq!(before.autoclear, AUTOCLEAR_BITMAPS);
        let node = open_plain(file.clone()).await.unwrap();
        node.read(0, BufferMut::new(512)).await.unwrap();
        assert_eq!(Header::read(&*file).await.unwrap(), before, "reading changes nothing");
        write(&node, &mut vec![0; SIZE], 0, 512, 1).await;
        let after = Header::read(&*file).await.unwrap();
        assert_eq!(after, Header { autoclear: 0, ..before });
    });
}

/// Of several requests that come first, none may go ahead of the others.
#[test]
fn nothing_changes_before_autoclear_features_are_durably_gone() {
    for_seeds(10, |seed| {
        let sim = Sim::new(seed);
        let image = MemoryNode::new("image.qcow2", Vec::new());
        block_on({
            let image = image.clone();
            async move {
                create(&*image, &CreateOptions::new(1 << 20)).await.unwrap();
                image.write(95, Buffer::copy_of(&[1]), WriteFlags::default()).await.unwrap();
            }
        });
        let mut pages = Pages::new(0, 512);
        pages.write(0, &image.contents());
        let file = SimFile::new(&sim, "image.qcow2", pages);
        let here = sim.clone();
        sim.run(async move {
            let node =
                Qcow2Node::open(file.clone(), Children::default(), Qcow2Options::default()).await.unwrap();
            file.stall(&[Op::Flush]);
            let writes: Vec<_> = (0..3)
                .map(|n| {
                    let (node, sim) = (node.clone(), here.clone());
                    here.spawn(format!("write {n}"), async move {
                        sim.sleep(std::time::Duration::from_micros(300 * n)).await;
                        node.write(n << 17, Buffer::zeroed(512), WriteFlags::default()).await.unwrap();
                    })
                })
                .collect();
            file.holds(1).await;
            here.sleep(std::time::Duration::from_millis(5)).await;
            assert_eq!(file.started(Op::Write), 1, "the header alone");
            file.release();
            for write in writes {
                write.await;
            }
            assert_eq!(node.header().autoclear, 0);
        });
    });
}

#[test]
fn dirty_and_corrupt_images_are_only_read() {
    for bit in [INCOMPAT_DIRTY, INCOMPAT_CORRUPT] {
        let file = MemoryNode::new("image.qcow2", Vec::new());
        block_on(async move {
            create(&*file, &CreateOptions::new(1 << 20)).await.unwrap();
            file.write(79, Buffer::copy_of(&[bit as u8]), WriteFlags::default()).await.unwrap();
            let err = open_plain(file.clone()).await.map(|_| ()).unwrap_err();
            assert!(err.to_string().contains("qemu-img check -r all"), "{err}");
            let options = Qcow2Options { read_only: true, ..Qcow2Options::default() };
            let node = Qcow2Node::open(file, Children::default(), options).await.unwrap();
            assert!(node.is_read_only());
            let err = node.write(0, Buffer::zeroed(512), WriteFlags::default()).await.unwrap_err();
            assert_eq!(err.kind(), ErrorKind::ReadOnly);
        });
    }
}

#[test]
fn files_that_need_larger_writes_than_a_cluster_are_refused() {
    let file = MemoryNode::new("image.qcow2", Vec::new());
    block_on(async move {
        let options = CreateOptions { cluster_size: 512, ..CreateOptions::new(1 << 20) };
        create(&*file, &options).await.unwrap();
        file.set_limits(Limits { write_alignment: 4096, ..Limits::default() });
        assert_eq!(open_plain(file).await.map(|_| ()).unwrap_err().kind(), ErrorKind::Unsupported);
    });
}

#[test]
fn the_backing_link_changes_and_goes() {
    block_on(async {
        let file = MemoryNode::new("image.qcow2", Vec::new());
        let mut options = CreateOptions::new(1 << 20);
        options.backing = Some(("old.raw".into(), Format::Raw));
        create(&*file, &options).await.unwrap();
        let backing = |byte| MemoryNode::new("b", vec![byte; SIZE]);
        let children = Children { data_file: None, backing: Some(backing(1)) };
        let node = Qcow2Node::open(file.clone(), children, Qcow2Options::default()).await.unwrap();
        let mut model = vec![1; SIZE];
        write(&node, &mut model, 1000, 100, 9).await;
        assert_same(&read_all(&*node).await, &model, "before");
        let link = BackingLink { name: "new.qcow2", format: "qcow2" };
        node.change_backing(Some(link), Some(backing(2))).await.unwrap();
        let header = Header::read(&*file).await.unwrap();
        assert_eq!(header.backing_name.as_deref(), Some("new.qcow2"));
        assert_eq!(header.backing_format().as_deref(), Some("qcow2"));
        let now = read_all(&*node).await;
        assert!(now[1000..1100] == [9; 100] && now[..1000] == [1; 1000] && now[65536] == 2);
        node.change_backing(None, None).await.unwrap();
        let header = Header::read(&*file).await.unwrap();
        assert_eq!((header.backing_name, header.backing_place.offset), (None, 0));
        assert_eq!(read_all(&*node).await[65536], 0);
        assert!(node.change_backing(Some(link), None).await.is_err());
        node.close().await.unwrap();
        check_clean(file, false, "after two changes").await;
    });
}

#[test]
fn entries_that_point_nowhere_or_into_metadata_are_refused() {
    block_on(async {
        let file = MemoryNode::new("image.qcow2", Vec::new());
        create(&*file, &CreateOptions::new(1 << 20)).await.unwrap();
        let node = open_plain(file.clone()).await.unwrap();
        write(&node, &mut vec![0; SIZE], 0, 1 << 17, 1).await;
        node.close().await.unwrap();
        let header = Header::read(&*file).await.unwrap();
        let l1 = file.read(header.l1_table_offset, BufferMut::new(8)).await.unwrap();
        let l1 = u64::from_be_bytes(l1[..8].try_into().unwrap());
        let l2 = l1 & 0x00ff_ffff_ffff_fe00;
        let put = async |offset: u64, word: u64| {
            file.write(offset, Buffer::copy_of(&word.to_be_bytes()), WriteFlags::default()).await.unwrap();
        };
        let copied = 1 << 63;
        for bad in [
            copied | 1 << 40,
            copied,
            copied | header.l1_table_offset,
            copied | l2,
            copied | 0x50200,
            1 << 60 | 0x50000,
        ] {
            put(l2, bad).await;
            let node = open_plain(file.clone()).await.unwrap();
            if bad == copied {
                continue; // Offset 0 is "unallocated", whatever the flag.
            }
            let read = node.read(0, BufferMut::new(512)).await.map(|_| ()).unwrap_err();
            let write = node.write(0, Buffer::zeroed(512), WriteFlags::default()).await.unwrap_err();
            let status = node.status(0..512).await.map(|_| ()).unwrap_err();
            for err in [read, write, status] {
                assert_eq!(err.kind(), ErrorKind::Corrupt);
                assert!(err.to_string().starts_with("image.qcow2: L2 entry 0x"), "{err}");
            }
            // The next cluster is in order.
            node.read(65536, BufferMut::new(512)).await.unwrap();
        }
        for bad in [1 << 40, 0x50200, l1 | 1] {
            put(header.l1_table_offset, bad).await;
            let node = open_plain(file.clone()).await.unwrap();
            let err = node.read(0, BufferMut::new(512)).await.map(|_| ()).unwrap_err();
            assert!(err.kind() == ErrorKind::Corrupt && err.to_string().contains("L1 entry 0"), "{err}");
        }
    });
}

/// After a flush has failed nobody knows what is on the disk, so nothing may claim to be durable any more.
#[test]
fn a_failed_flush_ends_all_changes() {
    let sim = Sim::new(0);
    let image = MemoryNode::new("image.qcow2", Vec::new());
    let creating = image.clone();
    sim.run(async move { create(&*creating, &CreateOptions::new(1 << 20)).await.unwrap() });
    let mut pages = Pages::new(0, 512);
    pages.write(0, &image.contents());
    let file = SimFile::new(&sim, "image.qcow2", pages);
    sim.run(async move {
        let open = async || {
            Qcow2Node::open(file.clone(), Children::default(), Qcow2Options::default()).await.unwrap()
        };
        let node = open().await;
        let mut model = vec![0; SIZE];
        write(&node, &mut model, 0, 100_000, 1).await;
        node.flush().await.unwrap();
        write(&node, &mut model, 300_000, 100_000, 2).await;
        file.fail(Fault::nth(&[Op::Flush], 1, ErrorKind::Io));
        assert_eq!(node.flush().await.unwrap_err().kind(), ErrorKind::Io);
        assert!(node.is_read_only());
        for result in [
            node.flush().await,
            node.write(0, Buffer::zeroed(512), WriteFlags::default()).await,
            node.discard(0, 1 << 17).await,
            node.resize(1 << 21).await,
            node.change_backing(None, None).await,
        ] {
            let err = result.unwrap_err();
            assert!(err.to_string().contains("read-only from now on"), "{err}");
        }
        assert_same(&read_all(&*node).await, &model, "reads go on");
        assert!(node.close().await.is_err());
        let node = open().await;
        let got = read_all(&*node).await;
        assert_same(&got[..300_000], &model[..300_000], "what was flushed");
        node.close().await.unwrap();
        check_clean(file, true, "after a failed flush").await;
    });
}

/// Random bytes of the metadata are changed: errors and wrong data may come of it, but nothing worse.
#[test]
fn damage_makes_errors_but_no_panic() {
    for_seeds(15, |seed| {
        let sim = Sim::new(seed);
        let rng = sim.rng().clone();
        sim.run(async move {
            let mut kind = Kind::random(&rng);
            while kind.create.cluster_size > 16 << 10 {
                kind = Kind::random(&rng);
            }
            let file = MemoryNode::new("image.qcow2", Vec::new());
            create(&*file, &kind.create).await.unwrap();
            let node = open(&kind, file.clone()).await;
            let size = node.size();
            let some_writes = async |node: &Qcow2Node| {
                for _ in 0..15 {
                    let range = rng.byte_range(size, 20 << 10, 1);
                    let len = range.end - range.start;
                    let _ =
                        node.write(range.start, Buffer::zeroed(len as usize), WriteFlags::default()).await;
                    let range = rng.byte_range(size, 40 << 10, 1);
                    let len = range.end - range.start;
                    let flags = ZeroFlags { unmap: true, ..ZeroFlags::default() };
                    let _ = node.write_zeroes(range.start, len, flags).await;
                    let _ = node.read(range.start, BufferMut::new(len as usize)).await;
                    let _ = node.discard(range.start / 2, len * 2).await;
                }
                let _ = node.flush().await;
            };
            some_writes(&node).await;
            node.close().await.unwrap();
            let bytes = file.contents();
            for _ in 0..10 {
                let mut bytes = bytes.clone();
                for _ in 0..rng.range(1..8) {
                    let at = rng.index(bytes.len().min(64 << 10) / 8) * 8 + rng.index(8);
                    bytes[at] = *rng.pick(&[0, 1, 0x40, 0x80, 0xff, rng.range(0..256) as u8]);
                }
                let damaged = MemoryNode::new("image.qcow2", bytes);
                let Ok(node) = Qcow2Node::open(damaged, kind.children(), kind.options).await else {
                    continue;
                };
                if node.size() == size {
                    some_writes(&node).await;
                    let _ = node.resize(size + (1 << 20)).await;
                    let _ = node.resize(size / 2).await;
                }
                let _ = node.close().await;
            }
        });
    });
}

#[test]
fn a_huge_image_opens_at_once_and_takes_writes_anywhere() {
    block_on(async {
        for (size, cluster_size) in [(1u64 << 40, 64 << 10), (1 << 50, 2 << 20)] {
            let file = MemoryNode::new("image.qcow2", Vec::new());
            create(&*file, &CreateOptions { cluster_size, ..CreateOptions::new(size) }).await.unwrap();
            let node = open_plain(file.clone()).await.unwrap();
            node.write(size - 4096, Buffer::copy_of(&[7; 4096]), WriteFlags::default()).await.unwrap();
            let got = node.read(size - 8192, BufferMut::new(8192)).await.unwrap();
            assert!(got[..4096] == [0; 4096] && got[4096..] == [7; 4096]);
            let extent = node.status(0..size).await.unwrap();
            assert!(extent.len > size / 2, "empty tables are skipped");
            node.discard(0, size).await.unwrap();
            node.close().await.unwrap();
            assert!(file.size() < 20 << 20);
            check_clean(file, false, "a huge image").await;
        }
    });
}
