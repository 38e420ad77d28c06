//! Carries one request out on the disk, and says how it ended in the kernel's words.

use headwater_block::{BufferMut, Client, Error, ErrorKind, WriteFlags, ZeroFlags};
use headwater_ublk::{Arrived, DataPort, Operation, Request};
use std::io;
use std::rc::Rc;

/// What a device's requests are carried out on.
pub(crate) struct Handler {
    /// How requests reach the disk.
    pub(crate) client: Client,
    pub(crate) data: DataPort,
    pub(crate) writable: bool,
}

/// Why a request failed: an error number.
struct Refused(i32);

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        tracing::debug!("{error}");
        Self(match error.kind() {
            ErrorKind::NoSpace => libc::ENOSPC,
            ErrorKind::Unsupported => libc::EOPNOTSUPP,
            // The kernel makes EIO of most others.
            _ => libc::EIO,
        })
    }
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        tracing::debug!("a ublk request's bytes can't be copied: {error}");
        Self(libc::EIO)
    }
}

impl Handler {
    /// Carries a request out; gives its tag, and the answer. The future must be driven to its end.
    pub(crate) async fn handle(self: Rc<Self>, arrived: Arrived) -> (u16, i32) {
        let Arrived { tag, request } = arrived;
        let answer = match self.carry_out(tag, request).await {
            Ok(bytes) => bytes,
            Err(Refused(error)) => -error,
        };
        (tag, answer)
    }

    /// Gives how many bytes were read or written; the kernel looks at no other count.
    async fn carry_out(&self, tag: u16, request: Request) -> Result<i32, Refused> {
        let Request { operation, offset, len } = request;
        let client = &self.client;
        if !self.writable && !matches!(operation, Operation::Read | Operation::Flush) {
            return Err(Refused(libc::EPERM));
        }
        match operation {
            Operation::Read => {
                let data = client.read(offset, len).await?;
                self.data.give(tag, &data)?;
            }
            Operation::Write { durable } => {
                let mut data = BufferMut::new(usize::try_from(len).map_err(|_| Refused(libc::EIO))?);
                self.data.take(tag, &mut data)?;
                client
                    .write(offset, data.freeze(), WriteFlags { fua: durable, ..WriteFlags::default() })
                    .await?;
                if !durable {
                    client.settle(offset..offset + len).await?;
                }
            }
            Operation::Flush => client.enter().await.flush().await?,
            Operation::Discard => client.enter().await.discard(offset, len).await?,
            Operation::WriteZeroes { unmap, durable } => {
                let flags = ZeroFlags { fua: durable, unmap, fast_only: false };
                client.write_zeroes(offset, len, flags).await?;
                if !durable {
                    client.settle(offset..offset + len).await?;
                }
            }
            Operation::Other(_) => return Err(Refused(libc::EOPNOTSUPP)),
        }
        Ok(match operation {
            Operation::Read | Operation::Write { .. } => i32::try_from(len).unwrap_or(i32::MAX),
            _ => 0,
        })
    }
}
