//! A filter that adds nothing: it reaches the layer below through that layer's disk, as layers do in a graph whose nodes are used by several.

use crate::executor::Sim;
use headwater_block::node::{Access, Change};
use headwater_block::{
    Buffer, BufferMut, Disk, Extent, Limits, LocalFuture, Node, Resolved, Result, WriteFlags, ZeroFlags,
};
use std::ops::Range;
use std::rc::Rc;

/// The filter; see the module.
pub struct SimFilter {
    sim: Sim,
    name: String,
    disk: Rc<Disk>,
}

impl SimFilter {
    /// A filter on top of `disk`.
    pub fn new(sim: &Sim, name: &str, disk: Rc<Disk>) -> Rc<Self> {
        Rc::new(Self { sim: sim.clone(), name: name.to_string(), disk })
    }
}

impl Node for SimFilter {
    fn name(&self) -> &str {
        &self.name
    }

    fn driver(&self) -> &'static str {
        "sim-filter"
    }

    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn limits(&self) -> Limits {
        self.disk.limits()
    }

    fn is_read_only(&self) -> bool {
        self.disk.is_read_only()
    }

    fn resolve(&self, _range: Range<u64>) -> Resolved {
        // Whoever read there directly would go past the disk's lock.
        Resolved::Ask
    }

    fn expect(&self, range: Range<u64>) {
        self.disk.top().expect(range);
    }

    fn read(&self, offset: u64, mut buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(async move {
            self.sim.yield_now().await;
            let inside = self.size().saturating_sub(offset).min(buf.len() as u64);
            let mut rest = buf.split_off(inside as usize);
            rest.fill(0);
            if buf.is_empty() {
                return Ok(rest);
            }
            Ok(self.disk.read_into(offset, buf).await?.join(rest))
        })
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        Box::pin(async move {
            self.sim.yield_now().await;
            self.disk.top().status(range).await
        })
    }

    fn access(&self, _range: Range<u64>, _change: Change) -> Access {
        Access::Shared
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.disk.write(offset, data, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.disk.write_zeroes(offset, len, flags))
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.disk.discard(offset, len))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.disk.flush())
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.disk.resize(size))
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.disk.close())
    }

    fn backing(&self) -> Option<Rc<dyn Node>> {
        self.disk.top().backing()
    }

    fn filtered(&self) -> Option<Rc<dyn Node>> {
        Some(self.disk.top())
    }
}
