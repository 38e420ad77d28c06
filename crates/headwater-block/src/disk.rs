//! The top of a chain of nodes: what exports and jobs call.
//!
//! A request passes here in one direction: bounds are checked ([`Disk::check`]), the gate lets it in ([`crate::drain`]), the range lock
//! admits it ([`crate::range_lock`]), and the top node carries it out. [`read`] holds the way of a read and copy-on-read,
//! [`mod@write`] that of changes, with the read-modify-write that alignment may need; [`changes`] tells jobs what was changed, and lets them
//! save what will be.
//!
//! # Rules that this module enforces
//! - All nodes of a chain share the guest's offsets, so that one range lock, here, serves guests and jobs. (Two instances of the one type:
//!   the second only makes concurrent fetches of the same bytes happen once; see [`crate::copy_up`].)
//! - A change that has started is driven to its end: its range stays locked while the kernel or a peer may still write. A future dropped
//!   half-way poisons the disk, loudly, rather than risk a byte.

use crate::abort::Abort;
use crate::backoff::Patience;
use crate::clock::Clock;
use crate::copy_before_write::PointInTime;
use crate::dirty_map::DirtyMap;
use crate::drain::{Drained, Gate, Hurry, Pass};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind};
use crate::follow::Follower;
use crate::guest_latency::{GuestLatency, Kind, Start};
use crate::hold::Outage;
use crate::node::{BackingLink, Limits, Node, ZeroFlags};
use crate::range_lock::RangeLock;
use crate::write_watch::WriteWatch;
use crate::{chain, copy_up, recall};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::{Rc, Weak};

mod changes;
mod copy_on_read;
mod read;
mod stats;
#[cfg(test)]
mod tests;
mod watch;
mod write;

use self::copy_on_read::Wanted;
use self::stats::add;

pub use self::copy_on_read::CopyOnRead;
pub use self::stats::Stats;
pub use self::watch::ReadWatch;

/// What becomes of zero bytes that a guest writes as data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// They are written as data.
    #[default]
    Off,
    /// They are written as zeroes that stay allocated.
    On,
    /// They are written as zeroes, and their storage may be given back.
    Unmap,
}

/// How a disk behaves.
#[derive(Debug, Clone, Copy, Default)]
pub struct DiskOptions {
    /// What a guest's reads fetch from the backing is kept in the overlay.
    pub copy_on_read: bool,
    /// What becomes of zero bytes that a guest writes as data.
    pub detect_zeroes: DetectZeroes,
    /// Refuses all changes, even if the image could take them.
    pub read_only: bool,
    /// Writes past the end make it longer, and reads there give zeroes: for a file that an image lies in, where a disk would refuse.
    pub growable: bool,
    /// Discards do nothing, and zeroes that may give storage back don't.
    pub ignore_discards: bool,
    /// For how long clients' requests are held when a source can't be reached; see [`crate::hold`].
    pub patience: Patience,
}

/// A chain of nodes as one disk that guests and jobs use at once.
pub struct Disk {
    name: Box<str>,
    top: RefCell<Rc<dyn Node>>,
    clock: Rc<dyn Clock>,
    lock: Rc<RangeLock>,
    fetch_lock: Rc<RangeLock>,
    gate: Rc<Gate>,
    options: Cell<DiskOptions>,
    /// Who wants copy-on-read besides the user.
    copy_on_read: RefCell<Vec<Wanted>>,
    next_id: Cell<u64>,
    /// Who follows the changes.
    trackers: RefCell<Vec<Weak<DirtyMap>>>,
    /// Who wants changes to go through.
    followers: RefCell<Vec<Weak<Follower>>>,
    /// What must be saved before it is changed.
    points: RefCell<Vec<Weak<PointInTime>>>,
    read_watches: RefCell<Vec<Weak<dyn ReadWatch>>>,
    poisoned: Cell<bool>,
    write_watch: WriteWatch,
    outage: Outage,
    stats: Stats,
    guest_latency: Rc<GuestLatency>,
}

impl Disk {
    /// A disk on top of `top`, which from now on nobody else changes.
    pub fn new(top: Rc<dyn Node>, clock: Rc<dyn Clock>, options: DiskOptions) -> Rc<Self> {
        Rc::new(Self {
            name: top.name().into(),
            top: RefCell::new(top),
            clock,
            lock: RangeLock::new(),
            fetch_lock: RangeLock::new(),
            gate: Gate::new(),
            options: Cell::new(options),
            copy_on_read: RefCell::default(),
            next_id: Cell::new(0),
            trackers: RefCell::default(),
            followers: RefCell::default(),
            points: RefCell::default(),
            read_watches: RefCell::default(),
            poisoned: Cell::new(false),
            write_watch: WriteWatch::default(),
            outage: Outage::default(),
            stats: Stats::default(),
            guest_latency: Rc::default(),
        })
    }

    /// The node on top of the chain.
    pub fn top(&self) -> Rc<dyn Node> {
        self.top.borrow().clone()
    }

    /// Puts another node in the place of the top one: the same image, opened in another way. The guard shows that no request is in
    /// flight.
    pub fn replace_top(&self, _drained: &Drained, node: Rc<dyn Node>) {
        self.top.replace(node);
    }

    /// How it behaves.
    pub fn options(&self) -> DiskOptions {
        self.options.get()
    }

    /// Changes how it behaves, for requests that come from now on.
    pub fn set_options(&self, options: DiskOptions) {
        self.options.set(options);
    }

    /// How messages call the disk.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.top().size()
    }

    /// What the top node asks of requests. Guests need not heed it: any offset and length works.
    pub fn limits(&self) -> Limits {
        self.top().limits()
    }

    /// True if changes are refused.
    pub fn is_read_only(&self) -> bool {
        self.options.get().read_only || self.top().is_read_only()
    }

    /// The clock that jobs on this disk use.
    pub fn clock(&self) -> &Rc<dyn Clock> {
        &self.clock
    }

    /// Tells when a guest's write goes past an offset.
    pub fn write_watch(&self) -> &WriteWatch {
        &self.write_watch
    }

    /// Whether the layers below the top can be reached.
    pub fn outage(&self) -> &Outage {
        &self.outage
    }

    /// What has happened so far.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// How long guests' requests take, while somebody watches.
    pub fn guest_latency(&self) -> &Rc<GuestLatency> {
        &self.guest_latency
    }

    pub(crate) fn fetch_lock(&self) -> &Rc<RangeLock> {
        &self.fetch_lock
    }

    pub(crate) fn range_lock(&self) -> &Rc<RangeLock> {
        &self.lock
    }

    pub(crate) fn gate(&self) -> &Rc<Gate> {
        &self.gate
    }

    /// `range` widened to whole allocation units of the top node, within what it takes.
    pub(crate) fn whole_units(&self, range: Range<u64>) -> Range<u64> {
        let limits = self.top().limits();
        let unit = u64::from(limits.allocation_unit);
        let end = self.top().size().next_multiple_of(u64::from(limits.write_alignment));
        let start = range.start - range.start % unit;
        start..range.end.checked_next_multiple_of(unit).map_or(end, |e| e.min(end))
    }

    /// Checks a request against the disk's bounds.
    fn check(&self, offset: u64, len: u64) -> Result<Range<u64>> {
        if self.poisoned.get() {
            return Err(Error::new(
                ErrorKind::Closed,
                format!(
                    "{}: a change was abandoned half-way, so nothing more is done; open the disk again",
                    self.name()
                ),
            ));
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.size() || self.options.get().growable => Ok(offset..end),
            _ => Err(Error::new(
                ErrorKind::OutOfRange,
                format!("{}: {len} bytes at {offset} reach past the end, {}", self.name(), self.size()),
            )),
        }
    }

    /// Checks that the disk may be changed.
    fn check_writable(&self) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, format!("{} is open for reading only", self.name())));
        }
        Ok(())
    }

    /// Lets a guest's request in.
    async fn admit(&self) -> Admitted<'_> {
        let pass = self.gate.enter().await;
        self.stats.in_flight.set(self.stats.in_flight.get() + 1);
        let start = self.guest_latency.is_watched().then(|| self.guest_latency.comes(self.clock.now()));
        Admitted { disk: self, start, kind: Cell::new(None), _pass: pass }
    }

    /// Marks the start of a change that must be driven to its end.
    pub(crate) fn must_finish(&self) -> Result<MustFinish<'_>> {
        self.check(0, 0)?;
        Ok(MustFinish { disk: self, done: false })
    }

    /// Makes everything that completed before durable.
    ///
    /// # Errors
    /// Those of the storage: then nothing is known to be durable that wasn't before.
    pub async fn flush(&self) -> Result<()> {
        self.check(0, 0)?;
        let _admitted = self.admit().await;
        add(&self.stats.flushes, 1);
        if self.is_read_only() {
            return Ok(());
        }
        self.top().flush().await
    }

    /// Waits until what has completed in `range` would be found again were this process killed. A client that goes on with our
    /// successor has no reason to do again what was answered, although it may not have been flushed.
    ///
    /// # Errors
    /// As for [`Disk::flush`]; then what the range holds afterwards isn't known.
    pub async fn settle(&self, range: Range<u64>) -> Result<()> {
        if range.is_empty() || self.top().is_settled(range.clone()) {
            return Ok(());
        }
        let _admitted = self.admit().await;
        self.top().settle(range).await
    }

    /// The status of `range`, in order and without gaps, in at most `max` extents (which may then end before the range does).
    /// Bytes that no layer holds are `Unallocated` and read as zeroes.
    ///
    /// # Errors
    /// `OutOfRange`, and those of the layers asked.
    pub async fn block_status(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        self.check(range.start, range.end.saturating_sub(range.start))?;
        let _admitted = self.admit().await;
        let mut extents: Vec<Extent> = Vec::new();
        let mut pos = range.start;
        while pos < range.end {
            let next = chain::status(&self.top(), pos..range.end, None).await?;
            pos = next.end();
            if let Some(last) = extents.last_mut().filter(|last| continues(last, &next)) {
                last.len += next.len;
            } else if extents.len() < max {
                extents.push(next);
            } else {
                break;
            }
        }
        Ok(extents)
    }

    /// The next run in `range` that the top lacks and a layer above `base` supplies. See [`chain::next_missing`].
    ///
    /// # Errors
    /// Those of the layers asked.
    pub async fn next_missing(
        &self,
        range: Range<u64>,
        base: Option<&Rc<dyn Node>>,
    ) -> Result<Option<chain::Missing>> {
        let found = chain::next_missing(&self.top(), self.whole_units(range), base).await;
        found.inspect_err(|error| self.outage.note(error, self.clock.now()))
    }

    /// Copies up; see [`copy_up::copy_up`].
    ///
    /// # Errors
    /// See there.
    pub async fn copy_up(
        self: &Rc<Self>,
        range: Range<u64>,
        options: &copy_up::CopyUpOptions,
    ) -> Result<copy_up::Copied, copy_up::Failed> {
        copy_up::copy_up(self, range, options).await
    }

    /// Reads what [`Disk::copy_up`] would of the layers below, and keeps nothing: tells whether they can be reached.
    ///
    /// # Errors
    /// Those of the source; `Cancelled` by `options.abort`.
    pub async fn try_source(
        self: &Rc<Self>,
        range: Range<u64>,
        options: &copy_up::CopyUpOptions,
    ) -> Result<()> {
        copy_up::fetch(self, range, options).await.map(drop)
    }

    /// Carries out `work`, requests to this disk, such that those which wait for storage out of reach end with `Cancelled` when `switch` is thrown, if the layers
    /// can do that. See [`crate::recall`].
    pub async fn recallable<T>(&self, switch: &Rc<Abort>, work: impl Future<Output = T>) -> T {
        match self.top().can_recall() {
            true => recall::under(switch.clone(), work).await,
            false => work.await,
        }
    }

    /// Waits until no request is in flight, and lets none start while the guard lives. Requests that wait for a rate limit further down pass
    /// at once.
    pub async fn drain(&self) -> Drained {
        let _hurry = self.hurry();
        self.gate.drain().await
    }

    /// Lifts the rate limits of all layers for as long as the answer lives; see [`Node::hurry`].
    pub(crate) fn hurry(&self) -> Vec<Hurry> {
        let mut held = Vec::new();
        self.top().hurry(&mut held);
        held
    }

    /// Changes the backing link of the top node; see [`Node::change_backing`]. Requests go on meanwhile.
    ///
    /// # Errors
    /// Those of the storage: then the old link stands.
    pub async fn change_backing(
        &self,
        link: Option<BackingLink<'_>>,
        node: Option<Rc<dyn Node>>,
    ) -> Result<()> {
        let unfinished = self.must_finish()?;
        let result = self.top().change_backing(link, node).await;
        unfinished.finished();
        result
    }

    /// Runs `work`, which changes the image on top without changing what is read, with all requests held back. Jobs that copy into the disk
    /// aren't: the caller has made sure that there are none.
    ///
    /// # Errors
    /// `ReadOnly`, and those of `work`.
    pub async fn alone<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.check_writable()?;
        let _drained = self.drain().await;
        let unfinished = self.must_finish()?;
        let result = work.await;
        unfinished.finished();
        result
    }

    /// Changes the size in bytes, with all requests held back. New bytes read as zeroes, whatever a backing holds there.
    ///
    /// # Errors
    /// `ReadOnly`; `InUse` while somebody tracks its changes; and those of the top node.
    pub async fn resize(&self, size: u64) -> Result<()> {
        self.check(0, 0)?;
        self.check_writable()?;
        let _drained = self.drain().await;
        self.check_not_tracked()?;
        let unfinished = self.must_finish()?;
        let old = self.size();
        let result = async {
            self.top().resize(size).await?;
            // A backing that is larger than the disk was must not show in the new part.
            let hidden = self.top().backing().map_or(0, |backing| backing.size()).min(size);
            if hidden > old {
                self.zero_within(old..hidden, ZeroFlags { unmap: true, ..ZeroFlags::default() }).await?;
            }
            Ok(())
        }
        .await;
        unfinished.finished();
        result
    }

    /// Waits for all requests, flushes, and gives up the image. Nothing may be called afterwards.
    ///
    /// # Errors
    /// Those of the storage.
    pub async fn close(&self) -> Result<()> {
        let _drained = self.drain().await;
        self.top().close().await
    }
}

/// True if `next` only continues `last`: the same status in the same layer, and the same run of host bytes.
fn continues(last: &Extent, next: &Extent) -> bool {
    let host = match (last.host_offset, next.host_offset) {
        (Some(a), Some(b)) => a + last.len == b,
        (a, b) => a == b,
    };
    let same_layer = last.depth == next.depth || last.kind == ExtentKind::Unallocated;
    last.kind == next.kind && same_layer && last.compressed == next.compressed && host
}

/// A guest's request that was let in.
struct Admitted<'a> {
    disk: &'a Disk,
    /// If it is measured.
    start: Option<Start>,
    kind: Cell<Option<Kind>>,
    _pass: Pass,
}

impl Admitted<'_> {
    /// Says which it is.
    fn is(&self, kind: Kind) {
        self.kind.set(Some(kind));
    }
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        let in_flight = &self.disk.stats.in_flight;
        in_flight.set(in_flight.get() - 1);
        if let Some(start) = self.start {
            self.disk.guest_latency.goes(self.kind.get(), start, self.disk.clock.now());
        }
    }
}

/// Poisons the disk unless the change that it stands for was driven to its end.
#[must_use]
pub(crate) struct MustFinish<'a> {
    disk: &'a Disk,
    done: bool,
}

impl MustFinish<'_> {
    pub(crate) fn finished(mut self) {
        self.done = true;
    }
}

impl Drop for MustFinish<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.disk.poisoned.set(true);
        }
    }
}
