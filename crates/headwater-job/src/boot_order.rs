//! The first pass of a stream that has a boot trace: copies what the trace names, in its order. What it doesn't name is left to the passes after it,
//! which look at the whole disk; so a trace decides about the order and about nothing else.

use crate::boot_trace::BootTrace;
use crate::copier::Copier;
use crate::readahead::Readahead;
use headwater_block::chain::Missing;
use headwater_block::copy_up::{Copied, CopyUpOptions, Failed};
use headwater_block::{Abort, Clock, Disk, ExtentKind, GuestLatency, LocalFuture, Node, Result};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::rc::Rc;

/// Copies the parts of a trace; see the module.
pub(crate) struct BootOrder {
    /// Copies everything else, later.
    rest: Rc<dyn Copier>,
    disk: Rc<Disk>,
    base: Option<Rc<dyn Node>>,
    detect_zeroes: bool,
    /// What the engine hasn't taken yet.
    ranges: RefCell<VecDeque<Range<u64>>>,
    /// The place of each range in the order, by its start.
    ranks: BTreeMap<u64, u64>,
    taken: Cell<u64>,
}

impl BootOrder {
    pub(crate) fn new(
        trace: &BootTrace,
        rest: Rc<dyn Copier>,
        disk: Rc<Disk>,
        base: Option<Rc<dyn Node>>,
        detect_zeroes: bool,
    ) -> Self {
        let ranges = trace.ranges(rest.size(), rest.unit());
        let ranks = ranges.iter().zip(0..).map(|(range, rank)| (range.start, rank)).collect();
        let (ranges, taken) = (RefCell::new(ranges.into()), Cell::new(0));
        Self { rest, disk, base, detect_zeroes, ranges, ranks, taken }
    }
}

impl Copier for BootOrder {
    fn clock(&self) -> &Rc<dyn Clock> {
        self.rest.clock()
    }

    fn size(&self) -> u64 {
        self.rest.size()
    }

    fn unit(&self) -> u64 {
        self.rest.unit()
    }

    fn guests(&self) -> Option<&Rc<GuestLatency>> {
        self.rest.guests()
    }

    fn take(&self, _from: u64) -> Option<Range<u64>> {
        let range = self.ranges.borrow_mut().pop_front()?;
        self.taken.set(self.taken.get() + (range.end - range.start));
        Some(range)
    }

    fn untaken(&self) -> u64 {
        self.size().saturating_sub(self.taken.get())
    }

    fn rank(&self, offset: u64) -> u64 {
        self.ranks.range(..=offset).next_back().map_or(0, |(_, rank)| *rank)
    }

    /// What the disk itself lacks is taken for data of the source: to ask it about each small range costs a round trip, and the copy asks anyway.
    fn look(self: Rc<Self>, range: Range<u64>) -> LocalFuture<'static, Result<Option<Missing>>> {
        Box::pin(async move {
            let top = self.disk.top();
            let mut at = range.start;
            while at < range.end {
                let extent = top.status(at..range.end).await?;
                let end = extent.end().min(range.end);
                if extent.kind == ExtentKind::Unallocated {
                    return Ok(Some(Missing { range: at..end, zero: false }));
                }
                at = end;
            }
            Ok(None)
        })
    }

    fn needs(&self, _run: &Missing) -> bool {
        true
    }

    fn is_at_hand(&self, range: &Range<u64>) -> bool {
        self.rest.is_at_hand(range)
    }

    fn copy(self: Rc<Self>, run: Missing, abort: Rc<Abort>) -> LocalFuture<'static, Result<Copied, Failed>> {
        let options = CopyUpOptions {
            base: self.base.clone(),
            detect_zeroes: self.detect_zeroes,
            abort: Some(abort),
            known: None,
        };
        Box::pin(async move { self.disk.copy_up(run.range, &options).await })
    }

    fn readahead(&self) -> Option<Rc<Readahead>> {
        self.rest.readahead()
    }

    fn keep_reads(&self, keep: bool) {
        self.rest.keep_reads(keep);
    }

    fn probe(self: Rc<Self>, run: Missing, abort: Rc<Abort>) -> LocalFuture<'static, Result<()>> {
        self.rest.clone().probe(run, abort)
    }

    fn source_back(self: Rc<Self>) -> LocalFuture<'static, ()> {
        self.rest.clone().source_back()
    }
}
