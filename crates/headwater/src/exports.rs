//! The addresses at which a disk is served.

use crate::failure::Outcome;
use headwater_block::Disk;
use headwater_export::nbd::{Export, NbdServer};
use headwater_nbd::NbdUri;
use std::rc::Rc;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Servers that run until they are told to stop.
#[derive(Default)]
pub struct Exports {
    servers: Vec<Server>,
    uris: Vec<NbdUri>,
}

struct Server {
    stop: oneshot::Sender<()>,
    task: JoinHandle<headwater_block::Result<()>>,
}

impl Exports {
    /// Serves `disk` at each of `uris`, from now on: clients can connect when this returns. URIs of one address that differ in the
    /// name only share a server. Must be called inside a `LocalSet`.
    ///
    /// # Errors
    /// If an address can't be had; then none is served.
    pub fn start(uris: &[NbdUri], disk: &Rc<Disk>, writable: bool) -> Outcome<Self> {
        let mut addresses = Vec::new();
        for uri in uris {
            if !addresses.contains(&&uri.address) {
                addresses.push(&uri.address);
            }
        }
        let mut bound = Vec::new();
        let mut served = Vec::new();
        for address in addresses {
            let names = uris.iter().filter(|uri| uri.address == *address).map(|uri| uri.export.clone());
            let names: Vec<String> = names.collect();
            let exports = names.iter().map(|name| Export {
                name: name.clone(),
                description: format!("headwater: {}", disk.name()),
                disk: disk.clone(),
                writable,
            });
            let server = NbdServer::bind(address, exports.collect())?;
            let address = server.address()?;
            served.extend(names.into_iter().map(|export| NbdUri { address: address.clone(), export }));
            bound.push(server);
        }
        let servers = bound.into_iter().map(|server| {
            let (stop, stopped) = oneshot::channel();
            let task = tokio::task::spawn_local(server.run(async move {
                // A sender that is gone means the same.
                let _ = stopped.await;
            }));
            Server { stop, task }
        });
        Ok(Self { servers: servers.collect(), uris: served })
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
        let (stops, tasks): (Vec<_>, Vec<_>) = self.servers.into_iter().map(|s| (s.stop, s.task)).unzip();
        drop(stops);
        for task in tasks {
            match task.await {
                Ok(Ok(())) => {}
                Ok(Err(err)) => tracing::warn!("an NBD server failed: {err}"),
                Err(err) => tracing::error!("an NBD server failed: {err}"),
            }
        }
    }
}
