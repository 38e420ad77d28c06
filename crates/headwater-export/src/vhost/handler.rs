//! Carries one request out on the disk.

use std::cell::Cell;
use std::rc::Rc;

use headwater_block::{BufferMut, Client, Disk, Edge, Error, ErrorKind, WriteFlags, ZeroFlags};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};

use super::chain::{Kind, Request};
use super::config::{BlkOptions, MAX_RANGE_SECTORS, MAX_RANGES, SECTOR};
use super::guest::{Gone, Memory, Parts};

/// Most memory that one request takes at a time, in bytes. Longer ones are done piece by piece.
pub(crate) const PIECE: u64 = 1 << 20;

/// The length in bytes of a disk's name as guests get it.
const ID: usize = 20;

/// The size in bytes of a range in a list of what is to be discarded or zeroed.
const RANGE: usize = 16;

/// In such a range: storage may be given back.
const UNMAP: u32 = 1;

/// What a guest's requests are carried out on.
pub(crate) struct Handler {
    /// Leads to the disk.
    pub(crate) edge: Rc<Edge>,
    pub(crate) options: BlkOptions,
    /// What the guest is told that the disk is called.
    pub(crate) id: String,
    /// Whether changes must be durable before the guest hears of them.
    pub(crate) write_through: Cell<bool>,
}

/// Why a request fails, in the words of virtio.
enum Failure {
    /// The guest asked for what isn't offered.
    Unsupported,
    /// Anything else.
    Failed(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Gone> for Failure {
    fn from(_: Gone) -> Self {
        Self::Failed(Error::new(ErrorKind::InvalidInput, "the guest's memory is gone".to_owned()))
    }
}

fn invalid(message: String) -> Failure {
    Failure::Failed(Error::new(ErrorKind::InvalidInput, message))
}

impl Handler {
    /// Carries a request out and says how it ended, as the guest is to be told. The future must be driven to its end.
    pub(crate) async fn handle(&self, client: &Client, request: &Request, memory: &Memory) -> u8 {
        let outcome = match self.carry_out(client, request, memory).await {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
            Err(Failure::Failed(error)) => {
                tracing::debug!(kind = ?request.kind, sector = request.sector, "{error}");
                VIRTIO_BLK_S_IOERR
            }
        };
        outcome as u8
    }

    async fn carry_out(&self, client: &Client, request: &Request, memory: &Memory) -> Result<(), Failure> {
        // A longer request is several for the disk: whatever disk the graph puts here between two of them holds the same bytes.
        let disk = &*client.disk();
        let changes = matches!(request.kind, Kind::Write(_) | Kind::Discard(_) | Kind::WriteZeroes(_));
        if changes && !self.options.takes_changes(disk) {
            return Err(
                Error::new(ErrorKind::ReadOnly, format!("{} is for reading only", disk.name())).into()
            );
        }
        match &request.kind {
            Kind::Read(parts) => {
                let offset = self.check(disk, request.sector, parts.len())?;
                for (at, len) in pieces(parts.len()) {
                    let data = client.read(offset + at, len).await?;
                    parts.write(memory, at, &data)?;
                }
                Ok(())
            }
            Kind::Write(parts) => {
                let offset = self.check(disk, request.sector, parts.len())?;
                let fua = self.write_through.get();
                for (at, len) in pieces(parts.len()) {
                    let mut data = BufferMut::new(len as usize);
                    parts.read(memory, at, &mut data)?;
                    client
                        .write(offset + at, data.freeze(), WriteFlags { fua, ..WriteFlags::default() })
                        .await?;
                }
                if !fua {
                    client.settle(offset..offset + parts.len()).await?;
                }
                Ok(())
            }
            Kind::Flush => Ok(client.enter().await.flush().await?),
            Kind::GetId(parts) => {
                let mut id = [0; ID];
                let len = self.id.len().min(ID);
                id[..len].copy_from_slice(&self.id.as_bytes()[..len]);
                let room = usize::try_from(parts.len()).unwrap_or(ID).min(ID);
                Ok(parts.write(memory, 0, &id[..room])?)
            }
            Kind::Discard(parts) => {
                for Range { offset, len, flags } in self.ranges(disk, parts, memory)? {
                    if flags != 0 {
                        return Err(Failure::Unsupported);
                    }
                    client.enter().await.discard(offset, len).await?;
                }
                if self.write_through.get() {
                    client.enter().await.flush().await?;
                }
                Ok(())
            }
            Kind::WriteZeroes(parts) => {
                for Range { offset, len, flags } in self.ranges(disk, parts, memory)? {
                    if flags & !UNMAP != 0 {
                        return Err(Failure::Unsupported);
                    }
                    let fua = self.write_through.get();
                    let flags = ZeroFlags { fua, unmap: flags & UNMAP != 0, fast_only: false };
                    client.write_zeroes(offset, len, flags).await?;
                    if !fua {
                        client.settle(offset..offset + len).await?;
                    }
                }
                Ok(())
            }
            Kind::Other(_) => Err(Failure::Unsupported),
        }
    }

    /// Checks that a request is in whole blocks and on the disk, and gives its offset in bytes.
    fn check(&self, disk: &Disk, sector: u64, len: u64) -> Result<u64, Failure> {
        let block = u64::from(self.options.logical_block.bytes());
        let offset = sector.checked_mul(SECTOR);
        let end = offset.and_then(|offset| offset.checked_add(len));
        // What is left behind the last whole sector isn't there for the guest.
        let size = disk.size() / SECTOR * SECTOR;
        match (offset, end) {
            (Some(offset), Some(end))
                if end <= size && offset.is_multiple_of(block) && len.is_multiple_of(block) =>
            {
                Ok(offset)
            }
            _ => Err(invalid(format!(
                "{}: {len} bytes at sector {sector} are not whole blocks of {block} bytes within {size}",
                disk.name()
            ))),
        }
    }

    /// The ranges of a request to discard or zero, all of them checked.
    fn ranges(&self, disk: &Disk, parts: &Parts, memory: &Memory) -> Result<Vec<Range>, Failure> {
        let count = parts.len() / RANGE as u64;
        if count == 0 || !parts.len().is_multiple_of(RANGE as u64) || count > MAX_RANGES.into() {
            return Err(invalid(format!("a list of ranges has {} bytes", parts.len())));
        }
        let mut list = vec![0; parts.len() as usize];
        parts.read(memory, 0, &mut list)?;
        let range = |bytes: &[u8]| {
            let word =
                |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
            let sector = u64::from(word(4)) << 32 | u64::from(word(0));
            let (sectors, flags) = (word(8), word(12));
            if sectors > MAX_RANGE_SECTORS {
                return Err(invalid(format!("a range of {sectors} sectors is too long")));
            }
            let len = u64::from(sectors) * SECTOR;
            Ok(Range { offset: self.check(disk, sector, len)?, len, flags })
        };
        list.chunks_exact(RANGE).map(range).collect()
    }
}

/// A range of the disk in bytes.
struct Range {
    offset: u64,
    len: u64,
    flags: u32,
}

/// Cuts a length into offsets and lengths of at most [`PIECE`].
fn pieces(len: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..len).step_by(PIECE as usize).map(move |at| (at, PIECE.min(len - at)))
}
