//! The trait that every layer of a disk implements: image formats, files, network sources, filters.

use crate::buffer::{Buffer, BufferMut};
use crate::debug_event::DebugEvent;
use crate::drain::Hurry;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, Resolved};
use crate::identity::Identity;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;

/// A boxed future that stays on its thread.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// How a write is to be done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// The data, and what is needed to find them again, are durable before the write completes.
    pub fua: bool,
    /// The data are to be kept compressed, where the node can do that ([`Node::compressed_unit`]) and it makes them smaller. Whoever can't
    /// writes them as they are: a wish about space, of which nothing that is read depends.
    pub compressed: bool,
}

/// How zeroes are to be written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// As for [`WriteFlags::fua`].
    pub fua: bool,
    /// Storage may be given back. Without it the range stays allocated, so that later writes to it don't run out of space.
    pub unmap: bool,
    /// Fail at once with `Unsupported` rather than write zeroes as if they were data.
    pub fast_only: bool,
}

/// What a node asks of the requests that reach it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths of writes must be multiples of this, in bytes; a power of two, 1 to 64 KiB. [`crate::Disk`] sees to it
    /// that they are; reads may have any alignment.
    pub write_alignment: u32,
    /// The size in bytes that requests are best made in and aligned to (a qcow2 cluster or subcluster, a disk's block); a power of two.
    pub preferred: u32,
    /// The unit in bytes of allocation: copy-ups cover whole units. A power of two, at least `write_alignment`.
    pub allocation_unit: u32,
    /// The largest request, in bytes, that the node takes at once.
    pub max_transfer: u32,
    /// How many requests it is worth having in flight.
    pub depth: u32,
    /// The node is remote: a request costs a round trip and bandwidth that others share.
    pub remote: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            write_alignment: 1,
            preferred: 4096,
            allocation_unit: 4096,
            max_transfer: 32 << 20,
            depth: 64,
            remote: false,
        }
    }
}

/// A change of a range, as far as locking is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Data are written.
    Write,
    /// Data are written with [`WriteFlags::compressed`].
    Compress,
    /// Zeroes are written; the flag is [`ZeroFlags::unmap`].
    Zero {
        /// Storage may be given back.
        unmap: bool,
    },
    /// The range is discarded.
    Discard,
}

/// What a change needs of the range lock; see [`Node::access`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// The bytes are overwritten where they are: no mapping changes, so that only those who exclude all others must wait.
    Shared,
    /// The mapping changes, or neighbouring bytes are read and written back: nobody else may be in this range (bytes), which
    /// covers the request.
    Exclusive(Range<u64>),
}

/// One layer of a disk.
///
/// **Offsets** are in bytes. **Reads** past the end of a node give zeroes. **Writes** past the end make a file longer; a format
/// node refuses them with `OutOfRange`, but takes a request that ends at its size rounded up to `write_alignment`.
///
/// **Cancellation**: the future of a read may be dropped at any time, unless [`Node::keeps_what_is_read`]. The future of everything else must be polled to its end;
/// [`crate::Disk`] enforces that.
///
/// **Concurrency**: [`crate::Disk`] holds the range lock as [`Node::access`] says while a change runs, and at least shared while a
/// read runs. Nodes below the top of a chain are read-only as long as they are below it.
///
/// Methods that the safety of data hangs on have no default body.
pub trait Node {
    /// How messages call the node: a path or a URI.
    fn name(&self) -> &str;

    /// What kind of node: "qcow2", "raw", "file", "nbd", "http", ...
    fn driver(&self) -> &'static str;

    /// Its size in bytes.
    fn size(&self) -> u64;

    /// What requests must look like.
    fn limits(&self) -> Limits;

    /// True if all changes are refused with `ReadOnly`.
    fn is_read_only(&self) -> bool;

    /// Looks up the start of `range` (not empty) from memory alone, through all layers below. Never blocks, never does I/O.
    fn resolve(&self, range: Range<u64>) -> Resolved;

    /// Fills the whole of `buf` from `offset` and gives it back, through all layers below. On error the buffer is gone.
    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>>;

    /// True if a read of `range` would ask nothing of storage, because all of it is kept here or on its way for somebody else; from memory alone.
    fn is_at_hand(&self, _range: Range<u64>) -> bool {
        false
    }

    /// Somebody is about to read `range` in large requests, from its beginning on. A node whose storage is far away may ask for it now, which takes memory for it until it
    /// was read, or some seconds have passed; or, if the range is empty, make ready what would take time before the first request. Advisory, and from memory alone.
    fn expect(&self, _range: Range<u64>) {}

    /// The status of the start of `range` (not empty) in this layer alone (`depth` 0), as one extent that starts at
    /// `range.start` and ends at or before `range.end`. Bytes past the node's end are `Zero`.
    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>>;

    /// What a change of `range` needs of the range lock, from memory alone; whoever is in doubt says `Exclusive`. It is asked
    /// again once the lock is held.
    fn access(&self, range: Range<u64>, change: Change) -> Access;

    /// Writes `data` at `offset`.
    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>>;

    /// Makes a range read as zeroes.
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>>;

    /// Tells that the contents of a range are no longer needed. Afterwards it reads as before or as zeroes, never as what a backing
    /// holds. Advisory: parts that cannot be given back are left alone.
    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>>;

    /// Makes everything that completed before this call durable: what fdatasync means, metadata included.
    fn flush(&self) -> LocalFuture<'_, Result<()>>;

    /// True if what has completed in `range` would be found again were this process killed now, though perhaps not if the power failed; from
    /// memory alone. Whoever is in doubt says false, which costs a flush.
    fn is_settled(&self, _range: Range<u64>) -> bool {
        false
    }

    /// Waits until [`Node::is_settled`] is true of what completed in `range` before this call. By default a flush, which does more than that.
    ///
    /// # Errors
    /// As for [`Node::flush`].
    fn settle(&self, _range: Range<u64>) -> LocalFuture<'_, Result<()>> {
        self.flush()
    }

    /// Changes the size in bytes. New bytes read as zeroes.
    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>>;

    /// Flushes and gives up the node: marks the image as cleanly closed, frees locks. Nothing may be called afterwards.
    fn close(&self) -> LocalFuture<'_, Result<()>>;

    /// What the storage that this node reaches is recognised by later, beside its size; nothing where storage has no such marks, and for nodes
    /// that hold no bytes of their own.
    ///
    /// # Errors
    /// If the system doesn't say.
    fn identity(&self) -> Result<Identity> {
        Ok(Identity::default())
    }

    /// The node that supplies what this layer lacks.
    fn backing(&self) -> Option<Rc<dyn Node>> {
        None
    }

    /// The node that holds this node's bytes (the file under a format).
    fn file(&self) -> Option<Rc<dyn Node>> {
        None
    }

    /// The node that a filter passes its requests to. A filter has the contents, the size and the backing of that node, and adds one
    /// behaviour.
    fn filtered(&self) -> Option<Rc<dyn Node>> {
        None
    }

    /// The size in bytes of what the node compresses in one piece, a power of two; none if it can't keep data compressed. Writes with
    /// [`WriteFlags::compressed`] that cover whole pieces cost no reading.
    fn compressed_unit(&self) -> Option<u32> {
        self.filtered().and_then(|below| below.compressed_unit())
    }

    /// Reads from another backing from now on, without changing what the header says: for a graph that changes while it is in use.
    /// The caller has made sure that both supply the same bytes, or that nobody has read through the old one yet.
    ///
    /// # Errors
    /// `Unsupported` if it can't have a backing.
    fn set_backing(&self, _node: Option<Rc<dyn Node>>) -> Result<()> {
        let message = format!("{}: {} takes no backing", self.name(), self.driver());
        Err(Error::new(ErrorKind::Unsupported, message))
    }

    /// Asks storage to take writes of any offset and length from now on ([`Limits::write_alignment`] 1), at the price of going through
    /// the page cache. An image calls it before its first write, if what it must write is smaller than its file's alignment (clusters
    /// of 512 bytes on a disk with blocks of 4 KiB, a raw image whose size is no multiple of it). Nodes without an alignment of their own
    /// pass it on to their file.
    fn use_buffered(&self) -> Result<()> {
        self.file().map_or(Ok(()), |file| file.use_buffered())
    }

    /// Lets requests pass that wait for a rate limit in this node or below it, for as long as what is pushed to `held` lives: somebody
    /// waits for them all. Nodes without a limit pass it on to their children.
    fn hurry(&self, held: &mut Vec<Hurry>) {
        for child in [self.file(), self.filtered(), self.backing()].into_iter().flatten() {
            child.hurry(held);
        }
    }

    /// Requests that wait here for storage to come back, now or later, fail at once from now on: the program ends. Others are carried out as ever. Of this node
    /// alone: whoever ends the program tells all of them.
    fn stop_waiting(&self) {}

    /// True if a change that was recalled while it waited ([`crate::recall`]) leaves nothing half-done but its own bytes, in this node and below it. A node that keeps metadata
    /// says false.
    fn can_recall(&self) -> bool {
        self.filtered().is_some_and(|below| below.can_recall())
    }

    /// True if a read may change this node or one below, because what is read is kept (copy-on-read in a filter or below one). Such a read
    /// should be driven to its end: dropped while it changes something, it costs the disk that it changes its use.
    fn keeps_what_is_read(&self) -> bool {
        [self.file(), self.filtered(), self.backing()]
            .into_iter()
            .flatten()
            .any(|child| child.keeps_what_is_read())
    }

    /// A layer above is about to do what `event` says: for fault injection. A node that doesn't inject passes it on to the one below, where
    /// the bytes are. Costs something, so layers ask [`Node::hears_debug_events`] once, when they are opened.
    fn debug_event(&self, event: DebugEvent) {
        if let Some(below) = self.file().or_else(|| self.filtered()) {
            below.debug_event(event);
        }
    }

    /// True if this node, or one below it that it tells of events, injects faults.
    fn hears_debug_events(&self) -> bool {
        self.file().or_else(|| self.filtered()).is_some_and(|below| below.hears_debug_events())
    }

    /// Makes the backing link durable as `new`: first everything that was written, then one atomic change of the header; it then reads
    /// from `node`. When it fails, the old link stands. The caller has made sure that nothing that matters is lost by it.
    fn change_backing<'a>(
        &'a self,
        _new: Option<BackingLink<'a>>,
        _node: Option<Rc<dyn Node>>,
    ) -> LocalFuture<'a, Result<()>> {
        let err = Error::new(
            ErrorKind::Unsupported,
            format!("{}: {} has no backing link to change", self.name(), self.driver()),
        );
        Box::pin(async move { Err(err) })
    }
}

/// What an overlay's header says of its backing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackingLink<'a> {
    /// The file name or URI, as written to the header.
    pub name: &'a str,
    /// The format's name, as written to the header ("raw", "qcow2").
    pub format: &'a str,
}

/// What of [`Node`] is the same for every node that can only be read: it refuses all changes with the error that its method `refusal` makes.
#[macro_export]
macro_rules! refuse_changes {
    () => {
        fn is_read_only(&self) -> bool {
            true
        }

        fn access(
            &self,
            _range: std::ops::Range<u64>,
            _change: $crate::node::Change,
        ) -> $crate::node::Access {
            $crate::node::Access::Shared
        }

        fn write(
            &self,
            _offset: u64,
            _data: $crate::Buffer,
            _flags: $crate::WriteFlags,
        ) -> $crate::LocalFuture<'_, $crate::Result<()>> {
            Box::pin(std::future::ready(Err(self.refusal())))
        }

        fn write_zeroes(
            &self,
            _offset: u64,
            _len: u64,
            _flags: $crate::ZeroFlags,
        ) -> $crate::LocalFuture<'_, $crate::Result<()>> {
            Box::pin(std::future::ready(Err(self.refusal())))
        }

        fn discard(&self, _offset: u64, _len: u64) -> $crate::LocalFuture<'_, $crate::Result<()>> {
            Box::pin(std::future::ready(Err(self.refusal())))
        }

        fn flush(&self) -> $crate::LocalFuture<'_, $crate::Result<()>> {
            Box::pin(std::future::ready(Ok(())))
        }

        fn resize(&self, _size: u64) -> $crate::LocalFuture<'_, $crate::Result<()>> {
            Box::pin(std::future::ready(Err(self.refusal())))
        }
    };
}
