//! A connection over which TLS runs, whichever library does it.

use crate::psk;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A connection with TLS over it. What is written may stay with it until it is flushed.
#[derive(Debug)]
pub struct TlsStream<S>(Session<S>)
where
    S: AsyncRead + AsyncWrite + Unpin;

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "whoever keeps a stream keeps it in a box")]
enum Session<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    X509(tokio_rustls::TlsStream<S>),
    Psk(psk::Stream<S>),
}

impl<S> TlsStream<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    /// One that was started with certificates.
    pub(crate) fn x509(stream: tokio_rustls::TlsStream<S>) -> Self {
        Self(Session::X509(stream))
    }

    /// One that was started with a key that both sides have.
    pub(crate) fn psk(stream: psk::Stream<S>) -> Self {
        Self(Session::Psk(stream))
    }

    /// What it was started on.
    pub fn below(&self) -> &S {
        match &self.0 {
            Session::X509(stream) => stream.get_ref().0,
            Session::Psk(stream) => stream.below(),
        }
    }
}

impl<S> AsyncRead for TlsStream<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Session::X509(stream) => Pin::new(stream).poll_read(cx, buf),
            Session::Psk(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl<S> AsyncWrite for TlsStream<S>
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
        match &mut self.get_mut().0 {
            Session::X509(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
            Session::Psk(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Session::X509(stream) => Pin::new(stream).poll_flush(cx),
            Session::Psk(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Session::X509(stream) => Pin::new(stream).poll_shutdown(cx),
            Session::Psk(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
