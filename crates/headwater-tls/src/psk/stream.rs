//! A connection over which s2n runs TLS, for those who write as to any other.

use super::errno::Errno;
use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How much plaintext is taken at a time, in bytes: four records.
pub(super) const STAGE: usize = 64 << 10;

/// A connection with TLS over it.
///
/// s2n wants to be offered the same bytes again after it had to wait. A writer needn't do so: it may be dropped, and another come with
/// something else. So what is to be sent is taken first, header and data of a message together, and sent from here.
pub(crate) struct Stream<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    tls: s2n_tls_tokio::TlsStream<Errno<S>>,
    /// What was taken from writers.
    staged: Vec<u8>,
    /// How much of it s2n has.
    sent: usize,
}

impl<S> fmt::Debug for Stream<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("staged", &(self.staged.len() - self.sent)).finish_non_exhaustive()
    }
}

impl<S> Stream<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    pub(super) fn new(tls: s2n_tls_tokio::TlsStream<Errno<S>>) -> Self {
        Self { tls, staged: Vec::with_capacity(STAGE), sent: 0 }
    }

    pub(crate) fn below(&self) -> &S {
        &self.tls.get_ref().0
    }

    /// Ready when s2n has all that was taken.
    fn poll_staged(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.staged.len() {
            let sent = ready!(Pin::new(&mut self.tls).poll_write(cx, &self.staged[self.sent..]))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += sent;
        }
        self.staged.clear();
        self.sent = 0;
        Poll::Ready(Ok(()))
    }
}

impl<S> AsyncRead for Stream<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tls).poll_read(cx, buf)
    }
}

impl<S> AsyncWrite for Stream<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_staged(cx))?;
        for part in parts {
            let room = STAGE - this.staged.len();
            this.staged.extend_from_slice(&part[..part.len().min(room)]);
        }
        let taken = this.staged.len();
        match this.poll_staged(cx) {
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            // What waits is taken all the same.
            _ => Poll::Ready(Ok(taken)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_staged(cx))?;
        Pin::new(&mut this.tls).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_staged(cx))?;
        Pin::new(&mut this.tls).poll_shutdown(cx)
    }
}
