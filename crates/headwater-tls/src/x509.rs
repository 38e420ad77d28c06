//! Sessions of those who know each other by certificates. TLS is rustls.

use crate::Endpoint;
use crate::files::Files;
use crate::verify::Anyone;
use headwater_block::{Error, ErrorKind, Result};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::ServerName;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::io;
use std::path::Path;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// Certificates that a client has, and what it demands of the server's.
#[derive(Clone)]
pub(crate) struct Client {
    config: Arc<ClientConfig>,
    verify_peer: bool,
}

impl Client {
    /// Reads the files.
    ///
    /// # Errors
    /// What the system says; `InvalidInput` if one isn't what it should be.
    pub(crate) fn load(directory: &Path, verify_peer: bool) -> Result<Self> {
        let files = Files::read(directory, Endpoint::Client)?;
        let config = client(files, verify_peer).map_err(|why| unusable(directory, &*why))?;
        Ok(Self { config: Arc::new(config), verify_peer })
    }

    /// See [`crate::TlsCredentials::connect`].
    pub(crate) async fn connect<S>(&self, stream: S, name: Option<&str>) -> Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        if self.verify_peer && name.is_none() {
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
        let connected = TlsConnector::from(self.config.clone()).connect(name, stream).await;
        connected.map(TlsStream::Client).map_err(|e| failure(e, &who))
    }
}

/// Certificates that a server has, and what it demands of a client's.
#[derive(Clone)]
pub(crate) struct Server(Arc<ServerConfig>);

impl Server {
    /// As [`Client::load`].
    pub(crate) fn load(directory: &Path, verify_peer: bool) -> Result<Self> {
        let files = Files::read(directory, Endpoint::Server)?;
        let config = server(files, verify_peer).map_err(|why| unusable(directory, &*why))?;
        Ok(Self(Arc::new(config)))
    }

    /// See [`crate::TlsCredentials::accept`].
    pub(crate) async fn accept<S>(&self, stream: S) -> Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let accepted = TlsAcceptor::from(self.0.clone()).accept(stream).await;
        accepted.map(TlsStream::Server).map_err(|e| failure(e, "the client"))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn unusable(directory: &Path, why: &dyn std::error::Error) -> Error {
    let message = format!("the TLS certificates in {} are no use: {why}", directory.display());
    Error::new(ErrorKind::InvalidInput, message)
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

fn client(files: Files, verify_peer: bool) -> Result<ClientConfig, Why> {
    let provider = provider();
    let roots = authorities(&files)?;
    let builder =
        ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let builder = if verify_peer {
        // What the list of revocations says nothing of is good.
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider)
            .with_crls(files.revoked)
            .allow_unknown_revocation_status()
            .build()?;
        builder.with_webpki_verifier(verifier)
    } else {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(Anyone(provider)))
    };
    let config = match files.identity {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key)?,
        None => builder.with_no_client_auth(),
    };
    Ok(config)
}

fn server(files: Files, verify_peer: bool) -> Result<ServerConfig, Why> {
    let provider = provider();
    let roots = authorities(&files)?;
    let builder =
        ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let builder = if verify_peer {
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
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
    Ok(config)
}
