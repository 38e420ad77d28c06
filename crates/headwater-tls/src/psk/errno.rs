//! The connection under s2n, which asks `errno` what went wrong.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A connection whose errors are in `errno`, too. Between s2n and the system's call there is code that may change it; s2n would take what
/// is left there from before for a wish to wait, and nobody would wake it.
#[derive(Debug)]
pub(super) struct Errno<S>(pub(super) S);

fn tell(error: &io::Error) {
    let unknown = rustix::io::Errno::IO.raw_os_error();
    errno::set_errno(errno::Errno(error.raw_os_error().unwrap_or(unknown)));
}

fn told<T>(result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
    if let Poll::Ready(Err(error)) = &result {
        tell(error);
    }
    result
}

impl<S: AsyncRead + Unpin> AsyncRead for Errno<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        told(Pin::new(&mut self.0).poll_read(cx, buf))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Errno<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        told(Pin::new(&mut self.0).poll_write(cx, buf))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        told(Pin::new(&mut self.0).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        told(Pin::new(&mut self.0).poll_shutdown(cx))
    }
}
