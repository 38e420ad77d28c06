//! How the data plane asks the broker for a character device: one question, one answer, on a socket for each device.
//!
//! | question | answers |
//! |---|---|
//! | `o`: open it | `k` and what `query-chardev` tells of it; `e` and the error |
//! | `n`: the next connection | `u` or `t` (Unix, TCP) with its way in and its way out; `s` with standard input; `z`: there is none any more |

use crate::daemon::chardev::Connection;
use crate::daemon::failure::{Refusal, generic};
use headwater_sandbox::{receive_packet, send_packet};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net as unix;
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

/// Longest packet, in bytes. A path is the longest thing that an answer has.
const LONGEST: usize = 16 << 10;

pub(super) const OPEN: &[u8] = b"o";
pub(super) const NEXT: &[u8] = b"n";
pub(super) const OPENED: u8 = b'k';
pub(super) const REFUSED: u8 = b'e';
pub(super) const UNIX: &[u8] = b"u";
pub(super) const TCP: &[u8] = b"t";
pub(super) const STDIO: &[u8] = b"s";
pub(super) const NONE: &[u8] = b"z";

/// Both ends of a desk.
pub(super) fn pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

/// One end of a desk. It keeps packets apart, which makes no difference to those who only wait for it and hand it on.
pub(in crate::daemon) struct Desk(UnixStream);

impl Desk {
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        unix_stream(socket).map(Self)
    }

    /// The next packet; none when the other end is gone.
    pub(super) async fn receive(&self) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        self.0.async_io(Interest::READABLE, || receive_packet(&self.0, LONGEST)).await
    }

    pub(super) async fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.0.async_io(Interest::WRITABLE, || send_packet(&self.0, bytes, descriptors)).await
    }

    async fn ask(&self, question: &[u8]) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        self.send(question, &[]).await?;
        self.receive().await?.ok_or_else(|| io::Error::new(io::ErrorKind::BrokenPipe, "the broker has ended"))
    }

    /// Has the device made; gives what `query-chardev` tells of it.
    pub(in crate::daemon) async fn open(&self) -> Result<String, Refusal> {
        let (answer, _) = self.ask(OPEN).await.map_err(|err| generic(format!("chardev: {err}")))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match answer.split_first() {
            Some((&OPENED, filename)) => Ok(text(filename)),
            Some((_, why)) => Err(generic(text(why))),
            None => Err(generic("chardev: the broker doesn't answer")),
        }
    }

    /// The next connection; none if there can be no more. `output` makes the way to standard output.
    pub(in crate::daemon) async fn connection(
        &self,
        output: impl FnOnce() -> io::Result<UnixStream>,
    ) -> io::Result<Option<Connection>> {
        let (answer, descriptors) = self.ask(NEXT).await?;
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next().ok_or(io::ErrorKind::InvalidData);
        let made = match &answer[..] {
            UNIX => Connection::new((unix_stream(next()?)?, unix_stream(next()?)?)),
            TCP => {
                let input = unix_stream(next()?)?;
                Connection::new((input, TcpStream::from_std(std::net::TcpStream::from(next()?))?))
            }
            STDIO => Connection::new((unix_stream(next()?)?, output()?)),
            _ => return Ok(None),
        };
        Ok(Some(made))
    }
}

pub(super) fn unix_stream(socket: OwnedFd) -> io::Result<UnixStream> {
    UnixStream::from_std(unix::UnixStream::from(socket))
}
