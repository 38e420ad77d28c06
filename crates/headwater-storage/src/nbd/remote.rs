//! The server and the export that are wanted, and the way there: connect, start TLS, agree.

use super::socket::{Socket, negotiate};
use headwater_block::{Error, ErrorKind, Result};
use headwater_nbd::{ClientAsk, IpFamily, NbdAddress, NbdUri, ServerOffer};
use headwater_tls::{Endpoint, TlsCredentials};
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

/// Where a server listens.
#[derive(Debug)]
pub enum Server {
    /// TCP.
    Inet {
        /// Name or literal address.
        host: String,
        /// Port.
        port: u16,
        /// Which addresses of the host may be tried.
        family: IpFamily,
    },
    /// A Unix socket.
    Unix {
        /// Its path.
        path: PathBuf,
    },
    /// A Unix socket that has no file.
    Abstract {
        /// Its name, without the zero in front.
        name: Vec<u8>,
        /// Whether the name ends with its last byte, rather than being filled up with zeroes.
        tight: bool,
    },
    /// A socket that is connected already, TCP or Unix. When that connection is lost, there is no other.
    Fd(OwnedFd),
}

impl From<NbdAddress> for Server {
    fn from(address: NbdAddress) -> Self {
        match address {
            NbdAddress::Tcp { host, port } => Self::Inet { host, port, family: IpFamily::Any },
            NbdAddress::Unix { path } => Self::Unix { path },
        }
    }
}

/// See the module.
pub(super) struct Remote {
    /// How messages call it.
    name: String,
    place: Place,
    export: String,
    tls: Option<Tls>,
}

enum Place {
    /// Can be connected to as often as wanted.
    Address(Server),
    /// A connection that was made by somebody else; empty once it was used.
    Given(Cell<Option<OwnedFd>>),
}

struct Tls {
    credentials: TlsCredentials,
    host: Option<String>,
}

impl Remote {
    /// True if it is reached over TCP.
    pub(super) fn is_tcp(&self) -> bool {
        matches!(self.place, Place::Address(Server::Inet { .. }))
    }

    /// The export called `export` of `server`. With credentials TLS is used, or nothing; `tls_hostname` is what the server's certificate
    /// must be for, unless that is the host that is connected to.
    pub(super) fn new(
        name: Option<&str>,
        server: Server,
        export: &str,
        credentials: Option<TlsCredentials>,
        tls_hostname: Option<String>,
    ) -> Result<Self> {
        let name = name.map_or_else(|| describe(&server, export), str::to_owned);
        let tls = match credentials {
            None => None,
            Some(credentials) => {
                credentials.check_endpoint(Endpoint::Client).map_err(|e| e.context(&name))?;
                let host = tls_hostname.or_else(|| match &server {
                    Server::Inet { host, .. } => Some(host.clone()),
                    _ => None,
                });
                Some(Tls { credentials, host })
            }
        };
        let place = match server {
            Server::Fd(fd) => Place::Given(Cell::new(Some(fd))),
            address => Place::Address(address),
        };
        Ok(Self { name, place, export: export.to_owned(), tls })
    }

    /// How messages call it.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether more than one connection can be made.
    pub(super) fn can_connect_again(&self) -> bool {
        matches!(self.place, Place::Address(_))
    }

    /// Connects and agrees, within a time.
    pub(super) async fn open(&self, timeout: Duration) -> Result<(Socket, ServerOffer)> {
        let opened = match tokio::time::timeout(timeout, self.try_open()).await {
            Ok(opened) => opened,
            Err(_) => {
                let seconds = timeout.as_secs_f32();
                let message = format!(
                    "the server did not finish negotiation within {seconds} s; it may be busy with other clients"
                );
                Err(Error::new(ErrorKind::TimedOut, message))
            }
        };
        opened.map_err(|e| e.context(&self.name))
    }

    async fn try_open(&self) -> Result<(Socket, ServerOffer)> {
        let connected = match &self.place {
            Place::Address(server) => Socket::connect(server).await,
            Place::Given(fd) => match fd.take() {
                Some(fd) => Socket::adopt(fd),
                None => {
                    let message = "the connection was handed over as a descriptor, and can't be made again";
                    return Err(Error::new(ErrorKind::Unavailable, message));
                }
            },
        };
        let socket = connected.map_err(|e| Error::from_io(e, "connect to the NBD server"))?;
        let tls = self.tls.as_ref().map(|tls| (&tls.credentials, tls.host.as_deref()));
        negotiate(socket, ClientAsk::new(self.export.as_str()), tls).await
    }
}

fn describe(server: &Server, export: &str) -> String {
    let uri = |address| NbdUri::new(address, export).to_string();
    match server {
        Server::Inet { host, port, .. } => uri(NbdAddress::Tcp { host: host.clone(), port: *port }),
        Server::Unix { path } => uri(NbdAddress::Unix { path: path.clone() }),
        Server::Abstract { name, .. } => {
            format!("NBD export {export:?} at abstract socket {:?}", String::from_utf8_lossy(name))
        }
        Server::Fd(_) => format!("NBD export {export:?} at a descriptor"),
    }
}
