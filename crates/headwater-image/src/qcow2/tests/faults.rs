//! Something goes wrong at every operation: on the image's file, on what is below it and on an external data file, each operation in turn
//! fails with EIO or ENOSPC, having done a part of what it was asked, or takes half a minute.
//!
//! The same guest does the same things in each run. Whatever fails, it tries once more, and if the image takes no more changes, it opens it
//! again, as docs/on-disk.md says, and goes on. In the end all that it wrote is there, and the image is in order.

use super::*;
use headwater_block::{Buffer, Error, ErrorKind, Result, WriteFlags, ZeroFlags};
use headwater_sim::{Fault, Fill, Op, Pages, Sim, SimFile, for_seeds};
use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

/// The largest disk, in bytes.
const MAX_SIZE: u64 = 32 << 10;

/// What a guest does.
#[derive(Debug, Clone)]
enum Step {
    /// With FUA, and compressed.
    Write(Range<u64>, bool, bool),
    Zero(Range<u64>, bool),
    Discard(Range<u64>),
    Flush,
    Read(Range<u64>),
    Status(Range<u64>),
    Resize(u64),
}

/// An image, and what is done to it.
#[derive(Debug, Clone)]
struct Plan {
    kind: Kind,
    data_file: bool,
    steps: Vec<Step>,
}

impl Plan {
    fn random(seed: u64, steps: usize) -> Self {
        let rng = Rng::new(seed);
        let mut kind = Kind::random(&rng);
        while kind.create.cluster_size > 16 << 10 || kind.create.size > MAX_SIZE {
            kind = Kind::random(&rng);
        }
        let data_file = kind.create.version == 3 && rng.one_in(3);
        if data_file {
            kind.create.data_file = Some("data.raw".into());
        }
        let mut size = kind.create.size;
        let mut step = || {
            let range = rng.byte_range(size, *rng.pick(&[512, 3 * kind.create.cluster_size]), 512);
            match rng.range(0..20) {
                0..7 => Step::Write(range, rng.one_in(6), rng.one_in(3)),
                7..9 => Step::Zero(range, rng.one_in(2)),
                9..11 => Step::Discard(range),
                11..14 => Step::Flush,
                14..17 => Step::Read(range),
                17 => Step::Status(range),
                _ => {
                    size = rng.range(1..MAX_SIZE / 512) * 512;
                    Step::Resize(size)
                }
            }
        };
        let steps = (0..steps).map(|_| step()).collect();
        Self { kind, data_file, steps }
    }
}

/// What goes wrong.
#[derive(Debug, Clone, Copy)]
enum Trouble {
    Fails(ErrorKind),
    Slow,
}

/// On which file it goes wrong, at which of its operations.
type Place = (usize, u64);

/// What each byte of the disk may be, as a set of bits: what it was in the beginning, zero, or what a step wrote.
const INITIAL: u64 = 1;
const ZERO: u64 = 2;

fn bit(step: usize) -> u64 {
    4 << step
}

struct Run {
    plan: Plan,
    files: [Rc<SimFile>; 3],
    node: Rc<Qcow2Node>,
    size: u64,
    /// The bytes that may be read now, and those that may be read when the image is opened again.
    now: Vec<u64>,
    durable: Vec<u64>,
    sizes: BTreeSet<u64>,
    reopened: u32,
}

impl Run {
    async fn start(sim: &Sim, plan: &Plan, trouble: Option<(Trouble, Place)>) -> Self {
        let file = |name, content: &[u8]| {
            let mut pages = Pages::new(0, 512);
            pages.write(0, content);
            SimFile::new(sim, name, pages)
        };
        let below = file("base.raw", plan.kind.backing.as_deref().unwrap_or_default());
        below.set_read_only(true);
        let files = [file("image.qcow2", &[]), below, file("data.raw", &[])];
        create(&*files[0], &plan.kind.create).await.expect("nothing fails yet");
        let node = Self::open(plan, &files).await.expect("nothing fails yet");
        match trouble {
            Some((Trouble::Fails(kind), (at, nth))) => files[at].fail(Fault::nth(Op::ALL, nth, kind)),
            Some((Trouble::Slow, (at, nth))) => files[at].delay_nth(nth, Duration::from_secs(30)),
            None => {}
        }
        let size = plan.kind.create.size;
        let all = vec![INITIAL; MAX_SIZE as usize];
        let sizes = BTreeSet::from([size]);
        Self { plan: plan.clone(), files, node, size, now: all.clone(), durable: all, sizes, reopened: 0 }
    }

    async fn open(plan: &Plan, files: &[Rc<SimFile>; 3]) -> Result<Rc<Qcow2Node>> {
        let children = Children {
            data_file: plan.data_file.then(|| files[2].clone() as Rc<dyn Node>),
            backing: plan.kind.backing.is_some().then(|| files[1].clone() as Rc<dyn Node>),
        };
        Qcow2Node::open(files[0].clone(), children, plan.kind.options).await
    }

    /// The value of a byte if it is what this bit says.
    fn value(&self, of: u64, at: u64) -> u8 {
        match of {
            INITIAL => self.plan.kind.backing.as_ref().and_then(|b| b.get(at as usize)).copied().unwrap_or(0),
            ZERO => 0,
            _ => Fill::Pattern(of.trailing_zeros() as u8).byte(at),
        }
    }

    /// Checks what was read, and remembers that it was this.
    fn check(&mut self, offset: u64, got: &[u8]) {
        for (at, byte) in (offset..).zip(got) {
            let allowed = self.now[at as usize];
            let (mut fitting, mut left) = (0, allowed);
            while left != 0 {
                let one = left & left.wrapping_neg();
                left ^= one;
                if self.value(one, at) == *byte {
                    fitting |= one;
                }
            }
            assert!(fitting != 0, "byte {at} is {byte}, which nobody wrote: {allowed:#b}");
            self.now[at as usize] = fitting;
        }
    }

    /// Bytes become what `of` says, for sure only once that has succeeded.
    fn begin(&mut self, range: &Range<u64>, of: u64) {
        let part = range.start as usize..range.end as usize;
        self.now[part.clone()].iter_mut().for_each(|byte| *byte |= of);
        self.durable[part].iter_mut().for_each(|byte| *byte |= of);
    }

    fn done(&mut self, range: &Range<u64>, of: u64) {
        self.now[range.start as usize..range.end as usize].fill(of);
    }

    fn flushed(&mut self) {
        self.durable.clone_from(&self.now);
        self.sizes = BTreeSet::from([self.size]);
    }

    async fn step(&mut self, index: usize) -> Result<()> {
        let node = self.node.clone();
        match self.plan.steps[index].clone() {
            Step::Write(range, fua, compressed) => {
                self.begin(&range, bit(index));
                let bytes: Vec<u8> = range.clone().map(|at| self.value(bit(index), at)).collect();
                node.write(range.start, Buffer::copy_of(&bytes), WriteFlags { fua, compressed }).await?;
                self.done(&range, bit(index));
                if fua {
                    self.durable[range.start as usize..range.end as usize].fill(bit(index));
                }
            }
            Step::Zero(range, unmap) => {
                self.begin(&range, ZERO);
                let flags = ZeroFlags { unmap, ..ZeroFlags::default() };
                node.write_zeroes(range.start, range.end - range.start, flags).await?;
                self.done(&range, ZERO);
            }
            Step::Discard(range) => {
                self.begin(&range, ZERO);
                node.discard(range.start, range.end - range.start).await?;
            }
            Step::Flush => {
                node.flush().await?;
                self.flushed();
            }
            Step::Read(range) => {
                let buf = BufferMut::new((range.end - range.start) as usize);
                let got = node.read(range.start, buf).await?;
                self.check(range.start, &got);
            }
            Step::Status(range) => {
                let extent = node.status(range.clone()).await?;
                assert!(extent.offset == range.start && extent.len > 0 && extent.end() <= range.end);
            }
            Step::Resize(size) => {
                // What lies beyond is gone, or the old end shows zeroes.
                let (low, high) = (self.size.min(size), self.size.max(size));
                self.sizes.insert(size);
                self.begin(&(low..high), ZERO);
                node.resize(size).await?;
                self.done(&(low..high), ZERO);
                self.size = size;
            }
        }
        Ok(())
    }

    /// Tries once more and, if that fails too, with the image opened again: then it must succeed.
    async fn insist(&mut self, index: usize) {
        let Err(first) = self.step(index).await else { return };
        self.is_explained(&first);
        let Err(second) = self.step(index).await else { return };
        assert!(second.to_string().contains("image.qcow2"), "{second}");
        self.reopen().await;
        let step = self.plan.steps[index].clone();
        self.step(index).await.unwrap_or_else(|err| panic!("{step:?} fails for ever: {err}, first {first}"));
    }

    fn is_explained(&self, err: &Error) {
        let failures: u64 = self.files.iter().map(|file| file.failures()).sum();
        assert!(failures == 1, "nothing was wrong: {err}");
        let fits = matches!(err.kind(), ErrorKind::Io | ErrorKind::NoSpace);
        assert!(fits && err.to_string().contains("injected"), "{err:?}");
    }

    async fn reopen(&mut self) {
        self.reopened += 1;
        check_clean(self.files[0].clone(), true, "after an error").await;
        self.node = Self::open(&self.plan, &self.files).await.expect("the fault is gone");
        self.size = self.node.size();
        assert!(self.sizes.contains(&self.size), "{} is none of {:?}", self.size, self.sizes);
        self.now.clone_from(&self.durable);
        self.read_all().await;
        self.flushed();
    }

    async fn read_all(&mut self) {
        let all = read_all(&*self.node).await;
        self.check(0, &all);
    }

    /// Closes the image and looks at it. Gives the numbers of operations until it was closed.
    async fn finish(&mut self, troubled: bool) -> [u64; 3] {
        if let Err(err) = self.node.close().await {
            self.is_explained(&err);
            self.reopen().await;
            self.node.close().await.expect("the fault is gone");
        }
        let operations = self.operations();
        self.files.iter().for_each(|file| file.repair());
        check_clean(self.files[0].clone(), troubled, "in the end").await;
        let size = self.size;
        self.node = Self::open(&self.plan, &self.files).await.expect("it is in order");
        assert_eq!(self.node.size(), size);
        self.read_all().await;
        operations
    }

    fn operations(&self) -> [u64; 3] {
        std::array::from_fn(|i| self.files[i].operations())
    }
}

/// Shows where the trouble was, when a test fails.
struct ShowOnPanic(String);

impl Drop for ShowOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}

/// One run; gives the number of operations that each file saw, and how often the image was opened again.
fn run(seed: u64, plan: &Plan, trouble: Option<(Trouble, Place)>) -> ([u64; 3], u32) {
    let _shown = ShowOnPanic(format!("{trouble:?} in {:?}: {:?}", plan.kind.create, plan.steps));
    let sim = Sim::new(seed);
    let (inner, plan) = (sim.clone(), plan.clone());
    sim.run(async move {
        let mut run = Run::start(&inner, &plan, trouble).await;
        let before = run.operations();
        for index in 0..plan.steps.len() {
            run.insist(index).await;
        }
        let fails = matches!(trouble, Some((Trouble::Fails(_), _)));
        let after = run.finish(fails).await;
        let counts = std::array::from_fn(|i| after[i] - before[i]);
        (counts, run.reopened)
    })
}

const TROUBLES: [Trouble; 3] =
    [Trouble::Fails(ErrorKind::Io), Trouble::Fails(ErrorKind::NoSpace), Trouble::Slow];

#[test]
fn something_goes_wrong_at_every_operation() {
    let (mut reopened, mut tried) = (0, 0);
    for_seeds(6, |seed| {
        tried += 1;
        let plan = Plan::random(seed, 12);
        let (counts, _) = run(seed, &plan, None);
        for (at, count) in counts.into_iter().enumerate() {
            for nth in 0..count {
                for trouble in TROUBLES {
                    reopened += run(seed, &plan, Some((trouble, (at, nth)))).1;
                }
            }
        }
    });
    // A single seed may be replayed.
    assert!(reopened > 0 || tried < 2, "a failed flush was never met");
}

#[test]
fn something_goes_wrong_somewhere_in_a_long_history() {
    for_seeds(25, |seed| {
        let rng = Rng::new(seed);
        let plan = Plan::random(seed + 1000, 55);
        let (counts, _) = run(seed, &plan, None);
        for _ in 0..6 {
            let at = rng.index(3);
            if counts[at] > 0 {
                run(seed, &plan, Some((*rng.pick(&TROUBLES), (at, rng.range(0..counts[at])))));
            }
        }
    });
}
