//! Random operations one after the other.

use super::*;
use headwater_block::node::{Access, Change};
use headwater_block::{Buffer, Resolved, WriteFlags, ZeroFlags};
use headwater_sim::{Sim, for_seeds};
use std::ops::Range;

struct Run {
    rng: Rng,
    kind: Kind,
    file: Rc<MemoryNode>,
    node: Rc<Qcow2Node>,
    model: Vec<u8>,
    trace: String,
}

impl Run {
    async fn new(rng: &Rng) -> Self {
        let kind = Kind::random(rng);
        let file = MemoryNode::new("image.qcow2", Vec::new());
        create(&*file, &kind.create).await.unwrap();
        let node = open(&kind, file.clone()).await;
        let model = kind.content();
        Self { rng: rng.clone(), trace: format!("{:?}\n", kind.create), kind, file, node, model }
    }

    fn range(&self) -> Range<u64> {
        let cluster = self.kind.create.cluster_size;
        let most = *self.rng.pick(&[512, cluster, 4 * cluster, 40 * cluster]);
        let unit = *self.rng.pick(&[1, 512, cluster]);
        let range = self.rng.byte_range(self.model.len() as u64, most.max(unit), 1);
        let aligned =
            range.start / unit * unit..(range.end.next_multiple_of(unit)).min(self.model.len() as u64);
        if aligned.is_empty() { range } else { aligned }
    }

    async fn step(&mut self) {
        let range = self.range();
        let len = (range.end - range.start) as usize;
        let part = range.start as usize..range.end as usize;
        let choice = self.rng.range(0..100);
        self.trace += &format!("{choice}: {range:?} of {}\n", self.model.len());
        match choice {
            0..40 => {
                let byte = self.rng.range(0..256) as u8;
                let data: Vec<u8> = (0..len).map(|i| byte.wrapping_add((i / 512) as u8)).collect();
                let fua = self.rng.one_in(10);
                let compressed = self.rng.one_in(3);
                let flags = WriteFlags { fua, compressed };
                self.node.write(range.start, Buffer::copy_of(&data), flags).await.unwrap();
                self.model[part].copy_from_slice(&data);
                let access = self.node.access(range, Change::Write);
                assert!(
                    access == Access::Shared
                        || compressed
                        || self.kind.options.cache_size == 0
                        || len > 1 << 20,
                    "what was written is in place now"
                );
            }
            40..55 => {
                let flags = ZeroFlags {
                    unmap: self.rng.one_in(2),
                    fua: self.rng.one_in(10),
                    fast_only: self.rng.one_in(8),
                };
                match self.node.write_zeroes(range.start, len as u64, flags).await {
                    Ok(()) => self.model[part].fill(0),
                    Err(err) => assert!(flags.fast_only, "{err}"),
                }
            }
            55..65 => {
                self.node.discard(range.start, len as u64).await.unwrap();
                let now = self.node.read(range.start, BufferMut::new(len)).await.unwrap();
                for (at, (now, before)) in
                    now.iter().zip(&mut self.model[part]).enumerate().filter(|(_, (n, b))| n != b)
                {
                    assert!(*now == 0, "byte {at} of {range:?} after a discard");
                    *before = *now;
                }
            }
            65..80 => {
                let got = self.node.read(range.start, BufferMut::new(len)).await.unwrap();
                assert_same(&got, &self.model[part], "read");
                self.resolve(range).await;
            }
            80..86 => self.node.flush().await.unwrap(),
            86..88 => self.extents().await,
            88..90 => self.killed().await,
            90..95 => self.resize().await,
            _ => self.reopen().await,
        }
    }

    /// What `resolve` says, if it says something, is what reading gives.
    async fn resolve(&self, range: Range<u64>) {
        let expected = |len: u64| &self.model[range.start as usize..(range.start + len) as usize];
        match self.node.resolve(range.clone()) {
            Resolved::At { node, offset, len, .. } => {
                assert!(len > 0 && len <= range.end - range.start);
                let got = node.read(offset, BufferMut::new(len as usize)).await.unwrap();
                assert_same(&got, expected(len), "resolved read");
            }
            Resolved::Zero { len, .. } => {
                assert!(len > 0 && len <= range.end - range.start);
                assert!(expected(len).iter().all(|byte| *byte == 0));
            }
            Resolved::Ask => {}
        }
    }

    async fn extents(&self) {
        use headwater_block::ExtentKind;
        let size = self.model.len() as u64;
        let mut at = 0;
        while at < size {
            let extent = self.node.status(at..size).await.unwrap();
            assert!(extent.offset == at && extent.len > 0 && extent.end() <= size && extent.depth == 0);
            let part = &self.model[at as usize..extent.end() as usize];
            match (extent.kind, extent.host_offset) {
                (ExtentKind::Zero, _) => assert!(part.iter().all(|byte| *byte == 0)),
                (ExtentKind::Data, Some(host)) => {
                    let got = self.file.read(host, BufferMut::new(part.len())).await.unwrap();
                    assert_same(&got, part, "extent");
                }
                (ExtentKind::Data, None) => assert!(extent.compressed),
                (ExtentKind::Unallocated, _) => {
                    let backing = self.kind.backing.as_deref().unwrap_or_default();
                    let below: Vec<u8> =
                        (at..extent.end()).map(|i| backing.get(i as usize).copied().unwrap_or(0)).collect();
                    assert_same(&below, part, "unallocated extent");
                }
            }
            at = extent.end();
        }
    }

    async fn resize(&mut self) {
        let cluster = self.kind.create.cluster_size;
        let size = self.model.len() as u64;
        let change = self.rng.range(0..(20 * cluster / 512).min(1000)) * 512;
        let new = if self.rng.one_in(2) { size.saturating_sub(change).max(512) } else { size + change };
        self.trace += &format!("resize {size} -> {new}\n");
        self.node.resize(new).await.unwrap();
        self.model.resize(new as usize, 0);
        assert_eq!(self.node.size(), new);
    }

    /// What is said to be settled is in the file, although nobody has closed it.
    async fn killed(&self) {
        let file = MemoryNode::new("image.qcow2", self.file.contents());
        let successor = read_all(&*open(&self.kind, file).await).await;
        assert_eq!(successor.len(), self.model.len());
        for (at, block) in self.model.chunks(512).enumerate() {
            let start = at * 512;
            let range = start as u64..(start + block.len()) as u64;
            if self.node.is_settled(range) {
                assert_same(&successor[start..start + block.len()], block, "settled, and killed");
            }
        }
        if !self.node.is_settled(0..self.model.len() as u64) {
            self.node.flush().await.unwrap();
        }
        assert!(self.node.is_settled(0..self.model.len() as u64), "everything was flushed");
    }

    async fn reopen(&mut self) {
        self.node.close().await.unwrap();
        check_clean(self.file.clone(), false, "after closing").await;
        self.node = open(&self.kind, self.file.clone()).await;
        assert_eq!(self.node.size(), self.model.len() as u64);
        assert_same(&read_all(&*self.node).await, &self.model, "after opening again");
    }
}

#[test]
fn random_operations_match_the_model() {
    for_seeds(10, |seed| {
        let sim = Sim::new(seed);
        let rng = sim.rng().clone();
        sim.run(async move {
            let mut run = Run::new(&rng).await;
            let mut guard = PrintOnPanic(String::new());
            for _ in 0..120 {
                guard.0 = run.trace.clone();
                run.step().await;
            }
            guard.0 = run.trace.clone();
            run.reopen().await;
            run.node.close().await.unwrap();
            if seed % 4 == 0 {
                check_with_qemu(&run.kind, &run.file.contents(), &run.model, "at the end");
            }
        });
    });
}

/// Shows what was done, when a test fails.
struct PrintOnPanic(String);

impl Drop for PrintOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}
