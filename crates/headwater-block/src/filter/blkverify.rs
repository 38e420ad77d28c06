//! blkverify: two children that must hold the same, one that is under test and one that is trusted (a raw image). Every change goes to both, every
//! read is compared.
//!
//! A difference is an error that names the first byte that differs, and **it is final**: every later request fails with it, because nobody
//! knows which bytes are the right ones. (QEMU's blkverify ends the process.) A request that one child fails and the other doesn't is a difference,
//! too.
//!
//! - Nothing may slip past the comparison: [`Node::status`] says that all is data, and [`Node::filtered`] that there is nothing below which one could
//!   use instead.
//! - Changes exclude each other and reads where they overlap ([`Node::access`]): otherwise the two children could carry them out in different orders.
//! - Zeroes are written to both. Discards go to none, because what reads back afterwards is for each child to decide.

use super::child::Child;
use crate::buffer::{Buffer, BufferMut};
use crate::drain::Hurry;
use crate::edge::Edge;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind, Resolved};
use crate::node::{Access, Change, Limits, LocalFuture, Node, WriteFlags, ZeroFlags};
use futures_util::future::join;
use std::cell::RefCell;
use std::future::ready;
use std::ops::Range;
use std::rc::Rc;

/// Two images that must hold the same; see the module.
pub struct BlkverifyNode {
    test: Child,
    raw: Child,
    /// The difference that was found.
    differ: RefCell<Option<Error>>,
}

impl BlkverifyNode {
    /// Compares `test` with `raw`.
    ///
    /// # Errors
    /// `InvalidInput` if they differ in size.
    pub fn new(test: Rc<Edge>, raw: Rc<Edge>) -> Result<Rc<Self>> {
        // Both get whole blocks of both.
        let alignment = |edge: &Rc<Edge>| edge.disk().limits().write_alignment;
        let of_both = alignment(&test).max(alignment(&raw));
        let (test, raw) = (Child::aligned(test, of_both), Child::aligned(raw, of_both));
        let (size, raw_size) = (test.disk().size(), raw.disk().size());
        if size != raw_size {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "cannot compare {} ({size} bytes) with {} ({raw_size} bytes): both must have the same size",
                    test.name(),
                    raw.name()
                ),
            ));
        }
        Ok(Rc::new(Self { test, raw, differ: RefCell::new(None) }))
    }

    fn check(&self) -> Result<()> {
        self.differ.borrow().as_ref().map_or(Ok(()), |err| Err(err.clone()))
    }

    /// Ends all use.
    #[cold]
    fn differ(&self, what: &str) -> Error {
        let message = format!(
            "{} and {} differ: {what}; nothing is read or written any more, so that both can be examined",
            self.test.name(),
            self.raw.name()
        );
        tracing::error!(message);
        self.differ.borrow_mut().get_or_insert(Error::new(ErrorKind::Corrupt, message)).clone()
    }

    /// What both said of one request: the same, or that is the difference.
    fn agree<T>(&self, what: std::fmt::Arguments<'_>, test: Result<T>, raw: Result<T>) -> Result<(T, T)> {
        match (test, raw) {
            (Ok(test), Ok(raw)) => Ok((test, raw)),
            (Err(err), Err(_)) => Err(err),
            (Err(err), Ok(_)) => Err(self.differ(&format!("the first failed to {what}: {err}"))),
            (Ok(_), Err(err)) => Err(self.differ(&format!("the second failed to {what}: {err}"))),
        }
    }

    async fn read_both(&self, offset: u64, buf: BufferMut) -> Result<BufferMut> {
        self.check()?;
        let len = buf.len();
        let (test, raw) = join(self.test.read(offset, buf), self.raw.read(offset, BufferMut::new(len))).await;
        let (test, raw) = self.agree(format_args!("read {len} bytes at {offset}"), test, raw)?;
        self.check()?;
        match test.iter().zip(raw.iter()).position(|(a, b)| a != b) {
            None => Ok(test),
            Some(at) => Err(self.differ(&format!(
                "byte {} is {:#04x} in the first and {:#04x} in the second (found by a read of {len} bytes at {offset})",
                offset + at as u64,
                test[at],
                raw[at]
            ))),
        }
    }

    async fn write_both(&self, offset: u64, data: Buffer, flags: WriteFlags) -> Result<()> {
        self.check()?;
        let len = data.len();
        let (test, raw) =
            join(self.test.write(offset, data.clone(), flags), self.raw.write(offset, data, flags)).await;
        self.agree(format_args!("write {len} bytes at {offset}"), test, raw).map(drop)
    }

    async fn zero_both(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.check()?;
        if flags.fast_only {
            // What is fast for one may not be for the other.
            let message =
                format!("{}: zeroes are written to two images, which isn't known to be fast", self.name());
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let (test, raw) =
            join(self.test.write_zeroes(offset, len, flags), self.raw.write_zeroes(offset, len, flags)).await;
        self.agree(format_args!("zero {len} bytes at {offset}"), test, raw).map(drop)
    }

    async fn flush_both(&self) -> Result<()> {
        self.check()?;
        let (test, raw) = join(self.test.flush(), self.raw.flush()).await;
        test.and(raw)
    }

    async fn resize_both(&self, size: u64) -> Result<()> {
        self.check()?;
        let (test, raw) = join(self.test.resize(size), self.raw.resize(size)).await;
        self.agree(format_args!("resize to {size} bytes"), test, raw).map(drop)
    }
}

impl Node for BlkverifyNode {
    fn name(&self) -> &str {
        self.test.name()
    }

    fn driver(&self) -> &'static str {
        "blkverify"
    }

    fn size(&self) -> u64 {
        self.test.disk().size()
    }

    fn limits(&self) -> Limits {
        let (test, raw) = (self.test.disk().limits(), self.raw.disk().limits());
        Limits {
            write_alignment: test.write_alignment.max(raw.write_alignment),
            allocation_unit: test.allocation_unit.max(raw.write_alignment),
            max_transfer: test.max_transfer.min(raw.max_transfer),
            ..test
        }
    }

    fn is_read_only(&self) -> bool {
        self.test.disk().is_read_only() || self.raw.disk().is_read_only()
    }

    fn resolve(&self, _range: Range<u64>) -> Resolved {
        Resolved::Ask
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(self.read_both(offset, buf))
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        let size = self.size();
        let (kind, end) = match range.start < size {
            true => (ExtentKind::Data, range.end.min(size)),
            false => (ExtentKind::Zero, range.end),
        };
        Box::pin(ready(Ok(Extent::new(range.start, end - range.start, kind))))
    }

    fn access(&self, range: Range<u64>, _change: Change) -> Access {
        Access::Exclusive(range)
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.write_both(offset, data, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.zero_both(offset, len, flags))
    }

    fn discard(&self, _offset: u64, _len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(self.check()))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.flush_both())
    }

    fn is_settled(&self, range: Range<u64>) -> bool {
        [&self.test, &self.raw].iter().all(|child| child.top().is_settled(range.clone()))
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.resize_both(size))
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.flush_both())
    }

    fn use_buffered(&self) -> Result<()> {
        self.test.top().use_buffered().and(self.raw.top().use_buffered())
    }

    fn keeps_what_is_read(&self) -> bool {
        self.test.disk().keeps_what_is_read() || self.raw.disk().keeps_what_is_read()
    }

    fn hurry(&self, held: &mut Vec<Hurry>) {
        self.test.top().hurry(held);
        self.raw.top().hurry(held);
    }
}
