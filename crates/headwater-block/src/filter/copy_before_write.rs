//! Copy-before-write as a node: what the disk below held when the node was made goes to another disk before it is changed.
//!
//! The work is that disk's ([`Disk::begin_point_in_time`](crate::Disk::begin_point_in_time)), because it needs the locks: so changes that don't come through this node
//! are saved as well. The node stands for the moment, and ends it when it is closed. [`SnapshotAccessNode`](super::SnapshotAccessNode) shows it.

use super::child::{Child, as_the_child};
use crate::buffer::{Buffer, BufferMut};
use crate::copy_before_write::PointInTime;
use crate::edge::Edge;
use crate::error::Result;
use crate::extent::Extent;
use crate::node::{Limits, LocalFuture, Node, WriteFlags, ZeroFlags};
use std::ops::Range;
use std::rc::Rc;

/// Keeps a moment; see the module.
pub struct CopyBeforeWriteNode {
    child: Child,
    point: Rc<PointInTime>,
}

impl CopyBeforeWriteNode {
    /// Keeps `point`, which is one of what lies below `child`.
    pub fn new(child: Rc<Edge>, point: Rc<PointInTime>) -> Rc<Self> {
        Rc::new(Self { child: Child::new(child), point })
    }

    /// The moment that it keeps.
    pub fn point(&self) -> &Rc<PointInTime> {
        &self.point
    }
}

impl Node for CopyBeforeWriteNode {
    as_the_child!();

    fn driver(&self) -> &'static str {
        "copy-before-write"
    }

    fn limits(&self) -> Limits {
        self.child.disk().limits()
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(self.child.read(offset, buf))
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        Box::pin(self.child.status(range))
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.child.write(offset, data, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.child.write_zeroes(offset, len, flags))
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.child.discard(offset, len))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.child.flush())
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.child.resize(size))
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            // Nothing touches the target afterwards.
            self.point.end().await;
            self.child.flush().await
        })
    }
}
