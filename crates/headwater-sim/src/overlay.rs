//! A small image format with a backing: a map of clusters in memory, whose look-ups take time, and a file for the data.
//!
//! It behaves as real formats do where it matters to those above: changes of the mapping copy the rest of a cluster from the
//! backing, data are written before the map says so, and zeroes are a state of a cluster. And it **checks the contract** of
//! [`headwater_block::Node`]: a change that needs the range for itself must not meet another request there.

use crate::contract::Contract;
use crate::device::Device;
use crate::executor::Sim;
use crate::faults::Op;
use crate::file::SimFile;
use crate::pages::Pages;
use futures_util::future::{join_all, try_join_all};
use headwater_block::node::{Access, BackingLink, Change};
use headwater_block::{
    Buffer, BufferMut, Error, ErrorKind, Extent, ExtentKind, Limits, LocalFuture, Node, Resolved, Result,
    WriteFlags, ZeroFlags,
};
use std::cell::{Cell, RefCell};
use std::ops::{Deref, Range};
use std::rc::Rc;

/// What the map says of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cluster {
    Unallocated,
    Zero,
    Data,
}

/// A mistake that an overlay makes on purpose, to show that the tests notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Defect {
    /// None.
    None,
    /// Look-ups answer from the map as it was in the beginning: who looks twice learns nothing new.
    StaleLookUps,
    /// A discard forgets the cluster, so that the backing shows through.
    DiscardForgets,
    /// The last cluster counts as local although it isn't.
    ClaimsTooMuch,
    /// Changes of the mapping ask for a shared lock.
    AsksTooLittle,
    /// The map says that data are there before they are, even if their write fails.
    MapsFirst,
}

/// The overlay; see the module. It behaves through its [`Device`], and its [`SimOverlay::data`] through that file's.
pub struct SimOverlay {
    device: Device,
    size: u64,
    unit: u64,
    alignment: u32,
    map: RefCell<Vec<Cluster>>,
    first_map: RefCell<Vec<Cluster>>,
    file: Rc<SimFile>,
    backing: RefCell<Option<Rc<dyn Node>>>,
    links: RefCell<Vec<Option<String>>>,
    contract: Contract,
    defect: Cell<Defect>,
}

impl Deref for SimOverlay {
    type Target = Device;
    fn deref(&self) -> &Device {
        &self.device
    }
}

impl SimOverlay {
    /// An overlay of `size` bytes that holds nothing yet, with clusters of `unit` bytes; writes must be aligned to `alignment`.
    pub fn new(
        sim: &Sim,
        name: &str,
        size: u64,
        unit: u32,
        alignment: u32,
        backing: Option<Rc<dyn Node>>,
    ) -> Rc<Self> {
        assert!(unit.is_multiple_of(alignment));
        let map = vec![Cluster::Unallocated; size.div_ceil(u64::from(unit)) as usize];
        Rc::new(Self {
            device: Device::new(sim, name),
            size,
            unit: u64::from(unit),
            alignment,
            first_map: RefCell::new(map.clone()),
            map: RefCell::new(map),
            file: SimFile::new(sim, &format!("{name}.data"), Pages::new(0, unit.max(512) as usize)),
            backing: RefCell::new(backing),
            links: RefCell::default(),
            contract: Contract::default(),
            defect: Cell::new(Defect::None),
        })
    }

    /// The file that holds the data.
    pub fn data(&self) -> &Rc<SimFile> {
        &self.file
    }

    /// Puts data into clusters that lie in `range` without taking time: what an image holds when a test begins.
    pub fn preset(&self, range: Range<u64>, data: Option<&[u8]>) {
        assert!(range.start.is_multiple_of(self.unit));
        let state = if data.is_some() { Cluster::Data } else { Cluster::Zero };
        for index in self.clusters(&range) {
            self.map.borrow_mut()[index] = state;
            self.first_map.borrow_mut()[index] = state;
        }
        if let Some(data) = data {
            self.file.preset(self.host(range.start), data);
        }
    }

    /// Makes a mistake from now on.
    pub fn set_defect(&self, defect: Defect) {
        self.defect.set(defect);
    }

    /// What the backing link was changed to, in order.
    pub fn links(&self) -> Vec<Option<String>> {
        self.links.borrow().clone()
    }

    /// How many clusters are neither data nor zeroes.
    pub fn unallocated(&self) -> usize {
        self.map.borrow().iter().filter(|cluster| **cluster == Cluster::Unallocated).count()
    }

    /// How many clusters hold data, and so take space.
    pub fn holding_data(&self) -> usize {
        self.map.borrow().iter().filter(|cluster| **cluster == Cluster::Data).count()
    }

    /// The file has room for something in front of the data, so that the two kinds of offset can't be mixed up.
    fn host(&self, offset: u64) -> u64 {
        offset + 65536
    }

    fn clusters(&self, range: &Range<u64>) -> Range<usize> {
        let count = self.map.borrow().len();
        (range.start / self.unit) as usize..(range.end.div_ceil(self.unit) as usize).min(count)
    }

    /// The clusters that lie in `range` entirely; the last one of the disk may be cut off by its end.
    fn whole(&self, range: &Range<u64>) -> Range<usize> {
        let start = range.start.div_ceil(self.unit) as usize;
        let end = if range.end >= self.size {
            self.size.div_ceil(self.unit) as usize
        } else {
            (range.end / self.unit) as usize
        };
        start..end.max(start)
    }

    fn range_of(&self, index: usize) -> Range<u64> {
        let start = index as u64 * self.unit;
        start..(start + self.unit).min(self.size.next_multiple_of(u64::from(self.alignment)))
    }

    fn widen(&self, range: &Range<u64>) -> Range<u64> {
        range.start - range.start % self.unit..range.end.next_multiple_of(self.unit)
    }

    fn state(&self, index: usize) -> Cluster {
        self.map.borrow()[index]
    }

    /// Runs of clusters of one state within a range.
    fn runs(&self, map: &[Cluster], range: &Range<u64>) -> Vec<(Range<u64>, Cluster)> {
        let mut runs: Vec<(Range<u64>, Cluster)> = Vec::new();
        for index in self.clusters(range) {
            let at = self.range_of(index);
            let part = at.start.max(range.start)..at.end.min(range.end);
            match runs.last_mut() {
                Some((last, state)) if *state == map[index] => last.end = part.end,
                _ => runs.push((part, map[index])),
            }
        }
        runs
    }

    /// What a change really needs.
    fn needs(&self, range: &Range<u64>, change: Change) -> Access {
        let map = self.map.borrow();
        let whole = self.whole(range);
        let shared = match change {
            Change::Write | Change::Compress => self.clusters(range).all(|index| map[index] == Cluster::Data),
            Change::Zero { .. } => self.clusters(range).all(|index| {
                map[index] == Cluster::Zero || (map[index] == Cluster::Data && !whole.contains(&index))
            }),
            Change::Discard => whole.is_empty(),
        };
        if shared { Access::Shared } else { Access::Exclusive(self.widen(range)) }
    }

    fn check_bounds(&self, range: &Range<u64>) {
        let alignment = u64::from(self.alignment);
        assert!(
            range.start.is_multiple_of(alignment)
                && range.end.is_multiple_of(alignment)
                && range.start < range.end
                && range.end <= self.size.next_multiple_of(alignment),
            "{}: a change of {range:?} isn't aligned to {alignment} or out of bounds",
            self.device.name()
        );
    }

    /// What the chain below holds.
    async fn read_below(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        let backing = self.backing.borrow().clone();
        match backing {
            Some(backing) => backing.read(offset, buf).await,
            None => {
                buf.fill(0);
                Ok(buf)
            }
        }
    }

    /// Writes a part of one cluster that the map doesn't call data: the rest of it comes from below.
    async fn write_new(&self, index: usize, part: Range<u64>, data: &[u8]) -> Result<()> {
        let cluster = self.range_of(index);
        let buf = BufferMut::new((cluster.end - cluster.start) as usize);
        let mut buf = match self.state(index) {
            _ if part == cluster => buf,
            Cluster::Unallocated => self.read_below(cluster.start, buf).await?,
            Cluster::Zero | Cluster::Data => BufferMut::zeroed(buf.len()),
        };
        buf[(part.start - cluster.start) as usize..(part.end - cluster.start) as usize].copy_from_slice(data);
        if self.defect.get() == Defect::MapsFirst {
            self.map.borrow_mut()[index] = Cluster::Data;
        }
        self.file.write(self.host(cluster.start), buf.freeze(), WriteFlags::default()).await?;
        self.device.serve(Op::Write, &cluster).await?;
        self.map.borrow_mut()[index] = Cluster::Data;
        Ok(())
    }

    async fn write_clusters(&self, offset: u64, data: &Buffer) -> Result<()> {
        let range = offset..offset + data.len() as u64;
        let parts = self.clusters(&range).map(|index| {
            let at = self.range_of(index);
            let part = at.start.max(range.start)..at.end.min(range.end);
            let data = data.slice((part.start - offset) as usize..(part.end - offset) as usize);
            async move {
                if self.state(index) == Cluster::Data {
                    self.file.write(self.host(part.start), data, WriteFlags::default()).await
                } else {
                    self.write_new(index, part, &data).await
                }
            }
        });
        join_all(parts).await.into_iter().collect()
    }

    async fn zero_clusters(&self, range: Range<u64>) -> Result<()> {
        let whole = self.whole(&range);
        for index in self.clusters(&range) {
            let at = self.range_of(index);
            if self.state(index) == Cluster::Zero {
                continue;
            }
            if !whole.contains(&index) {
                let part = at.start.max(range.start)..at.end.min(range.end);
                let zeroes = Buffer::zeroed((part.end - part.start) as usize);
                self.write_clusters(part.start, &zeroes).await?;
                continue;
            }
            self.device.serve(Op::WriteZeroes, &at).await?;
            let before = std::mem::replace(&mut self.map.borrow_mut()[index], Cluster::Zero);
            if before == Cluster::Data && self.device.sim().rng().one_in(2) {
                // The space is given back; that this fails is no failure of the request.
                let _ = self.file.discard(self.host(at.start), at.end - at.start).await;
            }
        }
        Ok(())
    }
}

impl Node for SimOverlay {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn driver(&self) -> &'static str {
        "sim-overlay"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        let unit = self.unit as u32;
        Limits {
            write_alignment: self.alignment,
            preferred: unit,
            allocation_unit: unit,
            ..Limits::default()
        }
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn resolve(&self, range: Range<u64>) -> Resolved {
        if self.device.sim().rng().one_in(2) {
            return Resolved::Ask;
        }
        let runs = self.runs(&self.map.borrow(), &(range.start..range.end.min(self.size)));
        let Some((run, state)) = runs.into_iter().next() else { return Resolved::Ask };
        let len = run.end - run.start;
        match state {
            Cluster::Data => {
                Resolved::At { node: self.file.clone(), offset: self.host(run.start), len, depth: 0 }
            }
            Cluster::Zero => Resolved::Zero { len, depth: 0 },
            Cluster::Unallocated => match &*self.backing.borrow() {
                None => Resolved::Zero { len, depth: 1 },
                Some(backing) if run.end > backing.size() => Resolved::Ask,
                Some(backing) => match backing.resolve(run) {
                    Resolved::At { node, offset, len, depth } => {
                        Resolved::At { node, offset, len, depth: depth + 1 }
                    }
                    Resolved::Zero { len, depth } => Resolved::Zero { len, depth: depth + 1 },
                    Resolved::Ask => Resolved::Ask,
                },
            },
        }
    }

    fn read(&self, offset: u64, mut buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(async move {
            let range = offset..offset + buf.len() as u64;
            let _in_use = self.contract.enter(self.device.name(), &range, Access::Shared);
            let _in_flight = self.device.enter(Op::Read, &range);
            self.device.serve(Op::Read, &range).await?;
            let inside = offset.min(self.size)..range.end.min(self.size).max(offset.min(self.size));
            let mut rest = buf.split_off((inside.end - inside.start) as usize);
            rest.fill(0);
            let runs = self.runs(&self.map.borrow(), &inside);
            let mut parts = Vec::new();
            for (run, state) in runs {
                let after = buf.split_off((run.end - run.start) as usize);
                let mut part = std::mem::replace(&mut buf, after);
                parts.push(async move {
                    match state {
                        Cluster::Data => self.file.read(self.host(run.start), part).await,
                        Cluster::Unallocated => self.read_below(run.start, part).await,
                        Cluster::Zero => {
                            part.fill(0);
                            Ok(part)
                        }
                    }
                });
            }
            let mut parts = try_join_all(parts).await?;
            parts.extend([buf, rest]);
            parts.into_iter().reduce(BufferMut::join).ok_or_else(|| {
                Error::new(ErrorKind::InvalidInput, format!("{}: a read of nothing", self.device.name()))
            })
        })
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        Box::pin(async move {
            let _in_flight = self.device.enter(Op::Status, &range);
            self.device.serve(Op::Status, &range).await?;
            if range.start >= self.size {
                return Ok(Extent::new(range.start, range.end - range.start, ExtentKind::Zero));
            }
            let stale = self.defect.get() == Defect::StaleLookUps;
            let runs = self.runs(if stale { &self.first_map } else { &self.map }.borrow().as_slice(), &range);
            let (run, mut state) = runs[0].clone();
            if self.defect.get() == Defect::ClaimsTooMuch && run.end >= self.size {
                state = Cluster::Data;
            }
            let kind = match state {
                Cluster::Unallocated => ExtentKind::Unallocated,
                Cluster::Zero => ExtentKind::Zero,
                Cluster::Data => ExtentKind::Data,
            };
            // The end of a table may cut a run short.
            let one = self.range_of(self.clusters(&run).start).end.min(run.end);
            let end = if self.device.sim().rng().one_in(4) { one } else { run.end };
            Ok(Extent::new(run.start, end - run.start, kind))
        })
    }

    fn access(&self, range: Range<u64>, change: Change) -> Access {
        if self.defect.get() == Defect::AsksTooLittle { Access::Shared } else { self.needs(&range, change) }
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let range = offset..offset + data.len() as u64;
            self.check_bounds(&range);
            let _in_use = self.contract.enter(self.device.name(), &range, self.needs(&range, Change::Write));
            let _in_flight = self.device.enter(Op::Write, &range);
            self.device.serve(Op::Write, &range).await?;
            self.write_clusters(offset, &data).await?;
            if flags.fua { self.file.flush().await } else { Ok(()) }
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let range = offset..offset + len;
            self.check_bounds(&range);
            let _in_use = self.contract.enter(
                self.device.name(),
                &range,
                self.needs(&range, Change::Zero { unmap: flags.unmap }),
            );
            let _in_flight = self.device.enter(Op::WriteZeroes, &range);
            self.device.serve(Op::WriteZeroes, &range).await?;
            self.zero_clusters(range).await?;
            if flags.fua { self.file.flush().await } else { Ok(()) }
        })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let range = offset..offset + len;
            self.check_bounds(&range);
            let _in_use =
                self.contract.enter(self.device.name(), &range, self.needs(&range, Change::Discard));
            let _in_flight = self.device.enter(Op::Discard, &range);
            self.device.serve(Op::Discard, &range).await?;
            for index in self.whole(&range) {
                if self.defect.get() == Defect::DiscardForgets {
                    self.map.borrow_mut()[index] = Cluster::Unallocated;
                } else if self.device.sim().rng().one_in(2) {
                    self.zero_clusters(self.range_of(index)).await?;
                }
            }
            Ok(())
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let range = 0..self.size;
            let _in_flight = self.device.enter(Op::Flush, &range);
            self.device.serve(Op::Flush, &range).await?;
            self.file.flush().await
        })
    }

    fn resize(&self, _size: u64) -> LocalFuture<'_, Result<()>> {
        let message = format!("{}: this simulated image has one size", self.device.name());
        Box::pin(async move { Err(Error::new(ErrorKind::Unsupported, message)) })
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        self.flush()
    }

    fn backing(&self) -> Option<Rc<dyn Node>> {
        self.backing.borrow().clone()
    }

    fn expect(&self, range: Range<u64>) {
        self.file.expect(range);
    }

    fn file(&self) -> Option<Rc<dyn Node>> {
        Some(self.file.clone())
    }

    fn change_backing<'a>(
        &'a self,
        new: Option<BackingLink<'a>>,
        node: Option<Rc<dyn Node>>,
    ) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            self.flush().await?;
            self.device.serve(Op::Header, &(0..self.size)).await?;
            self.links.borrow_mut().push(new.map(|link| link.name.to_string()));
            // A header that is written isn't known to be so before the flush; requests see the old chain until then.
            self.device.sim().yield_now().await;
            self.backing.replace(node);
            Ok(())
        })
    }
}
