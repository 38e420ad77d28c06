//! Compression as a node: what is written through it is kept compressed by its child.
//!
//! The work is the child's, which alone knows how ([`WriteFlags::compressed`]). What a request leaves of the pieces that are compressed at once
//! is read and compressed with it, under the child's locks: others may write to the child meanwhile.
//!
//! Zeroes and discards of whole pieces pass as they are, because they need no space anyway; zeroes that cover a part of a piece are data.

use super::child::{Child, as_the_child};
use crate::buffer::{Buffer, BufferMut};
use crate::edge::Edge;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::node::{Limits, LocalFuture, Node, WriteFlags, ZeroFlags};
use std::ops::Range;
use std::rc::Rc;

/// Has compressed what is written; see the module.
pub struct CompressNode {
    child: Child,
    /// What the child compressed in one piece when it was opened, in bytes.
    unit: u64,
}

impl CompressNode {
    /// Has `child` compress what is written.
    ///
    /// # Errors
    /// `Unsupported` if it can't.
    pub fn new(child: Rc<Edge>) -> Result<Rc<Self>> {
        let top = child.disk().top();
        let Some(unit) = top.compressed_unit() else {
            let message = format!("{}: {} keeps no data compressed", top.name(), top.driver());
            return Err(Error::new(ErrorKind::Unsupported, message));
        };
        Ok(Rc::new(Self { child: Child::new(child), unit: u64::from(unit) }))
    }

    /// A range's whole pieces, with what of the range lies before and after them. A last piece that the disk's end cuts off is whole.
    fn split(&self, range: &Range<u64>) -> [Range<u64>; 3] {
        let at_end = range.end >= self.size();
        let start = range.start.next_multiple_of(self.unit).min(range.end);
        let end = if at_end { range.end } else { range.end - range.end % self.unit };
        let end = end.max(start);
        [range.start..start, start..end, end..range.end]
    }
}

impl Node for CompressNode {
    as_the_child!();

    fn driver(&self) -> &'static str {
        "compress"
    }

    fn limits(&self) -> Limits {
        let child = self.child.limits();
        Limits { preferred: child.preferred.max(self.unit as u32), ..child }
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(self.child.read(offset, buf))
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        Box::pin(self.child.status(range))
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.child.write(offset, data, WriteFlags { compressed: true, ..flags }))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let [head, whole, tail] = self.split(&(offset..offset.saturating_add(len)));
            if flags.fast_only && !(head.is_empty() && tail.is_empty()) {
                let message = format!(
                    "{}: {len} bytes at {offset} are no whole pieces of {} bytes, and can only be zeroed by writing data",
                    self.name(),
                    self.unit
                );
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
            for part in [head, tail] {
                if !part.is_empty() {
                    let zeroes = Buffer::zeroed((part.end - part.start) as usize);
                    let flags = WriteFlags { fua: flags.fua, compressed: true };
                    self.child.write(part.start, zeroes, flags).await?;
                }
            }
            if whole.is_empty() {
                return Ok(());
            }
            self.child.write_zeroes(whole.start, whole.end - whole.start, flags).await
        })
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
        Box::pin(self.child.flush())
    }
}
