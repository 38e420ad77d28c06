//! The raw format: the bytes of the file, or of a window into it, are the disk.

use headwater_block::node::{Access, Change};
use headwater_block::{
    Buffer, BufferMut, DebugEvent, Error, ErrorKind, Extent, ExtentKind, Limits, LocalFuture, Node, Resolved,
    Result, WriteFlags, ZeroFlags,
};
use std::future::ready;
use std::ops::Range;
use std::rc::Rc;

/// A raw image over the node of its file.
pub struct RawNode {
    file: Rc<dyn Node>,
    /// Where the disk starts in the file, in bytes.
    offset: u64,
    /// The disk's size in bytes if it is fixed; otherwise it is what the file has from `offset` on.
    fixed: Option<u64>,
    read_only: bool,
    /// The file wants to know what is about to happen, because it injects faults.
    events: bool,
}

/// How a raw image is opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawOptions {
    /// Refuse all changes, even if the file would take them.
    pub read_only: bool,
    /// Where the disk starts in the file, in bytes.
    pub offset: u64,
    /// The disk's size in bytes; by default it reaches to the end of the file.
    pub size: Option<u64>,
}

impl RawNode {
    /// The disk that `file` holds.
    ///
    /// Fails with `InvalidInput` if the window isn't in the file.
    pub fn new(file: Rc<dyn Node>, options: RawOptions) -> Result<Rc<Self>> {
        let RawOptions { read_only, offset, size } = options;
        let read_only = read_only || file.is_read_only();
        let end = size.map_or(Some(offset), |size| offset.checked_add(size));
        if end.is_none_or(|end| end > file.size()) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{}: the window at offset {offset} of size {} reaches past the end of the file at {}; choose one inside",
                    file.name(),
                    size.unwrap_or(0),
                    file.size()
                ),
            ));
        }
        if !read_only {
            align(&*file, &[offset, size.unwrap_or(file.size() - offset)])?;
        }
        let events = file.hears_debug_events();
        Ok(Rc::new(Self { file, offset, fixed: size, read_only, events }))
    }

    /// Refuses changes that are not allowed at all.
    fn changeable(&self) -> Result<()> {
        if self.read_only {
            let message = format!("{}: the image is open for reading only", self.name());
            return Err(Error::new(ErrorKind::ReadOnly, message));
        }
        Ok(())
    }

    /// The offset in the file of `len` bytes that are written at `offset` of the disk. An image on this one may grow, as far as there is room.
    fn write_at(&self, offset: u64, len: u64) -> Result<u64> {
        let start = self.offset.checked_add(offset);
        match (start, self.fixed) {
            (Some(start), None) if start.checked_add(len).is_some() => {
                self.changeable()?;
                Ok(start)
            }
            (_, None) => self.change_at(offset, len, ErrorKind::OutOfRange),
            (_, Some(_)) => self.change_at(offset, len, ErrorKind::NoSpace),
        }
    }

    /// The offset in the file of a change of `len` bytes at `offset` of the disk, which must be within it; the error is of this kind if it isn't.
    fn change_at(&self, offset: u64, len: u64, kind: ErrorKind) -> Result<u64> {
        self.changeable()?;
        if offset.checked_add(len).is_none_or(|end| end > self.size()) {
            return Err(Error::new(
                kind,
                format!(
                    "{}: {len} bytes at {offset} are not within the disk of {} bytes",
                    self.name(),
                    self.size()
                ),
            ));
        }
        Ok(self.offset + offset)
    }

    fn tell(&self, events: &[DebugEvent]) {
        if self.events {
            events.iter().for_each(|event| self.file.debug_event(*event));
        }
    }

    /// The part of `range` that lies within the disk, in bytes of the file; `None` if it starts past the end.
    fn within(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let end = range.end.min(self.size());
        (range.start < end).then(|| self.offset + range.start..self.offset + end)
    }
}

/// Makes sure that a disk whose start and end are `bounds` can be written to its last byte: what direct I/O can't reach goes through the
/// page cache.
fn align(file: &dyn Node, bounds: &[u64]) -> Result<()> {
    let fits = || bounds.iter().all(|bound| bound.is_multiple_of(u64::from(file.limits().write_alignment)));
    if !fits() {
        file.use_buffered()?;
    }
    if !fits() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{}: the disk begins or ends at {bounds:?}, which writes in units of {} bytes can't reach; open it read-only, or enlarge it to a \
                 multiple",
                file.name(),
                file.limits().write_alignment
            ),
        ));
    }
    Ok(())
}

impl Node for RawNode {
    fn name(&self) -> &str {
        self.file.name()
    }

    fn driver(&self) -> &'static str {
        "raw"
    }

    fn size(&self) -> u64 {
        self.fixed.unwrap_or_else(|| self.file.size().saturating_sub(self.offset))
    }

    fn limits(&self) -> Limits {
        self.file.limits()
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn resolve(&self, range: Range<u64>) -> Resolved {
        let Some(within) = self.within(&range) else {
            return Resolved::Zero { len: range.end - range.start, depth: 0 };
        };
        match self.file.resolve(within.clone()) {
            // A read straight from the file would go untold.
            Resolved::Ask if self.events => Resolved::Ask,
            // The file has nothing better to say: the bytes are read from itself.
            Resolved::Ask => Resolved::At {
                node: self.file.clone(),
                offset: within.start,
                len: within.end - within.start,
                depth: 0,
            },
            known => known,
        }
    }

    fn read(&self, offset: u64, mut buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        let there = self.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        if there > 0 {
            self.tell(&[DebugEvent::ReadAio]);
        }
        if there == buf.len() {
            return self.file.read(self.offset + offset, buf);
        }
        let mut past_end = buf.split_off(there);
        past_end.fill(0);
        if there == 0 {
            return Box::pin(ready(Ok(buf.join(past_end))));
        }
        Box::pin(async move { Ok(self.file.read(self.offset + offset, buf).await?.join(past_end)) })
    }

    fn expect(&self, range: Range<u64>) {
        let end = range.end.min(self.size());
        self.file.expect(self.offset + range.start.min(end)..self.offset + end);
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        let Some(within) = self.within(&range) else {
            return Box::pin(ready(Ok(Extent::new(range.start, range.end - range.start, ExtentKind::Zero))));
        };
        Box::pin(async move {
            let extent = self.file.status(within).await?;
            // What a file lacks reads as zeroes: a raw image has nothing below it.
            let kind = if extent.kind == ExtentKind::Data { ExtentKind::Data } else { ExtentKind::Zero };
            Ok(Extent { offset: range.start, kind, depth: 0, ..extent })
        })
    }

    fn access(&self, range: Range<u64>, change: Change) -> Access {
        let Access::Exclusive(range) =
            self.file.access(range.start + self.offset..range.end + self.offset, change)
        else {
            return Access::Shared;
        };
        Access::Exclusive(range.start.saturating_sub(self.offset)..range.end.saturating_sub(self.offset))
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        match self.write_at(offset, data.len() as u64) {
            Ok(at) => {
                self.tell(&[DebugEvent::WriteAio]);
                self.file.write(at, data, flags)
            }
            Err(err) => Box::pin(ready(Err(err))),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        match self.write_at(offset, len) {
            Ok(at) => self.file.write_zeroes(at, len, flags),
            Err(err) => Box::pin(ready(Err(err))),
        }
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        match self.change_at(offset, len, ErrorKind::OutOfRange) {
            Ok(at) => self.file.discard(at, len),
            Err(err) => Box::pin(ready(Err(err))),
        }
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.tell(&[DebugEvent::FlushToOs, DebugEvent::FlushToDisk]);
        self.file.flush()
    }

    fn is_settled(&self, range: Range<u64>) -> bool {
        self.within(&range).is_none_or(|within| self.file.is_settled(within))
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        let checked = self.changeable().and_then(|()| {
            if self.fixed.is_some() {
                let message = format!("{}: a window of fixed size into a file can't be resized", self.name());
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
            align(&*self.file, &[size])?;
            size.checked_add(self.offset).ok_or_else(|| {
                Error::new(ErrorKind::OutOfRange, format!("{}: the size {size} is too large", self.name()))
            })
        });
        match checked {
            Ok(size) => self.file.resize(size),
            Err(err) => Box::pin(ready(Err(err))),
        }
    }

    fn can_recall(&self) -> bool {
        self.file.can_recall()
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        self.file.close()
    }

    fn file(&self) -> Option<Rc<dyn Node>> {
        Some(self.file.clone())
    }
}

#[cfg(test)]
mod tests;
