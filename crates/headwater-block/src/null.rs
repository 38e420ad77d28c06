//! A node without storage, for measuring what lies above it: writes go nowhere, reads give zeroes.

use crate::buffer::{Buffer, BufferMut};
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind, Resolved};
use crate::node::{Access, Change, Limits, LocalFuture, Node, WriteFlags, ZeroFlags};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

/// What the node calls itself. QEMU has two drivers, which differ in how they complete requests; here it's only a name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NullDriver {
    /// "null-co".
    #[default]
    Co,
    /// "null-aio".
    Aio,
}

/// How a null node behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NullOptions {
    /// Its name for itself.
    pub driver: NullDriver,
    /// The size in bytes.
    pub size: u64,
    /// How long each request takes.
    pub latency: Duration,
    /// Says that it reads as zeroes. Without it the status of all bytes is "data". They read as zeroes either way: QEMU leaves a
    /// read's memory as it was, and a guest would see what others left there.
    pub read_zeroes: bool,
    /// Refuses changes.
    pub read_only: bool,
}

impl Default for NullOptions {
    fn default() -> Self {
        Self {
            driver: NullDriver::Co,
            size: 1 << 30,
            latency: Duration::ZERO,
            read_zeroes: false,
            read_only: false,
        }
    }
}

/// A node without storage; see the module.
pub struct NullNode {
    name: Box<str>,
    clock: Rc<dyn Clock>,
    options: NullOptions,
}

impl NullNode {
    /// A node that behaves as `options` say. `name` is for messages.
    pub fn new(name: &str, clock: Rc<dyn Clock>, options: NullOptions) -> Rc<Self> {
        Rc::new(Self { name: name.into(), clock, options })
    }

    async fn take_time(&self) {
        if !self.options.latency.is_zero() {
            self.clock.sleep_until(self.clock.now().saturating_add(self.options.latency)).await;
        }
    }

    /// What all changes do: nothing, after a while.
    fn change(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async {
            self.take_time().await;
            if self.options.read_only {
                return Err(Error::new(
                    ErrorKind::ReadOnly,
                    format!("{} is open for reading only", self.name),
                ));
            }
            Ok(())
        })
    }
}

impl Node for NullNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn driver(&self) -> &'static str {
        match self.options.driver {
            NullDriver::Co => "null-co",
            NullDriver::Aio => "null-aio",
        }
    }

    fn size(&self) -> u64 {
        self.options.size
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    /// Always to be asked: whoever measures wants to see requests.
    fn resolve(&self, _range: Range<u64>) -> Resolved {
        Resolved::Ask
    }

    fn read(&self, _offset: u64, mut buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(async move {
            self.take_time().await;
            buf.fill(0);
            Ok(buf)
        })
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        let zero = self.options.read_zeroes || range.start >= self.options.size;
        let end = if zero { range.end } else { range.end.min(self.options.size) };
        let kind = if zero { ExtentKind::Zero } else { ExtentKind::Data };
        let host_offset = (!zero).then_some(range.start);
        let extent = Extent { host_offset, ..Extent::new(range.start, end - range.start, kind) };
        Box::pin(std::future::ready(Ok(extent)))
    }

    fn access(&self, _range: Range<u64>, _change: Change) -> Access {
        Access::Shared
    }

    fn write(&self, _offset: u64, _data: Buffer, _flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        self.change()
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        self.change()
    }

    fn discard(&self, _offset: u64, _len: u64) -> LocalFuture<'_, Result<()>> {
        self.change()
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async {
            self.take_time().await;
            Ok(())
        })
    }

    fn resize(&self, _size: u64) -> LocalFuture<'_, Result<()>> {
        let message = format!("{}: {} has a fixed size", self.name, self.driver());
        Box::pin(std::future::ready(Err(Error::new(ErrorKind::Unsupported, message))))
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Disk, DiskOptions};
    use futures_util::FutureExt;
    use std::cell::Cell;

    /// A clock that jumps to where somebody wants to sleep until.
    #[derive(Default)]
    struct JumpClock(Rc<Cell<Duration>>);

    impl Clock for JumpClock {
        fn now(&self) -> Duration {
            self.0.get()
        }

        fn sleep_until(&self, deadline: Duration) -> LocalFuture<'static, ()> {
            self.0.set(deadline);
            Box::pin(std::future::ready(()))
        }
    }

    fn now<T>(future: impl Future<Output = T>) -> T {
        future.now_or_never().expect("the clock jumps")
    }

    #[test]
    fn requests_take_their_time_and_leave_nothing() {
        let latency = Duration::from_millis(7);
        for read_zeroes in [false, true] {
            let clock = Rc::new(JumpClock::default());
            let options = NullOptions { latency, read_zeroes, ..NullOptions::default() };
            let disk = Disk::new(
                NullNode::new("null", clock.clone(), options),
                clock.clone(),
                DiskOptions::default(),
            );
            assert_eq!(disk.size(), 1 << 30);
            now(disk.write(5, Buffer::copy_of(&[7; 5000]), WriteFlags::default())).unwrap();
            assert!(now(disk.read(5, 5000)).unwrap().iter().all(|byte| *byte == 0));
            now(disk.flush()).unwrap();
            assert_eq!(clock.now(), latency * 3);
            let status = now(disk.block_status(0..1 << 30, 8)).unwrap();
            let kind = if read_zeroes { ExtentKind::Zero } else { ExtentKind::Data };
            assert_eq!(status.iter().map(|e| (e.len, e.kind)).collect::<Vec<_>>(), [(1 << 30, kind)]);
        }
    }

    #[test]
    fn it_can_be_read_only_and_never_resized() {
        let options = NullOptions { read_only: true, driver: NullDriver::Aio, ..NullOptions::default() };
        let node = NullNode::new("null", Rc::new(JumpClock::default()), options);
        assert_eq!(node.driver(), "null-aio");
        assert_eq!(now(node.discard(0, 512)).unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!(now(node.resize(1)).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
