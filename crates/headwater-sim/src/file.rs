//! A simulated file: bytes with latency, faults, stalls and a memory of what was asked of it.

use crate::device::Device;
use crate::executor::Sim;
use crate::faults::Op;
use crate::pages::Pages;
use crate::recorder::{Event, Recorder};
use headwater_block::node::{Access, Change};
use headwater_block::{
    Buffer, BufferMut, Error, ErrorKind, Extent, ExtentKind, Limits, LocalFuture, Node, Resolved, Result,
    WriteFlags, ZeroFlags,
};
use std::cell::{Cell, RefCell};
use std::ops::{Deref, Range};
use std::rc::{Rc, Weak};

/// The size in bytes of the pieces in which operations take effect.
const PIECE: u64 = 512;

/// Operations longer than this take effect at once, so that simulations of throughput stay quick.
const TORN: u64 = 64 << 10;

/// A file; see the crate for what it may do. It behaves through its [`Device`].
pub struct SimFile {
    this: Weak<SimFile>,
    device: Device,
    content: RefCell<Pages>,
    limits: Cell<Limits>,
    read_only: Cell<bool>,
    exact_status: Cell<bool>,
    recallable: Cell<bool>,
    /// How often each piece was read.
    reads: RefCell<Vec<u32>>,
    /// What somebody was about to read, and whether anything had been read by then.
    expected: RefCell<Vec<(Range<u64>, bool)>>,
    /// Who keeps the record of events, and this file's number there.
    recorder: RefCell<Option<(Rc<Recorder>, usize)>>,
    next_id: Cell<u64>,
}

impl Deref for SimFile {
    type Target = Device;
    fn deref(&self) -> &Device {
        &self.device
    }
}

impl SimFile {
    /// A file that holds `content`.
    pub fn new(sim: &Sim, name: &str, content: Pages) -> Rc<Self> {
        Rc::new_cyclic(|this| Self {
            this: this.clone(),
            device: Device::new(sim, name),
            content: RefCell::new(content),
            limits: Cell::new(Limits { preferred: 512, allocation_unit: 512, ..Limits::default() }),
            read_only: Cell::new(false),
            exact_status: Cell::new(false),
            recallable: Cell::new(false),
            reads: RefCell::default(),
            expected: RefCell::default(),
            recorder: RefCell::new(None),
            next_id: Cell::new(0),
        })
    }

    /// What a stall holds can be recalled: it is an outage, and nothing is under way.
    pub fn set_recallable(&self) {
        self.recallable.set(true);
    }

    /// Makes the file claim other limits.
    pub fn set_limits(&self, limits: Limits) {
        self.limits.set(limits);
    }

    /// Refuses changes from now on, or takes them again.
    pub fn set_read_only(&self, read_only: bool) {
        self.read_only.set(read_only);
    }

    /// Look-ups find the whole of a run, instead of a part of it now and then.
    pub fn set_exact_status(&self) {
        self.exact_status.set(true);
    }

    /// What the file holds right now.
    pub fn content(&self) -> Pages {
        self.content.borrow().clone()
    }

    /// Puts bytes into the file without taking time: what it holds when a test begins.
    pub fn preset(&self, offset: u64, data: &[u8]) {
        self.content.borrow_mut().write(offset, data);
    }

    /// How often the byte of `range` that was read most often was read.
    pub fn most_reads(&self, range: Range<u64>) -> u32 {
        let reads = self.reads.borrow();
        let pieces = (range.start / PIECE) as usize..range.end.div_ceil(PIECE) as usize;
        pieces.filter_map(|piece| reads.get(piece)).copied().max().unwrap_or(0)
    }

    /// What somebody said that they were about to read: before anything was read, or `later`.
    pub fn expected(&self, later: bool) -> Vec<Range<u64>> {
        let expected = self.expected.borrow();
        expected.iter().filter(|(_, was_read)| *was_read == later).map(|(range, _)| range.clone()).collect()
    }

    /// Starts to record events of this file alone, and forgets those before.
    pub fn record(&self) {
        Recorder::start(&[self]);
    }

    /// The events of this file since [`SimFile::record`].
    pub fn events(&self) -> Vec<Event> {
        match &*self.recorder.borrow() {
            Some((recorder, file)) => recorder.events_of(*file),
            None => Vec::new(),
        }
    }

    /// Tells `recorder` of events from now on, as its file number `file`.
    pub(crate) fn record_to(&self, recorder: Rc<Recorder>, file: usize) {
        self.recorder.replace(Some((recorder, file)));
    }

    fn started(&self, op: Op, range: &Range<u64>, data: Option<&Buffer>, fua: bool) -> u64 {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        self.tell(|| Event::Started { id, op, range: range.clone(), data: data.cloned(), fua });
        id
    }

    fn ended(&self, id: u64, ok: bool) {
        self.tell(|| Event::Ended { id, ok });
    }

    fn tell(&self, event: impl FnOnce() -> Event) {
        if let Some((recorder, file)) = &*self.recorder.borrow() {
            recorder.push(*file, event());
        }
    }

    /// The pieces of a range, in the order in which they take effect.
    fn pieces(&self, range: Range<u64>) -> Vec<Range<u64>> {
        if range.end - range.start > TORN || range.end - range.start <= 1 {
            return vec![range];
        }
        let mut pieces = Vec::new();
        let mut pos = range.start;
        while pos < range.end {
            let end = (pos / PIECE + 1) * PIECE;
            pieces.push(pos..end.min(range.end));
            pos = end;
        }
        let rng = self.device.sim().rng();
        for last in (1..pieces.len()).rev() {
            pieces.swap(last, rng.index(last + 1));
        }
        pieces
    }

    /// Lets time pass between two pieces, sometimes.
    async fn between(&self) {
        if self.device.sim().rng().one_in(8) {
            self.device.sim().yield_now().await;
        }
    }

    fn count_read(&self, range: &Range<u64>) {
        let mut reads = self.reads.borrow_mut();
        let pieces = (range.start / PIECE) as usize..range.end.div_ceil(PIECE) as usize;
        if reads.len() < pieces.end {
            reads.resize(pieces.end, 0);
        }
        reads[pieces].iter_mut().for_each(|count| *count += 1);
    }

    /// A change: waits, then applies it piece by piece; when it fails, it applies any of the pieces.
    fn change<'a>(
        &'a self,
        op: Op,
        range: Range<u64>,
        data: Option<Buffer>,
        fua: bool,
        apply: impl Fn(&mut Pages, Range<u64>, Option<&[u8]>) + 'a,
    ) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            if self.read_only.get() {
                let message = format!("{} is open for reading only", self.device.name());
                return Err(Error::new(ErrorKind::ReadOnly, message));
            }
            let id = self.started(op, &range, data.as_ref(), fua);
            let _in_flight = self.device.enter(op, &range);
            let result = self.device.serve(op, &range).await;
            let rng = self.device.sim().rng();
            for piece in self.pieces(range.clone()) {
                if result.is_err() && rng.one_in(2) {
                    continue;
                }
                let part = data.as_ref().map(|data| {
                    &data[(piece.start - range.start) as usize..(piece.end - range.start) as usize]
                });
                apply(&mut self.content.borrow_mut(), piece, part);
                self.between().await;
            }
            self.ended(id, result.is_ok());
            result
        })
    }
}

impl Node for SimFile {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn driver(&self) -> &'static str {
        "sim-file"
    }

    fn size(&self) -> u64 {
        self.content.borrow().size()
    }

    fn limits(&self) -> Limits {
        self.limits.get()
    }

    fn is_read_only(&self) -> bool {
        self.read_only.get()
    }

    fn resolve(&self, range: Range<u64>) -> Resolved {
        let (hole, end) = self.content.borrow().run(range.start);
        let len = end.min(range.end) - range.start;
        match (self.device.sim().rng().range(0..3), self.this.upgrade()) {
            (0, _) | (_, None) => Resolved::Ask,
            (1, _) if hole => Resolved::Zero { len, depth: 0 },
            (_, Some(node)) => {
                Resolved::At { node, offset: range.start, len: range.end - range.start, depth: 0 }
            }
        }
    }

    fn read(&self, offset: u64, mut buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(async move {
            let range = offset..offset + buf.len() as u64;
            self.count_read(&range);
            let _in_flight = self.device.enter(Op::Read, &range);
            self.device.serve(Op::Read, &range).await?;
            for piece in self.pieces(range) {
                let part = (piece.start - offset) as usize..(piece.end - offset) as usize;
                self.content.borrow().read(piece.start, &mut buf[part]);
                self.between().await;
            }
            Ok(buf)
        })
    }

    fn expect(&self, range: Range<u64>) {
        let was_read = !self.reads.borrow().is_empty();
        self.expected.borrow_mut().push((range, was_read));
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        Box::pin(async move {
            let _in_flight = self.device.enter(Op::Status, &range);
            self.device.serve(Op::Status, &range).await?;
            let (hole, end) = self.content.borrow().run(range.start);
            let kind = if hole { ExtentKind::Zero } else { ExtentKind::Data };
            let end = if range.start >= self.size() { range.end } else { end.min(range.end) };
            // Storage may know less than it could: a part of the run.
            let end = if !self.exact_status.get() && self.device.sim().rng().one_in(4) {
                let whole = range.start / PIECE * PIECE + PIECE * (1 + self.device.sim().rng().range(0..8));
                whole.min(end)
            } else {
                end
            };
            let mut extent = Extent::new(range.start, end - range.start, kind);
            extent.host_offset = (!hole).then_some(range.start);
            Ok(extent)
        })
    }

    fn can_recall(&self) -> bool {
        self.recallable.get()
    }

    fn access(&self, _range: Range<u64>, _change: Change) -> Access {
        Access::Shared
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        let range = offset..offset + data.len() as u64;
        self.change(Op::Write, range, Some(data), flags.fua, |pages, piece, data| {
            pages.write(piece.start, data.unwrap_or_default());
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        self.change(Op::WriteZeroes, offset..offset + len, None, flags.fua, |pages, piece, _| {
            if piece.end > pages.size() {
                pages.resize(piece.end);
            }
            pages.punch(piece);
        })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.change(Op::Discard, offset..offset + len, None, false, |pages, piece, _| {
            if self.device.sim().rng().one_in(2) {
                pages.punch(piece);
            }
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let range = 0..self.size();
            let id = self.started(Op::Flush, &range, None, false);
            let _in_flight = self.device.enter(Op::Flush, &range);
            let result = self.device.serve(Op::Flush, &range).await;
            self.ended(id, result.is_ok());
            result
        })
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let id = self.started(Op::Header, &(size..size), None, false);
            let _in_flight = self.device.enter(Op::Header, &(size..size));
            let result = self.device.serve(Op::Header, &(0..self.size().max(1))).await;
            if result.is_ok() {
                self.content.borrow_mut().resize(size);
            }
            self.ended(id, result.is_ok());
            result
        })
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        self.flush()
    }
}
