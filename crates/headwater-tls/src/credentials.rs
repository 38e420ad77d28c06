//! Credentials: what one side of a connection proves itself with, and what it demands of the other.

use crate::files::Files;
use crate::verify::Anyone;
use headwater_block::{Error, ErrorKind, Result};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::ServerName;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// Which side of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// The one that connects.
    Client,
    /// The one that is connected to.
    Server,
}

/// How the sides of a connection know each other: the kinds of credentials that QEMU has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CredentialsKind {
    /// By certificates (`tls-creds-x509`).
    X509,
    /// By a key that both have (`tls-creds-psk`). Not supported: rustls takes no keys from outside.
    Psk,
    /// Not at all (`tls-creds-anon`). Not supported: nobody knows who listens, and rustls has no such sessions.
    Anonymous,
}

/// Where credentials are and what they are for.
#[derive(Debug, Clone)]
pub struct TlsOptions {
    /// Which kind.
    pub kind: CredentialsKind,
    /// Whose they are.
    pub endpoint: Endpoint,
    /// Where the files are, in PEM: `ca-cert.pem`, perhaps `ca-crl.pem`; of a server `server-cert.pem` and `server-key.pem`; of a client
    /// `client-cert.pem` and `client-key.pem`, unless it has none.
    pub directory: PathBuf,
    /// Whether the other side must show a certificate that `ca-cert.pem` vouches for.
    pub verify_peer: bool,
}

/// Credentials as they were when they were loaded. Cheap to clone.
#[derive(Clone)]
pub struct TlsCredentials {
    directory: Arc<Path>,
    side: Side,
}

#[derive(Clone)]
enum Side {
    Client { config: Arc<ClientConfig>, verify_peer: bool },
    Server(Arc<ServerConfig>),
}

impl fmt::Debug for TlsCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TLS credentials of a {:?} in {}", self.endpoint(), self.directory.display())
    }
}

impl TlsCredentials {
    /// Reads the files.
    ///
    /// # Errors
    /// `Unsupported` for kinds other than certificates; `NotFound` and what else the system says if a file can't be read; `InvalidInput`
    /// if it isn't what it should be.
    pub fn load(options: &TlsOptions) -> Result<Self> {
        let refuse =
            |what| Err(Error::new(ErrorKind::Unsupported, format!("{what}; use certificates (x509)")));
        match options.kind {
            CredentialsKind::X509 => {}
            CredentialsKind::Psk => return refuse("TLS with a pre-shared key is not supported"),
            CredentialsKind::Anonymous => return refuse("TLS without credentials is not supported"),
        }
        let directory = &options.directory;
        let files = Files::read(directory, options.endpoint)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let side = match options.endpoint {
            Endpoint::Client => client(files, options.verify_peer, &provider),
            Endpoint::Server => server(files, options.verify_peer, &provider),
        };
        let side = side.map_err(|why| {
            let message = format!("the TLS certificates in {} are no use: {why}", directory.display());
            Error::new(ErrorKind::InvalidInput, message)
        })?;
        Ok(Self { directory: directory.as_path().into(), side })
    }

    /// Whose they are.
    pub fn endpoint(&self) -> Endpoint {
        match self.side {
            Side::Client { .. } => Endpoint::Client,
            Side::Server(_) => Endpoint::Server,
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
        let Side::Server(config) = &self.side else { return Err(self.not_for(Endpoint::Server)) };
        let accepted = TlsAcceptor::from(config.clone()).accept(stream).await;
        accepted.map(TlsStream::Server).map_err(|e| failure(e, "the client"))
    }

    /// Starts TLS with a server that is connected to. `name` is what the certificate must be for, a host name or an address: one of its
    /// alternative names, as the common name doesn't count. It is needed if the server is to be verified.
    ///
    /// # Errors
    /// `PermissionDenied` if the server isn't acceptable, or doesn't accept us; `InvalidInput` for a name that is none or missing; what
    /// the system says; see also [`TlsCredentials::check_endpoint`].
    pub async fn connect<S>(&self, stream: S, name: Option<&str>) -> Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Side::Client { config, verify_peer } = &self.side else {
            return Err(self.not_for(Endpoint::Client));
        };
        if *verify_peer && name.is_none() {
            let message =
                "the server's certificate can't be checked without a host name: give one (tls-hostname)";
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        // Nobody looks at this one.
        let name = name.unwrap_or("localhost").to_owned();
        let who = format!("the server {name:?}");
        let name = ServerName::try_from(name).map_err(|e| {
            Error::new(ErrorKind::InvalidInput, format!("{who}: its name is no use for TLS: {e}"))
        })?;
        let connected = TlsConnector::from(config.clone()).connect(name, stream).await;
        connected.map(TlsStream::Client).map_err(|e| failure(e, &who))
    }
}

fn failure(e: io::Error, with: &str) -> Error {
    if e.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) {
        return Error::new(ErrorKind::PermissionDenied, format!("no TLS with {with}: {e}"));
    }
    Error::from_io(e, format_args!("start TLS with {with}"))
}

/// What is wrong with the files.
type Why = Box<dyn std::error::Error>;

fn authorities(files: &Files) -> Result<Arc<RootCertStore>, Why> {
    let mut roots = RootCertStore::empty();
    for authority in &files.authorities {
        roots.add(authority.clone()).map_err(|e| format!("ca-cert.pem: {e}"))?;
    }
    Ok(Arc::new(roots))
}

fn client(files: Files, verify_peer: bool, provider: &Arc<CryptoProvider>) -> Result<Side, Why> {
    let roots = authorities(&files)?;
    let builder =
        ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let builder = if verify_peer {
        // What the list of revocations says nothing of is good.
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
            .with_crls(files.revoked)
            .allow_unknown_revocation_status()
            .build()?;
        builder.with_webpki_verifier(verifier)
    } else {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(Anyone(provider.clone())))
    };
    let config = match files.identity {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key)?,
        None => builder.with_no_client_auth(),
    };
    Ok(Side::Client { config: Arc::new(config), verify_peer })
}

fn server(files: Files, verify_peer: bool, provider: &Arc<CryptoProvider>) -> Result<Side, Why> {
    let roots = authorities(&files)?;
    let builder =
        ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let builder = if verify_peer {
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .with_crls(files.revoked)
            .allow_unknown_revocation_status()
            .build()?;
        builder.with_client_cert_verifier(verifier)
    } else {
        builder.with_no_client_auth()
    };
    let Some((chain, key)) = files.identity else { return Err("a server needs a certificate".into()) };
    let mut config = builder.with_single_cert(chain, key)?;
    // Connections are few and long; a session that is resumed would save nothing worth the state.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Side::Server(Arc::new(config)))
}
