//! The addresses at which a disk is served.

use crate::failure::Outcome;
use futures_util::future::join_all;
use headwater_block::{Disk, Edge};
use headwater_export::nbd::{Export, NbdServer, ServerOptions};
use headwater_nbd::{NbdUri, UriTls};
use headwater_tls::{CredentialsKind, Endpoint, TlsCredentials, TlsOptions};
use std::rc::Rc;

/// Servers that run until they are told to stop.
#[derive(Default)]
pub struct Exports {
    servers: Vec<NbdServer>,
    uris: Vec<NbdUri>,
}

impl Exports {
    /// Serves `disk` at each of `uris`, from now on: clients can connect when this returns. URIs of one address that differ in the
    /// name only share a server. Must be called inside a `LocalSet`.
    ///
    /// # Errors
    /// If an address can't be had, or is given twice with the same name; then none is served.
    pub fn start(uris: &[NbdUri], disk: &Rc<Disk>, writable: bool) -> Outcome<Self> {
        let mut places = Vec::new();
        for uri in uris {
            if !places.contains(&(&uri.address, &uri.tls)) {
                places.push((&uri.address, &uri.tls));
            }
        }
        let edge = Edge::new(disk.clone());
        let mut exports = Self::default();
        for (address, tls) in places {
            let options = ServerOptions {
                empty_name_is_only_export: true,
                tls: tls.as_ref().map(credentials).transpose()?,
                ..ServerOptions::default()
            };
            let server = NbdServer::start(address.into(), options)?;
            let bound = server.address().unwrap_or(address).clone();
            for uri in uris.iter().filter(|uri| (&uri.address, &uri.tls) == (address, tls)) {
                server.add(Export {
                    name: uri.export.clone(),
                    description: format!("headwater: {}", disk.name()),
                    edge: edge.clone(),
                    writable,
                    allocation_depth: true,
                })?;
                exports.uris.push(NbdUri { address: bound.clone(), ..uri.clone() });
            }
            exports.servers.push(server);
        }
        Ok(exports)
    }

    /// Where the disk is served, with the ports that the system chose where 0 was asked for.
    pub fn uris(&self) -> &[NbdUri] {
        &self.uris
    }

    /// True if nobody is served.
    pub fn is_empty(&self) -> bool {
        self.servers.is_empty()
    }

    /// Takes no more clients, finishes the requests that were received, and closes the connections.
    pub async fn stop(self) {
        join_all(self.servers.into_iter().map(NbdServer::stop)).await;
    }
}

/// What a server proves itself with where a URI wants TLS.
fn credentials(tls: &UriTls) -> headwater_block::Result<TlsCredentials> {
    TlsCredentials::load(&TlsOptions {
        kind: CredentialsKind::X509,
        endpoint: Endpoint::Server,
        directory: tls.certificates.clone(),
        verify_peer: tls.verify_peer,
    })
}
