//! One fetch for many: nodes that read the same source ask it once for what they all need.
//!
//! A [`ShareNode`] stands in the place of a node that reaches bytes over a network and looks like it. What is read through it is cut into blocks.
//! A block that somebody else is fetching at the moment is waited for; one that was fetched a little while ago is still in memory; one that
//! a [`BlockStore`] holds (a directory) is read from there; only what is left is asked of the source. Nodes over the same source with the same pinned
//! identity share all of that, nodes of one pool share the bound of memory.
//!
//! # When it shares
//! A source that others change must be asked each time. So a node shares only while it has **readers**: layers that stand on it as their backing and
//! have promised by that not to see a change ([`ShareNode::set_readers`]). Without readers it passes everything through, and what it held is forgotten.
//! Two nodes share with each other only if whoever joins them knows that they hold the same bytes and gives both one key.
//!
//! # Nobody hangs
//! Who asks first fetches, in its own future and through its own node: nothing is spawned. If that future is dropped, or fails, those
//! who wait look again, and the first to do so fetches. Who has seen two others fail for the same block fails with the second one's error: so a source
//! that is gone costs a reader at most three times the patience of its node, however many readers there are.
//!
//! # How much is fetched
//! Each block is asked for once as long as all who need it come while it is in flight or in memory. Streams from one source do, by themselves, if
//! they begin while the first of them is less than the bound of memory ahead: those behind read from memory, faster than the one in front reads from
//! the source, until they ask for what is just in flight; from then on all wait for the same answers, and move together. A reader that is held back
//! by something else (a speed limit, a slower disk) falls out of the window when it is further behind than the bound, and fetches for itself then, as
//! does one that begins later. Against that helps a store, which forgets nothing. So the source gives, for N streams: with a store, or if no
//! reader is ever further behind than the bound, the image once; otherwise for each group of readers that are that close to each other once.
//!
//! From memory goes first what every reader has had (overlays keep what they read, so they ask once), of which no more than a quarter of the
//! bound is kept for readers to come; then what was fetched the longest ago, which is what readers who go upwards need least.

mod memory;
mod source;
#[cfg(test)]
mod tests;

use self::memory::Memory;
use self::source::Source;
use crate::buffer::{Buffer, BufferMut};
use crate::debug_event::DebugEvent;
use crate::drain::Hurry;
use crate::error::Result;
use crate::extent::{Extent, Resolved};
use crate::identity::Identity;
use crate::node::{Access, Change, Limits, LocalFuture, Node, WriteFlags, ZeroFlags};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::{Rc, Weak};

/// The size in bytes of the blocks that are shared: what a small read is widened to.
pub const SHARE_BLOCK: u64 = 64 << 10;

/// Where blocks of one source are kept for longer than memory does. Offsets are the source's; everything begins and ends with blocks of
/// [`SHARE_BLOCK`] bytes or at the source's end.
pub trait BlockStore {
    /// How the block at `offset` is: true if it is held; and up to where the ones after it are the same, at most `until`. From memory alone.
    fn holds(&self, offset: u64, until: u64) -> (bool, u64);

    /// The bytes of a range that is held. May be dropped.
    fn read(&self, range: Range<u64>) -> LocalFuture<'_, Result<Buffer>>;

    /// Takes what was fetched, if it likes to. Never waits.
    fn keep(&self, offset: u64, data: Buffer);
}

/// What was read of a source, and where from; in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ShareStats {
    /// Asked of the source.
    pub fetched: u64,
    /// Answered by waiting for what somebody else was fetching.
    pub joined: u64,
    /// Answered from memory.
    pub from_memory: u64,
    /// Read from the store.
    pub from_store: u64,
}

/// All sources that share one bound of memory. Belongs to one thread.
pub struct SharePool {
    memory: Rc<RefCell<Memory>>,
    sources: RefCell<Vec<Weak<Source>>>,
    next_id: Cell<u64>,
}

impl SharePool {
    /// A pool whose sources keep at most `memory` bytes together. With 0 only what is in flight is shared.
    pub fn new(memory: u64) -> Rc<Self> {
        Rc::new(Self {
            memory: Rc::new(RefCell::new(Memory::new(memory))),
            sources: RefCell::default(),
            next_id: Cell::new(0),
        })
    }

    /// Bytes that are kept now.
    pub fn used(&self) -> u64 {
        self.memory.borrow().used()
    }

    /// A node in front of `node`, which must be read-only. All that are given the same `key` share; without one it shares with nobody else, but its
    /// own readers share. The caller vouches that nodes with one key hold the same bytes. `store` is what the first of them brings.
    pub fn join(
        self: &Rc<Self>,
        node: Rc<dyn Node>,
        key: Option<String>,
        store: Option<Rc<dyn BlockStore>>,
    ) -> Rc<ShareNode> {
        let mut sources = self.sources.borrow_mut();
        sources.retain(|source| source.strong_count() > 0);
        let known = sources
            .iter()
            .filter_map(Weak::upgrade)
            .find(|source| source.size() == node.size() && key.is_some() && source.key() == key.as_deref());
        let source = known.unwrap_or_else(|| {
            let id = self.next_id.get();
            self.next_id.set(id + 1);
            let source = Rc::new(Source::new(id, key, node.size(), self.memory.clone(), store));
            sources.push(Rc::downgrade(&source));
            source
        });
        Rc::new_cyclic(|this| ShareNode { this: this.clone(), node, source, readers: Cell::new(0) })
    }
}

/// A node that shares what it reads with others; see the [module](self). It has the name, the kind and everything else of the node that it is in front of.
pub struct ShareNode {
    this: Weak<ShareNode>,
    node: Rc<dyn Node>,
    source: Rc<Source>,
    readers: Cell<u32>,
}

impl ShareNode {
    /// How many layers stand on it, directly or not, and read each of its bytes about once. With 0 nothing is shared.
    pub fn set_readers(&self, readers: u32) {
        let before = self.readers.replace(readers);
        self.source.change_readers(before, readers);
    }

    /// See [`ShareNode::set_readers`].
    pub fn readers(&self) -> u32 {
        self.readers.get()
    }

    /// True while what is read is shared.
    pub fn is_sharing(&self) -> bool {
        self.readers.get() > 0
    }

    /// What all nodes of this source have read while they shared.
    pub fn stats(&self) -> ShareStats {
        self.source.stats()
    }

    async fn read_shared(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        let end = offset.saturating_add(buf.len() as u64).min(self.source.size());
        let there = (end.saturating_sub(offset) as usize).min(buf.len());
        buf[there..].fill(0);
        if there == 0 {
            return Ok(buf);
        }
        for piece in self.source.obtain(&self.node, offset..end).await? {
            let from = piece.offset.max(offset);
            let to = (piece.offset + piece.data.len() as u64).min(end);
            let data = &piece.data[(from - piece.offset) as usize..(to - piece.offset) as usize];
            buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(data);
        }
        Ok(buf)
    }
}

impl Drop for ShareNode {
    fn drop(&mut self) {
        self.set_readers(0);
    }
}

impl Node for ShareNode {
    fn name(&self) -> &str {
        self.node.name()
    }

    fn driver(&self) -> &'static str {
        self.node.driver()
    }

    fn size(&self) -> u64 {
        self.node.size()
    }

    fn limits(&self) -> Limits {
        self.node.limits()
    }

    fn is_read_only(&self) -> bool {
        self.node.is_read_only()
    }

    fn resolve(&self, range: Range<u64>) -> Resolved {
        match (self.node.resolve(range.clone()), self.this.upgrade()) {
            // The bytes are read here, and not past this node.
            (Resolved::At { len, .. }, Some(this)) if self.is_sharing() => {
                Resolved::At { node: this, offset: range.start, len, depth: 0 }
            }
            (resolved, _) => resolved,
        }
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        if self.is_sharing() { Box::pin(self.read_shared(offset, buf)) } else { self.node.read(offset, buf) }
    }

    fn is_at_hand(&self, range: Range<u64>) -> bool {
        self.is_sharing() && self.source.is_at_hand(range)
    }

    fn expect(&self, range: Range<u64>) {
        // What others have read, or will, isn't asked for again on behalf of one of them.
        let alone = self.readers.get() == self.source.readers() && !self.source.has_store();
        let begins = !range.is_empty() && alone && !self.is_at_hand(range.start..range.start + 1);
        self.node.expect(if begins { range } else { 0..0 });
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        self.node.status(range)
    }

    fn access(&self, range: Range<u64>, change: Change) -> Access {
        self.node.access(range, change)
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        self.node.write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        self.node.write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.node.discard(offset, len)
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.node.flush()
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        self.node.resize(size)
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        self.set_readers(0);
        self.node.close()
    }

    fn identity(&self) -> Result<Identity> {
        self.node.identity()
    }

    fn use_buffered(&self) -> Result<()> {
        self.node.use_buffered()
    }

    fn hurry(&self, held: &mut Vec<Hurry>) {
        self.node.hurry(held);
    }

    fn stop_waiting(&self) {
        self.node.stop_waiting();
    }

    fn can_recall(&self) -> bool {
        self.node.can_recall()
    }

    fn keeps_what_is_read(&self) -> bool {
        self.node.keeps_what_is_read()
    }

    fn debug_event(&self, event: DebugEvent) {
        self.node.debug_event(event);
    }

    fn hears_debug_events(&self) -> bool {
        self.node.hears_debug_events()
    }
}
