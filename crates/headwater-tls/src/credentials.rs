//! Credentials: what one side of a connection proves itself with, and what it demands of the other.

use crate::{TlsStream, psk, x509};
use headwater_block::{Error, ErrorKind, Result};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};

/// Which side of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// The one that connects.
    Client,
    /// The one that is connected to.
    Server,
}

/// Where credentials are and what they are for: the kinds that QEMU has, less that which tells nobody who is at the other end
/// (`tls-creds-anon`).
#[derive(Debug, Clone)]
pub enum TlsOptions {
    /// By certificates (`tls-creds-x509`).
    X509 {
        /// Whose they are.
        endpoint: Endpoint,
        /// Where the files are, in PEM: `ca-cert.pem`, perhaps `ca-crl.pem`; of a server `server-cert.pem` and `server-key.pem`; of a
        /// client `client-cert.pem` and `client-key.pem`, unless it has none.
        directory: PathBuf,
        /// Whether the other side must show a certificate that `ca-cert.pem` vouches for.
        verify_peer: bool,
    },
    /// By a key that both have (`tls-creds-psk`): those of a server's users.
    PskServer {
        /// The file with a `USER:KEY` a line, the key in hexadecimal digits, as `psktool` writes it.
        keys: PathBuf,
    },
    /// By a key that both have: that of one user.
    PskClient {
        /// As for a server. Others than this user may be in it.
        keys: PathBuf,
        /// Whose key is used.
        user: String,
    },
}

/// Credentials as they were when they were loaded. Cheap to clone.
#[derive(Clone)]
pub struct TlsCredentials {
    /// The directory or the file that they are from.
    place: Arc<Path>,
    side: Side,
}

#[derive(Clone)]
enum Side {
    X509Client(x509::Client),
    X509Server(x509::Server),
    PskClient(psk::Client),
    PskServer(psk::Server),
}

impl fmt::Debug for TlsCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TLS credentials of a {:?} in {}", self.endpoint(), self.place.display())
    }
}

impl TlsCredentials {
    /// Reads the files.
    ///
    /// # Errors
    /// `NotFound` and what else the system says if a file can't be read; `InvalidInput` if it isn't what it should be, or hasn't the user.
    pub fn load(options: &TlsOptions) -> Result<Self> {
        let (place, side) = match options {
            TlsOptions::X509 { endpoint: Endpoint::Client, directory, verify_peer } => {
                (directory, Side::X509Client(x509::Client::load(directory, *verify_peer)?))
            }
            TlsOptions::X509 { endpoint: Endpoint::Server, directory, verify_peer } => {
                (directory, Side::X509Server(x509::Server::load(directory, *verify_peer)?))
            }
            TlsOptions::PskClient { keys, user } => (keys, Side::PskClient(psk::Client::load(keys, user)?)),
            TlsOptions::PskServer { keys } => (keys, Side::PskServer(psk::Server::load(keys)?)),
        };
        Ok(Self { place: place.as_path().into(), side })
    }

    /// Whose they are.
    pub fn endpoint(&self) -> Endpoint {
        match self.side {
            Side::X509Client(_) | Side::PskClient(_) => Endpoint::Client,
            Side::X509Server(_) | Side::PskServer(_) => Endpoint::Server,
        }
    }

    /// Checks whose they are.
    ///
    /// # Errors
    /// `InvalidInput` if they are for the other side.
    pub fn check_endpoint(&self, wanted: Endpoint) -> Result<()> {
        if self.endpoint() == wanted { Ok(()) } else { Err(self.not_for(wanted)) }
    }

    fn not_for(&self, wanted: Endpoint) -> Error {
        let message = format!("{self:?} are no use for a {wanted:?}; load them for that endpoint");
        Error::new(ErrorKind::InvalidInput, message)
    }

    /// Starts TLS with a client that has connected.
    ///
    /// # Errors
    /// `PermissionDenied` if the client isn't acceptable, or doesn't accept us; what the system says; see also
    /// [`TlsCredentials::check_endpoint`].
    pub async fn accept<S>(&self, stream: S) -> Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        match &self.side {
            Side::X509Server(server) => server.accept(stream).await.map(TlsStream::x509),
            Side::PskServer(server) => server.accept(stream).await.map(TlsStream::psk),
            Side::X509Client(_) | Side::PskClient(_) => Err(self.not_for(Endpoint::Server)),
        }
    }

    /// Starts TLS with a server that is connected to. `name` is what the certificate must be for, a host name or an address: one of its
    /// alternative names, as the common name doesn't count. It is needed if the server is to be verified; nobody asks for it where both
    /// have a key.
    ///
    /// # Errors
    /// `PermissionDenied` if the server isn't acceptable, or doesn't accept us; `InvalidInput` for a name that is none or missing; what
    /// the system says; see also [`TlsCredentials::check_endpoint`].
    pub async fn connect<S>(&self, stream: S, name: Option<&str>) -> Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        match &self.side {
            Side::X509Client(client) => client.connect(stream, name).await.map(TlsStream::x509),
            Side::PskClient(client) => client.connect(stream).await.map(TlsStream::psk),
            Side::X509Server(_) | Side::PskServer(_) => Err(self.not_for(Endpoint::Client)),
        }
    }
}
