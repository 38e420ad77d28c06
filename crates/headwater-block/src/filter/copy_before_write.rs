//! Copy-before-write as a node: what the disk below held when the node was made goes to another disk before it is changed.
//!
//! The work is that disk's ([`Disk::begin_point_in_time`](crate::Disk::begin_point_in_time)), because it needs the locks: so changes that don't come through this node
//! are saved as well. The node stands for the moment, and ends it when it is closed. [`SnapshotAccessNode`](super::SnapshotAccessNode) shows it.

use super::child::{Child, as_the_child, passed_to_the_child};
use crate::buffer::BufferMut;
use crate::copy_before_write::PointInTime;
use crate::edge::Edge;
use crate::error::Result;
use crate::node::{LocalFuture, Node};
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
    passed_to_the_child!();

    fn driver(&self) -> &'static str {
        "copy-before-write"
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(self.child.read(offset, buf))
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            // Nothing touches the target afterwards.
            self.point.end().await;
            self.child.flush().await
        })
    }
}
