//! A filter node that makes its node far away: every request takes a while longer, however many are in flight.

use headwater_block::node::{Access, Change};
use headwater_block::{
    Buffer, BufferMut, Clock, Extent, Limits, LocalFuture, Node, Resolved, Result, WriteFlags, ZeroFlags,
};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

/// Passes every request on after a pause.
///
/// ```text
/// read, write, ... -> wait `latency` -> node
/// status, resolve  -> node (their cost is in the reply that carries them)
/// ```
pub struct DelayNode {
    node: Rc<dyn Node>,
    clock: Rc<dyn Clock>,
    latency: Duration,
}

impl DelayNode {
    /// Puts `node` this far away.
    pub fn new(node: Rc<dyn Node>, clock: Rc<dyn Clock>, latency: Duration) -> Rc<Self> {
        Rc::new(Self { node, clock, latency })
    }

    async fn wait(&self) {
        self.clock.sleep_until(self.clock.now() + self.latency).await;
    }
}

impl Node for DelayNode {
    fn name(&self) -> &str {
        self.node.name()
    }

    fn driver(&self) -> &'static str {
        "delay"
    }

    fn size(&self) -> u64 {
        self.node.size()
    }

    fn limits(&self) -> Limits {
        Limits { remote: true, ..self.node.limits() }
    }

    fn is_read_only(&self) -> bool {
        self.node.is_read_only()
    }

    /// A direct way to the node below would go round the delay.
    fn resolve(&self, _range: Range<u64>) -> Resolved {
        Resolved::Ask
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(async move {
            self.wait().await;
            self.node.read(offset, buf).await
        })
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        self.node.status(range)
    }

    fn access(&self, range: Range<u64>, change: Change) -> Access {
        self.node.access(range, change)
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.wait().await;
            self.node.write(offset, data, flags).await
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.wait().await;
            self.node.write_zeroes(offset, len, flags).await
        })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.wait().await;
            self.node.discard(offset, len).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.wait().await;
            self.node.flush().await
        })
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        self.node.resize(size)
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        self.node.close()
    }

    fn file(&self) -> Option<Rc<dyn Node>> {
        Some(self.node.clone())
    }
}
