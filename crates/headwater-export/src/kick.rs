//! An eventfd that somebody else writes when there is something to do.

use std::io;
use std::os::fd::OwnedFd;
use tokio::io::Interest;
use tokio::net::unix::pipe::Receiver;

/// See the module. For the event loop it is a pipe like another: it can be waited for.
///
/// It is never read. The event loop tells of each write (its epoll is edge-triggered), whatever the eventfd counts, and a number that nobody
/// takes back is full only after 2^64 kicks.
pub(crate) struct Kick(Receiver);

impl Kick {
    /// Watches a descriptor that doesn't block.
    ///
    /// # Errors
    /// If it can't be watched.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        Receiver::from_owned_fd_unchecked(fd).map(Self)
    }

    /// Waits for a kick since the last one that was told. Whoever looks afterwards for what there is to do misses nothing: a kick that comes
    /// meanwhile is told the next time. May be dropped at any time.
    ///
    /// # Errors
    /// If there can be none any more.
    pub(crate) async fn wait(&self) -> io::Result<()> {
        if self.0.ready(Interest::READABLE).await?.is_read_closed() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // What was told is told no more.
        let _ = self.0.try_io(|| Err::<(), _>(io::ErrorKind::WouldBlock.into()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use rustix::event::{EventfdFlags, eventfd};
    use std::time::Duration;

    #[tokio::test]
    async fn each_kick_is_told_once_and_those_before_the_first_wait_together() {
        let ours = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let theirs = ours.try_clone().unwrap();
        let ring = || rustix::io::write(&theirs, &1u64.to_le_bytes()).unwrap();
        ring();
        let kick = Kick::new(ours).unwrap();
        ring();
        kick.wait().await.unwrap();
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(1)).await;
            assert!(kick.wait().now_or_never().is_none(), "nobody kicked");
            ring();
            kick.wait().await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_can_never_be_kicked_again_is_an_error() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let kick = Kick::new(ours.into()).unwrap();
        drop(theirs);
        assert_eq!(kick.wait().await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
