//! What a disk held at one moment, as a node that can be read while guests change that disk: a backup program's view.
//!
//! It has the contents of a [`PointInTime`], not those of the node that keeps it, and so it isn't a filter in the sense of [`Node::filtered`]. It never has anything in memory
//! to answer from: where bytes are is known under the source's lock only.

use crate::buffer::BufferMut;
use crate::copy_before_write::PointInTime;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind, Resolved};
use crate::node::{Limits, LocalFuture, Node};
use crate::refuse_changes;
use std::ops::Range;
use std::rc::Rc;

/// Shows a moment; see the module.
pub struct SnapshotAccessNode {
    name: Box<str>,
    point: Rc<PointInTime>,
}

impl SnapshotAccessNode {
    /// Shows `point`.
    pub fn new(point: Rc<PointInTime>) -> Rc<Self> {
        Rc::new(Self { name: point.source().name().into(), point })
    }

    fn refusal(&self) -> Error {
        Error::new(ErrorKind::ReadOnly, format!("{}: what it held at a moment can't be changed", self.name))
    }
}

impl Node for SnapshotAccessNode {
    refuse_changes!();

    fn name(&self) -> &str {
        &self.name
    }

    fn driver(&self) -> &'static str {
        "snapshot-access"
    }

    fn size(&self) -> u64 {
        self.point.source().size()
    }

    fn limits(&self) -> Limits {
        let source = self.point.source().limits();
        Limits { remote: source.remote || self.point.target().limits().remote, ..source }
    }

    fn resolve(&self, _range: Range<u64>) -> Resolved {
        Resolved::Ask
    }

    fn read(&self, offset: u64, mut buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(async move {
            let there = self.size().saturating_sub(offset).min(buf.len() as u64) as usize;
            if there == buf.len() {
                return self.point.read(offset, buf).await;
            }
            if there > 0 {
                let part = self.point.read(offset, BufferMut::new(there)).await?;
                buf[..there].copy_from_slice(&part);
            }
            buf[there..].fill(0);
            Ok(buf)
        })
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        Box::pin(async move {
            let end = range.end.min(self.size());
            if range.start >= end {
                return Ok(Extent::new(range.start, range.end - range.start, ExtentKind::Zero));
            }
            self.point.status(range.start..end).await
        })
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }
}
