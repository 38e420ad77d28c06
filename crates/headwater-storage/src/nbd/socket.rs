//! The socket under a connection: TCP or Unix, read and written with vectors through a shared reference, and what it takes
//! to get from nothing to an agreed export.

use headwater_block::{Error, ErrorKind};
use headwater_nbd::error::OptionRefusal;
use headwater_nbd::{ClientAsk, ClientHandshake, NbdAddress, ProtocolError, ServerOffer, Step};
use std::cell::Cell;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::AsFd;
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

/// What a Unix socket takes from a writer before it must wait, in bytes. The default of 208 KiB costs a wake-up of both sides for
/// every fraction of a large write; TCP sizes its buffers by itself.
const UNIX_SEND_BUFFER: usize = 2 << 20;

/// A connected socket. All methods take `&self`: one task reads, another writes.
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// Connects; tries all addresses of a host name.
    pub(super) async fn connect(address: &NbdAddress) -> io::Result<Self> {
        match address {
            NbdAddress::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                stream.set_nodelay(true)?;
                // A peer that vanished without a word is noticed even while nothing is in flight.
                rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
                Ok(Self::Tcp(stream))
            }
            NbdAddress::Unix { path } => {
                let stream = UnixStream::connect(path).await?;
                rustix::net::sockopt::set_socket_send_buffer_size(&stream, UNIX_SEND_BUFFER)?;
                Ok(Self::Unix(stream))
            }
        }
    }

    /// Reads at least one byte; 0 means that the peer closed. Nothing is lost if the future is dropped.
    pub(super) async fn readv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        loop {
            let got = Cell::new(None);
            let tried = match self {
                Self::Tcp(stream) => {
                    stream.readable().await?;
                    stream.try_io(Interest::READABLE, || receive(stream, bufs, &got))
                }
                Self::Unix(stream) => {
                    stream.readable().await?;
                    stream.try_io(Interest::READABLE, || receive(stream, bufs, &got))
                }
            };
            match (got.get(), tried) {
                (Some(n), _) => return Ok(n),
                (None, Err(e)) if e.kind() == io::ErrorKind::WouldBlock => {}
                (None, tried) => return tried,
            }
        }
    }

    /// Writes at least one byte. Nothing is lost if the future is dropped.
    pub(super) async fn writev(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        loop {
            let done = match self {
                Self::Tcp(stream) => {
                    stream.writable().await?;
                    stream.try_write_vectored(bufs)
                }
                Self::Unix(stream) => {
                    stream.writable().await?;
                    stream.try_write_vectored(bufs)
                }
            };
            match done {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                done => return done,
            }
        }
    }

    /// Ends both directions: whoever reads or writes is woken.
    pub(super) fn shut_down(&self) {
        use rustix::net::{Shutdown, shutdown};
        // Fails only if the peer was faster, which is as good.
        let _ = match self {
            Self::Tcp(stream) => shutdown(stream, Shutdown::Both),
            Self::Unix(stream) => shutdown(stream, Shutdown::Both),
        };
    }

    async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let n = self.writev(&[IoSlice::new(bytes)]).await?;
            bytes = &bytes[n..];
        }
        Ok(())
    }
}

/// Reads what there is. When that is less than would fit, the socket is empty: saying "would block" at once, with the count in `got`,
/// saves the system call that finds it out (one in four, for small reads). A later byte makes the socket readable anew.
fn receive(socket: impl AsFd, bufs: &mut [IoSliceMut<'_>], got: &Cell<Option<usize>>) -> io::Result<usize> {
    let room: usize = bufs.iter().map(|buf| buf.len()).sum();
    let n = rustix::io::retry_on_intr(|| rustix::io::readv(&socket, bufs))?;
    if n == 0 || n == room {
        return Ok(n);
    }
    got.set(Some(n));
    Err(io::ErrorKind::WouldBlock.into())
}

/// Agrees on the export `ask` with the server at the other end. Reads not a byte more than negotiation has.
pub(super) async fn negotiate(socket: &Socket, ask: ClientAsk) -> Result<ServerOffer, Error> {
    let mut handshake = ClientHandshake::new(ask);
    let (mut input, mut output) = (Vec::new(), Vec::new());
    let io = |e| Error::from_io(e, "negotiate with the server");
    loop {
        match handshake.step(&input, &mut output) {
            Ok(Step::Done { outcome, consumed }) if consumed == input.len() => {
                socket.write_all(&output).await.map_err(io)?;
                return Ok(outcome);
            }
            Ok(Step::Done { .. }) => {
                return Err(Error::new(ErrorKind::Corrupt, "the server talks out of turn"));
            }
            Ok(Step::Next { state, consumed }) => {
                input.drain(..consumed);
                socket.write_all(&output).await.map_err(io)?;
                output.clear();
                handshake = state;
            }
            Ok(Step::More { state, needed }) => {
                let mut have = input.len();
                input.resize(needed, 0);
                while have < needed {
                    let n = socket.readv(&mut [IoSliceMut::new(&mut input[have..])]).await.map_err(io)?;
                    if n == 0 {
                        return Err(protocol_error(state.closed()));
                    }
                    have += n;
                }
                handshake = state;
            }
            Err(e) => {
                if matches!(e, ProtocolError::Refused { .. }) {
                    output.clear();
                    headwater_nbd::negotiate::encode_abort(&mut output);
                    // A courtesy to the server; the refusal is what matters.
                    let _ = socket.write_all(&output).await;
                }
                return Err(protocol_error(e));
            }
        }
    }
}

/// Sorts what can be wrong with a peer into our kinds of errors.
pub(super) fn protocol_error(e: ProtocolError) -> Error {
    let kind = match &e {
        ProtocolError::OldStyle => ErrorKind::Unsupported,
        ProtocolError::Closed { .. } => ErrorKind::Unavailable,
        ProtocolError::Refused { refusal, .. } => match refusal {
            OptionRefusal::UnknownExport => ErrorKind::NotFound,
            OptionRefusal::Policy => ErrorKind::PermissionDenied,
            OptionRefusal::Shutdown => ErrorKind::Unavailable,
            OptionRefusal::Unsupported | OptionRefusal::Platform | OptionRefusal::TlsRequired => {
                ErrorKind::Unsupported
            }
            _ => ErrorKind::InvalidInput,
        },
        _ => ErrorKind::Corrupt,
    };
    Error::new(kind, e.to_string())
}
