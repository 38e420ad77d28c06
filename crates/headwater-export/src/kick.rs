//! An eventfd that somebody else writes when there is something to do.

use std::io;
use std::os::fd::OwnedFd;
use tokio::net::unix::pipe::Receiver;

/// See the module. For the event loop it is a pipe like another: it can be waited for and read.
pub(crate) struct Kick(Receiver);

impl Kick {
    /// Watches a descriptor that doesn't block.
    ///
    /// # Errors
    /// If it can't be watched.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        Receiver::from_owned_fd_unchecked(fd).map(Self)
    }

    /// Waits for a kick. May be dropped at any time.
    ///
    /// # Errors
    /// If there can be none any more.
    pub(crate) async fn wait(&self) -> io::Result<()> {
        loop {
            self.0.readable().await?;
            match self.0.try_read(&mut [0; 8]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}
