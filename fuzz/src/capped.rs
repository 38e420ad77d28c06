//! Memory as a file on a disk that is nearly full.
//!
//! A damaged image may send a write to any offset. A file would become sparse there; memory would be filled.

use headwater_block::memory::MemoryNode;
use headwater_block::node::{Access, Change};
use headwater_block::{
    Buffer, BufferMut, Error, ErrorKind, Extent, Limits, LocalFuture, Node, Resolved, Result, WriteFlags,
    ZeroFlags,
};
use std::future::ready;
use std::ops::Range;
use std::rc::Rc;

/// How large the file may get, in bytes.
const CAPACITY: u64 = 2 << 20;

/// A [`MemoryNode`] that doesn't grow beyond a fixed size.
pub(crate) struct CappedNode {
    memory: Rc<MemoryNode>,
}

impl CappedNode {
    pub(crate) fn new(name: &str, bytes: Vec<u8>) -> Rc<Self> {
        Rc::new(Self { memory: MemoryNode::new(name, bytes) })
    }

    pub(crate) fn contents(&self) -> Vec<u8> {
        self.memory.contents()
    }

    fn room(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= CAPACITY => Ok(()),
            _ => {
                let message = format!("{}: no space for {len} bytes at {offset}", self.memory.name());
                Err(Error::new(ErrorKind::NoSpace, message))
            }
        }
    }
}

impl Node for CappedNode {
    fn name(&self) -> &str {
        self.memory.name()
    }

    fn driver(&self) -> &'static str {
        "memory"
    }

    fn size(&self) -> u64 {
        self.memory.size()
    }

    fn limits(&self) -> Limits {
        self.memory.limits()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn resolve(&self, _range: Range<u64>) -> Resolved {
        Resolved::Ask
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        self.memory.read(offset, buf)
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        self.memory.status(range)
    }

    fn access(&self, range: Range<u64>, change: Change) -> Access {
        self.memory.access(range, change)
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        match self.room(offset, data.len() as u64) {
            Ok(()) => self.memory.write(offset, data, flags),
            Err(error) => Box::pin(ready(Err(error))),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        match self.room(offset, len) {
            Ok(()) => self.memory.write_zeroes(offset, len, flags),
            Err(error) => Box::pin(ready(Err(error))),
        }
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.memory.discard(offset, len)
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.memory.flush()
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        match self.room(size, 0) {
            Ok(()) => self.memory.resize(size),
            Err(error) => Box::pin(ready(Err(error))),
        }
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        self.memory.close()
    }
}
