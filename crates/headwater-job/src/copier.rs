//! What a job copies: the part of a copying job that isn't the same for all of them. The copy engine does the rest.

use crate::readahead::Readahead;
use headwater_block::chain::Missing;
use headwater_block::copy_up::{Copied, Failed};
use headwater_block::{Abort, Clock, GuestLatency, LocalFuture, Result};
use std::ops::Range;
use std::rc::Rc;

/// Knows what is to be copied, and copies a run of it.
pub(crate) trait Copier {
    /// The clock of the disk that is copied.
    fn clock(&self) -> &Rc<dyn Clock>;

    /// How many bytes there are to look through at most.
    fn size(&self) -> u64;

    /// Copies are best made of whole units of so many bytes, a power of two.
    fn unit(&self) -> u64;

    /// Where requests of the guests that go first are counted, if there are any: those of the disk that is copied.
    fn guests(&self) -> Option<&Rc<GuestLatency>>;

    /// The next range, at or after `from`, that is to be looked through. It is the engine's from now on: it gives nothing back.
    fn take(&self, from: u64) -> Option<Range<u64>>;

    /// How many bytes could be taken and were not.
    fn untaken(&self) -> u64;

    /// What is found at `offset` is copied after all that has a lower rank; of equal rank the lower offset comes first.
    fn rank(&self, _offset: u64) -> u64 {
        0
    }

    /// The first run in `range` (not empty) that is to be copied. May be dropped.
    fn look(self: Rc<Self>, range: Range<u64>) -> LocalFuture<'static, Result<Option<Missing>>>;

    /// Whether a run that was found need be copied at all.
    fn needs(&self, run: &Missing) -> bool;

    /// Whether all of `range` is in memory, or on its way there, so that a copy of it costs its source nothing.
    fn is_at_hand(&self, _range: &Range<u64>) -> bool {
        false
    }

    /// Copies a run, or a part of one. Gives up with `Cancelled` when `abort` is thrown before anything was changed. Is polled to its end.
    /// Never runs twice at once for the same bytes.
    fn copy(self: Rc<Self>, run: Missing, abort: Rc<Abort>) -> LocalFuture<'static, Result<Copied, Failed>>;

    /// Completes when somebody else's read of the source has succeeded since one failed. May be dropped.
    fn source_back(self: Rc<Self>) -> LocalFuture<'static, ()>;

    /// What is copied ahead of guests.
    fn readahead(&self) -> Option<Rc<Readahead>> {
        None
    }

    /// Whether what guests fetch is kept while the job works. A job that waits for room doesn't want it.
    fn keep_reads(&self, _keep: bool) {}

    /// Reads what a copy of a run would, and changes nothing: tells whether the source can be reached. Gives up when `abort` is thrown. Is
    /// polled to its end.
    fn probe(self: Rc<Self>, run: Missing, abort: Rc<Abort>) -> LocalFuture<'static, Result<()>>;
}
