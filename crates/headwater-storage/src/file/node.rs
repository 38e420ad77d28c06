//! The file node: a disk's bytes in one file or on one block device.
//!
//! **Reads** take any offset, length and memory: what O_DIRECT wouldn't take goes through aligned memory of our own. **Writes** must be
//! multiples of `limits().write_alignment`, and may come from any memory. Images whose granularity is smaller than a file's
//! alignment ask for the page cache with [`Node::use_buffered`] before they write.
//!
//! **The size** is kept in memory: with the image locks held, nobody else changes it. Reads past it give zeroes, writes past it grow it.

use super::engine::Engine;
use super::flush::Durability;
use super::holes::{Holes, Run};
use super::lock::{self, Use};
use super::op::{OpenFile, Request};
use super::open::{self, Discard, FileOptions, Kind, Opened};
use super::zeroes::Abilities;
use headwater_block::node::{Access, Change};
use headwater_block::write_watch::WriteWatch;
use headwater_block::{
    Buffer, BufferMut, Error, ErrorKind, Extent, ExtentKind, Identity, Limits, LocalFuture, Node, Resolved,
    Result, WriteFlags, ZeroFlags,
};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::Path;
use std::rc::{Rc, Weak};

/// The largest piece, in bytes, that goes through aligned memory at once.
const BOUNCE: usize = 1 << 20;

/// A file or block device. Reads take any offset, length and memory, and give zeroes past the end; writes must be multiples of
/// `limits().write_alignment`, may come from any memory, and make a file longer. While it is open for writing, image locks keep others from
/// writing it, headwater or QEMU; while it is open for reading, too, unless [`FileOptions::force_share`] is set.
pub struct FileNode {
    me: Weak<FileNode>,
    pub(super) engine: Rc<Engine>,
    pub(super) file: Rc<OpenFile>,
    pub(super) name: String,
    pub(super) kind: Kind,
    /// How it was opened, in the end.
    pub(super) options: FileOptions,
    pub(super) locked: Cell<bool>,
    /// What the locks were last changed to; none if they are those of the opening.
    pub(super) usage: Cell<Option<Use>>,
    closed: Cell<bool>,
    /// In bytes, with everything that was written so far.
    pub(super) size: Cell<u64>,
    block: u32,
    holes: RefCell<Holes>,
    /// The file system doesn't tell holes from data.
    no_holes: Cell<bool>,
    /// The file system doesn't know RWF_DSYNC.
    no_durable_writes: Cell<bool>,
    pub(super) abilities: Abilities,
    pub(super) durability: Durability,
    write_watch: WriteWatch,
}

impl fmt::Debug for FileNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileNode({})", self.name)
    }
}

impl FileNode {
    /// Opens a regular file or a block device. Errors: `NotFound`, `PermissionDenied`, `ReadOnly` (the file system is), `InUse`
    /// (another process has it; see [`FileOptions::locking`]), `InvalidInput` (a directory, FIFO, ...), `Unsupported` (the options
    /// demand what the file system lacks).
    pub fn open(engine: &Rc<Engine>, path: impl AsRef<Path>, options: FileOptions) -> Result<Rc<Self>> {
        let name = path.as_ref().display().to_string();
        let opened = open::existing(path.as_ref(), &name, &options)?;
        Ok(Self::new(engine, name, opened, options))
    }

    /// Makes an empty file with mode 0644 (less the umask), durably, and opens it for reading and writing, whatever
    /// [`FileOptions::read_only`] says. Errors: `AlreadyExists` among those of [`FileNode::open`].
    pub fn create(engine: &Rc<Engine>, path: impl AsRef<Path>, options: FileOptions) -> Result<Rc<Self>> {
        let name = path.as_ref().display().to_string();
        let options = FileOptions { read_only: false, ..options };
        let opened = open::new(path.as_ref(), &name, &options)?;
        Ok(Self::new(engine, name, opened, options))
    }

    fn new(engine: &Rc<Engine>, name: String, opened: Opened, options: FileOptions) -> Rc<Self> {
        let options = FileOptions { read_only: opened.read_only, ..options };
        Rc::new_cyclic(|me| Self {
            me: me.clone(),
            engine: engine.clone(),
            file: Rc::new(opened.file),
            name,
            kind: opened.kind,
            options,
            locked: Cell::new(opened.locked),
            usage: Cell::new(None),
            closed: Cell::new(false),
            size: Cell::new(opened.size),
            block: opened.block,
            holes: RefCell::new(Holes::default()),
            no_holes: Cell::new(false),
            no_durable_writes: Cell::new(false),
            abilities: Abilities::default(),
            durability: Durability::default(),
            write_watch: WriteWatch::default(),
        })
    }

    /// True while requests go around the page cache.
    pub fn is_direct(&self) -> bool {
        self.file.alignment.get() > 1
    }

    /// True if image locks keep other processes away.
    pub fn is_locked(&self) -> bool {
        self.locked.get()
    }

    /// Tells when a write goes past an offset of the file.
    pub fn write_watch(&self) -> &WriteWatch {
        &self.write_watch
    }

    /// What is behind the file.
    pub fn engine(&self) -> &Rc<Engine> {
        &self.engine
    }

    pub(super) fn alignment(&self) -> u64 {
        u64::from(self.file.alignment.get())
    }

    /// What the kernel said, with what was being done to which bytes.
    pub(super) fn failed(&self, err: io::Error, what: &str, offset: u64, len: u64) -> Error {
        let err = Error::from_io(err, format_args!("{what} {len} bytes at {offset} of {}", self.name));
        match err.kind() {
            ErrorKind::NoSpace => err.context("no room is left; make some and try again"),
            _ => err,
        }
    }

    pub(super) fn check_open(&self) -> Result<()> {
        if !self.closed.get() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Closed, format!("{} was closed", self.name)))
    }

    fn check_writable(&self) -> Result<()> {
        self.check_open()?;
        if !self.options.read_only {
            return Ok(());
        }
        Err(Error::new(ErrorKind::ReadOnly, format!("{} is open for reading only", self.name)))
    }

    /// Refuses changes that can't be; gives the range of the others.
    pub(super) fn check_change(&self, what: &str, offset: u64, len: u64) -> Result<Range<u64>> {
        self.check_writable()?;
        let refuse = |kind, why: fmt::Arguments<'_>| {
            Err(Error::new(kind, format!("cannot {what} {len} bytes at {offset} of {}: {why}", self.name)))
        };
        let end = match offset.checked_add(len) {
            Some(end) if i64::try_from(end).is_ok() => end,
            _ => return refuse(ErrorKind::OutOfRange, format_args!("no file is that large")),
        };
        if self.kind == Kind::BlockDevice && end > self.size.get() {
            let size = self.size.get();
            return refuse(ErrorKind::OutOfRange, format_args!("the device has {size} bytes and can't grow"));
        }
        let align = self.alignment();
        if !offset.is_multiple_of(align) || !len.is_multiple_of(align) {
            let why = format_args!("direct I/O takes multiples of {align} bytes only; use the page cache");
            return refuse(ErrorKind::InvalidInput, why);
        }
        self.write_watch.writes_until(end);
        Ok(offset..end)
    }

    /// Marks the time in which a range changes.
    pub(super) fn change(&self, range: Range<u64>) -> ChangeGuard<'_> {
        self.holes.borrow_mut().change(&range);
        ChangeGuard { node: self, range }
    }

    pub(super) fn grow(&self, end: u64) {
        self.size.set(self.size.get().max(end));
    }

    fn is_aligned_memory(&self, memory: &[u8]) -> bool {
        memory.as_ptr().addr().is_multiple_of(self.file.memory_alignment.get() as usize)
    }

    async fn read_bytes(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        self.check_open()?;
        let there = self.size.get().saturating_sub(offset);
        let want = usize::try_from(there).map_or(buf.len(), |there| there.min(buf.len()));
        if want == 0 {
            buf.fill(0);
            return Ok(buf);
        }
        let len = buf.len() as u64;
        let align = self.alignment();
        let takes = offset.is_multiple_of(align) && len.is_multiple_of(align) && self.is_aligned_memory(&buf);
        if !takes {
            return self.read_through(offset, buf, want).await;
        }
        let (mut buf, done) = self
            .engine
            .read(&self.file, offset, buf, want)
            .await
            .map_err(|err| self.failed(err, "read", offset, len))?;
        if done < want {
            self.check_length()?;
        }
        buf[done..].fill(0);
        Ok(buf)
    }

    /// Reads the first `want` bytes, which lie within the file, through aligned memory.
    async fn read_through(&self, offset: u64, mut buf: BufferMut, want: usize) -> Result<BufferMut> {
        let align = self.alignment();
        let mut filled = 0;
        while filled < want {
            let at = offset + filled as u64;
            let skip = (at % align) as usize;
            let start = at - skip as u64;
            let count = (want - filled).min(BOUNCE - skip);
            let bounce = BufferMut::new((skip + count).next_multiple_of(align as usize));
            let (bounce, done) = self
                .engine
                .read(&self.file, start, bounce, skip + count)
                .await
                .map_err(|err| self.failed(err, "read", at, count as u64))?;
            if done < skip + count {
                self.check_length()?;
            }
            let there = done.clamp(skip, skip + count);
            let target = &mut buf[filled..filled + count];
            target[..there - skip].copy_from_slice(&bounce[skip..there]);
            // Only if somebody else made the file shorter.
            target[there - skip..].fill(0);
            filled += count;
        }
        buf[want..].fill(0);
        Ok(buf)
    }

    async fn write_bytes(&self, offset: u64, data: Buffer, flags: WriteFlags) -> Result<()> {
        let range = self.check_change("write", offset, data.len() as u64)?;
        if range.is_empty() {
            return Ok(());
        }
        let change = self.change(range.clone());
        if self.is_aligned_memory(&data) {
            self.write_aligned(offset, data, flags.fua).await?;
        } else {
            for start in (0..data.len()).step_by(BOUNCE) {
                let piece = BufferMut::copy_of(&data[start..data.len().min(start + BOUNCE)]).freeze();
                self.write_aligned(offset + start as u64, piece, flags.fua).await?;
            }
        }
        self.grow(range.end);
        drop(change);
        if flags.fua && self.no_durable_writes.get() { self.flush_changes().await } else { Ok(()) }
    }

    /// Writes what the file takes as it is.
    pub(super) async fn write_aligned(&self, offset: u64, data: Buffer, durable: bool) -> Result<()> {
        let len = data.len() as u64;
        let durable = durable && !self.no_durable_writes.get() && !self.options.no_flush;
        let mut result = self.engine.write(&self.file, offset, data.clone(), durable).await;
        if durable && result.as_ref().is_err_and(|err| err.raw_os_error() == Some(libc::EOPNOTSUPP)) {
            self.no_durable_writes.set(true);
            result = self.engine.write(&self.file, offset, data, false).await;
        }
        let err = match result {
            Ok(()) => return Ok(()),
            Err(err) => self.failed(err, "write", offset, len),
        };
        if durable && !self.is_direct() {
            // The kernel tells once that it could not write cached pages back; this call may have been told of others' pages.
            self.durability.lose(&err);
        }
        Err(err)
    }

    /// What becomes of discards.
    pub(super) fn discards(&self) -> Discard {
        self.options.discard
    }

    /// Flushes do nothing.
    pub(super) fn never_flushes(&self) -> bool {
        self.options.no_flush
    }

    async fn status_of(&self, range: Range<u64>) -> Result<Extent> {
        self.check_open()?;
        let size = self.size.get();
        let extent = |end: u64, hole: bool| {
            let kind = if hole { ExtentKind::Zero } else { ExtentKind::Data };
            let host_offset = (!hole).then_some(range.start);
            Extent { host_offset, ..Extent::new(range.start, end - range.start, kind) }
        };
        if range.start >= size {
            return Ok(extent(range.end, true));
        }
        let remembered = self.holes.borrow().find(range.start);
        let run = match remembered {
            Some(run) => run,
            None if self.no_holes.get() => Run { range: range.start..size, hole: false },
            None => {
                let asked_at = self.holes.borrow().changes();
                let run = self.look_up(range.start, size).await?;
                let fresh = self.holes.borrow_mut().remember(run.clone(), asked_at);
                // "Data" is never wrong, whatever was written meanwhile.
                Run { hole: run.hole && fresh, ..run }
            }
        };
        // A hole at the end goes on past it.
        let end = if run.hole && run.range.end >= size { range.end } else { run.range.end.min(range.end) };
        Ok(extent(end, run.hole))
    }

    /// Asks the file system for the run at `start`, which lies below `size`.
    async fn look_up(&self, start: u64, size: u64) -> Result<Run> {
        let data = Run { range: start..size, hole: false };
        let failed = |err| self.failed(err, "look for holes in", start, size - start);
        match self.engine.plain(&self.file, Request::SeekData { offset: start }).await {
            Ok(next) if next > start => Ok(Run { range: start..next.min(size), hole: true }),
            Ok(_) => match self.engine.plain(&self.file, Request::SeekHole { offset: start }).await {
                Ok(hole) if hole > start => Ok(Run { range: start..hole.min(size), ..data }),
                // It changed between the two calls, or ended: the rest is asked for again.
                Ok(_) => {
                    Ok(Run { range: start..size.min(start.saturating_add(u64::from(self.block))), ..data })
                }
                Err(err) if err.raw_os_error() == Some(libc::ENXIO) => Ok(data),
                Err(err) => Err(failed(err)),
            },
            Err(err) => match err.raw_os_error() {
                Some(libc::ENXIO) => self.check_length().map(|()| Run { hole: true, ..data }),
                Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOTTY | libc::ESPIPE) => {
                    self.no_holes.set(true);
                    Ok(data)
                }
                _ => Err(failed(err)),
            },
        }
    }

    async fn set_size(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        let old = self.size.get();
        if size == old {
            return Ok(());
        }
        if self.kind == Kind::BlockDevice {
            let message =
                format!("{}: a block device can't be resized here, from {old} to {size} bytes", self.name);
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        if i64::try_from(size).is_err() {
            let message = format!("cannot resize {} to {size} bytes: no file is that large", self.name);
            return Err(Error::new(ErrorKind::OutOfRange, message));
        }
        let _change = self.change(old.min(size)..old.max(size));
        let resized = self.engine.plain(&self.file, Request::SetSize { size }).await;
        resized.map_err(|err| Error::from_io(err, format_args!("resize {} to {size} bytes", self.name)))?;
        self.size.set(size);
        Ok(())
    }

    async fn shut_down(&self) -> Result<()> {
        self.check_open()?;
        let flushed = if self.options.read_only { Ok(()) } else { self.flush_changes().await };
        self.closed.set(true);
        if self.locked.replace(false) {
            lock::release(self.file.fd.as_fd());
        }
        flushed
    }
}

/// See [`FileNode::change`].
pub(super) struct ChangeGuard<'a> {
    node: &'a FileNode,
    range: Range<u64>,
}

impl Drop for ChangeGuard<'_> {
    fn drop(&mut self) {
        // Whether it worked or not: something may have been changed.
        self.node.holes.borrow_mut().change(&self.range);
        self.node.durability.changed();
    }
}

impl Node for FileNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn driver(&self) -> &'static str {
        "file"
    }

    fn size(&self) -> u64 {
        self.size.get()
    }

    fn limits(&self) -> Limits {
        let write_alignment = self.file.alignment.get();
        let preferred = self.block.max(write_alignment);
        Limits { write_alignment, preferred, allocation_unit: preferred, ..Limits::default() }
    }

    fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    fn resolve(&self, range: Range<u64>) -> Resolved {
        let len = range.end.saturating_sub(range.start);
        let there = self.size.get().saturating_sub(range.start);
        match self.me.upgrade() {
            _ if there == 0 => Resolved::Zero { len, depth: 0 },
            Some(node) => Resolved::At { node, offset: range.start, len: len.min(there), depth: 0 },
            None => Resolved::Ask,
        }
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(self.read_bytes(offset, buf))
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        Box::pin(self.status_of(range))
    }

    /// Bytes are overwritten where they are: all changes are whole blocks, and nothing is mapped.
    fn access(&self, _range: Range<u64>, _change: Change) -> Access {
        Access::Shared
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.write_bytes(offset, data, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.zero_bytes(offset, len, flags))
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.discard_bytes(offset, len))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.check_open()?;
            if self.options.read_only { Ok(()) } else { self.flush_changes().await }
        })
    }

    /// What has completed is the kernel's.
    fn is_settled(&self, _range: Range<u64>) -> bool {
        true
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.set_size(size))
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.shut_down())
    }

    fn identity(&self) -> Result<Identity> {
        self.marks()
    }

    /// Leaves O_DIRECT. Requests in flight are not disturbed: the kernel keeps the two ways coherent.
    fn use_buffered(&self) -> Result<()> {
        self.check_open()?;
        if self.is_direct() { open::leave_direct(&self.file, &self.name) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests;
