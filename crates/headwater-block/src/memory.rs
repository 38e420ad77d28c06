//! A node that lives in memory: for tests, and as the smallest example of a node.

use crate::buffer::{Buffer, BufferMut};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind, Resolved};
use crate::node::{Access, Change, Limits, LocalFuture, Node, WriteFlags, ZeroFlags};
use crate::zero::is_zero;
use std::cell::{Cell, RefCell};
use std::future::ready;
use std::ops::Range;
use std::rc::Rc;

/// Bytes in memory that behave as a file: they grow when written past the end.
pub struct MemoryNode {
    name: String,
    bytes: RefCell<Vec<u8>>,
    limits: Cell<Limits>,
    read_only: Cell<bool>,
}

/// The unit in which [`MemoryNode::status`] looks for zeroes, in bytes.
const STATUS_UNIT: u64 = 4096;

impl MemoryNode {
    /// A node that holds `bytes`.
    pub fn new(name: impl Into<String>, bytes: Vec<u8>) -> Rc<Self> {
        Rc::new(Self {
            name: name.into(),
            bytes: RefCell::new(bytes),
            limits: Cell::new(Limits::default()),
            read_only: Cell::new(false),
        })
    }

    /// A copy of what it holds.
    pub fn contents(&self) -> Vec<u8> {
        self.bytes.borrow().clone()
    }

    /// Makes the node claim other limits.
    pub fn set_limits(&self, limits: Limits) {
        self.limits.set(limits);
    }

    /// Refuses changes from now on, or takes them again.
    pub fn set_read_only(&self, read_only: bool) {
        self.read_only.set(read_only);
    }

    fn change(&self, offset: u64, len: u64, f: impl FnOnce(&mut [u8])) -> Result<()> {
        if self.read_only.get() {
            return Err(Error::new(ErrorKind::ReadOnly, format!("{} is open for reading only", self.name)));
        }
        let end =
            offset.checked_add(len).and_then(|end| usize::try_from(end).ok()).filter(|end| *end < 1 << 40);
        let Some(end) = end else {
            return Err(Error::new(ErrorKind::OutOfRange, format!("{}: {len} bytes at {offset}", self.name)));
        };
        let mut bytes = self.bytes.borrow_mut();
        if end > bytes.len() {
            bytes.resize(end, 0);
        }
        f(&mut bytes[offset as usize..end]);
        Ok(())
    }
}

impl Node for MemoryNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn driver(&self) -> &'static str {
        "memory"
    }

    fn size(&self) -> u64 {
        self.bytes.borrow().len() as u64
    }

    fn limits(&self) -> Limits {
        self.limits.get()
    }

    fn is_read_only(&self) -> bool {
        self.read_only.get()
    }

    fn resolve(&self, _range: Range<u64>) -> Resolved {
        Resolved::Ask
    }

    fn read(&self, offset: u64, mut buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        let bytes = self.bytes.borrow();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let there = buf.len().min(bytes.len() - start);
        buf[..there].copy_from_slice(&bytes[start..start + there]);
        buf[there..].fill(0);
        Box::pin(ready(Ok(buf)))
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        let bytes = self.bytes.borrow();
        let kind_at = |offset: u64| {
            let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
            let end = (start - start % STATUS_UNIT as usize + STATUS_UNIT as usize).min(bytes.len());
            if is_zero(&bytes[start..end]) { ExtentKind::Zero } else { ExtentKind::Data }
        };
        let kind = kind_at(range.start);
        let mut end = (range.start / STATUS_UNIT + 1) * STATUS_UNIT;
        while end < range.end && kind_at(end) == kind {
            end += STATUS_UNIT;
        }
        let mut extent = Extent::new(range.start, end.min(range.end) - range.start, kind);
        extent.host_offset = (kind == ExtentKind::Data).then_some(range.start);
        Box::pin(ready(Ok(extent)))
    }

    fn access(&self, _range: Range<u64>, _change: Change) -> Access {
        Access::Shared
    }

    fn write(&self, offset: u64, data: Buffer, _flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(self.change(offset, data.len() as u64, |bytes| bytes.copy_from_slice(&data))))
    }

    fn write_zeroes(&self, offset: u64, len: u64, _flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(self.change(offset, len, |bytes| bytes.fill(0))))
    }

    fn discard(&self, _offset: u64, _len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Ok(())))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Ok(())))
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        self.bytes.borrow_mut().resize(size as usize, 0);
        Box::pin(ready(Ok(())))
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Ok(())))
    }
}
