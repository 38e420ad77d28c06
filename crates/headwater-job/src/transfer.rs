//! Copies what a chain holds into another disk: what commit and mirror do.
//!
//! Only what lies above a given node is copied, exactly: data as data, zeroes as zeroes; what no layer above it holds is left alone in the
//! target. So the target may be that node's own disk (commit): nothing is ever read from the bytes that are written.
//!
//! The target is written through its disk, under its range lock, so that others may use it meanwhile. The source is either still, or in
//! use: then a [`Follower`] says what must be copied, and its module text, with that of its map, argues that nothing is missed. What it needs of this one:
//! - **Take first, then look.** A part's status, and then its data, are asked after it was taken from the map.
//! - **One copy at a time of the same bytes**, or an old one could overtake a new one: a pass takes no part twice, and ends when its
//!   copies have.
//!
//! # Errors, compared with QEMU
//! An error that is ignored is tried again when the rest of the pass is done, and fails the job when it stays. QEMU 10 tries the same part
//! again at once and for ever.

use crate::copier::Copier;
use headwater_block::chain::{self, Missing};
use headwater_block::copy_up::{Copied, Failed, Operation};
use headwater_block::{
    Abort, BufferMut, Clock, Disk, ExtentKind, Follower, GuestLatency, LocalFuture, Node, Result, WriteFlags,
    ZeroFlags,
};
use std::ops::Range;
use std::rc::Rc;

/// The most that is taken from the map at once, in bytes: what is changed before it is taken is copied once, not twice.
const MOST_TAKEN: u64 = 1 << 30;

/// Where data come from.
pub(crate) enum Source {
    /// A layer that nobody writes.
    Still(Rc<dyn Node>),
    /// A disk that guests write meanwhile, and what they have changed.
    InUse(Rc<Follower>),
}

impl Source {
    fn top(&self) -> Rc<dyn Node> {
        match self {
            Source::Still(node) => node.clone(),
            Source::InUse(follower) => follower.source().top(),
        }
    }
}

/// A copy from one disk into another; see the module.
pub(crate) struct Transfer {
    pub(crate) source: Source,
    /// What this node and the layers below it hold isn't copied. If none, what no layer holds is copied as zeroes.
    pub(crate) above: Option<Rc<dyn Node>>,
    /// At least as large as the source.
    pub(crate) target: Rc<Disk>,
}

impl Transfer {
    async fn write(&self, run: Missing, abort: &Abort) -> Result<Copied, Failed> {
        let Range { start, end } = run.range;
        let node = match &self.source {
            Source::Still(node) => node,
            Source::InUse(follower) => return follower.copy(start..end, run.zero, abort).await,
        };
        let data = async {
            if run.zero {
                return Ok(None);
            }
            let buf = BufferMut::new((end - start) as usize);
            Ok(Some(node.read(start, buf).await?.freeze()))
        };
        let data = abort.guard(data).await.and_then(|read| read);
        let (copied, written) = match data.map_err(|error| Operation::Read.failed(error))? {
            Some(data) => {
                let copied = Copied { fetched: end - start, data: end - start, ..Copied::default() };
                (copied, self.target.write(start, data, WriteFlags::default()).await)
            }
            None => {
                let flags = ZeroFlags { unmap: true, ..ZeroFlags::default() };
                let copied = Copied { zero: end - start, ..Copied::default() };
                (copied, self.target.write_zeroes(start, end - start, flags).await)
            }
        };
        written.map(|()| copied).map_err(|error| Operation::Write.failed(error))
    }
}

impl Copier for Transfer {
    fn clock(&self) -> &Rc<dyn Clock> {
        self.target.clock()
    }

    fn size(&self) -> u64 {
        self.source.top().size()
    }

    fn unit(&self) -> u64 {
        u64::from(self.target.limits().allocation_unit)
    }

    fn guests(&self) -> Option<&Rc<GuestLatency>> {
        match &self.source {
            Source::Still(_) => None,
            Source::InUse(follower) => Some(follower.source().guest_latency()),
        }
    }

    fn take(&self, from: u64) -> Option<Range<u64>> {
        match &self.source {
            Source::Still(node) => (from < node.size()).then(|| from..node.size()),
            // race-mark: transfer-take
            Source::InUse(follower) => follower.map().take(from, MOST_TAKEN),
        }
    }

    fn untaken(&self) -> u64 {
        match &self.source {
            Source::Still(_) => 0,
            Source::InUse(follower) => follower.map().bytes(),
        }
    }

    fn look(self: Rc<Self>, range: Range<u64>) -> LocalFuture<'static, Result<Option<Missing>>> {
        Box::pin(async move {
            let top = self.source.top();
            let mut pos = range.start;
            while pos < range.end {
                let extent = chain::status(&top, pos..range.end, self.above.as_ref()).await?;
                let end = extent.end().min(range.end);
                if extent.kind != ExtentKind::Unallocated || self.above.is_none() {
                    return Ok(Some(Missing { range: pos..end, zero: extent.kind != ExtentKind::Data }));
                }
                pos = end;
            }
            Ok(None)
        })
    }

    fn needs(&self, _run: &Missing) -> bool {
        true
    }

    fn copy(self: Rc<Self>, run: Missing, abort: Rc<Abort>) -> LocalFuture<'static, Result<Copied, Failed>> {
        Box::pin(async move { self.write(run, &abort).await })
    }

    fn source_back(self: Rc<Self>) -> LocalFuture<'static, ()> {
        // Nobody reads through here but the job itself.
        Box::pin(std::future::pending())
    }

    fn probe(self: Rc<Self>, run: Missing, abort: Rc<Abort>) -> LocalFuture<'static, Result<()>> {
        let read = async move {
            match &self.source {
                Source::Still(node) => {
                    let buf = BufferMut::new((run.range.end - run.range.start) as usize);
                    node.read(run.range.start, buf).await.map(drop)
                }
                Source::InUse(follower) => follower.source().read_beside_guests(run.range).await.map(drop),
            }
        };
        Box::pin(async move { abort.guard(read).await? })
    }
}
