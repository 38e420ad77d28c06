//! Binds an address and accepts connections.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use headwater_block::{Error, ErrorKind, Result};
use headwater_nbd::NbdAddress;
use tokio::net::{TcpListener, UnixListener};

use super::socket::Socket;

/// A bound address.
#[derive(Debug)]
pub(crate) enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket. The file is removed when the listener goes.
    Unix(UnixListener, SocketFile),
}

impl Listener {
    /// Binds `address`. A Unix socket that nobody listens to any more is replaced.
    pub(crate) fn bind(address: &NbdAddress) -> Result<Self> {
        match address {
            NbdAddress::Tcp { host, port } => {
                let what = format!("listen on {host} port {port}");
                let listener = std::net::TcpListener::bind((host.as_str(), *port))
                    .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
                    .and_then(TcpListener::from_std);
                listener.map(Self::Tcp).map_err(|error| bind_error(error, &what))
            }
            NbdAddress::Unix { path } => {
                let what = format!("listen on socket {}", path.display());
                remove_stale(path)?;
                let listener = UnixListener::bind(path).map_err(|error| bind_error(error, &what))?;
                Ok(Self::Unix(listener, SocketFile(path.clone())))
            }
        }
    }

    /// Where clients can connect: as given, with the port that the system chose if 0 was asked for.
    pub(crate) fn address(&self) -> Result<NbdAddress> {
        match self {
            Self::Tcp(listener) => {
                let address = listener.local_addr();
                let address =
                    address.map_err(|error| Error::from_io(error, "ask for the address listened on"))?;
                Ok(NbdAddress::Tcp { host: address.ip().to_string(), port: address.port() })
            }
            Self::Unix(_, file) => Ok(NbdAddress::Unix { path: file.0.clone() }),
        }
    }

    /// The next connection. May be dropped at any time.
    pub(crate) async fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Tcp(listener) => Ok(Socket::tcp(listener.accept().await?.0)),
            Self::Unix(listener, _) => Ok(Socket::unix(listener.accept().await?.0)),
        }
    }
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
