//! Carries one request out on the disk, and says how it ended in the kernel's words.

use headwater_block::range_lock::{Guard, Mode, RangeLock, Token};
use headwater_block::{Buffer, Client, Disk, Error, ErrorKind, ExtentKind, WriteFlags, ZeroFlags};
use headwater_fuse::{Answer, Attributes, Errno, NewAttributes, Operation, SeekTo, Space, Ticket};
use rustix::fs::FallocateFlags;
use std::cell::Cell;
use std::rc::Rc;
use std::time::SystemTime;

/// Most extents that are looked up at once to find data or a hole.
const MAX_EXTENTS: usize = 256;

/// How many bytes of zeroes are written at once. A bound keeps one request from occupying the disk for long.
const MAX_ZEROES: u64 = 1 << 30;

/// Who may use the file: `chmod` and `chown` change it, for as long as it is mounted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// What requests are carried out on.
pub(crate) struct Handler {
    /// How requests reach the disk.
    pub(crate) client: Client,
    pub(crate) writable: bool,
    pub(crate) writethrough: bool,
    pub(crate) growable: bool,
    pub(crate) access: Cell<Access>,
    /// When it was mounted: the time that the file shows.
    pub(crate) since: SystemTime,
    /// Tells others that the size has changed.
    pub(crate) resized: Box<dyn Fn()>,
    /// Held while the size is changed: who would grow the disk looks again whether somebody else has.
    pub(crate) resizing: Rc<RangeLock>,
}

/// Why a request failed, as the kernel has it.
struct Refused(Errno);

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        tracing::debug!("{error}");
        Self(match error.kind() {
            ErrorKind::NoSpace => Errno::NOSPC,
            ErrorKind::ReadOnly => Errno::ROFS,
            ErrorKind::PermissionDenied | ErrorKind::NotAllowed => Errno::PERM,
            ErrorKind::Unsupported => Errno::OPNOTSUPP,
            ErrorKind::InvalidInput | ErrorKind::OutOfRange => Errno::INVAL,
            ErrorKind::InUse => Errno::BUSY,
            _ => Errno::IO,
        })
    }
}

impl Handler {
    /// Carries a request out; gives its ticket, and the answer. `data` are the bytes of a write. The future must be driven to its end.
    pub(crate) async fn handle(
        &self,
        ticket: Ticket,
        operation: Result<Operation, Errno>,
        data: Buffer,
    ) -> (Ticket, Result<Answer<Buffer>, Errno>) {
        let answer = match operation {
            Ok(operation) => self.carry_out(operation, data).await.map_err(|Refused(errno)| errno),
            Err(errno) => Err(errno),
        };
        (ticket, answer)
    }

    async fn carry_out(&self, operation: Operation, data: Buffer) -> Result<Answer<Buffer>, Refused> {
        Ok(match operation {
            Operation::GetAttributes => Answer::Attributes(self.attributes()),
            Operation::SetAttributes(new) => {
                self.set_attributes(new).await?;
                Answer::Attributes(self.attributes())
            }
            Operation::Open { for_writing } if for_writing && !self.writable => {
                return Err(Refused(Errno::ROFS));
            }
            Operation::Open { .. } => Answer::Opened,
            Operation::Release => Answer::Done,
            Operation::Read { offset, len } => Answer::Read(read(&self.client, offset, len.into()).await?),
            Operation::Write { offset, durable } => Answer::Written(self.write(offset, data, durable).await?),
            Operation::Flush => {
                self.client.enter().await.flush().await?;
                Answer::Done
            }
            Operation::Allocate { offset, len, mode } => {
                self.allocate(offset, len, mode).await?;
                Answer::Done
            }
            Operation::Seek { offset, to } => Answer::Found(seek(&self.client, offset, to).await?),
            Operation::Space => Answer::Space(Space { size: self.client.disk().size(), block_size: 512 }),
        })
    }

    fn attributes(&self) -> Attributes {
        const REGULAR_FILE: u32 = 0o100_000;
        let Access { mode, uid, gid } = self.access.get();
        Attributes {
            size: self.client.disk().size(),
            time: self.since,
            mode: REGULAR_FILE | mode,
            uid,
            gid,
            block_size: 4096,
        }
    }

    async fn set_attributes(&self, new: NewAttributes) -> Result<(), Refused> {
        let mut access = self.access.get();
        if let Some(mode) = new.mode {
            let mode = mode & 0o7777;
            // A disk isn't a program, and one that can't be written isn't made so by a mode.
            if mode & 0o7111 != 0 || (!self.writable && mode & 0o222 != 0) {
                return Err(Refused(Errno::PERM));
            }
            access.mode = mode;
        }
        access.uid = new.uid.unwrap_or(access.uid);
        access.gid = new.gid.unwrap_or(access.gid);
        match new.size {
            Some(size) if size != self.client.disk().size() && !self.growable => {
                return Err(Refused(Errno::PERM));
            }
            Some(size) => {
                let _resizing = self.hold_size().await;
                self.resize(&*self.client.enter().await, size).await?;
            }
            None => {}
        }
        self.access.set(access);
        Ok(())
    }

    async fn write(&self, offset: u64, data: Buffer, durable: bool) -> Result<u32, Refused> {
        let fits = self.reach(offset, data.len() as u64).await?;
        let data = data.slice(0..fits as usize);
        let flags = WriteFlags { fua: durable || self.writethrough, ..WriteFlags::default() };
        self.client.write(offset, data, flags).await?;
        Ok(fits as u32)
    }

    async fn allocate(&self, offset: u64, length: u64, mode: FallocateFlags) -> Result<(), Refused> {
        let unmap = mode == FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let keeps_size = mode.contains(FallocateFlags::KEEP_SIZE);
        // Plain allocation is refused: a promise of room can't be kept for every image. Programs write zeroes instead.
        if !unmap && mode - FallocateFlags::KEEP_SIZE != FallocateFlags::ZERO_RANGE {
            return Err(Refused(Errno::OPNOTSUPP));
        }
        let length = if keeps_size {
            length.min(self.client.disk().size().saturating_sub(offset))
        } else if self.reach(offset, length).await? == length {
            length
        } else {
            // Unlike a write it can't be done in part.
            return Err(Refused(Errno::NOSPC));
        };
        let flags = ZeroFlags { unmap, fua: self.writethrough, ..ZeroFlags::default() };
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let step = MAX_ZEROES.min(end - at);
            self.client.write_zeroes(at, step, flags).await?;
            at += step;
        }
        Ok(())
    }

    /// How much of a change at `offset` the disk takes, after it has grown where it may.
    async fn reach(&self, offset: u64, length: u64) -> Result<u64, Refused> {
        let end = offset.checked_add(length).ok_or(Refused(Errno::FBIG))?;
        if end > self.client.disk().size() && self.growable {
            let _resizing = self.hold_size().await;
            let disk = self.client.enter().await;
            if end > disk.size() {
                self.resize(&disk, end).await?;
            }
        }
        match length.min(self.client.disk().size().saturating_sub(offset)) {
            0 if length > 0 => Err(Refused(Errno::NOSPC)),
            fits => Ok(fits),
        }
    }

    /// Formats that count in sectors get the whole of the last one.
    async fn resize(&self, disk: &Disk, size: u64) -> Result<(), Refused> {
        match disk.resize(size).await {
            Err(error) if error.kind() == ErrorKind::InvalidInput && !size.is_multiple_of(512) => {
                disk.resize(size.next_multiple_of(512)).await?;
            }
            result => result?,
        }
        (self.resized)();
        Ok(())
    }

    async fn hold_size(&self) -> Guard {
        self.resizing.acquire(Token::for_request(), 0..1, Mode::Exclusive).await
    }
}

async fn read(client: &Client, offset: u64, length: u64) -> Result<Buffer, Refused> {
    let length = length.min(client.disk().size().saturating_sub(offset));
    if length == 0 {
        return Ok(Buffer::zeroed(0));
    }
    Ok(client.read(offset, length).await?)
}

/// The next data, or the next hole: there is one at the end of the disk.
async fn seek(client: &Client, offset: u64, to: SeekTo) -> Result<u64, Refused> {
    let size = client.disk().size();
    if offset >= size {
        return Err(Refused(Errno::NXIO));
    }
    let mut at = offset;
    while at < size {
        let extents = client.block_status(at..size, MAX_EXTENTS).await?;
        for extent in &extents {
            if (extent.kind == ExtentKind::Data) == (to == SeekTo::Data) {
                return Ok(at);
            }
            at = extent.end();
        }
    }
    match to {
        SeekTo::Hole => Ok(size),
        SeekTo::Data => Err(Refused(Errno::NXIO)),
    }
}
