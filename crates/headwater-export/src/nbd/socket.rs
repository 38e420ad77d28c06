//! A connected socket, TCP or Unix, plain or with TLS over it, polled by the one task that owns it.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use headwater_tls::{PlainSocket, TlsCredentials, TlsStream};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use crate::listener::Listener;

/// What we ask the kernel to buffer in each direction, in bytes. At 128 KiB requests, larger buffers mean fewer wake-ups.
const BUFFER: usize = 2 << 20;

/// A connected socket.
#[derive(Debug)]
pub(crate) enum Socket {
    /// As it is.
    Plain(PlainSocket),
    /// With TLS over it.
    Tls(Box<TlsStream<PlainSocket>>),
}

impl Socket {
    /// Ready with the next connection to `listener`.
    pub(crate) fn poll_accept(listener: &Listener, cx: &mut Context<'_>) -> Poll<io::Result<Self>> {
        match listener {
            Listener::Tcp(listeners) => {
                for listener in listeners {
                    if let Poll::Ready(accepted) = listener.poll_accept(cx) {
                        return Poll::Ready(accepted.map(|(stream, _)| Self::tcp(stream)));
                    }
                }
                Poll::Pending
            }
            Listener::Unix { listener, .. } => {
                listener.poll_accept(cx).map_ok(|(stream, _)| Self::unix(stream))
            }
        }
    }

    /// Takes over a TCP connection.
    pub(crate) fn tcp(stream: TcpStream) -> Self {
        // Replies are written in batches already; waiting for more would only delay them. Both options fail only if the
        // connection is gone, which the session will find.
        let _ = stream.set_nodelay(true);
        // A client whose machine is gone says no goodbye; its place must become free all the same.
        let _ = sockopt::set_socket_keepalive(&stream, true);
        enlarge_buffers(stream.as_fd());
        Self::Plain(PlainSocket::Tcp(stream))
    }

    /// Takes over a connection of a Unix socket.
    pub(crate) fn unix(stream: UnixStream) -> Self {
        enlarge_buffers(stream.as_fd());
        Self::Plain(PlainSocket::Unix(stream))
    }

    /// Starts TLS. May be dropped at any time.
    pub(crate) async fn start_tls(self, credentials: &TlsCredentials) -> headwater_block::Result<Self> {
        match self {
            Self::Plain(plain) => Ok(Self::Tls(Box::new(credentials.accept(plain).await?))),
            // The negotiation has it that it is asked for once.
            tls @ Self::Tls(_) => Ok(tls),
        }
    }

    /// Receives into `buf` (not empty). Zero means that the client will send no more.
    pub(crate) fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buf = ReadBuf::new(buf);
        ready!(match self {
            Self::Plain(plain) => Pin::new(plain).poll_read(cx, &mut buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, &mut buf),
        })?;
        Poll::Ready(Ok(buf.filled().len()))
    }

    /// Sends from the front of `parts` (not empty), as many bytes as are taken. See also [`Socket::poll_flush`].
    pub(crate) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(plain) => Pin::new(plain).poll_write_vectored(cx, parts),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
        }
    }

    /// Ready when the kernel has what was sent: TLS keeps what the kernel doesn't take.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(_) => Poll::Ready(Ok(())),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    /// Says that nothing follows, so that the client can tell this end from one that somebody else made.
    pub(crate) fn say_end(&mut self, cx: &mut Context<'_>) {
        if let Self::Tls(stream) = self {
            // A client that isn't there doesn't hear it.
            let _ = Pin::new(stream).poll_shutdown(cx);
        }
    }

    /// Whether the client will send no more than what has come and wasn't received yet.
    pub(crate) fn has_ended(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let ends = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut asked = [PollFd::new(self.plain(), PollFlags::RDHUP)];
        // If the system doesn't say, it will be seen later.
        poll(&mut asked, Some(&Timespec::default())).is_ok() && asked[0].revents().intersects(ends)
    }

    fn plain(&self) -> &PlainSocket {
        match self {
            Self::Plain(plain) => plain,
            Self::Tls(stream) => stream.below(),
        }
    }

    /// Tells the client at once that the connection is over, while the socket may stay open for a while.
    pub(crate) fn cut(&self) {
        self.plain().shut_down();
    }
}

/// Best effort: the kernel clips what the administrator doesn't allow, and a smaller buffer works too.
fn enlarge_buffers(socket: BorrowedFd<'_>) {
    let _ = sockopt::set_socket_send_buffer_size(socket, BUFFER);
    let _ = sockopt::set_socket_recv_buffer_size(socket, BUFFER);
}
