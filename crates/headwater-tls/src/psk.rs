//! Sessions of those who know each other by a key that both have. TLS is s2n: rustls takes no keys from outside.
//!
//! - `keys`: the file. `stream`: the connection that comes of it. `errno`: what s2n learns of the connection below.
//!
//! Version 1.3 of TLS and nothing older: the key proves who is there, and each session has secrets of its own all the same (`psk_dhe_ke`).
//! There are no certificates on either side. A session to which a key has not been the way is none.

mod errno;
mod keys;
mod stream;

use headwater_block::{Error, ErrorKind, Result};
use keys::User;
use s2n_tls::config::Config;
use s2n_tls::connection::{Builder, Connection};
use s2n_tls::enums::{Mode, PskHmac};
use s2n_tls::error::{Error as TlsError, ErrorType};
use s2n_tls::psk::Psk;
use s2n_tls::security::Policy;
use s2n_tls_tokio::{TlsAcceptor, TlsConnector};
use std::io;
use std::path::Path;
use std::sync::Arc;
pub(crate) use stream::Stream;
use tokio::io::{AsyncRead, AsyncWrite};

/// The suites and groups that are offered and taken: version 1.3 only, AES and ChaCha20. Names of s2n's policies stand for the same for
/// ever.
const POLICY: &str = "AWS-CRT-SDK-TLSv1.3-2023";

/// The key of one user.
#[derive(Clone)]
pub(crate) struct Client(Sessions);

impl Client {
    /// Reads the key of `user`.
    ///
    /// # Errors
    /// What the system says; `InvalidInput` if the file isn't what it should be, or hasn't the user.
    pub(crate) fn load(path: &Path, user: &str) -> Result<Self> {
        let mut users = keys::read(path)?;
        users.retain(|known| known.name == user.as_bytes());
        if users.is_empty() {
            let message = format!("the user {user:?} is not in {}", path.display());
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        Sessions::new(path, users).map(Self)
    }

    /// See [`crate::TlsCredentials::connect`].
    pub(crate) async fn connect<S>(&self, stream: S) -> Result<Stream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        // No name is said: there is no certificate to choose by it.
        let connected = TlsConnector::new(self.0.clone()).connect("", errno::Errno(stream)).await;
        self.0.checked(connected, "the server")
    }
}

/// The keys of those who may come.
#[derive(Clone)]
pub(crate) struct Server(Sessions);

impl Server {
    /// Reads the keys of all users.
    ///
    /// # Errors
    /// What the system says; `InvalidInput` if the file isn't what it should be.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        Sessions::new(path, keys::read(path)?).map(Self)
    }

    /// See [`crate::TlsCredentials::accept`].
    pub(crate) async fn accept<S>(&self, stream: S) -> Result<Stream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let accepted = TlsAcceptor::new(self.0.clone()).accept(errno::Errno(stream)).await;
        self.0.checked(accepted, "the client")
    }
}

/// What sessions are made from.
#[derive(Clone)]
struct Sessions {
    place: Arc<Path>,
    config: Config,
    keys: Arc<[Psk]>,
}

impl Sessions {
    fn new(place: &Path, users: Vec<User>) -> Result<Self> {
        let made = || {
            let keys: Result<Vec<Psk>, TlsError> = users.iter().map(key).collect();
            Ok(Self { place: place.into(), config: config()?, keys: keys?.into() })
        };
        made().map_err(|e: TlsError| {
            let message = format!("the keys in {} are no use for TLS: {}", place.display(), e.message());
            Error::new(ErrorKind::InvalidInput, message)
        })
    }

    /// The session, if a key was the way to it.
    fn checked<S>(
        &self,
        started: Result<s2n_tls_tokio::TlsStream<errno::Errno<S>>, TlsError>,
        with: &str,
    ) -> Result<Stream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let tls = started.map_err(|e| self.failure(e, with))?;
        match tls.as_ref().negotiated_psk_identity_length() {
            Ok(1..) => Ok(Stream::new(tls)),
            _ => Err(self.refusal(with, "no key was used")),
        }
    }

    fn refusal(&self, with: &str, why: &str) -> Error {
        let message = format!(
            "no TLS with {with}: {why}; both sides must have the same key for the same user, here from {}",
            self.place.display()
        );
        Error::new(ErrorKind::PermissionDenied, message)
    }

    fn failure(&self, e: TlsError, with: &str) -> Error {
        match e.kind() {
            ErrorType::IOError => Error::from_io(io::Error::from(e), format_args!("start TLS with {with}")),
            // Some close without a word where they don't know the user.
            ErrorType::ConnectionClosed => self.refusal(with, "it closed the connection"),
            _ => self.refusal(with, e.message()),
        }
    }
}

impl Builder for Sessions {
    type Output = Connection;

    fn build_connection(&self, mode: Mode) -> Result<Connection, TlsError> {
        let mut connection = self.config.build_connection(mode)?;
        // Full records; and each is read with one call, not its header first.
        connection.prefer_throughput()?.set_receive_buffering(true)?;
        for key in self.keys.iter() {
            connection.append_psk(key)?;
        }
        Ok(connection)
    }
}

fn config() -> Result<Config, TlsError> {
    let mut config = Config::builder();
    // Whoever comes with a certificate is nobody here.
    config.with_system_certs(false)?.set_security_policy(&Policy::from_version(POLICY)?)?;
    // The delay after an error is against guessing the padding of CBC suites, which version 1.3 doesn't have. It would hold the place of
    // a connection for half a minute.
    config.set_max_blinding_delay(0)?.set_send_buffer_size(SEND_BUFFER)?;
    config.build()
}

/// Room for the records of all that is staged, so that they leave with one call, in bytes.
const SEND_BUFFER: u32 = stream::STAGE as u32 + (4 << 10);

fn key(user: &User) -> Result<Psk, TlsError> {
    let mut key = Psk::builder()?;
    key.set_identity(&user.name)?.set_secret(&user.key)?;
    // What GnuTLS takes keys for that nothing more is said of.
    key.set_hmac(PskHmac::SHA256)?;
    key.build()
}
