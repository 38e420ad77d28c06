//! Where clients can connect: a bound address.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net as unix;
use std::path::{Path, PathBuf};

use headwater_block::{Error, ErrorKind, Result};
use headwater_nbd::{IpFamily, NbdAddress};
use rustix::net::{AddressFamily, sockopt};
use tokio::net::{TcpListener, TcpSocket, UnixListener};

/// How many clients may wait to be accepted.
const BACKLOG: u32 = 128;

/// Longest name of an abstract socket, in bytes: the kernel's, less the zero that makes it one.
const MAX_ABSTRACT: usize = 107;

/// Where to listen.
#[derive(Debug)]
pub enum Listen {
    /// TCP, at every address that the host has.
    Inet {
        /// Name or literal address; empty for all addresses of this machine.
        host: String,
        /// Port; 0 lets the system choose one.
        port: u16,
        /// The last port to try if those before are taken.
        to: Option<u16>,
        /// Which addresses of the host count.
        family: IpFamily,
    },
    /// A Unix socket.
    Unix {
        /// Its path. A socket that nobody listens to any more is replaced.
        path: PathBuf,
    },
    /// A Unix socket that has no file.
    Abstract {
        /// Its name, without the zero in front.
        name: Vec<u8>,
        /// Whether the name ends with its last byte, rather than being filled up with zeroes.
        tight: bool,
    },
    /// A socket that listens already, TCP or Unix.
    Fd(OwnedFd),
}

impl From<&NbdAddress> for Listen {
    fn from(address: &NbdAddress) -> Self {
        match address.clone() {
            NbdAddress::Tcp { host, port } => Self::Inet { host, port, to: None, family: IpFamily::Any },
            NbdAddress::Unix { path } => Self::Unix { path },
        }
    }
}

/// A bound address.
#[derive(Debug)]
pub(crate) enum Listener {
    /// TCP, one for each address; at least one.
    Tcp(Vec<TcpListener>),
    /// A Unix socket. If we made a file for it, that is removed when the listener goes.
    Unix { listener: UnixListener, _file: Option<SocketFile> },
}

impl Listener {
    pub(crate) fn bind(listen: Listen) -> Result<Self> {
        match listen {
            Listen::Inet { host, port, to, family } => bind_inet(&host, port, to, family).map(Self::Tcp),
            Listen::Unix { path } => {
                let what = format!("listen on socket {}", path.display());
                remove_stale(&path)?;
                let listener = UnixListener::bind(&path).map_err(|error| bind_error(error, &what))?;
                Ok(Self::Unix { listener, _file: Some(SocketFile(path)) })
            }
            Listen::Abstract { name, tight } => {
                let what = format!("listen on abstract socket {:?}", String::from_utf8_lossy(&name));
                let listener = bind_abstract(name, tight).map_err(|error| bind_error(error, &what))?;
                Ok(Self::Unix { listener, _file: None })
            }
            Listen::Fd(fd) => adopt(fd),
        }
    }

    /// Where clients can connect, with the port that the system chose if 0 was asked for: the first address if there are several.
    /// `None` for one that has no such form.
    pub(crate) fn address(&self) -> Option<NbdAddress> {
        match self {
            Self::Tcp(listeners) => {
                let address = listeners.first()?.local_addr().ok()?;
                Some(NbdAddress::Tcp { host: address.ip().to_string(), port: address.port() })
            }
            Self::Unix { listener, .. } => {
                let path = listener.local_addr().ok()?.as_pathname()?.to_owned();
                Some(NbdAddress::Unix { path })
            }
        }
    }
}

fn bind_inet(host: &str, first: u16, to: Option<u16>, family: IpFamily) -> Result<Vec<TcpListener>> {
    let last = to.unwrap_or(first);
    let what = match to {
        None => format!("listen on {host:?} port {first}"),
        Some(last) => format!("listen on {host:?} ports {first} to {last}"),
    };
    if last < first {
        let message = format!("cannot {what}: the last port comes before the first");
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let found: Vec<IpAddr> = if host.is_empty() {
        vec![Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()]
    } else {
        let found = (host, first).to_socket_addrs().map_err(|error| Error::from_io(error, &what))?;
        found.map(|address| address.ip()).collect()
    };
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in found {
        if family.admits(address) && !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    if addresses.is_empty() {
        let message = format!("cannot {what}: it has no address of the family that was asked for");
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let mut taken = None;
    for port in first..=last {
        match bind_all(&addresses, port) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => taken = Some(error),
            bound => return bound.map_err(|error| bind_error(error, &what)),
        }
    }
    Err(bind_error(taken.unwrap_or_else(|| io::ErrorKind::AddrInUse.into()), &what))
}

/// Binds one port of all addresses, those excepted that this machine doesn't have: a name may have an IPv6 address where there is no
/// IPv6. One address at least must be had.
fn bind_all(addresses: &[IpAddr], port: u16) -> io::Result<Vec<TcpListener>> {
    let mut bound: Vec<TcpListener> = Vec::new();
    let mut failed = None;
    for address in addresses {
        // The port that the system chose for the first one is wanted of the others.
        let port = match bound.first() {
            Some(first) => first.local_addr()?.port(),
            None => port,
        };
        // An IPv6 socket on all addresses would take the IPv4 ones along.
        let apart = addresses.iter().any(IpAddr::is_ipv4);
        match bind_one(SocketAddr::new(*address, port), apart) {
            Ok(listener) => bound.push(listener),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Err(error),
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) if bound.is_empty() => Err(error),
        _ => Ok(bound),
    }
}

fn bind_one(address: SocketAddr, apart: bool) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A server that is started anew need not wait until the old connections are forgotten.
    socket.set_reuseaddr(true)?;
    if apart && address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn bind_abstract(mut name: Vec<u8>, tight: bool) -> io::Result<UnixListener> {
    if !tight && name.len() < MAX_ABSTRACT {
        name.resize(MAX_ABSTRACT, 0);
    }
    let address = unix::SocketAddr::from_abstract_name(name)?;
    let listener = unix::UnixListener::bind_addr(&address)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Takes over a socket that listens.
fn adopt(fd: OwnedFd) -> Result<Listener> {
    let what = "listen on the descriptor that was handed over";
    let refuse = |why: &str| Err(Error::new(ErrorKind::InvalidInput, format!("cannot {what}: {why}")));
    match sockopt::socket_acceptconn(&fd) {
        Ok(true) => {}
        Ok(false) => return refuse("the socket doesn't listen"),
        Err(_) => return refuse("it is no socket"),
    }
    let adopted = match sockopt::socket_domain(&fd).map_err(io::Error::from) {
        Ok(AddressFamily::UNIX) => {
            let listener = unix::UnixListener::from(fd);
            let listener = listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener));
            listener.map(|listener| Listener::Unix { listener, _file: None })
        }
        Ok(AddressFamily::INET | AddressFamily::INET6) => {
            let listener = std::net::TcpListener::from(fd);
            let listener = listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener));
            listener.map(|listener| Listener::Tcp(vec![listener]))
        }
        Ok(_) => return refuse("it is neither a TCP nor a Unix socket"),
        Err(error) => Err(error),
    };
    adopted.map_err(|error| Error::from_io(error, what))
}

/// The file of a Unix socket that we listen on.
#[derive(Debug)]
pub(crate) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // If it is gone already, so much the better.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Removes a socket that a server left behind when it died. Anything else is left alone.
fn remove_stale(path: &Path) -> Result<()> {
    let what = || format!("listen on socket {}", path.display());
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::from_io(error, what())),
    };
    if !metadata.file_type().is_socket() {
        let message =
            format!("cannot {}: a file of that name exists and is no socket; choose another path", what());
        return Err(Error::new(ErrorKind::AlreadyExists, message));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|error| Error::from_io(error, what()))
        }
        // Somebody answers, or it cannot be known.
        _ => Err(Error::new(
            ErrorKind::InUse,
            format!("cannot {}: another server uses it; stop that one or choose another path", what()),
        )),
    }
}

fn bind_error(error: io::Error, what: &str) -> Error {
    match error.kind() {
        io::ErrorKind::AddrInUse => Error::new(
            ErrorKind::InUse,
            format!("cannot {what}: another process listens there; stop that one or choose another address"),
        ),
        _ => Error::from_io(error, what),
    }
}
