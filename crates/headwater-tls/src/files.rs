//! The directory of certificates: which files there are, and what is in them.

use crate::Endpoint;
use headwater_block::{Error, ErrorKind, Result};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use std::fs;
use std::io;
use std::path::Path;

/// The authorities that the other side's certificate must come from.
const CA_CERT: &str = "ca-cert.pem";
/// What they have revoked; may be missing.
const CA_CRL: &str = "ca-crl.pem";

/// What is in a directory for one of the two sides.
pub(crate) struct Files {
    pub(crate) authorities: Vec<CertificateDer<'static>>,
    pub(crate) revoked: Vec<CertificateRevocationListDer<'static>>,
    /// The certificate with those between it and an authority, and its key. A client may have none.
    pub(crate) identity: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
}

impl Files {
    /// Reads what `endpoint` needs.
    pub(crate) fn read(directory: &Path, endpoint: Endpoint) -> Result<Self> {
        let (cert, key) = match endpoint {
            Endpoint::Server => ("server-cert.pem", "server-key.pem"),
            Endpoint::Client => ("client-cert.pem", "client-key.pem"),
        };
        let (cert, key) = (directory.join(cert), directory.join(key));
        let there = |path: &Path| path.try_exists().unwrap_or(true);
        let identity = if endpoint == Endpoint::Client && !there(&cert) && !there(&key) {
            None
        } else {
            Some((all(&cert)?, PrivateKeyDer::from_pem_slice(&bytes(&key)?).map_err(|e| unusable(&key, &e))?))
        };
        let revoked = directory.join(CA_CRL);
        Ok(Self {
            authorities: all(&directory.join(CA_CERT))?,
            revoked: if there(&revoked) { all(&revoked)? } else { Vec::new() },
            identity,
        })
    }
}

fn bytes(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e: io::Error| Error::from_io(e, format_args!("read {}", path.display())))
}

/// All objects of a kind in a file; at least one.
fn all<T: PemObject>(path: &Path) -> Result<Vec<T>> {
    let found: Result<Vec<T>, pem::Error> = T::pem_slice_iter(&bytes(path)?).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(unusable(path, &pem::Error::NoItemsFound)),
        Err(e) => Err(unusable(path, &e)),
    }
}

fn unusable(path: &Path, e: &pem::Error) -> Error {
    let message = format!(
        "{} is no use for TLS: {e}; what is expected is PEM, and keys without a password",
        path.display()
    );
    Error::new(ErrorKind::InvalidInput, message)
}
