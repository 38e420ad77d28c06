//! A connected socket, TCP or Unix, polled by the one task that owns it.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// What we ask the kernel to buffer in each direction, in bytes. At 128 KiB requests, larger buffers mean fewer wake-ups.
const BUFFER: usize = 2 << 20;

/// A connected socket.
#[derive(Debug)]
pub(crate) enum Socket {
    /// TCP.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixStream),
}

impl Socket {
    /// Takes over a TCP connection.
    pub(crate) fn tcp(stream: TcpStream) -> Self {
        // Replies are written in batches already; waiting for more would only delay them. Both options fail only if the
        // connection is gone, which the session will find.
        let _ = stream.set_nodelay(true);
        // A client whose machine is gone says no goodbye; its place must become free all the same.
        let _ = sockopt::set_socket_keepalive(&stream, true);
        enlarge_buffers(stream.as_fd());
        Self::Tcp(stream)
    }

    /// Takes over a connection of a Unix socket.
    pub(crate) fn unix(stream: UnixStream) -> Self {
        enlarge_buffers(stream.as_fd());
        Self::Unix(stream)
    }

    /// Receives into `buf` (not empty). Zero means that the client will send no more.
    pub(crate) fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buf = ReadBuf::new(buf);
        ready!(match self {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, &mut buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, &mut buf),
        })?;
        Poll::Ready(Ok(buf.filled().len()))
    }

    /// Sends from the front of `parts` (not empty), as many bytes as the kernel takes.
    pub(crate) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
        }
    }

    /// Tells the client at once that the connection is over, while the socket may stay open for a while.
    pub(crate) fn cut(&self) {
        // It fails only if the connection is gone already.
        let _ = rustix::net::shutdown(self.as_fd(), rustix::net::Shutdown::Both);
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

/// Best effort: the kernel clips what the administrator doesn't allow, and a smaller buffer works too.
fn enlarge_buffers(socket: BorrowedFd<'_>) {
    let _ = sockopt::set_socket_send_buffer_size(socket, BUFFER);
    let _ = sockopt::set_socket_recv_buffer_size(socket, BUFFER);
}
