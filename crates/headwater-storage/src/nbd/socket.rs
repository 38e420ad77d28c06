//! The socket under a connection: TCP or Unix, plain or with TLS over it, read and written with vectors through a shared reference, and
//! what it takes to get from nothing to an agreed export.

use super::remote::Server;
use crate::dial::dial;
use headwater_block::{Error, ErrorKind};
use headwater_nbd::error::OptionRefusal;
use headwater_nbd::{ClientAsk, ClientHandshake, ProtocolError, ServerOffer, Step, TlsHandshake};
use headwater_tls::{PlainSocket, TlsCredentials, TlsStream};
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net as std_unix;
use std::pin::Pin;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// What a Unix socket takes from a writer before it must wait, in bytes. The default of 208 KiB costs a wake-up of both sides for
/// every fraction of a large write; TCP sizes its buffers by itself.
const UNIX_SEND_BUFFER: usize = 2 << 20;

/// The kernel's limit for the name of an abstract socket, in bytes, less the zero that makes it one.
const MAX_ABSTRACT: usize = 107;

/// A connected socket. All methods take `&self`: one task reads, another writes.
pub(super) enum Socket {
    /// As it is.
    Plain(PlainSocket),
    /// With TLS over it. Each poll borrows it, none holds it; reading and writing wake their own tasks.
    Tls(Box<RefCell<TlsStream<PlainSocket>>>),
}

impl Socket {
    /// Connects; tries all addresses of a host name ([`dial`]).
    pub(super) async fn connect(server: &Server) -> io::Result<Self> {
        let plain = match server {
            Server::Inet { host, port, family } => {
                let found = tokio::net::lookup_host((host.as_str(), *port)).await?;
                let addresses: Vec<SocketAddr> = found.filter(|found| family.admits(found.ip())).collect();
                if addresses.is_empty() {
                    let why = format!("{host} has no address of the family that was asked for");
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
                }
                tcp(dial(addresses).await?)?
            }
            Server::Unix { path } => unix(UnixStream::connect(path).await?)?,
            Server::Abstract { name, tight } => {
                let mut name = name.clone();
                if !tight && name.len() < MAX_ABSTRACT {
                    name.resize(MAX_ABSTRACT, 0);
                }
                let address = std_unix::SocketAddr::from_abstract_name(name)?;
                adopt_unix(std_unix::UnixStream::connect_addr(&address)?)?
            }
            // It is connected already.
            Server::Fd(fd) => return Self::adopt(fd.try_clone()?),
        };
        Ok(Self::Plain(plain))
    }

    /// Takes over a connection that somebody else made.
    pub(super) fn adopt(fd: OwnedFd) -> io::Result<Self> {
        use rustix::net::{AddressFamily, sockopt::socket_domain};
        match socket_domain(&fd)? {
            AddressFamily::UNIX => adopt_unix(std_unix::UnixStream::from(fd)).map(Self::Plain),
            AddressFamily::INET | AddressFamily::INET6 => {
                let stream = std::net::TcpStream::from(fd);
                stream.set_nonblocking(true)?;
                tcp(TcpStream::from_std(stream)?).map(Self::Plain)
            }
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a TCP nor a Unix socket")),
        }
    }

    /// Starts TLS; `host` is what the server's certificate must be for.
    async fn start_tls(self, credentials: &TlsCredentials, host: Option<&str>) -> Result<Self, Error> {
        match self {
            Self::Plain(plain) => {
                let stream = credentials.connect(plain, host).await?;
                Ok(Self::Tls(Box::new(RefCell::new(stream))))
            }
            tls @ Self::Tls(_) => Ok(tls),
        }
    }

    /// Reads at least one byte; 0 means that the peer closed. Nothing is lost if the future is dropped.
    pub(super) async fn readv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(plain) => readv(plain, bufs).await,
            Self::Tls(stream) => {
                // TLS fills one buffer at a time.
                let Some(buf) = bufs.iter_mut().find(|buf| !buf.is_empty()) else { return Ok(0) };
                let mut buf = ReadBuf::new(buf);
                poll_fn(|cx| Pin::new(&mut *stream.borrow_mut()).poll_read(cx, &mut buf)).await?;
                Ok(buf.filled().len())
            }
        }
    }

    /// Writes at least one byte. Nothing is lost if the future is dropped. See also [`Socket::flush`].
    pub(super) async fn writev(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let written = match self {
            Self::Plain(plain) => writev(plain, bufs).await?,
            Self::Tls(stream) => {
                poll_fn(|cx| Pin::new(&mut *stream.borrow_mut()).poll_write_vectored(cx, bufs)).await?
            }
        };
        if written == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(written) }
    }

    /// Waits until the kernel has what was written: TLS keeps what the kernel doesn't take.
    pub(super) async fn flush(&self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Tls(stream) => poll_fn(|cx| Pin::new(&mut *stream.borrow_mut()).poll_flush(cx)).await,
        }
    }

    /// Ends both directions: whoever reads or writes is woken.
    pub(super) fn shut_down(&self) {
        match self {
            Self::Plain(plain) => plain.shut_down(),
            Self::Tls(stream) => stream.borrow().below().shut_down(),
        }
    }

    async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let n = self.writev(&[IoSlice::new(bytes)]).await?;
            bytes = &bytes[n..];
        }
        self.flush().await
    }
}

fn tcp(stream: TcpStream) -> io::Result<PlainSocket> {
    stream.set_nodelay(true)?;
    // A peer that vanished without a word is noticed even while nothing is in flight.
    rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
    Ok(PlainSocket::Tcp(stream))
}

fn unix(stream: UnixStream) -> io::Result<PlainSocket> {
    rustix::net::sockopt::set_socket_send_buffer_size(&stream, UNIX_SEND_BUFFER)?;
    Ok(PlainSocket::Unix(stream))
}

fn adopt_unix(stream: std_unix::UnixStream) -> io::Result<PlainSocket> {
    stream.set_nonblocking(true)?;
    unix(UnixStream::from_std(stream)?)
}

async fn readv(socket: &PlainSocket, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
    loop {
        let got = Cell::new(None);
        let tried = match socket {
            PlainSocket::Tcp(stream) => {
                stream.readable().await?;
                stream.try_io(Interest::READABLE, || receive(stream, bufs, &got))
            }
            PlainSocket::Unix(stream) => {
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

async fn writev(socket: &PlainSocket, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
    loop {
        let done = match socket {
            PlainSocket::Tcp(stream) => {
                stream.writable().await?;
                stream.try_write_vectored(bufs)
            }
            PlainSocket::Unix(stream) => {
                stream.writable().await?;
                stream.try_write_vectored(bufs)
            }
        };
        match done {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
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

/// Agrees on the export `ask` with the server at the other end: over TLS, if there are credentials, with the name that the server's
/// certificate must be for. Then nothing but the wish for TLS is said in clear.
pub(super) async fn negotiate(
    mut socket: Socket,
    ask: ClientAsk,
    tls: Option<(&TlsCredentials, Option<&str>)>,
) -> Result<(Socket, ServerOffer), Error> {
    let handshake = match tls {
        None => ClientHandshake::new(ask),
        Some((credentials, host)) => {
            let starting = TlsHandshake::new(ask);
            let handshake = drive(&socket, starting, TlsHandshake::step, TlsHandshake::closed).await?;
            socket = socket.start_tls(credentials, host).await?;
            handshake
        }
    };
    let offer = drive(&socket, handshake, ClientHandshake::step, ClientHandshake::closed).await?;
    Ok((socket, offer))
}

/// Drives one of the codec's handshakes to its end. Reads not a byte more than it has.
async fn drive<State, Outcome>(
    socket: &Socket,
    mut handshake: State,
    step: impl Fn(State, &[u8], &mut Vec<u8>) -> Result<Step<State, Outcome>, ProtocolError>,
    closed: impl Fn(&State) -> ProtocolError,
) -> Result<Outcome, Error> {
    let (mut input, mut output) = (Vec::new(), Vec::new());
    let io = |e| Error::from_io(e, "negotiate with the server");
    loop {
        match step(handshake, &input, &mut output) {
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
                        return Err(protocol_error(closed(&state)));
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
