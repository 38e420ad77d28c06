//! The way of a guest's read.

use super::{Admitted, Disk, add};
use crate::abort::Abort;
use crate::buffer::{Buffer, BufferMut};
use crate::copy_up::{self, CopyUpOptions};
use crate::debug_event::DebugEvent;
use crate::error::Result;
use crate::extent::Resolved;
use crate::guest_latency::Kind;
use crate::node::{LocalFuture, Node};
use crate::range_lock::{Guard, Mode, Token};
use std::ops::Range;
use std::rc::Rc;

/// How a read gets its data.
enum Way {
    /// From one place of the top layer's storage, usually a file.
    Here(Rc<dyn Node>, u64),
    /// From one place of a layer below, or of remote storage.
    Far(Rc<dyn Node>, u64),
    /// They are zeroes, as memory tells.
    Zero,
    /// Through the layers.
    Layers(Rc<dyn Node>),
    /// Through a copy-up, which keeps them.
    Keep,
}

/// Does what may be dropped until somebody leaves for whom it is done.
async fn until<T>(leaves: Option<&Rc<Abort>>, work: impl Future<Output = Result<T>>) -> Result<T> {
    match leaves {
        Some(leaves) => leaves.guard(work).await?,
        None => work.await,
    }
}

impl Disk {
    /// Reads `len` bytes at `offset`; any alignment. Must be driven to its end while [`Disk::keeps_what_is_read`], because it may then change
    /// the overlay; otherwise it may be dropped at any time.
    ///
    /// With copy-on-read, what had to be fetched from the backing is kept. If keeping it fails (the disk is full, say) the guest
    /// gets its data all the same.
    ///
    /// # Errors
    /// `OutOfRange`, and those of the layers read.
    pub async fn read(self: &Rc<Self>, offset: u64, len: u64) -> Result<Buffer> {
        Ok(self.read_unless_zero(offset, len).await?.unwrap_or_else(|| Buffer::zeroed(len as usize)))
    }

    /// As [`Disk::read`], but gives `None`, and no buffer, if memory alone tells that all the bytes read as zeroes.
    ///
    /// # Errors
    /// As for [`Disk::read`].
    pub async fn read_unless_zero(self: &Rc<Self>, offset: u64, len: u64) -> Result<Option<Buffer>> {
        self.read_until(offset, len, None).await
    }

    /// As [`Disk::read_unless_zero`], but what is being fetched from below is given up, with `Cancelled`, when `leaves` is thrown.
    pub(crate) async fn read_until(
        self: &Rc<Self>,
        offset: u64,
        len: u64,
        leaves: Option<&Rc<Abort>>,
    ) -> Result<Option<Buffer>> {
        let range = self.check(offset, len)?;
        if len == 0 {
            return Ok(Some(Buffer::zeroed(0)));
        }
        let admitted = self.admit().await;
        tracing::trace!(target: "qemu", event = "bdrv_co_preadv_part", node = self.name(), offset, bytes = len);
        add(&self.stats.reads, 1);
        add(&self.stats.read_bytes, len);
        self.tell_watches(|watch| watch.reads(&range));
        let (guard, way) = self.way(&range, &admitted).await;
        let buf = || BufferMut::new(len as usize);
        match way {
            Way::Here(node, offset) => Ok(Some(node.read(offset, buf()).await?.freeze())),
            Way::Far(node, offset) => Ok(Some(until(leaves, node.read(offset, buf())).await?.freeze())),
            Way::Zero => Ok(None),
            Way::Layers(top) if top.keeps_what_is_read() => Ok(Some(top.read(offset, buf()).await?.freeze())),
            Way::Layers(top) => Ok(Some(until(leaves, top.read(offset, buf())).await?.freeze())),
            Way::Keep => {
                drop(guard);
                self.read_and_keep(range, leaves.cloned()).await.map(Some)
            }
        }
    }

    /// As [`Disk::read`], but fills the whole of `buf` and gives it back: for a node on top of this disk.
    ///
    /// # Errors
    /// As for [`Disk::read`]. The buffer is gone then.
    pub async fn read_into(self: &Rc<Self>, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        let len = buf.len() as u64;
        let range = self.check(offset, len)?;
        if len == 0 {
            return Ok(buf);
        }
        let admitted = self.admit().await;
        tracing::trace!(target: "qemu", event = "bdrv_co_preadv_part", node = self.name(), offset, bytes = len);
        add(&self.stats.reads, 1);
        add(&self.stats.read_bytes, len);
        self.tell_watches(|watch| watch.reads(&range));
        let (guard, way) = self.way(&range, &admitted).await;
        match way {
            Way::Here(node, offset) | Way::Far(node, offset) => node.read(offset, buf).await,
            Way::Zero => {
                buf.fill(0);
                Ok(buf)
            }
            Way::Layers(top) => top.read(offset, buf).await,
            Way::Keep => {
                drop(guard);
                buf.copy_from_slice(&self.read_and_keep(range, None).await?);
                Ok(buf)
            }
        }
    }

    /// Reads for a job that copies this disk elsewhere: under the range lock as every read, but the gate doesn't hold it back, because the
    /// job copies the rest while guests are held back; it isn't counted, and nothing is kept. May be dropped at any time.
    ///
    /// # Errors
    /// As for [`Disk::read`].
    pub async fn read_beside_guests(&self, range: Range<u64>) -> Result<Buffer> {
        let len = range.end.saturating_sub(range.start);
        let range = self.check(range.start, len)?;
        let _guard = self.lock.acquire(Token::for_request(), range.clone(), Mode::Shared).await;
        Ok(self.top().read(range.start, BufferMut::new(len as usize)).await?.freeze())
    }

    /// Locks `range` and finds out how it is read. The lock keeps the mapping that is looked up here true until the data are in memory.
    async fn way(&self, range: &Range<u64>, admitted: &Admitted<'_>) -> (Guard, Way) {
        let guard = self.lock.acquire(Token::for_request(), range.clone(), Mode::Shared).await;
        let len = range.end - range.start;
        let top = self.top();
        let way = match top.resolve(range.clone()) {
            Resolved::At { node, offset, len: run, depth } if run >= len && self.may_pass(depth) => {
                self.count_backing_read(depth);
                admitted.is(if depth == 0 { Kind::Read } else { Kind::Miss });
                if depth > 0 || node.limits().remote {
                    Way::Far(node, offset)
                } else {
                    Way::Here(node, offset)
                }
            }
            Resolved::Zero { len: run, .. } if run >= len => Way::Zero,
            first if !self.copies_on_read() => {
                if let Resolved::At { depth, .. } = first {
                    self.count_backing_read(depth);
                }
                admitted.is(Kind::Miss);
                Way::Layers(top)
            }
            _ => {
                admitted.is(Kind::Miss);
                Way::Keep
            }
        };
        (guard, way)
    }

    /// True if data at `depth` need not be copied up when they are read.
    fn may_pass(&self, depth: u32) -> bool {
        depth == 0 || !self.copies_on_read()
    }

    fn count_backing_read(&self, depth: u32) {
        if depth > 0 {
            add(&self.stats.backing_reads, 1);
        }
    }

    /// A read that may have to fetch from the backing what the overlay will then keep. Apart from other reads, because its state is several
    /// times theirs, and a read's state is moved about before it starts.
    fn read_and_keep(
        self: &Rc<Self>,
        range: Range<u64>,
        leaves: Option<Rc<Abort>>,
    ) -> LocalFuture<'_, Result<Buffer>> {
        Box::pin(async move {
            let base = self.copy_on_read_base();
            let options =
                CopyUpOptions { base, detect_zeroes: true, abort: leaves, ..CopyUpOptions::default() };
            // Waits here if somebody is already fetching these bytes; then they are local.
            let fetch = copy_up::fetch(self, range.clone(), &options).await?;
            if !fetch.is_empty() {
                add(&self.stats.backing_reads, 1);
                self.tell_watches(|watch| watch.misses(&range));
                self.top().debug_event(DebugEvent::CorWrite);
                // race-mark: copy-on-read-store
                let stored = copy_up::store(self, &fetch, &options).await;
                if stored.is_err() {
                    add(&self.stats.copy_on_read_failures, 1);
                }
                if let Some(data) = fetch.get(&range) {
                    return Ok(data);
                }
            }
            drop(fetch);
            let _guard = self.lock.acquire(Token::for_request(), range.clone(), Mode::Shared).await;
            let buf = BufferMut::new((range.end - range.start) as usize);
            Ok(self.top().read(range.start, buf).await?.freeze())
        })
    }
}
