//! How a filter reaches the disk that it filters: from the contract of a node to that of a disk.
//!
//! A node gives zeroes past its end, and takes changes that end at its size rounded up to its alignment; a disk refuses both. What lies past the
//! child's end is cut off here, unless the child may grow.

use crate::buffer::{Buffer, BufferMut};
use crate::disk::Disk;
use crate::edge::{Edge, Entered};
use crate::error::Result;
use crate::extent::Extent;
use crate::node::{Limits, Node, WriteFlags, ZeroFlags};
use std::ops::Range;
use std::rc::Rc;

/// The child of a filter.
pub(super) struct Child {
    edge: Rc<Edge>,
    name: Box<str>,
    /// What the filter itself asks changes to be aligned to, in bytes.
    alignment: u32,
}

impl Child {
    pub(super) fn new(edge: Rc<Edge>) -> Self {
        Self::aligned(edge, 1)
    }

    /// The child of a filter that asks for an alignment of its own.
    pub(super) fn aligned(edge: Rc<Edge>, alignment: u32) -> Self {
        let name = edge.disk().name().into();
        Self { edge, name, alignment }
    }

    /// What changes through the filter are aligned to, in bytes.
    pub(super) fn alignment(&self) -> u32 {
        self.alignment.max(self.disk().limits().write_alignment)
    }

    /// What the filter asks of requests: what the child does, but for the alignment of writes. What an unaligned write leaves of a block is read and
    /// written back by the child's disk, under the locks that all who use the child share; done above the filter, it could write back bytes
    /// that somebody else has changed meanwhile.
    pub(super) fn limits(&self) -> Limits {
        Limits { write_alignment: self.alignment, ..self.disk().limits() }
    }

    /// What messages call the filter: as the child was called when it was made.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The child's node.
    pub(super) fn top(&self) -> Rc<dyn Node> {
        self.disk().top()
    }

    /// To ask what it is, not for requests.
    pub(super) fn disk(&self) -> Rc<Disk> {
        self.edge.disk()
    }

    pub(super) fn edge(&self) -> &Rc<Edge> {
        &self.edge
    }

    /// Lets a request in.
    pub(super) async fn enter(&self) -> Entered {
        self.edge.enter().await
    }

    pub(super) async fn read(&self, offset: u64, buf: BufferMut) -> Result<BufferMut> {
        let disk = self.enter().await;
        self.read_on(&disk, offset, buf).await
    }

    pub(super) async fn status(&self, range: Range<u64>) -> Result<Extent> {
        self.enter().await.top().status(range).await
    }

    pub(super) async fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> Result<()> {
        let disk = self.enter().await;
        self.write_on(&disk, offset, data, flags).await
    }

    pub(super) async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let disk = self.enter().await;
        self.write_zeroes_on(&disk, offset, len, flags).await
    }

    pub(super) async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let disk = self.enter().await;
        self.discard_on(&disk, offset, len).await
    }

    pub(super) async fn flush(&self) -> Result<()> {
        self.enter().await.flush().await
    }

    pub(super) async fn settle(&self, range: Range<u64>) -> Result<()> {
        self.enter().await.settle(range).await
    }

    pub(super) async fn resize(&self, size: u64) -> Result<()> {
        self.enter().await.resize(size).await
    }

    /// As [`Child::read`], for a request that was let in.
    pub(super) async fn read_on(
        &self,
        disk: &Rc<Disk>,
        offset: u64,
        mut buf: BufferMut,
    ) -> Result<BufferMut> {
        let there = disk.size().saturating_sub(offset);
        let there = usize::try_from(there).map_or(buf.len(), |there| there.min(buf.len()));
        if disk.options().growable || there == buf.len() {
            return disk.read_into(offset, buf).await;
        }
        let mut past_end = buf.split_off(there);
        past_end.fill(0);
        if there == 0 {
            return Ok(buf.join(past_end));
        }
        Ok(disk.read_into(offset, buf).await?.join(past_end))
    }

    /// As [`Child::write`], for a request that was let in.
    pub(super) async fn write_on(
        &self,
        disk: &Disk,
        offset: u64,
        data: Buffer,
        flags: WriteFlags,
    ) -> Result<()> {
        let len = self.within(disk, offset, data.len() as u64) as usize;
        if len == 0 && !data.is_empty() {
            return Ok(());
        }
        let data = if len < data.len() { data.slice(0..len) } else { data };
        disk.write(offset, data, flags).await
    }

    /// As [`Child::write_zeroes`], for a request that was let in.
    pub(super) async fn write_zeroes_on(
        &self,
        disk: &Disk,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        match self.within(disk, offset, len) {
            0 if len > 0 => Ok(()),
            within => disk.write_zeroes(offset, within, flags).await,
        }
    }

    /// As [`Child::discard`], for a request that was let in.
    pub(super) async fn discard_on(&self, disk: &Disk, offset: u64, len: u64) -> Result<()> {
        match self.within(disk, offset, len) {
            0 if len > 0 => Ok(()),
            within => disk.discard(offset, within).await,
        }
    }

    /// How many of `len` bytes at `offset` exist on `disk`, where those that don't are padding.
    fn within(&self, disk: &Disk, offset: u64, len: u64) -> u64 {
        let size = disk.size();
        let limit = size.checked_next_multiple_of(u64::from(self.alignment())).unwrap_or(size);
        let end = offset.saturating_add(len);
        // What lies further out is no padding: the disk says what is wrong with it.
        if disk.options().growable || end > limit { len } else { len.min(size.saturating_sub(offset)) }
    }
}

/// What of [`Node`] is the same for every filter with one child, which is `self.child`: the answers of the child's node.
macro_rules! as_the_child {
    () => {
        fn name(&self) -> &str {
            self.child.name()
        }

        fn size(&self) -> u64 {
            self.child.disk().size()
        }

        fn is_read_only(&self) -> bool {
            self.child.disk().is_read_only()
        }

        /// The requests must be seen.
        fn resolve(&self, _range: std::ops::Range<u64>) -> $crate::Resolved {
            $crate::Resolved::Ask
        }

        /// The child's disk locks for itself.
        fn access(
            &self,
            _range: std::ops::Range<u64>,
            _change: $crate::node::Change,
        ) -> $crate::node::Access {
            $crate::node::Access::Shared
        }

        fn is_settled(&self, range: std::ops::Range<u64>) -> bool {
            self.child.top().is_settled(range)
        }

        fn settle(
            &self,
            range: std::ops::Range<u64>,
        ) -> $crate::node::LocalFuture<'_, $crate::error::Result<()>> {
            Box::pin(self.child.settle(range))
        }

        fn keeps_what_is_read(&self) -> bool {
            self.child.disk().keeps_what_is_read()
        }

        fn backing(&self) -> Option<std::rc::Rc<dyn $crate::Node>> {
            self.child.top().backing()
        }

        fn filtered(&self) -> Option<std::rc::Rc<dyn $crate::Node>> {
            Some(self.child.top())
        }

        fn set_backing(&self, node: Option<std::rc::Rc<dyn $crate::Node>>) -> $crate::Result<()> {
            self.child.top().set_backing(node)
        }

        fn use_buffered(&self) -> $crate::Result<()> {
            self.child.top().use_buffered()
        }

        fn change_backing<'a>(
            &'a self,
            new: Option<$crate::node::BackingLink<'a>>,
            node: Option<std::rc::Rc<dyn $crate::Node>>,
        ) -> $crate::LocalFuture<'a, $crate::Result<()>> {
            Box::pin(async move { self.child.enter().await.change_backing(new, node).await })
        }
    };
}

/// The requests of a filter that lets them through as they are to its child, which is `self.child`.
macro_rules! passed_to_the_child {
    () => {
        fn expect(&self, range: std::ops::Range<u64>) {
            self.child.top().expect(range);
        }

        fn limits(&self) -> $crate::Limits {
            self.child.limits()
        }

        fn status(
            &self,
            range: std::ops::Range<u64>,
        ) -> $crate::LocalFuture<'_, $crate::Result<$crate::Extent>> {
            Box::pin(self.child.status(range))
        }

        fn write(
            &self,
            offset: u64,
            data: $crate::Buffer,
            flags: $crate::WriteFlags,
        ) -> $crate::LocalFuture<'_, $crate::Result<()>> {
            Box::pin(self.child.write(offset, data, flags))
        }

        fn write_zeroes(
            &self,
            offset: u64,
            len: u64,
            flags: $crate::ZeroFlags,
        ) -> $crate::LocalFuture<'_, $crate::Result<()>> {
            Box::pin(self.child.write_zeroes(offset, len, flags))
        }

        fn discard(&self, offset: u64, len: u64) -> $crate::LocalFuture<'_, $crate::Result<()>> {
            Box::pin(self.child.discard(offset, len))
        }

        fn flush(&self) -> $crate::LocalFuture<'_, $crate::Result<()>> {
            Box::pin(self.child.flush())
        }

        fn resize(&self, size: u64) -> $crate::LocalFuture<'_, $crate::Result<()>> {
            Box::pin(self.child.resize(size))
        }
    };
}

pub(super) use {as_the_child, passed_to_the_child};
